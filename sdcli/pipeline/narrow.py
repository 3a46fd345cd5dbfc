"""Layers whose weights stay in the narrow type of their file, and are widened one after the other as they compute.

A float16 model that is drawn with in float32 takes half the memory so, mapped from its file, and no time to widen on
loading. What it computes is the same to the bit: a wider type holds every number of a narrower one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

NARROW = (torch.float16, torch.bfloat16)
# Widening takes as long for a small picture as for a large one: for a small model it would be half of a step.
LEAST_PART = 1 << 26  # numbers of a part; the embedded model's UNet has 2^24.4, that of Stable Diffusion 1.5 2^29.7
LEAST_WEIGHT = 1 << 16  # numbers of one weight: smaller ones, norms and biases are a hundredth of a part

_room = threading.local()  # of each thread, for the one weight that is wide at a time


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, widened(self.weight, input.dtype), self.bias)


class _Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        convolved: Tensor = self._conv_forward(input, widened(self.weight, input.dtype), self.bias)
        return convolved


_KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}


def stay_narrow(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> frozenset[str]:
    """The weights of a part, by their keys, that need not be widened on loading to be computed with in a type."""
    if dtype != torch.float32 or sum(value.numel() for value in state.values()) < LEAST_PART:
        return frozenset()
    keys = (f"{name}.weight" for name, layer in module.named_modules() if type(layer) in _KINDS)
    return frozenset(key for key in keys if state[key].dtype in NARROW and state[key].numel() >= LEAST_WEIGHT)


def widen_in_use(module: nn.Module, keys: frozenset[str]) -> None:
    """Let the layers of these weights compute in the type of what they are given."""
    for key in keys:
        layer = module.get_submodule(key.removesuffix(".weight"))
        layer.__class__ = _KINDS[type(layer)]  # all that it is, but for how it computes


def widened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in a type: itself where it has it, else in a place that the next weight of this thread takes.

    The place is kept, as large as the largest: memory that is new each time costs more than widening (0.7 s of
    CPU time in place of 1.5 s for all weights of Stable Diffusion 1.5's UNet).
    """
    if weight.dtype == dtype:
        return weight
    room: Tensor | None = getattr(_room, "tensor", None)
    count = prod(weight.shape)
    if room is None or room.numel() < count or room.dtype != dtype or room.device != weight.device:
        _room.tensor = None  # before the next is there
        room = _room.tensor = torch.empty(count, dtype=dtype, device=weight.device)
    return room[:count].view(weight.shape).copy_(weight)
