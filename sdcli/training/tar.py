"""The members of a tar by its headers alone: their names, their kinds, where their bytes lie. Nothing is unpacked.

Not the standard library's tarfile, which keeps all members in memory, reads an extended header of any length into it
and takes a tar that was cut between two members for a whole one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512  # bytes; what a tar is made of
MAX_EXTENDED_BYTES = 1 << 20  # of a header that says more of the next member: a long name, pax records
FILE, FOLDER, SPARSE = "a file", "a folder", "sparse"
# The letters of POSIX.1-2024 pax, "ustar Interchange Format", and GNU's S.
KINDS = {
    b"0": FILE,
    b"\0": FILE,
    b"1": "a hard link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"5": FOLDER,
    b"6": "a pipe",
    b"7": FILE,  # promised to lie in one piece
    b"S": SPARSE,
}
WITHOUT_BYTES = (b"1", b"2", b"3", b"4", b"5", b"6")  # whatever size their headers give
EXTENDED = (b"x", b"X", b"g", b"L", b"K")  # pax, Solaris' pax, pax for all members, GNU's long name and long link
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # the first bytes of gzip, bzip2, xz, zstd
RECORD = re.compile(rb"(?P<length>\d{1,7}) (?P<key>[^=]+)=")


class Damaged(ValueError):
    """What is wrong with a tar that cannot be read to its end, in words that go after its name."""


class Compressed(Damaged):
    """A file called a tar that has one inside, compressed."""


class Member(NamedTuple):
    """One member: its name and kind, the place of its first byte in the tar, how many bytes it has."""

    name: str
    kind: str
    offset: int
    size: int


def members(stream: BinaryIO) -> Iterator[Member]:
    """Every member of an uncompressed tar in its order, whichever dialect it is in: V7, ustar, pax or GNU.

    Raises Damaged where a header makes no sense, or the tar ends before its end mark.
    """
    end, offset = stream.seek(0, os.SEEK_END), 0
    said: dict[bytes, bytes] = {}  # by extended headers, of the member after them
    while (header := _read(stream, offset, BLOCK)).count(0) < BLOCK:
        _check(header, offset)
        letter, size, offset = header[156:157], _number(header[124:136]), offset + BLOCK
        if letter in EXTENDED:
            said |= _extended(letter, _read(stream, offset, size))
            offset += _padded(size)
            continue
        if letter == b"S":
            offset = _after_map(stream, header, offset)
        member, said = _member(header, letter, size, offset, said), {}
        offset += _padded(member.size)
        if member.offset + member.size > end:
            raise Damaged(f"is cut short in {member.name}")
        yield member


def _read(stream: BinaryIO, offset: int, size: int) -> bytes:
    if size > MAX_EXTENDED_BYTES:
        raise Damaged(f"has an extended header of {size:,} bytes")
    stream.seek(offset)
    data = stream.read(size)
    if len(data) < size:
        raise Damaged("is cut short: it has no end mark")
    return data


def _check(header: bytes, offset: int) -> None:
    if offset == 0 and header.startswith(COMPRESSED):
        raise Compressed("is compressed")
    total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])  # the sum's own field counts as blanks
    if header[148:156].strip(b"\0 ").lstrip(b"0") != b"%o" % total:
        raise Damaged(f"is damaged at byte {offset:,}" if offset else "is no tar")


def _number(field: bytes) -> int:
    """Octal digits, or with the first bit set GNU's binary form for what has too many of them."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits.strip(b"01234567"):
        raise Damaged(f"has a header with the number {field!r}")
    return int(digits or b"0", 8)


def _extended(letter: bytes, data: bytes) -> dict[bytes, bytes]:
    """What an extended header says of the next member, as pax records."""
    if letter == b"L":
        return {b"path": data.partition(b"\0")[0]}
    if letter == b"K":
        return {}
    records = dict(_records(data))
    if letter == b"g":  # for all members: comments and times, as `git archive` writes them
        if records.keys() & {b"path", b"size"}:
            raise Damaged("has one name or size for all members")
        return {}
    return records


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """pax records, each of them `length key=value` and a line feed, where the length is that of all of it."""
    start = 0
    while match := RECORD.match(data, start):
        end = start + int(match["length"])
        if end > len(data) or end <= match.end():
            break
        yield match["key"], data[match.end() : end - 1]
        start = end
    if start < len(data):
        raise Damaged("has a damaged pax header")


def _after_map(stream: BinaryIO, header: bytes, offset: int) -> int:
    """Where the bytes of a GNU sparse member begin: its map of holes may go on after the header."""
    goes_on = header[482]
    while goes_on:
        goes_on, offset = _read(stream, offset, BLOCK)[504], offset + BLOCK
    return offset


def _member(header: bytes, letter: bytes, size: int, offset: int, said: dict[bytes, bytes]) -> Member:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    if prefix and header[257:263] == b"ustar\0":  # GNU keeps times there
        name = prefix + b"/" + name
    name = said.get(b"path", name)
    kind = KINDS.get(letter, f"of the unknown kind {letter.decode('latin-1')!r}")
    if letter == b"\0" and name.endswith(b"/"):  # V7 had no letter for it
        letter, kind = b"5", FOLDER
    if any(key.startswith(b"GNU.sparse.") for key in said):
        kind = SPARSE
    size = _decimal(said[b"size"]) if b"size" in said else size
    return Member(name.decode("utf-8", "surrogateescape"), kind, offset, 0 if letter in WITHOUT_BYTES else size)


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise Damaged(f"has a pax header with the size {digits[:20]!r}")
    return int(digits)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
