"""What pages have in common: their frame, and pictures scaled down. Each is one HTML file that asks no network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image

from sdcli.errors import InputError
from sdcli.files import open_regular

TEMPLATES = Path(__file__).with_name("templates")
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}  # by suffix
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 256 << 20
SMALL_SIDE = 96  # px; a picture up to it is kept exactly, and shown by its pixels
# What a picture is made of until it takes no more bytes than it may: parts of its sides, and WebP's quality.
ATTEMPTS = ((1, 80), (1, 50), (2, 50), (4, 50), (8, 30))
ACRONYMS = frozenset({"ema", "fid", "id", "kid", "kl", "l1", "l2", "lora", "lpips", "psnr", "ssim", "vae", "vlb"})
EMBEDDED = "data:"  # where a page's images come from, in the words of its content-security policy


@dataclass(frozen=True)
class Setting:
    """One setting of what a page shows."""

    name: str
    value: str


@dataclass(frozen=True)
class Picture:
    """A picture scaled down, as a data: URI; an empty one where the file cannot be read."""

    caption: str
    uri: str = ""
    width: int = 0  # px
    height: int = 0

    @property
    def is_small(self) -> bool:
        """Whether it is to be shown by its pixels."""
        return max(self.width, self.height) <= SMALL_SIDE


def picture(path: Path, folder: Path, side: int, most: int | None = None) -> Picture:
    """A picture file as it is embedded: at most `side` px, its name without the suffix as the caption.

    folder: that its real path must lie in. most: bytes of its URI, for which it is made smaller still; None: any.
    """
    try:
        image = _thumbnail(path, folder, side)
    except InputError:
        return Picture(path.stem)
    is_lossless = max(image.size) <= SMALL_SIDE
    for part, quality in ATTEMPTS:
        small = image.reduce(part) if part > 1 else image
        stream = io.BytesIO()
        small.save(stream, "WEBP", lossless=is_lossless, quality=quality, method=2)
        uri = "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
        if most is None or len(uri) <= most:
            return Picture(path.stem, uri, *small.size)
        is_lossless = False
    return Picture(path.stem)


def render(name: str, *, images: str = EMBEDDED, **values: object) -> Iterator[bytes]:
    """A page of the templates, piece by piece. Every value is escaped; only our own style and script run, by hashes.

    name: that of the template, of its style beside that of all pages, and of its script.
    images: the sources that images may come from.
    """
    style = "".join((TEMPLATES / one).read_text(encoding="utf-8") for one in ("page.css", f"{name}.css"))
    script = (TEMPLATES / f"{name}.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pieces = environment.get_template(f"{name}.html").generate(
        style=style,
        style_hash=_csp_hash(style),
        script=script,
        script_hash=_csp_hash(script),
        images=images,
        **values,
    )
    return (piece.encode("utf-8", "replace") for piece in pieces)  # a name may hold bytes that are no text


def as_text(value: object) -> str:
    """A setting's value as a person reads it."""
    if isinstance(value, str | Path):
        return str(value)
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return json.dumps(value, ensure_ascii=False, default=str)


def as_title(name: str) -> str:
    """The name of a field with a capital, to stand alone."""
    found = in_words(name)
    return found[:1].upper() + found[1:]


def in_words(name: str) -> str:
    """The name of a field in words."""
    return " ".join(word.upper() if word in ACRONYMS else word for word in name.replace("_", " ").split(" "))


def _thumbnail(path: Path, folder: Path, side: int) -> Image.Image:
    with open_regular(path, max_bytes=MAX_FILE_BYTES, within=folder) as stream:
        try:
            image = Image.open(stream, formats=[FORMATS[path.suffix.lower()]])
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{path}: has {image.width} x {image.height} pixels")
            small = image.convert("RGBA" if image.has_transparency_data else "RGB")
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
        except Exception as error:  # Pillow's decoders raise a dozen types on malformed files
            raise InputError(f"{path}: cannot be decoded ({error})") from error
    return small


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
