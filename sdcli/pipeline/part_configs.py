"""What the config of a model's part may say, before anything is built by it. It is untrusted. No torch.

Building costs time and memory by the numbers in a config, before a single weight is compared with them: so counts and
lists have limits, and so has their product. What a text encoder is built with is chosen by name, because transformers
takes more from a config than sizes: code to fetch, tables to fill, types to look up.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Iterator, Mapping
from inspect import Parameter
from typing import Any, get_args, get_origin

from sdcli.errors import InputError

Config = dict[str, Any]

MAX_LAYERS = 100  # of any count of layers; Stable Diffusion's reach 24
MAX_BLOCKS = 2000  # layers by transformers by levels; those of Stable Diffusion XL are 90
MAX_ENTRIES = 16  # of a list: one a level, of which there are up to 8, or one a channel
MAX_NUMBER = 1 << 20  # channels, groups, kernels; Stable Diffusion's reach 4,096
MAX_ROWS = 1 << 24  # of a table of words, which has one for each
MAX_TEXT = 200  # characters
MIN_SCALE, MAX_SCALE = 1e-4, 1e4  # of latents; those of known models are 0.13 to 0.92
LAYER_KEYS = frozenset(
    {"layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block", "num_hidden_layers"}
)
ROW_KEYS = frozenset({"vocab_size", "num_vq_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"})
TEXT_KEYS = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"}
    | {"max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout"}
    | {"initializer_range", "initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id"}
)
KINDS: dict[type, tuple[type, ...]] = {bool: (bool,), str: (str,), int: (int, float), float: (int, float)}
WORDS: dict[type, str] = {bool: "true or false", str: "a word", int: "an integer", float: "a number"}
# Other numbers between latents and UNet, which known models leave empty and nothing here applies.
UNHEARD_KEYS = ("latents_mean", "latents_std")


def checked(name: str, config: Mapping[str, Any]) -> Config:
    """What a part is built with: its config without names of our own and what its class has no use for.

    name: its class. Raises InputError, naming the key, for what is out of range.
    """
    found = {key: value for key, value in config.items() if not key.startswith("_")}
    if name.startswith("CLIPText"):
        found = {key: value for key, value in found.items() if key in TEXT_KEYS}
    if name == "ClassEmbedder":  # whose names have limits of their own
        return found
    for key, value in found.items():
        _check(name, key, value)
    _check_blocks(name, found)
    scale = found.get("scaling_factor")
    if scale is not None and (type(scale) not in (int, float) or not MIN_SCALE <= scale <= MAX_SCALE):
        raise _refusal(name, "scaling_factor", scale, f"a number from {MIN_SCALE} to {MAX_SCALE}")
    for key in UNHEARD_KEYS:
        if found.get(key) is not None:
            raise _refusal(name, key, found[key], "null: only scaling_factor and shift_factor are applied")
    return found


def check_kinds(name: str, config: Mapping[str, Any], arguments: Mapping[str, Parameter]) -> None:
    """Raise InputError for a value that is of no kind that its class asks for: "no", or a list, would count as true.

    arguments: of the class, with what they are annotated to be, else by what they are if nothing is said.
    """
    for key in sorted(config.keys() & arguments.keys()):
        value, asked = config[key], arguments[key]
        hint = type(asked.default) if asked.annotation is Parameter.empty else asked.annotation
        kinds = {kind for one in _types(hint) for kind in KINDS.get(one, ())}
        # null counts as false, which is not what is meant where nothing said means true
        is_fit = asked.default is not True if value is None else _is_of(value, kinds, _depth(hint))
        if kinds and not is_fit:
            said = "a number" if float in kinds else " or ".join(sorted(WORDS[kind] for kind in kinds))
            raise _refusal(name, key, value, said + (", or a list of such" if _depth(hint) else ""))


def _is_of(value: object, kinds: Collection[type], depth: int) -> bool:
    """Whether a value is of one of these types, or a list of such in as many levels as may be, none of them empty."""
    if isinstance(value, list | tuple):
        return depth > 0 and bool(value) and all(_is_of(one, kinds, depth - 1) for one in value)
    return type(value) in kinds


def _types(hint: Any) -> Iterator[Any]:
    """The types that an annotation is made of: `int | tuple[int, int]` of int, tuple and int."""
    yield get_origin(hint) or hint
    for one in get_args(hint):
        yield from _types(one)


def _depth(hint: Any) -> int:
    """Lists in lists that an annotation allows: 1 of `int | tuple[int, int]`, 2 of `tuple[tuple[int]]`."""
    inner = max(map(_depth, get_args(hint)), default=0)
    return inner + (hint is tuple or get_origin(hint) is tuple)


def _check(name: str, key: str, value: object) -> None:
    most = MAX_LAYERS if key in LAYER_KEYS else MAX_ROWS if key in ROW_KEYS else MAX_NUMBER
    entries = _flat(value)
    is_long = isinstance(value, list) and len(value) > MAX_ENTRIES
    if isinstance(value, dict) or is_long or len(entries) > MAX_ENTRIES**2:
        raise _refusal(name, key, value, f"a value, or up to {MAX_ENTRIES}")
    for entry in entries:
        if isinstance(entry, str) and len(entry) > MAX_TEXT:
            raise _refusal(name, key, value, f"text of up to {MAX_TEXT} characters")
        if key in LAYER_KEYS and not (type(entry) is int and 0 <= entry <= MAX_LAYERS):
            raise _refusal(name, key, value, f"a number of layers up to {MAX_LAYERS}")
        if isinstance(entry, int | float) and not abs(entry) <= most:  # nor NaN
            raise _refusal(name, key, value, f"a number up to {most:,}")
        if key.endswith("eps") and not (isinstance(entry, int | float) and 0 <= entry <= 1):
            raise _refusal(name, key, value, "a number from 0 to 1")


def _check_blocks(name: str, config: Config) -> None:
    """Raise InputError for more layers, each of more transformers, on more levels than any model has."""
    levels = max((len(config[key]) for key in config if isinstance(config[key], list)), default=1)
    counts = [max([1, *map(int, _flat(config[key]))]) for key in sorted(config.keys() & LAYER_KEYS)]
    if levels * math.prod(sorted(counts)[-2:]) > MAX_BLOCKS:
        said = {key: config[key] for key in sorted(config.keys() & LAYER_KEYS)}
        raise InputError(f"{name}: has {reprlib.repr(said)} on {levels} levels", f"expected are {MAX_BLOCKS:,} in all")


def _flat(value: object) -> list[Any]:
    """The entries of a list and of the lists in it; None has none."""
    if isinstance(value, list | tuple):
        return [entry for one in value for entry in _flat(one)]
    return [] if value is None else [value]


def _refusal(name: str, key: str, value: object, expected: str) -> InputError:
    return InputError(f"{name}: {key} is {reprlib.repr(value)}", f"expected is {expected}")
