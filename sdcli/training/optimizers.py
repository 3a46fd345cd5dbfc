"""The optimizers that there are, and their state as tensors and plain JSON."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sdcli.train_specs import TrainSpec
from sdcli.training import sharding


def create(parameters: list[nn.Parameter], spec: TrainSpec) -> torch.optim.Optimizer:
    """The optimizer that a run was asked for, over what it trains."""
    return _OPTIMIZERS[spec.optimizer](parameters, spec)


def state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors named `<parameter>.<quantity>`, and its numbers and settings as plain JSON."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    stored: set[int] = set()
    for name, value in ((f"{i}.{key}", value) for i, row in whole["state"].items() for key, value in _flat(row)):
        if not isinstance(value, Tensor):
            numbers[name] = value
            continue
        # All parameters share one code book of 8 bits; a safetensors file holds nothing twice.
        tensors[name] = value.clone() if value.data_ptr() in stored else value
        stored.add(value.data_ptr())
    return tensors, {"param_groups": whole["param_groups"], "numbers": numbers}


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], settings: dict[str, Any]) -> None:
    """The inverse of `state`."""
    state: dict[int, dict[str, Tensor | float]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        is_of_each_weight = value.shape == parameter.shape  # the others, such as the step, are the parameter's own
        state.setdefault(int(index), {})[key] = sharding.like(value, parameter) if is_of_each_weight else value
    for name, number in settings["numbers"].items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = number
    optimizer.load_state_dict({"state": state, "param_groups": settings["param_groups"]})


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The quantities of a parameter; bitsandbytes keeps those of 8 bits in a table of their own, and reads either."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from value.items()
        else:
            yield key, value


def _adamw(parameters: list[nn.Parameter], spec: TrainSpec) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=spec.peak_lr, weight_decay=spec.weight_decay, fused=True)


def _adamw8bit(parameters: list[nn.Parameter], spec: TrainSpec) -> torch.optim.Optimizer:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels of 4 bits, which nobody asked for
    from bitsandbytes.optim.adamw import AdamW8bit  # deferred: few have it, and `start.accelerator_for` has asked

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=spec.peak_lr, weight_decay=spec.weight_decay)
    return optimizer


_OPTIMIZERS = {"adamw": _adamw, "adamw8bit": _adamw8bit}
