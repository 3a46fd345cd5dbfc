"""LoRA files -> what they add to a model's weights, and a model with it added.

A merged model costs what the plain one does: nothing stands beside its layers, and nothing of peft is needed.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sdcli.errors import InputError, NumericalError, SdcliWarning
from sdcli.files import reason
from sdcli.layout import ENCODERS
from sdcli.original.names import PROJECTION
from sdcli.pipeline.bundle import Conditioner, ModelBundle, TextEncoder
from sdcli.pipeline.classes import ClassEmbedder
from sdcli.pipeline.device import computing_dtype
from sdcli.pipeline.lora_keys import MAX_BYTES, changes, is_safetensors, read_header
from sdcli.pipeline.lora_names import Layers
from sdcli.pipeline.lora_shapes import MAGNITUDES, Change, magnitude_axis
from sdcli.pipeline.pickles import read_pickle

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA file that fits a model: what it changes, by which tensors, and how strongly that is added."""

    path: Path
    scale: float
    changes: Sequence[Change]
    tensors: Mapping[str, Tensor]


def read_adapter(path: Path, layers: Layers, scale: float = 1.0) -> Adapter:
    """A LoRA, LoHa or LoKr file of any dialect, by its content, whatever its suffix.

    layers: of the model it is for, as `lora_names.model_layers` tells them.
    Raises InputError when the file is malformed, unsafe, or has anything that no layer of the model takes,
    NumericalError when a number in it is not finite.
    """
    tensors, metadata = _contents(path)
    for key, value in tensors.items():
        # An alpha may be a whole number: kohya's trainer writes the one that it was given.
        if not value.is_floating_point() and not (key.endswith(".alpha") and value.dtype in (torch.int64, torch.int32)):
            raise InputError(f"{path}: {key[:100]} holds {value.dtype}", "get the file again")
    found = changes(str(path), {key: tuple(value.shape) for key, value in tensors.items()}, metadata, layers)
    for key, value in tensors.items():
        if not value.float().isfinite().all():
            raise NumericalError(f"{path}: {key} holds NaN or Inf", "get the file again")
    for change in found:
        _factor(change, tensors, str(path))
    if not any(_adds(change, tensors) for change in found):
        warnings.warn(f"{path}: adds nothing: it was never trained", SdcliWarning, stacklevel=2)
    return Adapter(path, scale, found, tensors)


def merged(bundle: ModelBundle, adapters: Sequence[Adapter]) -> ModelBundle:
    """A model with the changes of all adapters in its weights; the one given stays as it is, bit for bit.

    Layers that no adapter changes are shared between both.
    Raises NumericalError where the type of the weights cannot hold the sum.
    """
    unet = with_adapters(bundle.unet, "unet", adapters)
    return replace(bundle, unet=unet, conditioner=merged_conditioner(bundle.conditioner, adapters))


def merged_conditioner(conditioner: Conditioner, adapters: Sequence[Adapter]) -> Conditioner:
    """A text encoder, or two, with the changes of all adapters; what gives the context of classes has none."""
    if isinstance(conditioner, ClassEmbedder):
        return conditioner
    if isinstance(conditioner, TextEncoder):
        return replace(conditioner, model=with_adapters(conditioner.model, ENCODERS[0], adapters))
    first, second = conditioner.first, conditioner.second
    first = replace(first, model=with_adapters(first.model, ENCODERS[0], adapters))
    second = replace(second, model=with_adapters(second.model, ENCODERS[1], adapters))
    dtype = computing_dtype(conditioner.second.model)  # the projection's one weight may be narrower than it computes
    beside = with_adapters(nn.ModuleDict({PROJECTION: conditioner.projection}), ENCODERS[1], adapters, dtype)
    return replace(conditioner, first=first, second=second, projection=beside[PROJECTION])


@torch.no_grad()
def with_adapters(module: Module, part: str, adapters: Sequence[Adapter], dtype: torch.dtype | None = None) -> Module:
    """A part of a model with the adapters' changes: W + the sum of scale * delta, in float32 and then cast once.

    Every delta is that to the plain weight W, so that the order of the adapters does not matter. Of a part in two
    modules, as is the text encoder that has its projection beside it, each takes the changes of its own layers.
    dtype: in which the module computes; None: that of its widest weight.
    """
    todo: dict[str, list[tuple[Adapter, Change]]] = {}
    there = {name for name, _ in module.named_parameters()}
    for adapter in adapters:
        for change in adapter.changes:
            if change.part == part and adapter.scale and f"{change.layer}.weight" in there:
                todo.setdefault(change.layer, []).append((adapter, change))
    if not todo:
        return module
    shared: dict[int, object] = {id(one): one for one in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, memo=shared)
    dtype = dtype if dtype is not None else computing_dtype(module)
    for layer, both in todo.items():
        weight = module.get_parameter(f"{layer}.weight")
        plain = total = weight.detach().float()
        for adapter, change in both:
            total = total + adapter.scale * delta(change, adapter.tensors, plain)
        (low, high), most = total.aminmax(), torch.finfo(dtype).max
        if not (-most <= low and high <= most):  # of NaN neither is true
            names = ", ".join(str(adapter.path) for adapter, _ in both)
            what = f"{names}: {layer} is not finite in {dtype} once it is merged"
            raise NumericalError(what, "use a smaller scale, or --dtype float32")
        copied.get_submodule(layer).register_parameter("weight", nn.Parameter(total.to(dtype), requires_grad=False))
    return copied


def delta(change: Change, tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """What a change at scale 1 adds to a layer's weight (out, in, *k), in float32.

    With DoRA it is m V' / |V'| - W for V' = W + delta W, where |V'| is the norm of each output's (or input's) weights;
    half the scale is half of that way. Source: Liu et al. 2024, arXiv:2402.09353, eq. 5.
    """
    given = {role: tensors[key].to(weight.device, torch.float32) for role, key in change.keys.items()}
    form = {"lora": _lora, "loha": _loha, "lokr": _lokr}[change.form]
    added = _factor(change, tensors, change.layer) * form(given).reshape(weight.shape)
    for role in MAGNITUDES & given.keys():
        axis = magnitude_axis(role, tuple(given[role].shape), tuple(weight.shape))
        assert axis is not None
        direction = weight + added
        norm = direction.transpose(0, axis).flatten(1).norm(dim=1)
        by_unit: Tensor = (given[role].flatten() / norm).reshape([-1 if i == axis else 1 for i in range(weight.dim())])
        return by_unit * direction - weight
    return added


def _lora(given: Mapping[str, Tensor]) -> Tensor:
    """B A: Hu et al. 2021, arXiv:2106.09685, eq. 3; of a convolution, that of two, one after the other."""
    up, down = given["up"].flatten(1), given["down"]
    if "mid" in given:
        return torch.einsum("om, mn..., ni -> oi...", up, given["mid"], down.flatten(1))
    return up @ down.flatten(1)


def _loha(given: Mapping[str, Tensor]) -> Tensor:
    """(X1 Y1^T) * (X2 Y2^T), element by element: Hyeon-Woo et al. 2022, arXiv:2108.06098, propositions 1 and 3."""
    if "t1" in given:
        first, second = (_core(given[f"t{i}"], given[f"w{i}_a"], given[f"w{i}_b"]) for i in (1, 2))
    else:
        first, second = (given[f"w{i}_a"] @ given[f"w{i}_b"] for i in (1, 2))
    return first * second


def _lokr(given: Mapping[str, Tensor]) -> Tensor:
    """The Kronecker product of w1 and w2: Yeh et al. 2023, arXiv:2309.14859, section 3."""
    first = given["w1"] if "w1" in given else given["w1_a"] @ given["w1_b"]
    if "t2" in given:
        second = _core(given["t2"], given["w2_a"], given["w2_b"])
    else:
        second = given["w2"] if "w2" in given else given["w2_a"] @ given["w2_b"]
    return torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second)


def _core(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A convolution of a small one t (r, r, *k) between a (r, out) and b (r, in): (out, in, *k)."""
    return torch.einsum("ij..., io, jn -> on...", t, a, b)


def _factor(change: Change, tensors: Mapping[str, Tensor], where: str) -> float:
    """alpha / rank, the file's own scale. Raises InputError for an alpha on which programs do not agree."""
    if change.rank is None:
        return 1.0
    alpha = float(change.rank) if change.alpha is None else change.alpha
    if "alpha" in change.keys:
        alpha = float(tensors[change.keys["alpha"]])
    if alpha == 0 or not math.isfinite(alpha):
        what = f"{where}: {change.layer}: alpha is {alpha:g}, which some programs take for the rank"
        raise InputError(what, "get the file again")
    return alpha / (math.sqrt(change.rank) if change.is_root else change.rank)


def _adds(change: Change, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a change changes anything, as far as one tensor tells: the half of LoRA that training starts from 0."""
    return change.form != "lora" or bool(MAGNITUDES & change.keys.keys()) or bool(tensors[change.keys["up"]].any())


def _contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by their keys, and its metadata."""
    if is_safetensors(path):
        _, metadata = read_header(path)
        try:
            return load_file(path), metadata
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: cannot be read ({reason(error)})", "get the file again") from error
    value = read_pickle(path, max_bytes=MAX_BYTES)
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    pairs = value.items() if isinstance(value, dict) else ()
    tensors = {str(key): one for key, one in pairs if isinstance(one, Tensor)}
    if not isinstance(value, dict) or len(tensors) < len(value):
        what = f"{path}: is no LoRA file: it holds more than tensors"
        raise InputError(what, "give a textual inversion to --embedding")
    return tensors, {}
