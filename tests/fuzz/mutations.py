"""Ways to damage a file, drawn from a seed: bytes of any kind, JSON by its values, safetensors by its header."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

EDGES = (0, 1, -1, 2**7, 2**8, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        "a",
        "../../etc/passwd",
        "/",
        "\x00",
        "\u202e\x1b[2J",
        "🐶" * 300,
        "x" * 5000,
        [],
        [[]],
        {},
        {"a": {}},
        [0] * 50,
        "\ud800",
        {"content": []},
        ["a", {"b": [1, "\ud800"]}],
        json.loads("[" * 600 + "]" * 600),
    ),
)
DEEP = 2000  # levels of a value that is nested beyond all sense


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes, damaged once to four times, each time in a way that suits what they are."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(_ways(data))(data, chance)
    return data


def _ways(data: bytes) -> tuple[Mutation, ...]:
    plain = (_flip, _cut, _overwrite, _insert, _drop, _repeat, _edge)
    if data[:1] in (b"{", b"["):
        return (*plain, _json, _json, _json, _json_text)
    if _header_size(data) is not None:
        return (*plain, _header, _header, _header, _header_length, _values)
    return plain


def _flip(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return b"\x80"
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _overwrite(data: bytes, chance: random.Random) -> bytes:
    at, size = chance.randrange(len(data) + 1), chance.choice((1, 2, 4, 8, 64))
    return data[:at] + chance.randbytes(size) + data[at + size :]


def _insert(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice((b"\x00", b"\n", b'"', b"\xff\xfe", b"," * 9, chance.randbytes(16))) + data[at:]


def _drop(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + data[at + chance.choice((1, 4, 16, 256)) :]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    at, size = chance.randrange(len(data) + 1), chance.choice((1, 8, 100))
    return data[:at] + data[at : at + size] * chance.choice((2, 3, 50)) + data[at + size :]


def _edge(data: bytes, chance: random.Random) -> bytes:
    """A number that is one too many for some field, in one of the sizes that fields have."""
    size = chance.choice("bhiq")
    number = chance.choice(EDGES) & (1 << 8 * struct.calcsize(size)) - 1
    packed = number.to_bytes(struct.calcsize(size), chance.choice(("little", "big")))
    at = chance.randrange(len(data) + 1)
    return data[:at] + packed + data[at + len(packed) :]


def _json(data: bytes, chance: random.Random) -> bytes:
    """One value of a JSON document replaced, removed or doubled under another name."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return _flip(data, chance)
    places = list(_places(root))
    container, key = chance.choice(places)
    way = chance.randrange(4)
    if way == 0 and container is not root:
        del container[key]
    elif way == 1 and isinstance(container, dict):
        container[str(chance.choice(ODD_VALUES))] = container.pop(key)
    elif way == 2:
        container[key] = container[chance.choice(list(container) if isinstance(container, dict) else [key])]
    else:
        container[key] = chance.choice(ODD_VALUES)
    return json.dumps(root[0]).encode()


def _json_text(data: bytes, chance: random.Random) -> bytes:
    """JSON that no parser of a document makes: depth, doubled keys, other encodings."""
    way = chance.randrange(4)
    if way == 0:
        return b"[" * DEEP + b"]" * DEEP
    if way == 1:
        return b'{"a": ' * DEEP + b"0" + b"}" * DEEP
    if way == 2:
        return data[:1] + data[1:-1] + b", " + data[1:]
    return data.decode(errors="replace").encode(chance.choice(("utf-16", "utf-8-sig", "utf-32")))


def _header_size(data: bytes) -> int | None:
    """The length of a safetensors file's header, if it is one."""
    size = int.from_bytes(data[:8], "little")
    return size if 2 <= size <= len(data) - 8 and data[8:9] == b"{" else None


def _header(data: bytes, chance: random.Random) -> bytes:
    """A header of safetensors with a value changed, its length told truly."""
    size = _header_size(data)
    if size is None:
        return _flip(data, chance)
    header = _json(data[8 : 8 + size], chance)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _header_length(data: bytes, chance: random.Random) -> bytes:
    return (chance.choice(EDGES) & 2**64 - 1).to_bytes(8, "little") + data[8:]


def _values(data: bytes, chance: random.Random) -> bytes:
    """The tensors' bytes all the same: zeros, NaN, the largest."""
    size = _header_size(data)
    if size is None:
        return _flip(data, chance)
    return data[: 8 + size] + chance.choice((b"\x00", b"\xff", b"\x7f")) * (len(data) - 8 - size)


def _places(root: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    found, todo = [], [root]
    while todo:
        container = todo.pop()
        pairs = list(container.items()) if isinstance(container, dict) else list(enumerate(container))
        found += [(container, key) for key, _ in pairs]
        todo += [value for _, value in pairs if isinstance(value, dict | list)]
    return found


def rearranged(path: Path, others: list[Path], outside: Path, chance: random.Random) -> None:
    """A file of a folder gone, exchanged for another, or no regular file any more; `outside`: one not of the folder."""
    way = chance.randrange(8)
    if way == 0:
        path.unlink()
    elif way == 1:
        path.write_bytes(b"")
    elif way == 2:
        path.write_bytes(chance.choice(others).read_bytes())
    elif way == 3:
        path.with_name(chance.choice(others).name).write_bytes(path.read_bytes())
    else:
        path.unlink()
        if way == 4:
            os.mkfifo(path)
        elif way == 5:
            path.mkdir()
        else:
            path.symlink_to(outside if way == 6 else chance.choice(("/dev/zero", path.name, "..")))
