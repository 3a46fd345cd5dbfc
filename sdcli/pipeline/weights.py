"""The tensors of a model's parts: out of its files, under the names of the modules, and into a file.

They are mapped from disk, not read: what holds them costs no memory of its own until it is changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdcli import layout
from sdcli.errors import InputError, NumericalError
from sdcli.files import atomic_write
from sdcli.headers import METADATA, read_header
from sdcli.original.checkpoint import PART_NAMES, Checkpoint
from sdcli.original.names import TEXT_PREFIX
from sdcli.original.parts import Source

State = dict[str, Tensor]

OLD_ATTENTION_KEYS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
DTYPES = {  # safetensors' names of the types that are written, in the order in which its library writes them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def read_state(place: Path, part: str, *, averaged: bool = False) -> State:
    """The tensors of one part of a model by their modules' names, as they are on disk, checked by nobody.

    averaged: the UNet's averages over its training (EMA), which some single files hold besides.
    Raises InputError when files are missing or damaged, or there are no averages.
    """
    checkpoint = layout.single_file(place)
    if checkpoint is None:
        if averaged and part == "unet":
            raise InputError(f"{place}: holds no averaged weights (EMA)", "leave out --ema")
        state: State = {}
        for path in layout.weight_files(place, part):
            for key, tensor in _read_file(path).items():
                if key in state:
                    raise InputError(f"{path}: {key} is in another shard, too", "get the files again")
                state[key] = tensor
        return _modern_keys(state, part)
    return _from_single_file(checkpoint, part, averaged)


def read_tensors(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file by their names there. Raises InputError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path}: is no whole safetensors file ({error})", "get the file again") from error


def check_shapes(
    place: Path, part: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise InputError unless a part has all the tensors its config asks for, no others, and in their shapes."""
    path = place if place.is_file() else place / part
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        example = (missing or unexpected)[0]
        whose = f"of its {PART_NAMES[part]} " if place.is_file() else ""
        what = f"{len(missing)} tensors {whose}are missing and {len(unexpected)} unexpected ({example}, for one)"
        raise InputError(f"{path}: {what}", "weights and config.json belong to different models")
    for key, shape in expected.items():
        if found[key] != shape:
            raise InputError(f"{path}: {key} has shape {found[key]}, the config says {shape}", "mend config.json")


def check_numbers(place: Path, part: str, state: Mapping[str, Tensor]) -> None:
    """Raise InputError for a tensor of whole numbers, NumericalError for one that holds NaN or Inf."""
    path = place if place.is_file() else place / part
    for key, value in state.items():
        if not value.is_floating_point():
            raise InputError(f"{path}: {key} is of type {value.dtype}", "weights are floating-point numbers")
        if not is_finite(value):
            raise NumericalError(f"{path}: {key} holds NaN or Inf", "get the weights again")


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is finite.

    A finite sum tells, as what is not finite leaves none, and takes a third of the time that least and greatest take.
    Those tell where the sum is too large for its type; NaN is both. Types of 8 bits have no such questions and are
    asked in a wider one.
    """
    if not tensor.numel():
        return True
    if tensor.itemsize > 1 and bool(tensor.sum().isfinite()):
        return True
    return bool(torch.stack(torch.aminmax(tensor if tensor.itemsize > 1 else tensor.float())).isfinite().all())


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors by their names."""
    return {key: tuple(value.shape) for key, value in state.items()}


def write_tensors(
    path: Path,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    *,
    overwrite: bool = True,
) -> None:
    """Write floating-point tensors as safetensors, one after the other: none but the one at hand takes memory.

    dtype: of all of them; None leaves each its own. The same tensors give the same bytes.
    overwrite: False raises FileExistsError when there is such a file.
    Raises InputError for whole numbers, NumericalError for a number that the type cannot hold, OutputError when the
    disk refuses.
    """
    for key, tensor in state.items():
        if tensor.dtype not in DTYPES:
            raise InputError(f"{key}: is of type {tensor.dtype}", "weights are floating-point numbers")
    types = {key: dtype if dtype is not None else tensor.dtype for key, tensor in state.items()}
    ranks = list(DTYPES)
    order = sorted(state, key=lambda key: (ranks.index(types[key]), key))  # the widest first: all are aligned
    header: dict[str, object] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for key in order:
        begin, end = end, end + state[key].numel() * types[key].itemsize
        header[key] = {"dtype": DTYPES[types[key]], "shape": list(state[key].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()  # to the byte as the library writes it
    text += b" " * (-len(text) % 8)
    with atomic_write(path, overwrite=overwrite) as part, part.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            tensor = state[key].detach().to("cpu", types[key]).contiguous()
            if not is_finite(tensor):
                raise NumericalError(f"{path}: {key} is not finite in {types[key]}", "nothing was written")
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _from_single_file(checkpoint: Checkpoint, part: str, averaged: bool) -> State:
    path = checkpoint.path
    sources = checkpoint.averages if averaged and part == "unet" else checkpoint.sources.get(part, {})
    if not sources:
        what = "no averaged weights (EMA)" if averaged and part == "unet" else f"no {PART_NAMES.get(part, part)}"
        raise InputError(f"{path}: holds {what}", "name a file that does")
    read = dict(read_tensors(path, {source.name for source in sources.values()}))
    return {key: _tensor(read[source.name], source) for key, source in sources.items()}


def _tensor(tensor: Tensor, source: Source) -> Tensor:
    """The tensor of a source: a third of the rows where three are one, a matrix for a 1 x 1 kernel, rows for columns.

    Only the last takes memory.
    """
    if source.is_transposed:
        return tensor.T.contiguous()
    if source.third is not None:
        rows = source.shape[0]
        tensor = tensor[source.third * rows : (source.third + 1) * rows]
    return tensor.reshape(source.shape)


def _read_file(path: Path) -> State:
    return dict(read_tensors(path, read_header(path).entries))


def _modern_keys(state: State, part: str) -> State:
    """Bring the key names of older writers to those of the modules."""
    if part == "text_encoder":
        state = {key.removeprefix(TEXT_PREFIX): value for key, value in state.items()}
    for buffer in ("embeddings.position_ids", f"{TEXT_PREFIX}embeddings.position_ids"):
        if part in layout.ENCODERS:
            state.pop(buffer, None)
    if part == "vae":
        for old, new in OLD_ATTENTION_KEYS.items():
            state = {(key.replace(old, new) if ".attentions." in key else key): v for key, v in state.items()}
    return state
