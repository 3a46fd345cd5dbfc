"""What `--lora FILE[:SCALE]` means, and whether the file fits the model, as far as headers tell. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli import store
from sdcli.errors import InputError, UsageError
from sdcli.files import exists, open_regular
from sdcli.jail import is_pickled
from sdcli.pipeline.lora_keys import MAX_BYTES, changes, is_safetensors, read_header
from sdcli.pipeline.lora_names import model_layers

MAX_SCALE = 100.0
A1111_HASH_LENGTH = 12
AS_WRITTEN = "write it as FILE or FILE:0.8"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and how strongly it is to be added: 1 as it was trained, 0 not at all, below 0 the other way."""

    path: Path
    scale: float = 1.0

    def describe(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"file": str(self.path), "scale": self.scale}


def lora_file(text: str) -> LoraFile:
    """What `--lora FILE[:SCALE]` means: the whole is the file if there is one of that name, however many colons it has;
    else what follows the last colon is the scale.

    Raises UsageError for a scale that is none, InputError when there is no such file.
    """
    before, after = text.rpartition(":")[::2]
    if not before or exists(Path(text)):
        open_regular(Path(text), max_bytes=MAX_BYTES).close()
        return LoraFile(Path(text))
    if not exists(Path(before)):
        raise InputError(f"--lora {text}: no such file", AS_WRITTEN)
    try:
        scale = float(after)
    except ValueError as error:
        raise UsageError(f"--lora {text}: {after.strip() or 'an empty scale'} is no number", AS_WRITTEN) from error
    if not -MAX_SCALE <= scale <= MAX_SCALE:
        hint = f"expected is {-MAX_SCALE:g}..{MAX_SCALE:g}; 1 is as it was trained"
        raise UsageError(f"--lora {text}: the scale is out of range", hint)
    open_regular(Path(before), max_bytes=MAX_BYTES).close()
    return LoraFile(Path(before), scale)


def check_fit(files: Sequence[LoraFile], folder: Path) -> None:
    """Raise InputError for a file that does not fit a model, or is none of those that are read.

    A pickled one is read only when it is needed.
    """
    if not files:
        return
    layers = model_layers(folder)
    for one in files:
        if is_safetensors(one.path):
            changes(str(one.path), *read_header(one.path), layers)
        elif not is_pickled(one.path):
            what = f"{one.path}: is neither a safetensors file nor one of torch.save"
            raise InputError(what, "name a LoRA, LoHa or LoKr file")


def lora_facts(files: Sequence[LoraFile]) -> list[dict[str, Any]]:
    """What a record says of the LoRAs that a picture was made with: nothing of where they lie."""
    return [_facts(one) for one in files]


def content(one: LoraFile) -> list[Any]:
    """What makes a LoRA another one for the hash of a job."""
    return [store.file_hash(one.path), one.scale]


def _facts(one: LoraFile) -> dict[str, Any]:
    name = one.path.name.encode(errors="replace").decode()
    whole = store.file_hash(one.path)
    return {"file": name, "sha256": whole, "scale": one.scale, "a1111_hash": _a1111_hash(one.path, whole)}


def _a1111_hash(path: Path, whole: str) -> str:
    """What A1111's interface calls the hash of a LoRA: of safetensors the header, which may be edited, does not count.

    Source: AUTOMATIC1111/stable-diffusion-webui, modules/hashes.py, `addnet_hash_safetensors`.
    """
    if not is_safetensors(path):
        return whole[:A1111_HASH_LENGTH]
    with open_regular(path) as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return hashlib.file_digest(stream, "sha256").hexdigest()[:A1111_HASH_LENGTH]
