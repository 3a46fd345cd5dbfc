"""Opening inputs and putting outputs in place."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sdcli import files
from sdcli.errors import InputError, OutputError, ResourceError
from sdcli.files import (
    atomic_folder,
    atomic_write,
    check_writable,
    open_regular,
    open_slice,
    output_error,
    place,
    read_bytes,
    remove_dead_parts,
)

OLD = time.time() - 2 * files.PART_GRACE_SECONDS


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def dead_pid() -> int:
    """The number of a process that has ended and been buried."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


# open_regular


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", max_bytes=5) == b"12345"


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert read_bytes(tmp_path / "link", max_bytes=5, within=tmp_path) == b"12345"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a: no such file or directory"):
        open_regular(tmp_path / "a")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        open_regular(tmp_path)


def test_a_fifo_that_nobody_writes_to_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no regular file"):
        open_regular(tmp_path / "pipe")


def test_a_device_is_refused() -> None:
    with pytest.raises(InputError, match="is no regular file"):
        open_regular(Path("/dev/zero"))


@pytest.mark.skipif(sys.platform != "linux", reason="where /proc has files that are none")
@pytest.mark.parametrize("place", ["/proc/self/mem", "/proc/self/pagemap", "/proc/self/cmdline"])
def test_a_file_that_is_longer_than_it_says_or_fails_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(place)
    with pytest.raises(InputError, match=r"link: (has more bytes than it says|input/output error|invalid argument)"):
        open_regular(tmp_path / "link")


def test_a_file_above_the_size_cap_is_refused_with_both_figures(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(2001))
    with pytest.raises(InputError, match=r"has 2,001 bytes; at most 2,000"):
        open_regular(tmp_path / "a", max_bytes=2000)


def test_a_link_leading_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").symlink_to("../secret")
    with pytest.raises(InputError, match="leads outside"):
        open_regular(tmp_path / "model" / "weights", within=tmp_path / "model")


def test_a_folder_link_leading_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights").write_bytes(b"secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vae").symlink_to("../elsewhere")
    with pytest.raises(InputError, match="leads outside"):
        open_regular(tmp_path / "model" / "vae" / "weights", within=tmp_path / "model")


@pytest.mark.parametrize("within", [None, Path()], ids=["anywhere", "within"])
def test_a_name_with_a_null_byte_is_refused(within: Path | None) -> None:
    with pytest.raises(InputError, match="null byte"):
        open_regular(Path("a\0b"), within=within)


@pytest.mark.parametrize("is_bound", [False, True], ids=["anywhere", "within"])
def test_a_link_to_itself_is_refused(is_bound: bool, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop"):
        open_regular(tmp_path / "loop", within=tmp_path if is_bound else None)


def test_a_refused_input_leaves_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    before = len(list(Path("/dev/fd").iterdir()))
    for path in (tmp_path, tmp_path / "a", tmp_path / "missing"):
        with pytest.raises(InputError):
            open_regular(path, max_bytes=5)
    assert len(list(Path("/dev/fd").iterdir())) == before


# open_slice


@pytest.mark.parametrize(("offset", "size"), [(0, 100), (10, 50), (90, 10), (95, 10), (100, 5), (10, 0)])
def test_a_slice_reads_and_seeks_as_a_file_of_these_bytes_does(tmp_path: Path, offset: int, size: int) -> None:
    content = bytes(range(100))
    (tmp_path / "whole").write_bytes(content)
    (tmp_path / "part").write_bytes(content[offset : offset + size])
    with open_slice(tmp_path / "whole", offset, size) as part, (tmp_path / "part").open("rb") as file:
        for count in (7, 3, -1, 1):
            assert (part.read(count), part.tell()) == (file.read(count), file.tell())
        for place in (5, 0, 200):
            assert (part.seek(place), part.read(9)) == (file.seek(place), file.read(9))
        assert part.seek(-place, os.SEEK_CUR) == file.seek(-place, os.SEEK_CUR)
        assert part.seek(0, os.SEEK_END) == size


def test_a_slice_has_no_descriptor_that_would_lead_past_its_end(tmp_path: Path) -> None:
    """Pillow's TIFF decoder reads by the descriptor where there is one."""
    (tmp_path / "a").write_bytes(b"12345")
    with open_slice(tmp_path / "a", 1, 2) as part, pytest.raises(OSError, match="fileno"):
        part.fileno()


def test_a_closed_slice_leaves_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    before = open_files()
    parts = [open_slice(tmp_path / "a", 1, 2) for _ in range(5)]
    assert open_files() == before + 5
    for part in parts:
        part.close()
    assert open_files() == before


def test_a_slice_cannot_be_sought_before_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with open_slice(tmp_path / "a", 3, 2) as part, pytest.raises(ValueError, match="cannot seek to byte -1"):
        part.seek(-1)


def test_a_slice_of_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        open_slice(tmp_path, 0, 1)


# atomic_write


def test_the_target_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with atomic_write(target) as part:
        part.write_text("whole", encoding="utf-8")
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "whole"
    assert names(tmp_path) == ["a.txt"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old", encoding="utf-8")
    with atomic_write(target) as part:
        part.write_text("new, ha", encoding="utf-8")
        assert target.read_text(encoding="utf-8") == "old"
    assert target.read_text(encoding="utf-8") == "new, ha"


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, problem: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old", encoding="utf-8")

    def fail_half_way() -> None:
        with atomic_write(target) as part:
            part.write_text("ha", encoding="utf-8")
            raise problem

    with pytest.raises(problem):
        fail_half_way()
    assert target.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_an_output_error_that_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="free some space"), atomic_write(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such file"), atomic_write(tmp_path / "none" / "a"):
        pass


def test_a_file_in_place_of_the_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a directory"), atomic_write(tmp_path / "file" / "a"):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask_even_if_a_library_renames_a_private_file_over_the_part(
    tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a") as part:
            private = tmp_path / "private"
            private.touch(mode=0o600)
            private.rename(part)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_without_overwrite_an_existing_file_stays(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(FileExistsError), atomic_write(target, overwrite=False) as part:
        part.write_bytes(b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_without_overwrite_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "a"

    def write_while_another_does() -> None:
        with atomic_write(target, overwrite=False) as part:
            part.write_bytes(b"new")
            target.write_bytes(b"another's")

    with pytest.raises(FileExistsError):
        write_while_another_does()
    assert target.read_bytes() == b"another's"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["a" * 255, "狗" * 85], ids=["ascii", "utf-8"])
def test_a_name_of_255_bytes_can_be_written(tmp_path: Path, name: str) -> None:
    with atomic_write(tmp_path / name) as part:
        assert files.PART_NAME.fullmatch(part.name)
    assert names(tmp_path) == [name]


# place


def test_place_numbers_a_name_that_is_taken(tmp_path: Path) -> None:
    placed = [place(bytes([i]), tmp_path / "puppy.png", "number") for i in range(3)]
    assert [path.name for path in placed] == ["puppy.png", "puppy-2.png", "puppy-3.png"]
    assert [path.read_bytes() for path in placed] == [b"\0", b"\1", b"\2"]


@pytest.mark.parametrize(
    ("name", "ending", "second"),
    [
        ("photo.latents.safetensors", ".latents.safetensors", "photo-2.latents.safetensors"),
        ("v1.5-puppy.png", "", "v1.5-puppy-2.png"),
        ("puppy", "", "puppy-2"),
    ],
)
def test_place_numbers_before_the_ending(tmp_path: Path, name: str, ending: str, second: str) -> None:
    placed = [place(b"", tmp_path / name, "number", ending=ending) for _ in range(2)]
    assert placed[1].name == second


def test_place_overwrites_when_asked(tmp_path: Path) -> None:
    place(b"old", tmp_path / "a", "overwrite")
    assert place(b"new", tmp_path / "a", "overwrite").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_place_refuses_a_taken_name_when_told_to(tmp_path: Path) -> None:
    place(b"old", tmp_path / "a", "error")
    with pytest.raises(OutputError, match="a: exists"):
        place(b"new", tmp_path / "a", "error")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_place_makes_the_folder(tmp_path: Path) -> None:
    assert place(b"1", tmp_path / "out" / "deep" / "a", "number").read_bytes() == b"1"


# remove_dead_parts


def test_only_old_parts_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = dead_pid()
    old_and_dead = f".a.png.{dead}-0123abcd.part"
    kept = [
        f".a.png.{os.getpid()}-0123abcd.part",  # alive
        f".a.png.{dead}-xyz.part",  # not our naming
        ".notes.part",
        "a.part",
        "a.png",
    ]
    for name in (old_and_dead, *kept):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (OLD, OLD))
    nobodys = f".c.png.{10**20}-0123abcd.part"
    (tmp_path / nobodys).touch()
    os.utime(tmp_path / nobodys, (OLD, OLD))
    young = f".b.png.{dead}-0123abcd.part"  # perhaps of a living process of another container
    (tmp_path / young).touch()
    remove_dead_parts(tmp_path)
    assert names(tmp_path) == sorted([*kept, young])


def test_what_is_to_be_private_is_never_readable_by_others_in_between(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for mode in (0o600, 0o644, 0o400):
            with atomic_write(tmp_path / "x", mode=mode) as part:
                assert stat.S_IMODE(part.stat().st_mode) == 0o600
                part.write_bytes(b"secret")
            assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode
    finally:
        os.umask(before)


# atomic_folder


def spoil(target: Path) -> None:
    with atomic_folder(target) as part:
        (part / "a").touch()
        raise InputError("bad")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new" / "model") as part:
        (part / "unet").mkdir()
        (part / "unet" / "a").write_text("x", encoding="utf-8")
        assert names(tmp_path / "new") == [part.name]
    assert names(tmp_path / "new") == ["model"]
    assert (tmp_path / "new" / "model" / "unet" / "a").read_text(encoding="utf-8") == "x"
    with pytest.raises(InputError, match="bad"):
        spoil(tmp_path / "new" / "other")
    assert names(tmp_path / "new") == ["model"]


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_folder_takes_no_place_that_is_taken(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model")
    with pytest.raises(OutputError, match="model: exists"), atomic_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == ["model"]


def test_the_folder_of_a_process_that_was_killed_is_removed_by_the_next(tmp_path: Path) -> None:
    dead = tmp_path / f".model.{2**22 + 1}-0123abcd.part"
    (dead / "unet").mkdir(parents=True)
    os.utime(dead, (1, 1))
    with atomic_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == ["model"]


# check_writable, output_error


def test_a_folder_that_can_be_made_is_writable_and_is_not_made_yet(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep")
    assert names(tmp_path) == []


def test_a_file_in_the_way_of_the_output_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is a file"):
        check_writable(tmp_path / "file" / "new")


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_a_folder_that_takes_no_file_whatever_its_mode_says_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="/proc: cannot be written"):
        check_writable(Path("/proc"))
    check_writable(tmp_path)
    assert names(tmp_path) == []


def test_running_out_of_descriptors_is_a_matter_of_resources() -> None:
    assert isinstance(output_error(Path("a"), OSError(errno.EMFILE, "Too many open files")), ResourceError)
    assert isinstance(output_error(Path("a"), OSError(errno.EROFS, "Read-only file system")), OutputError)
