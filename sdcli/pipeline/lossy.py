"""What the lossy formats make of a picture: encoded as a given file was, so that both can be compared."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, JpegImagePlugin

from sdcli.pipeline.metadata import picture_bytes

QUALITIES = range(1, 101)
LOSSLESS = b"VP8L"  # the chunk of a WebP file that loses nothing
PROBE = Image.new("RGB", (16, 16))


@dataclass(frozen=True)
class Encoded:
    """A picture after an encoding. quality: of sdcli's encoder, None where it has none like that or nothing is lost."""

    image: Image.Image
    form: str  # png, webp or jpg
    quality: int | None
    is_lossy: bool


def encoded_as(image: Image.Image, data: bytes) -> Encoded:
    """What is left of a picture when it is encoded as a PNG, WebP or JPEG file is.

    JPEG: with the tables and the sampling that the file has in its head. WebP does not tell its quality: taken is the
    one that gives a file of the nearest length, and of its neighbours the one whose pixels are nearest.
    """
    with Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG")) as file:
        if file.format == "JPEG":
            return _jpeg(image, file)
        if file.format == "WEBP" and LOSSLESS not in _chunks(data):
            return _webp(image, data, file.convert("RGB"))
        form = str(file.format).lower()
        return Encoded(image, form, 100 if form == "webp" else None, is_lossy=False)


def _jpeg(image: Image.Image, file: Image.Image) -> Encoded:
    assert isinstance(file, JpegImagePlugin.JpegImageFile)
    tables, sampling = file.quantization, JpegImagePlugin.get_sampling(file)
    for quality in QUALITIES:
        with Image.open(io.BytesIO(picture_bytes(PROBE, None, "jpg", quality))) as probe:
            assert isinstance(probe, JpegImagePlugin.JpegImageFile)
            if probe.quantization == tables and JpegImagePlugin.get_sampling(probe) == sampling:
                return Encoded(_decoded(picture_bytes(image, None, "jpg", quality)), "jpg", quality, is_lossy=True)
    buffer = io.BytesIO()
    known = {"subsampling": sampling} if sampling >= 0 else {}
    image.save(buffer, format="JPEG", qtables=tables, **known)
    return Encoded(_decoded(buffer.getvalue()), "jpg", None, is_lossy=True)


def _webp(image: Image.Image, data: bytes, target: Image.Image) -> Encoded:
    wanted = _pixel_bytes(data)
    low, high = 1, 99  # 100 loses nothing
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if _size(image, middle) < wanted else (low, middle)
    candidates = {
        quality: _decoded(_encode(image, quality)) for quality in (low - 1, low, low + 1) if 1 <= quality < 100
    }
    best = min(candidates, key=lambda quality: _apart(candidates[quality], target))
    return Encoded(candidates[best], "webp", best, is_lossy=True)


def _encode(image: Image.Image, quality: int) -> bytes:
    return picture_bytes(image, None, "webp", quality)


def _size(image: Image.Image, quality: int) -> int:
    return _pixel_bytes(_encode(image, quality))


def _decoded(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as file:
        return file.convert("RGB")


def _apart(a: Image.Image, b: Image.Image) -> float:
    """The mean absolute difference; infinite for pictures of two sizes."""
    if a.size != b.size:
        return float("inf")
    return float(np.abs(np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16)).mean())


def _chunks(data: bytes) -> dict[bytes, int]:
    """The chunks of a WebP file by name, with the length of each (RIFF: name, length in 4 bytes, content, padding)."""
    found, at = {}, 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        found[data[at : at + 4]] = length
        at += 8 + length + length % 2
    return found


def _pixel_bytes(data: bytes) -> int:
    return _chunks(data).get(b"VP8 ", 0)
