"""The blocks that PNG, JPEG and WebP files are made of: what texts stand in them, and the file without. No pixels."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sdcli.errors import InputError

MAX_TEXT_BYTES = 16 << 20  # of one text, unpacked
MAX_TEXTS_BYTES = 64 << 20  # of all in a file
MAX_BLOCKS = 1_000_000
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
JFIF_BYTES = 14  # of JFIF's head, up to its thumbnail
XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"
EXIF_HEAD = b"Exif\0\0"
PNG_XMP = "XML:com.adobe.xmp"
# What the pixels are and how they are to be shown, animation included; all other blocks tell about the picture.
PNG_KEPT = frozenset(
    b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB iCCP cICP mDCv mDCV cLLi cLLI sBIT bKGD pHYs acTL fcTL fdAT".split()
)
WEBP_KEPT = frozenset({b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ICCP", b"ANIM", b"ANMF"})
WEBP_PIXELS = frozenset({b"VP8 ", b"VP8L", b"ANMF"})
WEBP_EXIF_FLAG, WEBP_XMP_FLAG = 0x08, 0x04  # of VP8X
SOS, EOI, APP0, APP1, APP2, APP14, APP15, COM = 0xDA, 0xD9, 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
# All of SOF0 to SOF15 but DHT, JPG and DAC, whose numbers lie among theirs.
FRAMES = frozenset(bytes([marker]) for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
EXIF_BLOCKS = frozenset({b"eXIf", b"EXIF", bytes([APP1])})
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)  # in coded data 0 is stuffing, D0 to D7 restarts


@dataclass
class Inside:
    """What a file says besides its pixels. texts: by keyword, of JPEG's comments by `COM`."""

    texts: dict[str, str] = field(default_factory=dict)
    exif: bytes = b""  # without the head that JPEG puts before it
    xmp: str = ""
    size: int = 0  # bytes of all that was read, packed and unpacked


@dataclass(frozen=True)
class Block:
    """A chunk or segment: its name, the whole of it and what it holds."""

    name: bytes
    start: int
    end: int
    first: int  # of its content
    last: int


def look_inside(data: bytes, path: Path) -> Inside:
    """The texts, EXIF and XMP of a PNG, JPEG or WebP file.

    path: what errors call it. Raises InputError for another kind of file, one that is cut short, and texts that are or
    unpack to more than MAX_TEXT_BYTES.
    """
    inside = Inside()
    for block in _blocks(data, path):
        content = data[block.first : block.last] if block.name in READERS else b""
        if not content:
            continue
        if len(content) > MAX_TEXT_BYTES:
            raise _too_large(path, block.name)
        READERS[block.name](content, inside, path)
        inside.size += len(content)
        if inside.size > MAX_TEXTS_BYTES:
            raise InputError(f"{path}: its texts have over {MAX_TEXTS_BYTES >> 20} MiB", "no program writes so much")
    return inside


def exif(data: bytes, path: Path) -> bytes:
    """The EXIF block of a file, whatever its texts are; errors as `look_inside`, but for those of texts."""
    inside = Inside()
    for block in _blocks(data, path):
        if block.name in EXIF_BLOCKS and block.last - block.first <= MAX_TEXT_BYTES:
            READERS[block.name](data[block.first : block.last], inside, path)
    return inside.exif


def without_metadata(data: bytes, path: Path, orientation: int = 1) -> bytes:
    """The same file without any text, EXIF, XMP, thumbnail, time or block of unknown meaning; its pixels untouched.

    Kept are colour profiles and what else says how pixels are shown. orientation: EXIF's number, of which a block is
    written anew if it is not 1, so that the picture does not lie down. What follows the end of the picture is dropped.
    Raises InputError as `look_inside`, and for a file without pixels.
    """
    exif = _orientation(orientation) if 2 <= orientation <= 8 else b""
    blocks = list(_blocks(data, path))
    if not _has_pixels(data, {block.name for block in blocks}):
        raise InputError(f"{path}: has no pixels", "the file is damaged; save it again")
    if data.startswith(PNG_HEAD):
        kept = [data[b.start : b.end] for b in blocks if b.name in PNG_KEPT]
        extra = [_png_chunk(b"eXIf", exif)] if exif else []
        return b"".join([PNG_HEAD, kept[0], *extra, *kept[1:]])
    if data.startswith(b"\xff\xd8"):
        parts = [b"\xff\xd8"]
        if exif:
            parts.append(struct.pack(">BBH", 0xFF, APP1, 2 + len(EXIF_HEAD + exif)) + EXIF_HEAD + exif)
        parts += [_without_thumbnail(b, data) for b in blocks if _is_kept_of_jpeg(b, data)]
        return b"".join(parts)
    flags = WEBP_EXIF_FLAG if exif else 0
    parts = [_webp_chunk(b.name, _cleared(b, data, flags)) for b in blocks if b.name in WEBP_KEPT]
    if exif and blocks and blocks[0].name == b"VP8X":
        parts.append(_webp_chunk(b"EXIF", exif))
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _has_pixels(data: bytes, names: set[bytes]) -> bool:
    if data.startswith(PNG_HEAD):
        return b"IDAT" in names
    if data.startswith(b"\xff\xd8"):
        return bytes([SOS]) in names and not names.isdisjoint(FRAMES)
    return not names.isdisjoint(WEBP_PIXELS)


def _blocks(data: bytes, path: Path) -> Iterator[Block]:
    if data.startswith(PNG_HEAD):
        found = _png_blocks(data, path)
    elif data.startswith(b"\xff\xd8\xff"):
        found = _jpeg_blocks(data, path)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        found = _webp_blocks(data, path)
    else:
        raise InputError(f"{path}: is no PNG, JPEG or WebP picture", "name one of these")
    for number, block in enumerate(found):
        if number >= MAX_BLOCKS:
            raise InputError(f"{path}: has over {MAX_BLOCKS:,} blocks", "the file is damaged; save it again")
        yield block


def _png_blocks(data: bytes, path: Path) -> Iterator[Block]:
    """Source: PNG specification, third edition, section 5.3."""
    at, name = len(PNG_HEAD), b""
    while name != b"IEND":
        if at + 12 > len(data):
            raise _cut_short(path)
        (size,) = struct.unpack_from(">I", data, at)
        is_first, name, end = not name, data[at + 4 : at + 8], at + 12 + size
        if end > len(data):
            raise _cut_short(path)
        if is_first and name != b"IHDR":
            raise InputError(f"{path}: does not begin with IHDR", "the file is damaged; save it again")
        yield Block(name, at, end, at + 8, end - 4)
        at = end


def _jpeg_blocks(data: bytes, path: Path) -> Iterator[Block]:
    """Segments; the coded data belongs to the SOS before it. Source: ITU T.81, annex B."""
    at, marker = 2, 0
    while marker != EOI:
        start = at
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] == b"\xff":
            at += 1  # fill bytes
        if at + 2 > len(data):
            raise _cut_short(path)
        if data[at] != 0xFF:
            raise InputError(f"{path}: has no segment at byte {at}", "the file is damaged; save it again")
        marker = data[at + 1]
        if marker in (0x01, EOI) or 0xD0 <= marker <= 0xD7:
            yield Block(bytes([marker]), start, at + 2, at + 2, at + 2)
            at += 2
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + size
        if size < 2 or end > len(data):
            raise _cut_short(path)
        last = end
        if marker == SOS:
            following = NEXT_MARKER.search(data, end)
            if following is None:
                raise _cut_short(path)
            end = following.start()
        yield Block(bytes([marker]), start, end, at + 4, last)
        at = end


def _webp_blocks(data: bytes, path: Path) -> Iterator[Block]:
    """Source: WebP Container Specification, RFC 9649, section 2."""
    at, stop = 12, 8 + struct.unpack_from("<I", data, 4)[0]
    if stop > len(data) or at + 8 > stop:
        raise _cut_short(path)
    while at + 8 <= stop:
        (size,) = struct.unpack_from("<I", data, at + 4)
        end = at + 8 + size
        if end > stop:
            raise _cut_short(path)
        yield Block(data[at : at + 4], at, min(end + size % 2, stop), at + 8, end)
        at = end + size % 2


def _read_text(content: bytes, inside: Inside, path: Path) -> None:
    keyword, _, text = content.partition(b"\0")
    inside.texts[keyword.decode("latin-1")] = _words(keyword, text)


def _read_packed_text(content: bytes, inside: Inside, path: Path) -> None:
    keyword, _, packed = content.partition(b"\0")
    text = _unpacked(packed[1:], keyword, path)
    inside.size += len(text)
    inside.texts[keyword.decode("latin-1")] = _words(keyword, text)


def _read_international_text(content: bytes, inside: Inside, path: Path) -> None:
    keyword, _, rest = content.partition(b"\0")
    is_packed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    if is_packed:
        text = _unpacked(text, keyword, path)
        inside.size += len(text)
    name, words = keyword.decode("latin-1"), text.decode("utf-8", "replace")
    if name == PNG_XMP:
        inside.xmp = words
    else:
        inside.texts[name] = words


def _read_exif(content: bytes, inside: Inside, path: Path) -> None:
    inside.exif = content.removeprefix(EXIF_HEAD)


def _read_app1(content: bytes, inside: Inside, path: Path) -> None:
    if content.startswith(EXIF_HEAD):
        inside.exif = inside.exif or content.removeprefix(EXIF_HEAD)
    elif content.startswith(XMP_HEAD):
        inside.xmp = content.removeprefix(XMP_HEAD).decode("utf-8", "replace")


def _read_xmp(content: bytes, inside: Inside, path: Path) -> None:
    inside.xmp = content.decode("utf-8", "replace")


def _read_comment(content: bytes, inside: Inside, path: Path) -> None:
    inside.texts["COM"] = _words(b"COM", content)


READERS = {
    b"tEXt": _read_text,
    b"zTXt": _read_packed_text,
    b"iTXt": _read_international_text,
    b"eXIf": _read_exif,
    b"EXIF": _read_exif,
    b"XMP ": _read_xmp,
    bytes([APP1]): _read_app1,
    bytes([COM]): _read_comment,
}


def _words(keyword: bytes, text: bytes) -> str:
    """Text as it was meant: Latin-1 by the specification, UTF-8 by several programs; ours keep to the specification."""
    if keyword != b"sdcli":
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            pass
    return text.decode("latin-1")


def _unpacked(packed: bytes, keyword: bytes, path: Path) -> bytes:
    """Raises InputError for damaged data, and for more than MAX_TEXT_BYTES without unpacking them all."""
    try:
        unpacking = zlib.decompressobj()
        text = unpacking.decompress(packed, MAX_TEXT_BYTES + 1)
    except zlib.error as error:
        name = keyword.decode("latin-1")
        raise InputError(f"{path}: its text {name} cannot be unpacked ({error})", "the file is damaged") from error
    if len(text) > MAX_TEXT_BYTES:
        raise _too_large(path, keyword)
    if not unpacking.eof:
        raise _cut_short(path)
    return text


def _is_kept_of_jpeg(block: Block, data: bytes) -> bool:
    """JFIF's head, colour profiles and Adobe's colour transform stay of the application segments."""
    marker = block.name[0]
    if marker == APP0:
        return data.startswith(b"JFIF\0", block.first)
    if marker == APP2:
        return data.startswith(b"ICC_PROFILE\0", block.first)
    return marker == APP14 or not (APP0 <= marker <= APP15 or marker == COM)


def _without_thumbnail(block: Block, data: bytes) -> bytes:
    """A segment as it stands, but JFIF's head without its thumbnail. Source: JFIF 1.02, page 5."""
    if block.name[0] != APP0 or block.last - block.first < JFIF_BYTES:
        return data[block.start : block.end]
    head = data[block.first : block.first + JFIF_BYTES - 2] + b"\0\0"  # its width and height
    return struct.pack(">BBH", 0xFF, APP0, 2 + len(head)) + head


def _cleared(block: Block, data: bytes, flags: int) -> bytes:
    """A chunk's content; the first chunk's flags say that there is no EXIF and no XMP, but for those of `flags`."""
    content = data[block.first : block.last]
    if block.name != b"VP8X" or not content:
        return content
    return bytes([content[0] & ~(WEBP_EXIF_FLAG | WEBP_XMP_FLAG) | flags]) + content[1:]


def _orientation(number: int) -> bytes:
    """EXIF with that alone: a TIFF head and one directory of one entry (tag 0x0112, SHORT)."""
    return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, number, 0, 0)


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _webp_chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _cut_short(path: Path) -> InputError:
    return InputError(f"{path}: is cut short", "the file is damaged; save it again")


def _too_large(path: Path, name: bytes) -> InputError:
    words = name.decode("latin-1") if name.isalnum() else "segment"
    return InputError(f"{path}: its text {words} has over {MAX_TEXT_BYTES >> 20} MiB", "no program writes so much")
