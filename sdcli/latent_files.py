"""Latent files: safetensors with `latents` (1, C, h, w) float32, and as metadata what they need to be decoded.

Written are model, scaling_factor, height and width in px, and mode: `mean` or `sample` of a VAE's posterior, `invert`
for the noise that draws a picture, `diffuse` for a picture noised to step t, `generate` for one that was drawn; each
with what it was made by. Any file with the tensor is read; the metadata is checked where it is there. No torch until a
tensor is read or written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdcli.errors import InputError, NumericalError
from sdcli.files import open_regular, reason
from sdcli.layout import safetensors_header, safetensors_metadata, with_sorted_header

if TYPE_CHECKING:
    from torch import Tensor

PICTURES = ("mean", "sample", "generate")  # modes of what holds a picture
SUFFIX = ".latents.safetensors"
KEY = "latents"
MAX_BYTES = 1 << 30
MAX_SHOWN = 40  # characters of a setting that a file says it was made with
MAX_PIXELS = 128_000_000  # of the picture they give: as many as are read of one
SCALING_FACTOR = 0.18215  # the default of diffusers, which does not write what equals it
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' names


@dataclass(frozen=True)
class LatentFile:
    """What the header of a latent file says."""

    path: Path
    shape: tuple[int, ...]
    metadata: dict[str, str]


def look(path: Path) -> LatentFile:
    """Read the header of a latent file. Raises InputError when it is none, or too large."""
    open_regular(path, max_bytes=MAX_BYTES).close()
    try:
        tensor = safetensors_header(path).get(KEY)
    except InputError as error:
        raise _no_latent_file(path, error.message.removeprefix(f"{path}: ")) from error
    if tensor is None:
        raise _no_latent_file(path, f"it holds no {KEY}")
    if tensor["dtype"] not in FLOATS:
        raise InputError(f"{path}: latents of type {tensor['dtype']!r}", "expected are floating-point numbers")
    return LatentFile(path, tuple(tensor["shape"]), safetensors_metadata(path))


def check_fits(file: LatentFile, vae: Mapping[str, Any]) -> None:
    """Raise InputError unless latents belong to the VAE of this config and give a picture of a size we read."""
    channels, pixels_each = int(vae.get("latent_channels", 4)), factor(vae) ** 2
    path, shape = file.path, file.shape
    if len(shape) != 4 or shape[:2] != (1, channels) or min(shape) < 1:
        raise InputError(f"{path}: latents of shape {shape}", f"this model needs (1, {channels}, h, w)")
    if shape[2] * shape[3] * pixels_each > MAX_PIXELS:
        what = f"latents of shape {shape} give {shape[2] * shape[3] * pixels_each:,} pixels"
        raise InputError(f"{path}: {what}", f"at most {MAX_PIXELS:,} are accepted")
    scaling, written = vae.get("scaling_factor", SCALING_FACTOR), file.metadata.get("scaling_factor")
    if written is not None and not _is_number(written, scaling):
        what = f"was encoded with scaling factor {written}, this model has {scaling}"
        raise InputError(f"{path}: {what}", f"decode it with --model {file.metadata.get('model', 'REF')}")


def doubt(file: LatentFile, settings: Mapping[str, object], last: int) -> str | None:
    """Why what is drawn from a file may surprise, in a sentence: it is half a picture, or the noise of other settings.

    settings: scheduler, steps, guidance and what else was chosen, by the options' names; of an inversion they are to be
    those that it was made with. last: the model's last timestep, at which a picture is as good as gone.
    """
    said = file.metadata
    t = _number(said.get("t", ""))
    if said.get("mode") == "diffuse" and t is not None and t < last:
        what = f"holds a picture noised to t = {t:g} of {last}, not noise"
        return f"{file.path}: {what}: what is drawn from it will look like neither"
    apart = [key for key, value in settings.items() if not _says(said.get(key), value)]
    if said.get("mode") != "invert" or not apart:
        return None
    made, asked = [], []
    for key in apart:
        option = f"--{key.replace('_', '-')}"
        made.append(f"{option} {said[key][:MAX_SHOWN]}" if key in said else f"no {option}")
        asked.append(f"{option} {settings[key]}")
    what = f"is the noise of an inversion with {', '.join(made)}"
    return f"{file.path}: {what}; with {', '.join(asked)} it draws another picture"


def factor(vae: Mapping[str, Any]) -> int:
    """Pixels per latent along a side."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def read(path: Path, vae: Mapping[str, Any]) -> Tensor:
    """The latents in a file (1, C, h, w), in the type they have there, checked as by `look` and `check_fits`.

    Raises NumericalError when they are not finite.
    """
    check_fits(look(path), vae)
    from safetensors import SafetensorError, safe_open  # deferred, as the next: the header needs no torch

    try:
        with safe_open(path, framework="pt") as file:
            latents = cast("Tensor", file.get_tensor(KEY))
    except (SafetensorError, OSError, ValueError) as error:
        raise _no_latent_file(path, reason(error)) from error
    if not latents.float().isfinite().all():  # not every type can be asked
        raise NumericalError(f"{path}: holds values that are not finite", "encode the picture again with float32")
    return latents


def file_bytes(latents: Tensor, facts: Mapping[str, Any]) -> bytes:
    """A latent file of one picture's latents (1, C, h, w); facts that are None are left out."""
    from safetensors.torch import save

    texts = {key: json.dumps(value) if isinstance(value, list) else str(value) for key, value in facts.items()}
    metadata = {key: text for key, text in texts.items() if facts[key] is not None}
    return with_sorted_header(save({KEY: latents.contiguous()}, metadata))


def _no_latent_file(path: Path, why: str) -> InputError:
    return InputError(f"{path}: is no latent file ({why})", "make one with sdcli encode")


def _says(text: str | None, value: object) -> bool:
    return text is not None and (_is_number(text, value) if isinstance(value, int | float) else text == value)


def _is_number(text: str, value: object) -> bool:
    return _number(text) == value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
