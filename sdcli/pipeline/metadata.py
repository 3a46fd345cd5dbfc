"""What is written into picture files about how they were made."""

from __future__ import annotations

import io
import json
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from sdcli.errors import InputError, SdcliWarning
from sdcli.files import open_regular

# What a picture's own record leaves out, so that the same command gives the same bytes wherever and whenever it runs.
NOT_INSIDE = frozenset({"path", "seconds", "saved_latents"})
DEFAULT_QUALITY = 90
MAX_EXIF = {"jpg": 65_533, "webp": 1 << 24}  # bytes; of JPEG a segment less its length
MAX_PICTURE_BYTES = 1 << 30
FORMATS = ("PNG", "WEBP", "JPEG")
# What Pillow raises of malformed files and EXIF blocks while it decodes no pixels: of 1.5 million mutations each, and
# what its own `open` expects of the code of formats.
MALFORMED = (OSError, ValueError, SyntaxError, struct.error, TypeError, LookupError, Image.DecompressionBombError)
A1111_SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "lms": "LMS",
    "heun": "Heun",
    "dpm": "DPM++ 2M",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler-a": "Euler a",
    "unipc": "UniPC",
    "dpm-sde": "DPM++ 2M SDE",
    "dpm2": "DPM2",
    "dpm2-a": "DPM2 a",
    "lcm": "LCM",
    # As programs of the same grammar call those that A1111 lacks.
    "f-pndm": "F-PNDM",
    "s-pndm": "S-PNDM",
    "dpm-single": "DPM++ 2S",
    "deis": "DEIS",
    "tcd": "TCD",
}
A1111_OF_ORDER_3 = {"dpm": "DPM++ 3M", "dpm-sde": "DPM++ 3M SDE"}


def png_bytes(image: Image.Image, record: Mapping[str, Any] | None) -> bytes:
    """A PNG file with the record inside: as `parameters` in the A1111 form and as `sdcli` in JSON. None: neither."""
    chunks = PngImagePlugin.PngInfo()
    if record is not None:
        inside = {key: value for key, value in record.items() if key not in NOT_INSIDE}
        _add_text(chunks, "parameters", a1111_parameters(inside))
        _add_text(chunks, "sdcli", json.dumps(inside, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def picture_bytes(
    image: Image.Image, record: Mapping[str, Any] | None, form: str = "png", quality: int | None = None
) -> bytes:
    """A picture file with the record inside; None: without.

    form: `png`, whose texts are as in `png_bytes`; `webp` or `jpg`, which carry the same two as EXIF.
    quality: 1 to 100 of the latter two; WebP at 100 is lossless, JPEG from 90 on keeps colour at full resolution.
    """
    if form == "png":
        return png_bytes(image, record)
    quality = quality if quality is not None else DEFAULT_QUALITY
    buffer = io.BytesIO()
    exif = exif_bytes(record, MAX_EXIF[form]) if record is not None else b""
    if form == "webp":
        # method 4 is libwebp's own default: the bytes do not depend on what Pillow's may become.
        image.save(buffer, format="WEBP", quality=quality, lossless=quality == 100, method=4, exif=exif)
    else:
        fine = {"subsampling": 0} if quality >= DEFAULT_QUALITY else {}
        image.save(buffer, format="JPEG", quality=quality, exif=exif, **fine)
    return buffer.getvalue()


def exif_bytes(record: Mapping[str, Any], most: int) -> bytes:
    """An EXIF block with the record: `UserComment` in the A1111 form, `ImageDescription` as `sdcli` and JSON.

    EXIF and not XMP, because whoever copies a picture's EXIF has both; XMP is a block of its own.
    Big-endian throughout, as A1111's reader takes UTF-16 to be, whatever the block says.
    most: what the file can hold, in bytes; the A1111 form, and then the JSON, are left out with a warning beyond it.
    """
    inside = {key: value for key, value in record.items() if key not in NOT_INSIDE}
    described = b"sdcli " + json.dumps(inside).encode("ascii")
    comment = b"UNICODE\0" + a1111_parameters(inside).replace("\0", "").encode("utf-16-be", "replace")
    for texts in ((described, comment), (described, b"")):
        block = _exif(*texts)
        if len(block) <= most:
            if not texts[1]:
                _warn_of_size("the parameters in the A1111 form do not fit", most)
            return block
    _warn_of_size("what tells of its making does not fit", most)
    return b""


def _exif(description: bytes, comment: bytes) -> bytes:
    """EXIF with these two texts; an empty one is left out. Source: EXIF 2.32, sections 4.6.2 to 4.6.5."""
    exif = Image.Exif()
    exif.endian = ">"
    exif[ExifTags.Base.ImageDescription] = description.decode("ascii")
    if comment:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return exif.tobytes()


def _warn_of_size(what: str, most: int) -> None:
    note = f"{what} into the {most:,} bytes that this format has for it, and is left out; PNG holds any"
    warnings.warn(note, SdcliWarning, stacklevel=4)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record inside a picture that we wrote; None where it has none, or is no whole picture of ours."""
    try:
        with (
            open_regular(path, max_bytes=MAX_PICTURE_BYTES) as stream,
            Image.open(stream, formats=FORMATS) as image,
        ):
            text = image.info.get("sdcli", "")
            if image.format == "PNG":
                image.verify()  # its checksums, without decoding
            else:
                image.load()
                described = str(image.getexif().get(ExifTags.Base.ImageDescription, ""))
                text = described.removeprefix("sdcli ") if described.startswith("sdcli {") else ""
            value = json.loads(text) if text else None
    except (InputError, *MALFORMED, RecursionError):  # the last of JSON nested too deeply
        return None
    return value if isinstance(value, dict) else None


def a1111_parameters(record: Mapping[str, Any]) -> str:
    """The record as the `parameters` text that galleries and web interfaces read."""
    known = A1111_OF_ORDER_3 if record.get("order") == 3 else A1111_SAMPLERS
    pairs = {
        "Steps": record["steps"],
        "Sampler": known.get(record["scheduler"], record["scheduler"]),
        **({"Schedule type": record["sigmas"].capitalize()} if record.get("sigmas", "model") != "model" else {}),
        "CFG scale": f"{record['guidance']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": record["model_hash"][:10],
        "Model": Path(record["model"]).name,
        **({"Denoising strength": f"{record['strength']:g}"} if "strength" in record else {}),
        **({"Clip skip": record["clip_skip"] + 1} if record.get("clip_skip") else {}),
        **({"Class": record["class"]["name"], "Class index": record["class"]["index"]} if "class" in record else {}),
        **({"Init image hash": record["init_image"]["sha256"][:10]} if "init_image" in record else {}),
        "RNG": "CPU",
        **({"Eta": f"{record['eta']:g}"} if "eta" in record else {}),
    }
    if record.get("loras"):
        pairs["Lora hashes"] = ", ".join(f"{_a1111_name(one)}: {one['a1111_hash']}" for one in record["loras"])
    if record.get("embeddings"):
        pairs["TI hashes"] = ", ".join(f"{one['token']}: {one['sha256'][:12]}" for one in record["embeddings"])
    for key in ("replace", "mix"):
        if record.get(key):
            pairs[key.capitalize()] = "; ".join(record[key])
    for key, name in (("prompt_template", "Template"), ("negative_template", "Negative Template")):
        if key in record:
            pairs[name] = record[key]
    for key, name in (("latents", "Latents hash"), ("mask", "Mask hash")):
        if record.get(key):
            pairs[name] = record[key]["sha256"][:10]
    pairs["Version"] = f"sdcli {record['sdcli']}"
    tags = [f"<lora:{_a1111_name(one)}:{_plain(one['scale'])}>" for one in record.get("loras", ())]
    lines = [" ".join(text for text in (record["prompt"], *tags) if text)] if record["prompt"] or tags else []
    if record["negative"]:
        lines.append(f"Negative prompt: {record['negative']}")
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in pairs.items()))
    return "\n".join(lines)


def _a1111_name(one: Mapping[str, Any]) -> str:
    """A LoRA as A1111 names it: the file without its suffix; what would end a name there is left out."""
    return re.sub(r"[:,<>]", "", Path(one["file"]).stem) or "lora"


def _plain(number: float) -> str:
    """A number in as few digits as tell it from all others, whole ones without a point."""
    return repr(number).removesuffix(".0")


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]|^\s|\s$', value) else value


def _add_text(chunks: PngImagePlugin.PngInfo, key: str, text: str) -> None:
    """tEXt where Latin-1 can hold the text, else iTXt, as readers of `parameters` expect; neither can hold NUL."""
    text = text.replace("\0", "")
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        chunks.add_itxt(key, text)
    else:
        chunks.add_text(key, text)
