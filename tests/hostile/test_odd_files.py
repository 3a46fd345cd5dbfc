"""Odd files that people have and that are meant well: each gives, bit for bit, the weights that went into it."""

from __future__ import annotations

import argparse
import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdcli.headers import read_header
from sdcli.original.checkpoint import recognise
from sdcli.pipeline import pickles
from sdcli.pipeline.weights import read_state
from tests import originals

Weights = dict[str, Tensor]
KIND = originals.Kind(multiples=(1,), context=4, text_layers=1, vocabulary=10)
PARTS = ("vae", "unet", "text_encoder")


@pytest.fixture(scope="module")
def weights() -> Weights:
    return originals.weights(KIND)


def pickled(value: Any, folder: Path, **how: Any) -> Path:
    """The copy that is made of a checkpoint, read here and not in a process of its own."""
    buffer, copy = io.BytesIO(), io.BytesIO()
    torch.save(value, buffer, **how)
    pickles.checkpoint(buffer, len(buffer.getvalue()), copy)
    (folder / "copy.safetensors").write_bytes(copy.getvalue())
    return folder / "copy.safetensors"


def plain(value: Weights, folder: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: one.contiguous() for key, one in value.items()}, folder / "a.safetensors", metadata=metadata)
    return folder / "a.safetensors"


def module_state(weights: Weights) -> Any:
    """As `module.state_dict()` gives it: ordered, with an attribute of versions."""
    found = OrderedDict(weights)
    found._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return found


def of_a_trainer(weights: Weights) -> dict[str, Any]:
    """All that Lightning saves beside the weights."""
    return {
        "epoch": 7,
        "global_step": np.int64(875_000),
        "pytorch-lightning_version": "1.4.2",
        "state_dict": module_state(weights),
        "callbacks": {},
        "lr_schedulers": [{"last_epoch": 5, "_last_lr": [1e-4], "verbose": False}],
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}}, "param_groups": []}
        ],
        "hyper_parameters": {"size": torch.Size([1, 2]), "dtype": torch.float16, "args": argparse.Namespace(lr=1e-4)},
        "loops": None,
    }


def sheared(weights: Weights) -> Weights:
    """The same numbers with other strides, in larger storages and in common ones."""
    found = dict(weights)
    for key, one in weights.items():
        if one.dim() == 2:
            found[key] = one.t().contiguous().t()
        elif one.dim() == 1 and one.is_floating_point():
            found[key] = torch.stack([one, one], dim=1)[:, 0]
    return found


def with_extras(weights: Weights) -> Weights:
    averages = {"model_ema.num_updates": torch.tensor(7), "model_ema.decay": torch.tensor(0.9999, dtype=torch.float64)}
    return weights | averages | {"lvlb_weights": torch.ones(10, dtype=torch.float64), "logvar": torch.zeros(10)}


Odd = Callable[[Weights, Path], Path]
ODD_FILES: dict[str, Odd] = {
    "a state_dict": lambda weights, at: pickled(module_state(weights), at),
    "parameters": lambda weights, at: pickled(
        {k: nn.Parameter(v, requires_grad=False) for k, v in weights.items()}, at
    ),
    "Lightning's": lambda weights, at: pickled(of_a_trainer(weights), at),
    "before torch 1.6": lambda weights, at: pickled(of_a_trainer(weights), at, _use_new_zipfile_serialization=False),
    "strides": lambda weights, at: pickled(sheared(weights), at),
    "averages, scalars and float64": lambda weights, at: pickled(with_extras(weights), at),
    "the same as safetensors": lambda weights, at: plain(with_extras(weights), at),
    "metadata of others": lambda weights, at: plain(weights, at, {"format": "pt", "ss_x": "小" * 10_000, "": "\x00"}),
    **{
        f"protocol {number}": lambda weights, at, number=number: pickled(weights, at, pickle_protocol=number)  # type: ignore[misc]
        for number in (2, 3)  # torch's own reader of data alone knows no later ones
    },
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 3")
@pytest.mark.parametrize("name", ODD_FILES)
def test_an_odd_file_gives_the_weights_that_went_into_it(tmp_path: Path, weights: Weights, name: str) -> None:
    (tmp_path / "plain").mkdir()
    sound, odd = plain(weights, tmp_path / "plain"), ODD_FILES[name](weights, tmp_path)
    assert recognise(odd, read_header(odd)).strangers == ()
    for part in PARTS:
        expected, found = read_state(sound, part), read_state(odd, part)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], one) and found[key].dtype == one.dtype for key, one in expected.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("write", [plain, pickled])
def test_weights_of_any_precision_keep_it(tmp_path: Path, weights: Weights, dtype: torch.dtype, write: Any) -> None:
    cast = {key: one.to(dtype) if one.is_floating_point() else one for key, one in weights.items()}
    state = read_state(write(cast, tmp_path), "unet")
    assert {one.dtype for one in state.values()} == {dtype}
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(state["conv_in.weight"], cast[key])
