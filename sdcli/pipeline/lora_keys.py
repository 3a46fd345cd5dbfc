"""What a LoRA file changes, by its keys and shapes alone: which layers of a model, in which form. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdcli.errors import InputError
from sdcli.files import open_regular, reason
from sdcli.headers import parse_said
from sdcli.layout import ENCODERS, safetensors_metadata
from sdcli.original.names import SDXL, TEXT_PREFIX
from sdcli.pipeline.lora_names import ADAPTED_PARTS, WIDTHS, Layers, Shape, header_shapes, is_xl, known_names
from sdcli.pipeline.lora_shapes import Change, check_shapes

MAX_BYTES = 4 << 30
MAX_KEYS = 20_000  # SDXL's largest have some 5,000
KEYS_SHOWN = 3
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps what the keys do not say
ROLES = {  # how a key ends -> form, and what the tensor is in its formula
    ".lora_down.weight": ("lora", "down"),
    ".lora_up.weight": ("lora", "up"),
    ".lora_mid.weight": ("lora", "mid"),
    ".lora_A.weight": ("lora", "down"),
    ".lora_B.weight": ("lora", "up"),
    ".lora.down.weight": ("lora", "down"),
    ".lora.up.weight": ("lora", "up"),
    ".lora_linear_layer.down.weight": ("lora", "down"),
    ".lora_linear_layer.up.weight": ("lora", "up"),
    "_lora.down.weight": ("lora", "down"),
    "_lora.up.weight": ("lora", "up"),
    **{f".hada_{name}": ("loha", name) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": ("lokr", name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".alpha": ("", "alpha"),
    ".dora_scale": ("", "dora"),
    ".lora_magnitude_vector": ("", "magnitude"),
    ".lora_magnitude_vector.weight": ("", "magnitude"),
}
REFUSED = (  # what is in a key -> what is refused by its name
    (re.compile(r"\.oft_"), "OFT"),
    (re.compile(r"\.boft_"), "BOFT"),
    (re.compile(r"\.(on_input|ia3_l)$"), "IA3"),
    (re.compile(r"\.(a|b)[12]\.weight$"), "GLoRA"),
    (re.compile(r"\.diff(_b)?$"), "full differences of weights"),
    (re.compile(r"\.[wb]_norm$"), "norms"),
    (re.compile(r"\.vera_"), "VeRA"),
    (re.compile(r"\.lora_(A|B|up|down)\.bias$"), "biases beside LoRA"),
    (re.compile(r"\.lora_embedding_"), "LoRA of token tables"),
    (re.compile(r"^bundle_emb\."), "textual inversions in a bundle"),
    (re.compile(r"^base_model\.model\."), "peft's own naming, whose alpha is in another file"),
)
OF_FAMILY = (  # what is in the keys for no Stable Diffusion 1.x or 2.x -> the family
    (re.compile(r"lora_te3|(^|[._])joint_(transformer_)?blocks"), "Stable Diffusion 3"),
    (re.compile(r"(^|[._])(double|single)_(transformer_)?blocks|^transformer\."), "a transformer such as Flux"),
    (re.compile(r"^lora_te[12]_|^text_encoder(_2|s\.clip_g)\.|[._]transformer_blocks[._][1-9]"), SDXL),
)
# What Stable Diffusion XL does not have: attention in the outermost of four levels, a text encoder without a number.
OF_ONE_ENCODER = re.compile(
    r"^lora_te_|(down_blocks[._]0|up_blocks[._]3)[._]attentions|input_blocks[._][12][._]1[._]|output_blocks[._](9|1\d)"
)
CONTEXT_WIDTHS = WIDTHS | {2048: SDXL}
# The layers that tell the width of the context, in a file and in a model: those that read it, and the text encoder's.
READING = (re.compile(r"attn2[._]to_[kv]"), ("unet", "attn2.to_k"))
WRITING = (
    re.compile(r"^(lora_te_|text_encoder(s\.clip_[lh])?\.).*self_attn[._][qkv]_proj"),
    ("text_encoder", "self_attn.q_proj"),
)
PATTERN = re.compile(r"\^?([\w.]+)\$?")  # of layers, as far as they are names


def changes(where: str, shapes: Mapping[str, Shape], metadata: Mapping[str, str], layers: Layers) -> list[Change]:
    """What a file of these tensors changes in a model of these layers; every tensor has its use.

    where: the file, for errors.
    Raises InputError, naming kind, family or examples, when the file is no LoRA, is for another model, or malformed.
    """
    _check_kind(where, shapes)
    _check_width(where, shapes, layers)
    names, found, lost = known_names(layers), dict[tuple[str, str], Change](), list[str]()
    for key in shapes:
        ending = ending_of(key)
        layer = next((names[one] for one in _stems(key, ending) if one in names), None) if ending else None
        if layer is None:
            lost.append(key)
            continue
        change = found.setdefault(layer, Change(*layer))
        form, role = ROLES[ending]
        if role in change.keys or (form and change.form and form != change.form):
            raise InputError(f"{where}: changes the layer {layer[1]} twice ({key})", "get the file again")
        change.keys[role] = key
        change.form = change.form or form
    if lost:
        raise _lost(where, lost, shapes, metadata, layers)
    for change in found.values():
        check_shapes(where, change, shapes, layers[change.part][change.layer])
    _read_alphas(where, found.values(), metadata)
    return list(found.values())


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: eight bytes of length, then JSON.

    Raises InputError for no file, or an empty one.
    """
    with open_regular(path, max_bytes=MAX_BYTES) as stream:
        start = stream.read(9)
    if not start:
        raise InputError(f"{path}: is empty", "get the file again")
    return start[8:] == b"{"


def read_header(path: Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """The shapes of a safetensors file by their keys, and its metadata. Raises InputError for a malformed one."""
    open_regular(path, max_bytes=MAX_BYTES).close()
    return header_shapes(path), safetensors_metadata(path)


def ending_of(key: str) -> str:
    """The longest of the known endings of keys; empty for a key of none."""
    return max((ending for ending in ROLES if key.endswith(ending)), key=len, default="")


def family_of(shapes: Mapping[str, Shape]) -> str | None:
    """The family of models that a file is for, by its keys and widths; None where they do not tell."""
    read, written = (CONTEXT_WIDTHS.get(_width(shapes, pattern) or 0) for pattern, _ in (READING, WRITING))
    named = (family for pattern, family in OF_FAMILY if any(map(pattern.search, shapes)))
    return read or next(named, None) or written


def _width(shapes: Mapping[str, Shape], pattern: re.Pattern[str]) -> int | None:
    """The width that a file's layers of such names read; None where no key tells it."""
    for key, shape in shapes.items():
        form, role = ROLES.get(ending_of(key), ("", ""))
        if (form, role) in (("lora", "down"), ("loha", "w1_b")) and len(shape) == 2 and pattern.search(key):
            return shape[1]
    return None


def said_base(metadata: Mapping[str, str]) -> str | None:
    """The model that a file says it was trained on: kohya's key, or that of ModelSpec."""
    return metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")


def _check_kind(where: str, shapes: Mapping[str, Shape]) -> None:
    if len(shapes) > MAX_KEYS:
        raise InputError(f"{where}: holds {len(shapes):,} tensors", f"at most {MAX_KEYS:,} are read")
    refused: dict[str, list[str]] = {}
    for key in shapes:
        kind = next((kind for pattern, kind in REFUSED if pattern.search(key)), None)
        if kind is not None:
            refused.setdefault(kind, []).append(key)
    if refused:
        kind, keys = max(refused.items(), key=lambda one: len(one[1]))
        what = f"{where}: holds {kind}, in {len(keys)} of {len(shapes)} tensors ({first_keys(keys)})"
        raise InputError(what, "read are LoRA, LoCon, DoRA, LoHa and LoKr")
    if not any(map(ending_of, shapes)):
        hint = "give a textual inversion to --embedding" if len(shapes) <= 2 else "name a LoRA, LoHa or LoKr file"
        raise InputError(f"{where}: is no LoRA file: it holds {first_keys(list(shapes)) or 'nothing'}", hint)


def _check_width(where: str, shapes: Mapping[str, Shape], layers: Layers) -> None:
    for pattern, (part, end) in (READING, WRITING):
        given, wanted = _width(shapes, pattern), _model_width(layers, part, end)
        if given is not None and wanted is not None and given != wanted:
            families = (family_of(shapes), _model_family(layers))
            told = [
                f"{width} wide" + (f" ({one})" if one else "")
                for width, one in zip((given, wanted), families, strict=True)
            ]
            what = f"{where}: is for a context {told[0]}, the model's is {told[1]}"
            raise InputError(what, "use one that was made for this model")


def _model_width(layers: Layers, part: str, end: str) -> int | None:
    return next((shape[1] for name, shape in layers.get(part, {}).items() if name.endswith(end)), None)


def _model_family(layers: Layers) -> str | None:
    widths = (_model_width(layers, part, end) for _, (part, end) in (READING, WRITING))
    return SDXL if is_xl(layers) else next((CONTEXT_WIDTHS.get(width) for width in widths if width is not None), None)


def _stems(key: str, ending: str) -> Iterator[str]:
    """What may be the layer's name in a key: as it stands, or as diffusers' attention processors had it."""
    stem = key.removesuffix(ending)
    yield stem
    if ending.startswith("_lora."):
        stem = stem.replace(".processor.", ".")
        yield stem
        yield f"{stem}.0"  # to_out
        block, _, last = stem.rpartition(".to_")
        yield f"{block}.{last}_proj"  # of the text encoder


def _lost(
    where: str, lost: list[str], shapes: Mapping[str, Shape], metadata: Mapping[str, str], layers: Layers
) -> InputError:
    """The error for tensors that belong to no layer of the model."""
    what = f"{where}: {len(lost)} of {len(shapes)} tensors belong to no layer of the model ({first_keys(lost)})"
    if not layers.keys() & set(ENCODERS) and any(key.startswith(("lora_te", "text_encoder")) for key in lost):
        return InputError(f"{what}; the model has no text encoder", "use one that was made for this model")
    family, own = family_of({key: shapes[key] for key in lost}), _model_family(layers)
    if family is None and is_xl(layers) and any(map(OF_ONE_ENCODER.search, lost)):
        family = "Stable Diffusion 1.x or 2.x"
    said = said_base(metadata)
    if family is not None and family != own:
        what += f"; it is for {family}"
    elif said is not None:
        what += f"; it says that it is for {said[:60]!r}"
    return InputError(what, "use one that was made for this model")


def first_keys(keys: Collection[object]) -> str:
    """The first keys of a file, as an error names them: whoever wrote it chose how many and how long."""
    return ", ".join(key[:100] for key in sorted(map(str, keys))[:KEYS_SHOWN]) + (
        ", ..." if len(keys) > KEYS_SHOWN else ""
    )


def _read_alphas(where: str, found: Iterable[Change], metadata: Mapping[str, str]) -> None:
    """Set what diffusers' metadata say of alpha. Raises InputError where they cannot be understood."""
    if METADATA_KEY not in metadata:
        return
    try:
        said = parse_said(metadata[METADATA_KEY])
        has_parts = any(key.startswith(tuple(f"{part}." for part in ADAPTED_PARTS)) for key in said)
        for change in found:
            of_part = f"{change.part}." if has_parts else ""  # without: saved by the part alone
            alpha = said.get(f"{of_part}lora_alpha")
            alpha = _by_pattern(said.get(f"{of_part}alpha_pattern") or {}, change.layer, alpha)
            change.alpha = None if alpha is None else float(alpha)
            change.is_root = bool(said.get(f"{of_part}use_rslora", False))
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        hint = "save it again with diffusers"
        raise InputError(f"{where}: its {METADATA_KEY} cannot be read ({reason(error)})", hint) from error


def _by_pattern(patterns: Mapping[str, object], layer: str, usual: Any) -> Any:
    """What the first fitting pattern says of a layer: peft's are names of layers, or the ends of names."""
    for pattern, value in patterns.items():
        name = PATTERN.fullmatch(pattern.replace("\\.", "."))
        if name is None:
            raise ValueError(f"the pattern {pattern[:60]!r} is no name of a layer")
        is_whole = pattern.startswith("^")
        end = name[1].removeprefix(TEXT_PREFIX)
        if layer == end or (not is_whole and layer.endswith(f".{end}")):
            return value
    return usual
