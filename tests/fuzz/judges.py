"""What may be read: a damaged file that our reader takes must be sound by somebody else's reading of it.

The rules, for a file that was read and not refused:

1. Safetensors: the reference library opens it, too; no name is there twice; every number is finite. Of a part of a
   model the names and shapes are those of the sound file. Of a latent file, shape and scaling factor are those of its
   model.
2. JSON: it parses without a name twice and without NaN, and every value that anything here listens to is of the kind
   that it was of: then it is another valid file, and says what it says. A value that is gone stands for its default.
3. Where neither a value that is listened to nor a tensor has changed, what is drawn is to the bit what the sound model
   draws; where one has, it is what the file says, and finite, or it is refused with exit code 7.

A judge says which rule a file breaks, or None. It knows nothing of our readers but which values they listen to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

Judge = Callable[[Path, Path], str | None]  # given the sound file and the damaged one

# Values that nothing listens to: other programs' notes, and what stands in a file for the benefit of its reader.
DEAF = {
    "model_index.json": lambda key: key not in ("_class_name", "force_zeros_for_empty_prompt"),
    "tokenizer_config.json": lambda key: key not in ("bos_token", "eos_token", "unk_token", "pad_token"),
    "config.json": lambda key: key.startswith("_") and key != "_class_name",
    "scheduler_config.json": lambda key: key.startswith("_") and key != "_class_name",
}
TEXT_ENCODER_HEARS = frozenset(
    {"architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    | {"max_position_embeddings", "hidden_act", "layer_norm_eps"}
)


def safetensors_objection(path: Path) -> str | None:
    """Rule 1, as far as it is the same for all."""
    data = path.read_bytes()
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=_once)
    except (SafetensorError, ValueError, KeyError) as error:
        return f"the reference library, or JSON, does not read it: {error}"
    if set(header) - {"__metadata__"} != set(tensors):
        return "it has other tensors than its header names"
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.double().isfinite().all()):
            return f"{name} is not finite"
    return None


def weights(sound: Path, damaged: Path) -> str | None:
    """Of a part of a model: the names and shapes are those of the sound file, too."""
    objection = safetensors_objection(damaged)
    if objection is not None:
        return objection
    was, found = shapes(load_file(sound)), shapes(load_file(damaged))
    changed = {name for name in was.keys() | found.keys() if was.get(name) != found.get(name)}
    return f"{sorted(changed)[:3]} have other shapes, or are not there" if changed else None


def adapter(sound: Path, damaged: Path) -> str | None:
    """Of a LoRA: each name is one of the sound file's, for a tensor that is none belongs to no layer."""
    objection = safetensors_objection(damaged)
    if objection is not None:
        return objection
    strange = load_file(damaged).keys() - load_file(sound).keys()
    return f"{sorted(strange)[:3]} belong to no layer" if strange else None


def word(width: int) -> Judge:
    """Of a learned word: one tensor of up to 75 vectors of this width, not all of them zero."""

    def judge(sound: Path, damaged: Path) -> str | None:
        objection = safetensors_objection(damaged)
        if objection is not None:
            return objection
        tensors = list(load_file(damaged).values())
        vectors = tensors[0].reshape(-1, tensors[0].shape[-1]) if len(tensors) == 1 and tensors[0].dim() else None
        if vectors is None or vectors.shape[1] != width or not 1 <= len(vectors) <= 75 or not bool(vectors.any()):
            return f"holds {shapes(load_file(damaged))}"
        return None

    return judge


def latents(sound: Path, damaged: Path) -> str | None:
    """Of a latent file: (1, C, h, w) with the channels, and for the scaling factor, of its model."""
    objection = safetensors_objection(damaged)
    if objection is not None:
        return objection
    found, was = load_file(damaged), load_file(sound)["latents"]
    tensor = found.get("latents")
    if tensor is None or tensor.dim() != 4 or tensor.shape[:2] != was.shape[:2] or not tensor.is_floating_point():
        return f"holds {shapes(found)}"
    said = _metadata(damaged).get("scaling_factor")
    if said is not None and not _is_same_number(said, _metadata(sound)["scaling_factor"]):
        return f"has the scaling factor {said!r}"
    return None


def text(sound: Path, damaged: Path) -> str | None:
    """Rule 2, of a JSON file of a model; other texts have no second reader."""
    if damaged.suffix != ".json" or not sound.exists() or not damaged.exists():
        return None
    try:
        found = json.loads(damaged.read_bytes(), object_pairs_hook=_once, parse_constant=_constant)
    except ValueError as error:
        return f"is no JSON to be sure of: {error}"
    was = json.loads(sound.read_bytes())
    for key in heard(damaged, found.keys() & was.keys()):
        if None not in (found[key], was[key]) and _kind(found[key], key) != _kind(was[key], key):
            return f"{key} was {str(was[key])[:50]!r} and is {str(found[key])[:50]!r}"
    return None


def of_a_model(sound: Path, damaged: Path) -> str | None:
    """Rules 1 and 2, by the kind of file."""
    if not damaged.is_file() or not sound.is_file():
        return None  # what is no file, or was none, is judged by what is drawn
    return (weights if damaged.suffix == ".safetensors" else text)(sound, damaged)


def is_the_same_to_hear(sound: Path, damaged: Path) -> bool:
    """Whether nothing has changed that anything listens to: then the same must be drawn (rule 3)."""
    if not damaged.is_file() or not sound.is_file():
        return False
    if damaged.suffix == ".safetensors":
        was, found = load_file(sound), load_file(damaged)
        same = (_is_same_tensor(was[name], found[name]) for name in was if name in found)
        return was.keys() == found.keys() and all(same)
    if damaged.suffix != ".json":
        return damaged.read_bytes() == sound.read_bytes()
    was, found = json.loads(sound.read_bytes()), json.loads(damaged.read_bytes())
    return all(
        key in was and key in found and was[key] == found[key] for key in heard(damaged, was.keys() | found.keys())
    )


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def heard(path: Path, keys: Any) -> Iterator[str]:
    """The keys of a JSON file that anything listens to."""
    is_deaf = DEAF.get(path.name, lambda key: False)
    for key in sorted(keys):
        if path.parent.name in ("text_encoder", "text_encoder_2") and path.name == "config.json":
            if key in TEXT_ENCODER_HEARS:
                yield key
        elif not is_deaf(key):
            yield key


def _is_same_tensor(was: Tensor, found: Tensor) -> bool:
    return was.shape == found.shape and bool(torch.equal(was.double(), found.double()))


def _metadata(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {})


def _is_same_number(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return False


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)


def _kind(value: object, key: str = "") -> str:
    if key.endswith("_token") and isinstance(value, str | dict):
        return "mark"  # as text, or with how it is matched
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
