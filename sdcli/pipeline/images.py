"""Picture files <-> images <-> pixels."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sdcli.errors import InputError, SdcliWarning
from sdcli.files import open_regular

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 128_000_000  # decoded, about 384 MB as RGB
MAX_FILE_BYTES = 1 << 30
ALPHA_BACKGROUND = (255, 255, 255)
MAX_COUNTED = 100  # frames of a TIFF
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def load_image(path: Path) -> Image.Image:
    """Read a picture as it is meant to be seen: rotated by its EXIF, in RGB, transparency over white.

    Raises InputError when the file is no picture of a supported format, is cut short or has more than
    MAX_PIXELS pixels. Warns (SdcliWarning) when it is an animation, of which the first frame is taken.
    """
    with open_regular(path, max_bytes=MAX_FILE_BYTES) as stream:
        return read_image(stream, path)


def read_image(stream: BinaryIO, path: Path) -> Image.Image:
    """Read a picture that is open already, as `load_image` does.

    path: what errors and warnings call it.
    """
    try:
        # No catch_warnings here: it is not safe in threads, which read pictures, and would lose our own warnings.
        opened = Image.open(stream, formats=FORMATS)
        _check_size(path, opened)
        frames = _count_frames(opened)
        opened.load()
        if opened.mode == "F":
            raise InputError(f"{path}: holds floating-point values", "save it with 8 or 16 bits a channel")
        image = _to_rgb(ImageOps.exif_transpose(opened))
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: is no picture", f"accepted are {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise a dozen types on malformed files
        raise InputError(f"{path}: cannot be decoded ({error})", "the file is damaged; save it again") from error
    if frames > 1:
        count = f"{frames}" if frames < MAX_COUNTED else f"{MAX_COUNTED} or more"
        warnings.warn(f"{path}: only the first of {count} frames is used", SdcliWarning, stacklevel=2)
    return image


def read_size(stream: BinaryIO, path: Path) -> tuple[int, int]:
    """Width and height in px of an open picture, rotated by its EXIF, without decoding it; errors as `read_image`."""
    try:
        opened = Image.open(stream, formats=FORMATS)
        is_turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in TURNED
    except Exception as error:  # as in `read_image`
        raise InputError(f"{path}: cannot be decoded ({error})", "the file is damaged; save it again") from error
    return (opened.height, opened.width) if is_turned else opened.size


def file_format(stream: BinaryIO, path: Path) -> str:
    """The format an open picture is in, whatever its name says. Raises InputError when it is none of FORMATS."""
    try:
        return str(Image.open(stream, formats=FORMATS).format)
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: is no picture", f"accepted are {', '.join(FORMATS)}") from error


def suffixes_of(form: str) -> tuple[str, ...]:
    """The accepted suffixes of a format of FORMATS, the usual one first."""
    return {"JPEG": (".jpg", ".jpeg"), "TIFF": (".tiff", ".tif")}.get(form, (f".{form.lower()}",))


def fit(
    image: Image.Image, width: int, height: int, method: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Scale and centre-crop an image so that it fills width x height px without distortion."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), method=method)


def cut(image: Image.Image, factor: int, path: Path) -> Image.Image:
    """An image cut at its edges to the next multiples of a VAE's factor, with a warning where that takes anything away.

    path: what errors and warnings call it. Raises InputError when nothing would be left.
    """
    width, height = (side // factor * factor for side in image.size)
    if not width or not height:
        raise InputError(f"{path}: is {image.width} x {image.height} px", f"at least {factor} x {factor} are needed")
    if (width, height) == image.size:
        return image
    text = f"{path}: {image.width} x {image.height} px cut to {width} x {height}, multiples of {factor}"
    warnings.warn(text, SdcliWarning, stacklevel=2)
    return crop(image, width, height)


def crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of an image, of width x height px."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as (1, 3, H, W) float32 in [-1, 1]."""
    import torch  # deferred: the size of a picture is asked for before anything heavy is imported

    array = np.array(image, dtype=np.float32)  # (H, W, 3)
    return torch.from_numpy(array).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1.0


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (B, 3, H, W) in [-1, 1], clipped, as one 8-bit RGB image each."""
    unit = (pixels.float() / 2 + 0.5).clamp(0, 1)
    array = (unit.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)  # (B, H, W, 3)
    return [Image.fromarray(one) for one in array]


def _count_frames(image: Image.Image) -> int:
    """How many frames a picture has. Of TIFF, where each is half a millisecond away, no more are counted than shown."""
    if image.format != "TIFF":
        return int(getattr(image, "n_frames", 1))
    count = 1
    with suppress(EOFError):
        while count < MAX_COUNTED:
            image.seek(count)
            count += 1
    image.seek(0)
    return count


def _check_size(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(
            f"{path}: has {image.width} x {image.height} pixels", f"at most {MAX_PIXELS:,} in all are accepted"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: scale to 8 bits, never clip
        array = np.asarray(image, dtype=np.float64)
        return Image.fromarray((array / 257.0).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*ALPHA_BACKGROUND, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")
