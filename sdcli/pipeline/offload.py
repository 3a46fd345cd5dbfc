"""The parts of a model on the device only while they work: one part after the other, or layer by layer.

Through accelerate's hooks. What waits lies in main memory as it was loaded, mapped from its file where it can be, and
is never copied back: drawing changes no weight. One thread at a time may draw with such a model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device, set_module_tensor_to_device
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from sdcli.pipeline.bundle import ModelBundle
from sdcli.pipeline.device import let_go
from sdcli.pipeline.vae import is_vq

Model = TypeVar("Model")


def home(device: torch.device, how: str) -> torch.device:
    """Where a model is to be loaded for a way of offloading: `auto` is none."""
    return device if how == "auto" else torch.device("cpu")


def placed(bundle: ModelBundle, device: torch.device, how: str) -> ModelBundle:
    """A model that computes on a device, given one that lies in main memory, which stays as it is.

    how: `auto`, all of it on the device at once, as it was loaded; `model`, the part that works; `sequential`, the
    layer that works. All weights of both are the same tensors.
    """
    if how == "auto":
        return bundle
    shared: dict[int, object] = {}
    bundle = dataclasses.replace(_with_copies(bundle, shared), device=device)
    stage = _Stage(device)
    for module in _called(bundle):
        state = {name: weight.detach() for name, weight in module.named_parameters()}
        if how == "sequential":
            cpu_offload(module, execution_device=device, state_dict=state)
        else:
            add_hook_to_module(module, _Turn(stage, state))
    if is_vq(bundle.vae):  # its codes are looked up, and not called
        codes = bundle.vae.get_submodule("quantize")
        for name, weight in [*codes.named_parameters()]:
            _put(codes, name, weight, device)
    return bundle


def brought_home(bundle: ModelBundle) -> ModelBundle:
    """A model whose weights lie in main memory, those of all that share them, too, so that nothing of it stays away."""
    for module in _modules(bundle):
        for weight in (*module.parameters(), *module.buffers()):
            weight.data = weight.data.to("cpu")
    return bundle


def is_offloaded(bundle: ModelBundle) -> bool:
    """Whether the parts of a model are brought to the device as they work."""
    return hasattr(bundle.unet, "_hf_hook")


def is_at_hand(bundle: ModelBundle) -> bool:
    """Whether a model is where it was loaded to, and was not brought home."""
    return next(bundle.unet.parameters()).device.type == bundle.device.type


class _Stage:
    """A device, which the part of a model that was called last has to itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._there: tuple[_Turn, nn.Module] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stage:
        return _Stage(self.device)

    def enter(self, turn: _Turn, module: nn.Module) -> None:
        """Bring a part to the device, unless it is there, and the one that is away."""
        if self._there is not None and self._there[0] is turn:
            return
        if self._there is not None:
            self._there[0].leave(self._there[1])
            self._there = None
            clear_device_cache()
        try:
            turn.come(module, self.device)
        except BaseException:  # memory ran out half way
            turn.leave(module)
            raise
        self._there = turn, module


class _Turn(ModelHook):  # type: ignore[misc]  # accelerate is not typed
    """Brings a part to the device when it is called, where it stays until another one is."""

    def __init__(self, stage: _Stage, state: dict[str, Tensor]) -> None:
        self._stage, self._state = stage, state
        self.execution_device = stage.device

    def init_hook(self, module: nn.Module) -> nn.Module:
        for name, buffer in module.named_buffers():
            _put(module, name, buffer, self.execution_device)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._stage.enter(self, module)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        self.leave(module)
        return module

    def come(self, module: nn.Module, device: torch.device) -> None:
        for name, weight in self._state.items():
            _put(module, name, weight, device)

    def leave(self, module: nn.Module) -> None:
        for name, weight in self._state.items():
            _put(module, name, weight, weight.device)
        let_go(module)


def _put(module: nn.Module, name: str, value: Tensor, device: torch.device) -> None:
    """Let a tensor of a module be this one, on a device."""
    set_module_tensor_to_device(module, name, device, value=value, dtype=value.dtype, clear_cache=False)


def _called(bundle: ModelBundle) -> Iterator[nn.Module]:
    """The modules of a model that are called each by itself."""
    yield bundle.unet
    yield from (part for name, part in bundle.vae.named_children() if name != "quantize")
    yield from _modules(bundle.conditioner)


def _modules(value: object) -> Iterator[nn.Module]:
    """The modules in a value: itself, or those in the fields of a dataclass."""
    if isinstance(value, nn.Module):
        yield value
    elif dataclasses.is_dataclass(value):
        for one in dataclasses.fields(value):
            yield from _modules(getattr(value, one.name))


def _with_copies(value: Model, shared: dict[int, object]) -> Model:
    """The same value with copies of its modules, which share all weights with the originals."""
    if isinstance(value, nn.Module):
        shared |= {id(one): one for one in (*value.parameters(), *value.buffers())}
        return copy.deepcopy(value, memo=shared)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    given = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    return dataclasses.replace(value, **{name: _with_copies(one, shared) for name, one in given.items()})
