"""FSDP: a twin that is sharded beside the module that is looked at; what cannot be sharded is refused by name.

That two processes with shards are one without is in test_processes.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdcli.errors import UsageError
from sdcli.train_specs import TrainEmbeddingSpec, TrainSpec, TrainUnetSpec, TrainVaeSpec
from sdcli.training import sharding, start


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_a_twin_does_what_the_module_does_with_the_same_parameters(module: nn.Module) -> None:
    twin = sharding.twin(module)
    x = torch.randn(5, 3)
    assert torch.equal(twin.eval()(x), module.eval()(x))
    assert all(a is b for a, b in zip(twin.parameters(), module.parameters(), strict=True))
    assert not any(a is b for a, b in zip(twin.modules(), module.modules(), strict=True))


def test_an_empty_module_has_no_weights_but_when_it_is_filled(module: nn.Module) -> None:
    x, values = torch.randn(5, 3), copies(module)
    before = module.eval()(x)
    sharding.empty(module)
    assert sum(parameter.numel() for parameter in module.parameters()) == 0
    with sharding.filled(module, values):
        assert torch.equal(module(x), before)
    assert sum(parameter.numel() for parameter in module.parameters()) == 0


def test_what_has_no_shards_is_taken_as_it_is(module: nn.Module) -> None:
    values = copies(module)
    for value in values.values():
        assert sharding.whole(value).data_ptr() == sharding.local(value).data_ptr() == value.data_ptr()
        assert sharding.like(value, value) is value
    assert sharding.gathered(values, is_kept=True).keys() == values.keys()
    assert sharding.gathered(values, is_kept=False) == {}


@pytest.mark.parametrize(
    ("spec", "variables", "said"),
    [
        (TrainUnetSpec(lora_rank=4), {}, "FSDP shards a UNet that is trained whole"),
        (TrainVaeSpec(init="tiny"), {}, "FSDP shards a UNet that is trained whole"),
        (TrainEmbeddingSpec(token="<x>", init_token="x"), {}, "FSDP shards a UNet that is trained whole"),
        (TrainUnetSpec(), {"FSDP_VERSION": "1"}, "FSDP of version 1: only version 2"),
        (TrainUnetSpec(), {"FSDP_OFFLOAD_PARAMS": "true"}, "offloaded to the CPU"),
        (TrainUnetSpec(), {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use --gradient-checkpointing"),
        (TrainUnetSpec(optimizer="adamw8bit"), {}, "8-bit AdamW is not supported"),
        (TrainUnetSpec(mixed_precision="fp16"), {}, "--mixed-precision fp16"),
        (TrainUnetSpec(compile=True), {}, "--compile is not supported"),
    ],
    ids=["lora", "vae", "embedding", "version 1", "offload", "checkpointing", "8-bit", "fp16", "compiled"],
)
def test_what_cannot_be_sharded_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, spec: TrainSpec, variables: dict[str, Any], said: str
) -> None:
    for name, value in {"FSDP_VERSION": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as refusal:
        start._sharding(spec)
    assert said in f"{refusal.value.message}; {refusal.value.hint}"
