"""What a LoRA or textual-inversion file is, from its header alone, without the model it is for. No torch."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdcli.errors import InputError
from sdcli.files import open_regular
from sdcli.headers import parse_said
from sdcli.layout import safetensors_header
from sdcli.original.names import SDXL
from sdcli.pipeline.lora_keys import (
    MAX_BYTES,
    METADATA_KEY,
    ROLES,
    ending_of,
    family_of,
    first_keys,
    is_safetensors,
    read_header,
    said_base,
)
from sdcli.pipeline.lora_names import WIDTHS, Shape

EMBEDDING_WIDTHS = WIDTHS | {1280: f"the second text encoder of {SDXL}"}
# Keys of what is for the first and for the second text encoder of Stable Diffusion XL: A1111's, diffusers' trainers'.
PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
FORMS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
# How a key begins -> the part of the model, and who names it so; what begins otherwise is the UNet's.
PREFIXES = {
    "lora_unet_input_blocks_": ("unet", "kohya, in the original naming"),
    "lora_unet_output_blocks_": ("unet", "kohya, in the original naming"),
    "lora_unet_": ("unet", "kohya"),
    "lora_te2_": ("text_encoder_2", "kohya"),
    "lora_te": ("text_encoder", "kohya"),
    "lycoris_": ("unet", "LyCORIS"),
    "diffusion_model.": ("unet", "ComfyUI"),
    "text_encoders.clip_g.": ("text_encoder_2", "ComfyUI"),
    "text_encoders.": ("text_encoder", "ComfyUI"),
    "text_encoder_2.": ("text_encoder_2", "diffusers"),
    "text_encoder.": ("text_encoder", "diffusers"),
    "": ("unet", "diffusers"),
}
TITLES = ("modelspec.title", "ss_output_name")
NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}  # as struct reads them
MAX_TEXT = 200  # characters of what a file says


def describe(path: Path) -> dict[str, Any] | None:
    """The facts of a LoRA or textual-inversion file as plain values; None for a file that is neither, or is pickled.

    For a LoRA: dialects, forms, ranks and alphas with the number of layers that have each, layers by part, family, and
    what it says of itself. Raises InputError for a malformed header.
    """
    if not is_safetensors(path):
        return None
    shapes, metadata = read_header(path)
    if any(map(ending_of, shapes)):
        return lora_facts(shapes, metadata, _alphas(path) or _said_alphas(metadata))
    return embedding_facts(shapes)


def lora_facts(shapes: Mapping[str, Shape], metadata: Mapping[str, str], alphas: Mapping[float, int]) -> dict[str, Any]:
    """The facts of a LoRA of these tensors. alphas: how many layers have each."""
    layers: dict[str, tuple[str, str]] = {}
    forms, ranks = Counter[str](), Counter[int]()
    has_dora = False
    for key, shape in shapes.items():
        form, role = ROLES.get(ending := ending_of(key), ("", ""))
        prefix = next(one for one in PREFIXES if key.startswith(one))
        if form:
            layers[key.removesuffix(ending)] = PREFIXES[prefix]
        if role in ("down", "w1_b", "w2_b") and shape and not (form == "loha" and role == "w2_b"):
            forms[FORMS[form]] += 1
            ranks[shape[0]] += 1
        has_dora = has_dora or role in ("dora", "magnitude")
    facts: dict[str, Any] = {
        "kind": "LoRA",
        "dialects": sorted({dialect for _, dialect in layers.values()}),
        "forms": sorted(forms) + (["DoRA"] if has_dora else []),
        "ranks": _counted(ranks),
        "alphas": _counted(alphas),
        "layers": dict(Counter(part for part, _ in layers.values())),
        "tensors": len(shapes),
        "family": family_of(shapes),
        "base_model": said_base(metadata),
        "title": next((metadata[name] for name in TITLES if metadata.get(name)), None),
        "trigger": metadata.get("modelspec.trigger_phrase"),
        "trained_by": metadata.get("ss_network_module"),
    }
    return {key: value[:MAX_TEXT] if isinstance(value, str) else value for key, value in facts.items()}


def encoder_keys(keys: Collection[str | int]) -> tuple[str, ...] | None:
    """The keys of what is for each text encoder, where a file names them: a pair, or the first of one alone."""
    return next((some for pair in PAIRS for some in (pair, pair[:1]) if set(keys) == set(some)), None)


def check_pair(where: str, keys: Collection[str | int]) -> None:
    """Raise InputError for a file that names one of several text encoders, and not as they are named."""
    for pair in PAIRS:
        if set(keys) & set(pair) and encoder_keys(keys) is None:
            what = f"{where}: is no pair for the two text encoders of {SDXL}: it holds {first_keys(keys)}"
            raise InputError(what, f"expected are {' and '.join(pair)}")


def vector_widths(shapes: Mapping[str, Shape]) -> list[int]:
    """How wide the vectors of a textual-inversion file are, for each text encoder; empty for other files."""
    named = encoder_keys(shapes)
    keys = named or tuple(shapes)
    if (len(keys) > 1 and named is None) or not all(len(shapes[key]) in (1, 2) for key in keys):
        return []
    return [shapes[key][-1] for key in keys]


def check_widths(where: str, given: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise InputError, naming families, unless vectors are as wide as those of the model's text encoders."""
    if list(given) != list(wanted):
        what = f"{where}: its vectors are {_wide(given)}, the model's {_wide(wanted)}"
        raise InputError(what, "use one that was made for it")


def _wide(widths: Sequence[int]) -> str:
    """How wide vectors are, and for which models that is: a pair is for Stable Diffusion XL, however wide."""
    family = SDXL if len(widths) == 2 else EMBEDDING_WIDTHS.get(widths[0])
    return f"{' and '.join(map(str, widths))} wide" + (f" ({family})" if family is not None else "")


def embedding_facts(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The facts of a textual inversion of these tensors; None where they make none."""
    widths = vector_widths(shapes)
    if not widths:
        return None
    key, shape = next(iter(shapes.items()))
    facts: dict[str, Any] = {"kind": "textual inversion", "dialects": ["diffusers"]}
    facts |= {"vectors": shape[0] if len(shape) == 2 else 1, "width": widths[0]}
    if len(widths) == 2:
        return facts | {"width": widths, "dialects": ["a pair for two text encoders"], "family": SDXL}
    facts["family"] = EMBEDDING_WIDTHS.get(widths[0])
    if encoder_keys(shapes) is not None:  # the file's name is the token
        return facts
    return facts | ({"dialects": ["kohya"]} if key == "emb_params" else {"token": key[:MAX_TEXT]})


def _alphas(path: Path) -> Counter[float]:
    """The numbers that stand as alphas in a file; those of other types than IEEE's are left out."""
    found = Counter[float]()
    header = safetensors_header(path)
    with open_regular(path, max_bytes=MAX_BYTES) as stream:
        begin = 8 + int.from_bytes(stream.read(8), "little")
        for key, one in header.items():
            form, place = NUMBERS.get(str(one.get("dtype"))), one["data_offsets"][0]
            if key.endswith(".alpha") and form is not None and type(place) is int and 0 <= place < MAX_BYTES:
                stream.seek(begin + place)
                data = stream.read(struct.calcsize(form))
                if len(data) == struct.calcsize(form):
                    found[struct.unpack(form, data)[0]] += 1
    return found


def _said_alphas(metadata: Mapping[str, str]) -> Counter[float]:
    """The alphas that diffusers' metadata give parts of the model; none where they cannot be read."""
    try:
        said = parse_said(metadata.get(METADATA_KEY, "{}"))
        return Counter(float(value) for key, value in said.items() if key.endswith("lora_alpha") and value is not None)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return Counter()


def _counted(found: Mapping[Any, int]) -> dict[str, int]:
    """Values as JSON has them for keys, the commonest first."""
    return {f"{value:g}": count for value, count in sorted(found.items(), key=lambda one: -one[1])}
