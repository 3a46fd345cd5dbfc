"""Members of a tar by its headers: the same as tarfile finds in every dialect, and nothing out of a damaged one."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from sdcli.training import tar
from sdcli.training.tar import FILE, FOLDER, Damaged, Member
from tests.tars import packed

NAMES = ("a.png", "b/a.txt", "e\u0301t\u00e9/\u72ac.png", "n" * 100, "d/" * 60 + "long.png", "x" * 99 + "/" + "y" * 150)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def header(name: bytes, letter: bytes, size: bytes, fields: dict[int, bytes] | None = None) -> bytes:
    """A header put together by hand (POSIX ustar), its checksum right."""
    block = bytearray(512)
    for offset, field in {
        0: name,
        124: size,
        156: letter,
        257: b"ustar\x0000",
        148: b" " * 8,
        **(fields or {}),
    }.items():
        block[offset : offset + len(field)] = field
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def found(data: bytes) -> list[Member]:
    return list(tar.members(io.BytesIO(data)))


# As tarfile finds them


@pytest.mark.parametrize("form", FORMATS)
def test_names_places_and_sizes_are_those_that_tarfile_finds(form: str) -> None:
    names = NAMES if form != "ustar" else NAMES[:-1]  # ustar has no room for the last
    data = packed({name: name.encode() * (3**i) for i, name in enumerate(names)}, FORMATS[form])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [Member(m.name, FILE, m.offset_data, m.size) for m in archive]
    assert found(data) == expected
    assert [member.name for member in expected] == list(names)
    for i, member in enumerate(found(data)):
        assert data[member.offset : member.offset + member.size] == names[i].encode() * (3**i)


def test_a_comment_for_all_members_is_passed_over() -> None:
    data = packed({"a.txt": b"12345"}, comment="as git archive writes it")
    assert data[156:157] == b"g"
    (member,) = found(data)
    assert member[:2] == ("a.txt", FILE) and data[member.offset :][: member.size] == b"12345"


def test_a_file_of_nine_gigabytes_is_passed_over_unread(tmp_path: Path) -> None:
    size, path = 9 << 30, tmp_path / "large.tar"
    with path.open("wb") as stream:  # a hole: no byte of it is on the disk
        stream.write(header(b"large.npy", b"0", b"\x80" + size.to_bytes(11, "big")))
        stream.seek(size, os.SEEK_CUR)
        stream.write(packed({"a.png": b"123"}))
    with path.open("rb") as stream:
        assert list(tar.members(stream)) == [
            Member("large.npy", FILE, 512, size),
            Member("a.png", FILE, 512 + size + 512, 3),
        ]


def test_memory_does_not_grow_with_the_members() -> None:
    def peak(count: int) -> int:
        stream = io.BytesIO(b"".join(header(b"%d.png" % i, b"0", octal(0)) for i in range(count)) + bytes(1024))
        tracemalloc.start()
        try:
            assert sum(1 for _ in tar.members(stream)) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    assert peak(5000) < peak(50) + 10_000  # bytes; tarfile's grows by 450 a member


def test_folders_links_devices_and_pipes_are_told_apart_and_hold_no_bytes() -> None:
    letters = {b"5": FOLDER, b"1": "a hard link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
    data = b"".join(header(b"m" + letter, letter, octal(700)) for letter in letters) + packed({"a.png": b"123"})
    assert [(m.kind, m.size) for m in found(data)] == [*((kind, 0) for kind in letters.values()), (FILE, 3)]


def test_a_name_that_ends_in_a_slash_is_a_folder_where_the_header_has_no_letter() -> None:
    data = header(b"a/", b"\0", octal(0)) + header(b"a/b", b"\0", octal(0)) + bytes(1024)
    assert [(m.name, m.kind) for m in found(data)] == [("a/", FOLDER), ("a/b", FILE)]


def test_sparse_files_are_told_and_passed_over_in_gnus_old_form_and_in_that_of_pax() -> None:
    maps = [b"\1".rjust(505, b"\0") + bytes(7), bytes(512)]  # byte 504: one more follows
    old = header(b"old.png", b"S", octal(10), {257: b"ustar  \0", 482: b"\1"}) + b"".join(maps) + bytes(512)
    record = b"22 GNU.sparse.major=1\n"
    new = header(b"x", b"x", octal(len(record))) + record.ljust(512, b"\0") + header(b"new.png", b"0", octal(0))
    data = old + new + packed({"a.png": b"123"})
    assert [(m.name, m.kind) for m in found(data)] == [("old.png", "sparse"), ("new.png", "sparse"), ("a.png", FILE)]


def test_a_kind_that_nobody_knows_is_told_by_its_letter() -> None:
    data = header(b"volume", b"V", octal(0)) + bytes(1024)
    assert found(data)[0].kind == "of the unknown kind 'V'"


# Damage


def test_a_tar_cut_anywhere_is_damaged_and_gives_only_members_that_are_whole() -> None:
    data = packed({f"{i}.png": bytes([i]) * 600 * i for i in range(4)})
    whole = found(data)
    for length in range(0, whole[-1].offset + whole[-1].size + 512, 128):
        members, given = tar.members(io.BytesIO(data[:length])), []
        with pytest.raises(Damaged, match="is cut short"):
            given += members
        assert given == whole[: len(given)]


def test_every_flipped_byte_of_a_header_is_noticed() -> None:
    data = packed({"a.png": b"123", "b.png": b"456"})
    second = found(data)[1].offset - 512
    for place in range(512):
        spoilt = bytearray(data)
        spoilt[second + place] ^= 0x15
        with pytest.raises(Damaged, match=f"is damaged at byte {second:,}"):
            found(bytes(spoilt))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no tar" * 200, "is no tar"),
        (b"\x1f\x8b" + bytes(600), "is compressed"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "is compressed"),
        (header(b"a.png", b"0", b"\xff" * 11 + b"\xfe"), "has a header with the number"),  # -2 in GNU's binary form
        (header(b"a.png", b"0", b"-0000000512\0"), "has a header with the number"),
        (header(b"a.png", b"0", b"\x80" + b"\xff" * 11), r"is cut short in a\.png"),
        (header(b"x", b"x", octal(1 << 30)), "has an extended header of 1,073,741,824 bytes"),
        (header(b"x", b"L", octal(1 << 21)), "has an extended header of 2,097,152 bytes"),
        (header(b"x", b"x", octal(12)) + b"99 path=a.b\n".ljust(512, b"\0"), "has a damaged pax header"),
        (header(b"x", b"x", octal(12)) + b"3 path=a.b\n\n".ljust(512, b"\0"), "has a damaged pax header"),
        (
            header(b"x", b"x", octal(11)) + b"11 size=-5\n".ljust(512, b"\0") + packed({"a.png": b"1"}),
            "with the size b'-5'",
        ),
        (header(b"x", b"g", octal(11)) + b"11 path=ab\n".ljust(512, b"\0"), "has one name or size for all members"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_sense_is_damaged(data: bytes, words: str) -> None:
    with pytest.raises(Damaged, match=words):
        found(data + bytes(1024))
