"""A safetensors header is taken at its word in nothing: what readers rely on is checked, and told by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdcli.errors import InputError
from sdcli.headers import Entry, read_header


def entry(first: int, last: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": shape if shape is not None else [(last - first) // 4],
        "data_offsets": [first, last],
    }


def written(path: Path, header: object, size: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * size)
    return path


def test_a_header_says_where_every_tensor_lies(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"b": torch.zeros(3).half(), "a": torch.zeros(2, 2), "none": torch.zeros(0)}, path, metadata={"k": "v"})
    header = read_header(path)
    size, start = path.stat().st_size, path.stat().st_size - 22
    assert header.entries["a"] == Entry("F32", (2, 2), start, start + 16)
    assert header.entries["b"] == Entry("F16", (3,), start + 16, size)
    assert (header.entries["none"].numbers, header.metadata) == (0, {"k": "v"})


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}', 4, "it has a twice"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "does not begin where the tensor before it ends"),
        ({"a": entry(0, 8), "b": entry(4, 8)}, 8, "does not begin where the tensor before it ends"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "does not begin where the tensor before it ends"),
        ({"a": entry(4, 8)}, 8, "does not begin where the tensor before it ends"),
        ({"a": entry(0, 4, shape=[2])}, 4, "of type F32 and shape [2] cannot have 4 bytes"),
        ({"a": entry(0, 4, shape=[1 << 40, 1 << 40])}, 4, "cannot have 4 bytes"),
        ({"a": entry(0, 4, dtype="F128")}, 4, "a is {"),
        ({"a": entry(0, 4, shape=[1] * 9)}, 4, "a is {"),
        ({"a": entry(0, 4, shape=[-1, -1])}, 4, "a is {"),
        ({"a": entry(0, 4, shape=[True])}, 4, "a is {"),
        ({"a": entry(0, 4, shape=[1.0])}, 4, "a is {"),
        ({"a": entry(4, 0, shape=[0])}, 4, "cannot have -4 bytes"),
        ({"a": 5}, 0, "a has no dtype, shape and data_offsets"),
        ({"__metadata__": 5}, 0, "__metadata__ is 5"),
        ({f"{n}": entry(0, 0) for n in range(100_001)}, 0, "100,001 tensors"),
        ({"a": entry(0, 4)}, 8, "its header says"),
        ([], 0, "it is no JSON object"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, size: int, said: str) -> None:
    with pytest.raises(InputError) as refused:
        read_header(written(tmp_path / "a.safetensors", header, size))
    assert refused.value.message.startswith(str(tmp_path / "a.safetensors"))
    assert said in refused.value.message
    assert "\n" not in refused.value.message and len(refused.value.message) < 500
