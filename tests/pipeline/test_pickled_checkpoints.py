"""Pickled checkpoints: what trainers wrap weights in is taken off, what is code is refused, a copy is made once."""

from __future__ import annotations

import io
import os
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdcli import jail, store
from sdcli.errors import InputError
from sdcli.headers import read_header
from sdcli.pipeline import pickles
from sdcli.pipeline.weights import read_state
from tests import originals
from tests.commands import tree

WEIGHTS: dict[str, Tensor] = OrderedDict(
    {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).half(), "ids": torch.arange(3)}
)


def saved(value: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def handed_over(data: bytes) -> bytes:
    out = io.BytesIO()
    pickles.checkpoint(io.BytesIO(data), len(data), out)
    return out.getvalue()


def state_of(data: bytes, folder: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    (folder / "a.safetensors").write_bytes(handed_over(data))
    header = read_header(folder / "a.safetensors")
    return {key: (entry.dtype, entry.shape) for key, entry in header.entries.items()}, header.metadata


EXPECTED = {"a.weight": ("F32", (2, 3)), "b": ("F16", (2,)), "ids": ("I64", (3,))}


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class that pickles under the name of Lightning's callback."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for module in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    kind = type("ModelCheckpoint", (), {"__module__": name})
    sys.modules[name].ModelCheckpoint = kind  # type: ignore[attr-defined]
    return kind


@pytest.mark.parametrize(
    "value",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS},
        {"state_dict": {"state_dict": WEIGHTS}},
        {**WEIGHTS, "global_step": 5, "x": None},
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_weights_are_found_in_what_they_are_wrapped_in(tmp_path: Path, value: Any, is_zip: bool) -> None:
    found, _ = state_of(saved(value, _use_new_zipfile_serialization=is_zip), tmp_path)
    assert found == EXPECTED


def test_a_checkpoint_of_lightning_loads_without_lightning(tmp_path: Path, lightning: Any) -> None:
    """As Stable Diffusion 1.4 was published: a class as a key, and numpy's numbers."""
    callback = lightning()
    callback.best = 5
    value = {
        "epoch": 7,
        "global_step": 875_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": WEIGHTS,
        "callbacks": {lightning: {"best_model_score": np.float64(0.5), "dtype": np.dtype("float32")}, "x": callback},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}}],
    }
    found, metadata = state_of(saved(value), tmp_path)
    assert (found, metadata) == (EXPECTED, {"global_step": "875000"})


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"state_dict": WEIGHTS, "callbacks": Payload()}, "holds posix.system, which is code"),
        ({**WEIGHTS, "x": Payload()}, "holds posix.system, which is code"),
        ([{"state_dict": WEIGHTS}], "holds no weights under names"),
        ({"a": 5}, "holds no weights under names"),
        ({"__metadata__": torch.ones(1)}, "holds no weights under names"),
        ({"state_dict": {"a": torch.ones(1).to_sparse()}}, "holds a tensor of kind"),
        ({"state_dict": {"a": torch.ones(1).expand(10**9)}}, "more than it can hold"),
    ],
)
def test_what_is_no_checkpoint_is_refused(value: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        handed_over(saved(value))


def test_a_copy_is_made_once_and_made_again_for_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one test that starts the child: the whole way of a .ckpt to a model."""
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "cache"))
    copies, weights = store.checkpoints_folder(), originals.weights(originals.SD1)
    copies.mkdir(parents=True)
    (tmp_path / "sd.ckpt").write_bytes(b"what it was before")
    old, other = jail.copy_of(tmp_path / "sd.ckpt", copies), jail.copy_of(tmp_path / "other" / "sd.ckpt", copies)
    for path in (old, old.with_suffix(".yaml"), other):
        path.touch()
    torch.save({"state_dict": weights, "global_step": 5}, tmp_path / "sd.ckpt")
    found = store.resolve(str(tmp_path / "sd.ckpt"))
    assert found.source == tmp_path / "sd.ckpt"
    assert set(copies.iterdir()) == {found.folder, other}  # the old one's place is taken
    state = read_state(found.folder, "vae")
    assert torch.equal(state["encoder.conv_in.weight"], weights["first_stage_model.encoder.conv_in.weight"])
    assert store.model_hash(found) == next(store.hashes([tmp_path / "sd.ckpt"]))[1]
    before = tree(copies)
    assert store.resolve(str(tmp_path / "sd.ckpt")) == found
    assert tree(copies) == before
    os.utime(tmp_path / "sd.ckpt", (1, 1))
    assert jail.copy_of(tmp_path / "sd.ckpt", copies) != found.folder


def test_a_refused_file_leaves_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": WEIGHTS, "callbacks": Payload()}, tmp_path / "bad.ckpt")
    with pytest.raises(InputError, match=r"bad\.ckpt: holds posix\.system, which is code and was not run"):
        store.resolve("bad.ckpt")
    assert list((tmp_path / "cache" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "executed").exists()
