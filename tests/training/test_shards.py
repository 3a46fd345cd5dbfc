"""WebDataset's tars: what belongs together is found together, pictures are read in place, faults have names."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdcli.errors import InputError
from sdcli.training import data, layouts
from sdcli.training.known import content_hash
from sdcli.training.samples import Fault
from tests.tars import packed

PNG = b"the bytes of a picture, which nothing here decodes"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for tars, beside which nothing may appear."""
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def write(root: Path, contents: dict[str, bytes], name: str = "a.tar") -> Path:
    (root / name).write_bytes(packed(contents))
    return root / name


def said(root: Path) -> dict[str, tuple[str, ...]]:
    found = layouts.read(root)
    assert found.faults == []
    return {sample.name(root): sample.captions for sample in found.samples}


def faults(root: Path) -> dict[str, str]:
    return {Path(fault.path).relative_to(root).as_posix(): fault.problem for fault in layouts.read(root).faults}


def only_fault(root: Path) -> Fault:
    (fault,) = layouts.read(root).faults
    return fault


# What belongs together


def test_a_caption_is_text_a_caption_file_or_json_in_this_order(root: Path) -> None:
    contents = {
        "a.png": PNG,
        "a.json": b"not even read: the text counts",
        "a.txt": b"\xef\xbb\xbfa  picture\r\n",
        "b.webp": PNG,
        "b.json": b'{"caption": "by caption"}',
        "c.jpg": PNG,
        "c.json": b'{"text": ["one", "two"], "caption": "no"}',
        "d.JPEG": PNG,
        "d.caption": b"in a file",
        "e.png": PNG,
        "e.json": b'{"url": "somewhere"}',
    }
    write(root, contents)
    assert said(root) == {
        "a.tar/a.png": ("a picture",),
        "a.tar/b.webp": ("by caption",),
        "a.tar/c.jpg": ("one", "two"),
        "a.tar/d.JPEG": ("in a file",),
        "a.tar/e.png": (),
    }


def test_a_key_ends_at_the_first_dot_of_the_name_and_holds_its_folder(root: Path) -> None:
    contents = {
        "./v1.5/a.png": PNG,
        "v1.5/a.seg.png": PNG,
        "v1.5/a.txt": b"first",
        "b/a.txt": b"second, before its picture",
        "b/a.png": PNG,
        "b/a.npy": b"whatever else is there",
        "b/._a.png": b"of a Macintosh",
        "README": b"no dot",
    }
    write(root, contents)
    assert said(root) == {"a.tar/v1.5/a.png": ("first",), "a.tar/b/a.png": ("second, before its picture",)}


def test_tars_are_read_by_name_and_each_in_its_own_order(root: Path) -> None:
    write(root, {"2.png": PNG, "1.png": PNG}, "b.tar")
    write(root, {"3.png": PNG}, "a.TAR")
    assert layouts.read(root).name == "tars"
    assert list(said(root)) == ["a.TAR/3.png", "b.tar/2.png", "b.tar/1.png"]


def test_folders_in_a_tar_are_no_fault(root: Path) -> None:
    with tarfile.open(root / "a.tar", "w") as archive:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        picture = tarfile.TarInfo("./a.png")
        archive.addfile(picture, io.BytesIO(b""))
    assert said(root) == {"a.tar/a.png": ()}


def test_a_class_is_its_cls_file_and_numbers_are_in_the_order_of_numbers(root: Path) -> None:
    write(root, {f"{i}.{end}": what for i in (10, 9, 100) for end, what in (("png", PNG), ("cls", b"%d\n" % i))})
    dataset = data.find(root)
    assert dataset.classes == ("9", "10", "100")
    assert [(sample.label, sample.captions) for sample in dataset.samples] == [(n, (n,)) for n in ("10", "9", "100")]


def test_where_pictures_have_captions_a_class_is_none(root: Path) -> None:
    write(root, {"a.png": PNG, "a.cls": b"cat", "a.txt": b"a cat", "b.png": PNG, "b.cls": b"dog"})
    assert [(sample.label, sample.captions) for sample in data.find(root).samples] == [("cat", ("a cat",)), ("dog", ())]


def test_nothing_is_unpacked(root: Path) -> None:
    tar = write(root, {"a.png": PNG, "a.txt": b"a picture"})
    before = tar.read_bytes()
    (sample,) = data.find(root).samples
    with sample.open() as stream:
        assert stream.read() == PNG
    assert [path.name for path in root.parent.rglob("*")] == ["root", "a.tar"]
    assert tar.read_bytes() == before


# A picture in a tar is that picture


@pytest.fixture
def drawn(root: Path) -> Iterator[Path]:
    """A folder of pictures in every format, and beside it the same in a tar."""
    folder = root.parent / "files"
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp", "bmp", "gif"):
        noise.save(folder / f"{suffix}.{suffix}")
    noise.save(folder / "lzw.tif", compression="tiff_lzw")  # its decoder would rather have a file of its own
    write(root, {path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    return folder


def test_a_picture_of_every_format_is_read_out_of_a_tar_as_out_of_its_file(drawn: Path, root: Path) -> None:
    files, members = data.find(drawn).samples, data.find(root).samples
    assert len(files) == len(members) == 6
    for file, member in zip(files, members, strict=True):
        assert f"a.tar/{file.name(drawn)}" == member.name(root)
        assert data.load_image(file).tobytes() == data.load_image(member).tobytes()
        assert content_hash(file) == content_hash(member)


def test_a_picture_cut_short_in_a_tar_is_named_with_its_tar(drawn: Path, root: Path) -> None:
    whole = (drawn / "png.png").read_bytes()
    write(root, {"a.png": whole[:512], "b.png": whole})
    with pytest.raises(InputError, match=r"1 pictures cannot be read: .*/a\.tar/a\.png: cannot be decoded"):
        list(data.check(data.find(root)))


# Faults


def test_members_that_are_no_plain_files_are_faults_by_name(root: Path) -> None:
    kinds = {
        "hard.png": (tarfile.LNKTYPE, "is a hard link"),
        "soft.png": (tarfile.SYMTYPE, "is a link"),
        "pipe.png": (tarfile.FIFOTYPE, "is a pipe"),
        "device.png": (tarfile.CHRTYPE, "is a device"),
    }
    with tarfile.open(root / "a.tar", "w") as archive:
        for name, (kind, _) in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert faults(root) == {f"a.tar/{name}": problem for name, (_, problem) in kinds.items()}
    assert layouts.read(root).samples == []


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "b/../../a.png"])
def test_names_that_lead_outside_are_faults(root: Path, name: str) -> None:
    tar = write(root, {name: PNG, "good.png": PNG})
    assert only_fault(root).path == f"{tar}/{name}"
    assert only_fault(root).problem == "leads outside the tar"
    assert [sample.name(root) for sample in layouts.read(root).samples] == ["a.tar/good.png"]


@pytest.mark.parametrize(
    ("contents", "kind", "path", "words"),
    [
        ({"a.png": PNG, "a.txt": b"caf\xe9"}, "encoding", "a.txt", "is not UTF-8"),
        ({"a.png": PNG, "a.txt": b"a" * (1 << 20) + b"a"}, "caption", "a.txt", "has 1,048,577 bytes"),
        ({"a.png": PNG, "a.json": b"{"}, "caption", "a.json", "expecting property name"),
        ({"a.png": PNG, "a.json": b"[" * 100_000}, "caption", "a.json", "recursion"),
        ({"a.png": PNG, "a.json": b"[1]"}, "caption", "a.json", "says [1], no object"),
        ({"a.png": PNG, "a.json": b'{"text": 7}'}, "caption", "a.json", "text is 7"),
        ({"a.png": PNG, "a.cls": b"a\nb"}, "caption", "a.cls", "names the class"),
        ({"a.png": PNG, "a.cls": b""}, "caption", "a.cls", "names the class"),
        ({"a.png": PNG, "a.jpg": PNG}, "tar", "a.jpg", "has the name of a.png"),
        ({"a.png": PNG, "./a.png": PNG}, "tar", "./a.png", "is there twice"),
        ({"a.txt": b"a cat"}, "no picture", "a.txt", "has no picture beside it"),
        ({"a.2.png": PNG, "a.2.txt": b"a cat"}, "no picture", "a.2.png", "has no picture beside it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_is_a_fault(
    root: Path, contents: dict[str, bytes], kind: str, path: str, words: str
) -> None:
    tar = write(root, {"good.png": PNG, **contents})
    fault = only_fault(root)
    assert (fault.kind, fault.path) == (kind, f"{tar}/{path}")
    assert words in fault.problem
    assert "--fix changes no tar" in fault.hint and not fault.is_mendable


def test_a_damaged_tar_is_a_fault_and_what_comes_before_is_looked_at(root: Path) -> None:
    tar = write(root, {"a.png": PNG, "b.png": PNG})
    tar.write_bytes(tar.read_bytes()[:1300])
    (root / "empty.tar").write_bytes(b"")
    write(root, {}, "nothing.tar")
    assert faults(root) == {
        "a.tar": "is cut short: it has no end mark",
        "empty.tar": "is cut short: it has no end mark",
        "nothing.tar": "holds no picture",
    }
    assert [sample.name(root) for sample in layouts.read(root).samples] == ["a.tar/a.png"]


def test_compressed_tars_are_faults_that_tell_to_unpack_them(root: Path) -> None:
    for name in ("a.tar.gz", "b.tgz", "c.tar.zst"):
        (root / name).write_bytes(b"whatever")
    (root / "d.tar").write_bytes(b"\x1f\x8b" + bytes(1000))  # gzip under the name of a tar
    found = layouts.read(root)
    assert [Path(fault.path).name for fault in found.faults] == ["d.tar", "a.tar.gz", "b.tgz", "c.tar.zst"]
    assert all("is compressed" in fault.problem and "unpack" in fault.hint for fault in found.faults)


def test_a_compressed_tar_beside_what_was_unpacked_from_it_is_no_fault(root: Path) -> None:
    write(root, {"a.png": PNG})
    (root / "a.tar.gz").write_bytes(b"whatever")
    assert list(said(root)) == ["a.tar/a.png"]


def test_a_tar_that_is_no_file_is_a_fault(root: Path) -> None:
    (root / "a.tar").symlink_to("nowhere.tar")
    assert faults(root) == {"a.tar": "no such file or directory"}


def test_json_of_a_record_is_read_as_utf_8_with_a_byte_order_mark(root: Path) -> None:
    write(root, {"a.png": PNG, "a.json": b"\xef\xbb\xbf" + json.dumps({"text": "a  cat"}).encode()})
    assert said(root) == {"a.tar/a.png": ("a  cat",)}
