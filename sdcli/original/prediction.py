"""What the UNet of a single file predicts: no shape tells, so this asks, in order, whoever may know.

1. Keys that trainers leave as marks: `v_pred`, and `ztsnr` for a noise schedule that ends in pure noise.
2. The metadata of Stability's specification, `modelspec.prediction_type`, else `modelspec.architecture`.
3. A .yaml beside the file, of its name, as A1111's interface reads it: `parameterization: "v"`.
4. Of 2.x, `global_step` of 875,000: that of 2.0-base, as diffusers knows it.
5. Of 2.x, how one bias of the outermost transformer spreads: above 0.09 in models of v, as ComfyUI tells them apart.
6. Else epsilon, which is what 1.x predicts.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from sdcli.errors import InputError
from sdcli.files import exists, open_regular, read_bytes
from sdcli.headers import Entry, Header
from sdcli.original.names import UNET

EPSILON, V, SAMPLE = "epsilon", "v_prediction", "sample"
WORDS = {"epsilon": EPSILON, "eps": EPSILON, "v": V, "v_prediction": V, "v-prediction": V, "velocity": V}
MAX_YAML_BYTES = 1 << 20
MAX_NUMBERS = 1 << 16  # of a tensor that is read here; Stable Diffusion's has 320
BASE_STEP = 875_000
SPREAD = 0.09  # ComfyUI, comfy/supported_models.py, SD20.model_type
PARAMETERIZATION = re.compile(rb"^\s*parameterization:\s*[\"']?([\w-]+)", re.MULTILINE)
FORMATS = {"F64": "d", "F32": "f", "F16": "e"}


@dataclass(frozen=True)
class Prediction:
    """What a UNet predicts, in diffusers' words, and what told it."""

    kind: str
    told_by: str
    ends_in_noise: bool = False  # zero terminal SNR: Lin et al. 2023, arXiv:2305.08891


def find_prediction(path: Path, header: Header, *, is_sd2: bool) -> Prediction:
    """What the UNet of a file predicts. Raises InputError when a .yaml beside it cannot be read."""
    ends_in_noise = _has(header, "ztsnr")
    if _has(header, "v_pred"):
        return Prediction(V, "its key v_pred", ends_in_noise)
    said = WORDS.get(header.metadata.get("modelspec.prediction_type", "").lower())
    if said is not None:
        return Prediction(said, "its metadata, modelspec.prediction_type", ends_in_noise)
    architecture = header.metadata.get("modelspec.architecture", "")
    if architecture.startswith("stable-diffusion-v2"):
        kind = V if "-v" in architecture.removeprefix("stable-diffusion-v2") else EPSILON
        return Prediction(kind, "its metadata, modelspec.architecture", ends_in_noise)
    beside = path.with_suffix(".yaml")
    if exists(beside):
        match = PARAMETERIZATION.search(read_bytes(beside, max_bytes=MAX_YAML_BYTES))
        kind = WORDS.get(match[1].decode("ascii").lower(), EPSILON) if match else EPSILON  # the authors' default
        return Prediction(kind, f"{beside.name} beside it", ends_in_noise)
    if is_sd2 and header.metadata.get("global_step") == str(BASE_STEP):
        return Prediction(EPSILON, f"its global_step, {BASE_STEP}", ends_in_noise)
    bias = header.entries.get(f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias")
    if is_sd2 and bias is not None and bias.numbers <= MAX_NUMBERS and (numbers := _numbers(path, bias)):
        kind = V if _spread(numbers) > SPREAD else EPSILON
        return Prediction(kind, "how a bias of its UNet spreads", ends_in_noise)
    return Prediction(EPSILON, "its family's default", ends_in_noise)


def _has(header: Header, key: str) -> bool:
    return any(name in header.entries for name in (key, f"{UNET}{key}", f"model.{key}"))


def _numbers(path: Path, entry: Entry) -> list[float]:
    """The finite numbers of a small tensor; none where its type is unusual."""
    with open_regular(path) as stream:
        stream.seek(entry.first)
        data = stream.read(entry.last - entry.first)
    if entry.dtype == "BF16":  # the upper half of a float32
        data = b"".join(b"\0\0" + data[at : at + 2] for at in range(0, len(data), 2))
    kind = FORMATS.get("F32" if entry.dtype == "BF16" else entry.dtype)
    if kind is None:
        return []
    try:
        numbers = [value for (value,) in struct.iter_unpack(f"<{kind}", data)]
    except struct.error as error:
        raise InputError(f"{path}: is cut short", "get the file again") from error
    return numbers if all(map(math.isfinite, numbers)) else []


def _spread(numbers: list[float]) -> float:
    """The standard deviation of all, not of a sample of them."""
    mean = sum(numbers) / len(numbers)  # where fsum would raise, this is infinite
    return math.hypot(*(number - mean for number in numbers)) / math.sqrt(len(numbers))
