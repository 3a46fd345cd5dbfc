from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdcli.training import checkpoint, optimizers


@pytest.mark.parametrize("package", ["torch", "bitsandbytes"])
def test_an_optimizer_goes_on_from_its_saved_state_as_if_nothing_had_happened(tmp_path: Path, package: str) -> None:
    module = pytest.importorskip(package)
    kind = torch.optim.AdamW if package == "torch" else module.optim.AdamW8bit

    def steps(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            for parameter in parameters:
                parameter.grad = parameter.detach().sin()
            optimizer.step()

    # The first is small enough that bitsandbytes keeps its state in 32 bits; the others share their code books.
    straight = [torch.nn.Parameter(torch.linspace(-2, i, size)) for i, size in enumerate((7, 5000, 5000))]
    whole = kind(straight, lr=0.1, betas=(0.8, 0.95))
    steps(straight, whole, 3)
    tensors, settings = optimizers.state(whole)
    checkpoint.write_tensors(tmp_path / "o.safetensors", tensors)
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in straight]
    again = kind(resumed, lr=9.9)
    optimizers.load_state(again, load_file(tmp_path / "o.safetensors"), json.loads(json.dumps(settings)))
    steps(straight, whole, 3)
    steps(resumed, again, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
