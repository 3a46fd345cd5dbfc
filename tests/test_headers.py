"""A safetensors header is taken at its word in nothing: what readers rely on is checked, and told by name."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdcli.errors import InputError
from sdcli.headers import MAX_HEADER_BYTES, Entry, read_header


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
        (b'{"__metadata__": {"a": ' + b"[" * 600 + b"]" * 600 + b"}}", 0, "it has more than 32 levels"),
        ({f"{n}": 1 for n in range(50_001)}, 0, "50,001 tensors"),
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


def test_a_header_beyond_all_sense_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.write((90 << 20).to_bytes(8, "little") + b"{")
        file.truncate(100 << 20)
    with pytest.raises(InputError, match=r"a: has a safetensors header of 94,371,840 bytes") as refused:
        read_header(tmp_path / "a")
    assert refused.value.hint == "at most 16,777,216 are read"


@pytest.mark.parametrize("value", [b"[]", b'{"":1}', b"1", b'"x"'])
def test_a_header_of_values_without_end_is_refused_before_they_take_memory(tmp_path: Path, value: bytes) -> None:
    """A list of no entries costs 56 bytes, of which the file has 3: 24 MB of them took 600 MB."""
    header = b'{"a":[' + (value + b",") * ((MAX_HEADER_BYTES - 10) // (len(value) + 1)) + b"1]}"
    path = written(tmp_path / "a", header, 0)
    tracemalloc.start()
    with pytest.raises(InputError, match="it holds more than the names, types, shapes and places of 50,000 tensors"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 80e6
    tracemalloc.stop()


def test_what_stands_in_the_texts_of_a_header_is_not_counted(tmp_path: Path) -> None:
    """kohya's headers have the tags of all pictures, as JSON within JSON."""
    tags = {"ss_tag_frequency": json.dumps({f'a "{{[:,\\ tag" {number}': number for number in range(100_000)})}
    path = written(tmp_path / "a", {"__metadata__": tags, "x": entry(0, 4)}, 4)
    assert path.stat().st_size > 4e6
    assert read_header(path).metadata == tags


def test_a_header_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a", json.dumps({"a": entry(0, 4)}).encode("utf-16"), 4)
    with pytest.raises(InputError, match="its safetensors header cannot be read"):
        read_header(path)
