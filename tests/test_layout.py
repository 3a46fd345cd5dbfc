"""The diffusers layout: which files are read, and what they say without their weights."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdcli import layout, store
from sdcli.errors import InputError
from sdcli.pipeline.vocabulary import load_vocabulary
from tests import models


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """An empty UNet folder of a model."""
    (tmp_path / "model" / "unet").mkdir(parents=True)
    return tmp_path / "model" / "unet"


def test_the_published_weights_go_before_the_float16_copy(part: Path) -> None:
    half = part / "diffusion_pytorch_model.fp16.safetensors"
    half.touch()
    assert layout.weight_files(part.parent, "unet") == [half]
    whole = part / "diffusion_pytorch_model.safetensors"
    whole.touch()
    (part / "diffusion_pytorch_model.non_ema.safetensors").touch()
    assert layout.weight_files(part.parent, "unet") == [whole]


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_those_the_index_names(part: Path, variant: str) -> None:
    names = [f"diffusion_pytorch_model{variant}-0000{i}-of-00002.safetensors" for i in (2, 1)]
    index = part / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}))
    (part / names[0]).touch()
    with pytest.raises(InputError, match=names[1]):
        layout.weight_files(part.parent, "unet")
    (part / names[1]).touch()
    assert layout.weight_files(part.parent, "unet") == [part / names[1], part / names[0]]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe", b'{"a": ' + b"[" * 100_000])
def test_json_that_is_no_object_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json"):
        layout.read_json(tmp_path / "a.json")


def test_json_with_a_name_twice_or_with_nan_is_refused(tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 600 + "]" * 600 + "}"
    for text, said in (
        (deep, "it has more than 32 levels"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "it has c twice"),
        ('{"a": [NaN]}', "it holds NaN"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match=rf"a\.json: is no JSON \({said}\)"):
            layout.read_json(tmp_path / "a.json", within=tmp_path)
    (tmp_path / "a.json").write_text('{"lambda_min_clipped": -Infinity}')
    assert layout.read_json(tmp_path / "a.json", within=tmp_path) == {"lambda_min_clipped": -math.inf}


def test_a_schedulers_config_without_its_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"beta_start": 0.1}')
    with pytest.raises(InputError, match=r"scheduler_config\.json: has no _class_name"):
        layout.config(tmp_path, "scheduler")


@pytest.mark.parametrize("key", ["auto_map", "quantization_config", "attn_implementation", "custom_pipelines"])
def test_json_of_a_model_that_asks_for_code_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps({key: "x"}))
    with pytest.raises(InputError, match=rf"a\.json: asks for code with {key}"):
        layout.read_json(tmp_path / "a.json", within=tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({key: None}))
    assert layout.read_json(tmp_path / "a.json", within=tmp_path) == {key: None}


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "sdcli.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "unet/index",
        "tokenizer",
    ],
)
def test_json_that_is_linked_from_elsewhere_is_no_part_of_a_model(model: Path, tmp_path: Path, name: str) -> None:
    path = model / {
        "unet/index": "unet/diffusion_pytorch_model.safetensors.index.json",
        "tokenizer": "tokenizer/vocab.json",
    }.get(name, name)
    if name == "unet/index":
        models.weight_file(model / "unet").unlink()
    secret = tmp_path / "secret.json"
    path.rename(secret) if path.exists() else secret.write_text("{}")
    path.symlink_to(secret)
    with pytest.raises(InputError, match="leads outside"):
        read_all(model)


def read_all(model: Path) -> None:
    """All that a model says without its weights."""
    store.check_folder(model)
    layout.settings(model)
    layout.config(model, "unet")
    layout.config(model, "scheduler")
    layout.weight_files(model, "unet")
    load_vocabulary(model)


def header(value: Any, data: bytes = b"") -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_header_says_what_the_weights_are(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"one": torch.zeros(2, 3), "two": torch.ones(4, dtype=torch.float16)}, path, metadata={"format": "pt"})
    tensors = layout.safetensors_header(path)
    assert {key: (row["dtype"], row["shape"]) for key, row in tensors.items()} == {
        "one": ("F32", [2, 3]),
        "two": ("F16", [4]),
    }


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        header(b"{"),
        header(b'{"a": ' + b"[" * 100_000),
        header([]),
        header({"a": 5}),
        header({"a": {"dtype": "F32"}}),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["x", "y"]}}),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 3),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 5),
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.safetensors"):
        layout.safetensors_header(tmp_path / "a.safetensors")
