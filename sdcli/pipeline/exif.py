"""EXIF, as far as it can be read: the texts that programs write into it, and how a picture is turned."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import ExifTags, Image

from sdcli.errors import SdcliWarning
from sdcli.pipeline.metadata import MALFORMED


def texts_of(block: bytes, path: Path) -> dict[str, str]:
    """The texts of EXIF that programs use, by the names of their tags."""
    if not block:
        return {}
    exif = _exif(block)
    texts: dict[str, str] = {}
    for tag in (ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model):
        value = exif.get(tag)
        if isinstance(value, str) and value:
            texts[tag.name] = _plain(value)
    try:
        comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except MALFORMED:
        comment = None
    if isinstance(comment, str):
        comment = comment.encode("latin-1", "replace")
    if isinstance(comment, bytes) and comment:
        texts["UserComment"] = _comment(comment, path)
    return texts


def orientation(exif: bytes) -> int:
    """EXIF's orientation, 1 where nothing or nonsense is said."""
    value = _exif(exif).get(ExifTags.Base.Orientation, 1)
    return value if type(value) is int and 1 <= value <= 8 else 1


def _exif(block: bytes) -> Image.Exif:
    """EXIF as far as it can be read: cameras and programs write much that is no good."""
    exif = Image.Exif()
    try:
        exif.load(b"Exif\0\0" + block)
    except MALFORMED:
        return Image.Exif()
    return exif


def _plain(value: str) -> str:
    """ASCII by the specification, which Pillow reads as Latin-1, and UTF-8 in fact."""
    try:
        return value.encode("latin-1").decode("utf-8").rstrip("\0")
    except UnicodeError:
        return value.rstrip("\0")


def _comment(comment: bytes, path: Path) -> str:
    """EXIF's `UserComment`, its encoding named by the first eight bytes, UTF-16 in either order of bytes."""
    head, text = comment[:8], comment[8:]
    if head == b"UNICODE\0":
        encoding = "utf-16" if text[:2] in (b"\xff\xfe", b"\xfe\xff") else _order(text)
    elif head in (b"ASCII\0\0\0", b"\0" * 8):
        encoding = "utf-8"
    else:
        encoding, text = "utf-8", comment
    try:
        return text.decode(encoding).rstrip("\0")
    except UnicodeDecodeError:
        note = f"{path}: its EXIF comment is no {encoding.upper()}; what cannot be read is shown as \ufffd"
        warnings.warn(note, SdcliWarning, stacklevel=2)
        return text.decode(encoding, "replace").rstrip("\0")


def _order(text: bytes) -> str:
    """Big-endian, as A1111 writes, unless more of the second bytes of pairs than of the first are 0."""
    return "utf-16-le" if text[1::2].count(0) > text[0::2].count(0) else "utf-16-be"
