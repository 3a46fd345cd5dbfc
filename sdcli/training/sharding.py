"""A module whose weights lie in shards, one in each process (FSDP2), beside the whole one that is looked at at times.

A shard is a DTensor; every function here that makes one whole is a collective: all processes call it, in one order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def twin(module: nn.Module) -> nn.Module:
    """A module like this one, of the same parameters, to be sharded in its stead."""
    shared: dict[int, object] = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, shared)


@torch.no_grad()
def empty(module: nn.Module) -> None:
    """Free the memory of a module's parameters."""
    for parameter in module.parameters():
        parameter.data = parameter.new_empty(0)


@contextmanager
def filled(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let an empty module hold these values, whole, within the block. A collective."""
    parameters = dict(module.named_parameters())
    for name, value in values.items():
        parameters[name].data = whole(value)
    try:
        yield
    finally:
        empty(module)


def gathered(tensors: Mapping[str, Tensor], *, is_kept: bool) -> dict[str, Tensor]:
    """The tensors, those in shards made whole, one by one, in main memory; nothing unless `is_kept`. A collective."""
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if is_kept:
            found[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached, of which each process may have a shard alone. A collective of shards."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, detached and sharing its memory; of one that has no shards, all of it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, known to every process, in shards as those of `pattern`; as it is where that has none."""
    if not isinstance(pattern, DTensor) or isinstance(value, DTensor):
        return value
    there = value.to(pattern.device)
    return distribute_tensor(there, pattern.device_mesh, pattern.placements, src_data_rank=None)
