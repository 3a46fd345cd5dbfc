"""The header of a safetensors file: names, types, shapes and places of its tensors. It is untrusted."""

from __future__ import annotations

import json
import math
import os
import reprlib
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.errors import InputError
from sdcli.files import open_regular

MAX_HEADER_BYTES = 16 << 20  # SDXL's have under 1 MB, kohya's LoRAs, with the tags of all pictures in them, some
SMALL_HEADER_BYTES = 1 << 20  # whatever it holds, its values take under 30 MB
MAX_TENSORS = 50_000  # Stable Diffusion's files have 700 to 3,000
MAX_SAYINGS = 10_000  # of the metadata; kohya's have some 80
MAX_MARKS = {  # that a header may have outside its texts: a value costs up to 100 times the bytes that it has there
    b'"': 10 * MAX_TENSORS + 4 * MAX_SAYINGS,
    b":": 4 * MAX_TENSORS + MAX_SAYINGS,
    b"{": MAX_TENSORS + 2,
    b"[": 2 * MAX_TENSORS,
    b",": 12 * MAX_TENSORS + MAX_SAYINGS,
}
MAX_DEPTH = 32  # of values in values; a config has 4, CLIP's tokenizer.json 7: copying and showing cost calls each
MAX_DIMENSIONS = 8
WIDTHS = {  # bytes of a number
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, in bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """All that a safetensors file says before its tensors."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a file, every tensor's type, shape and place checked against the file's size.

    Raises InputError when it is malformed, has two tensors of one name, or tells of other bytes than there are.
    """
    raw, start, size = raw_header(path)
    metadata = raw.pop(METADATA, None)
    if not isinstance(metadata, dict | None):
        raise _refusal(path, f"{METADATA} is {reprlib.repr(metadata)}")
    if len(raw) > MAX_TENSORS:
        raise _refusal(path, f"{len(raw):,} tensors")
    entries = {name: _entry(path, name, value, start) for name, value in raw.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].first, item[1].last)):
        if entry.first != end:  # the library, too, wants them side by side: else two names could share bytes
            raise _refusal(path, f"{_shown(name)} does not begin where the tensor before it ends")
        end = entry.last
    if end != size:
        what = f"{path}: is no whole safetensors file: it has {size:,} bytes, its header says {end:,}"
        raise InputError(what, "get the file again")
    return Header(entries, {str(key): str(value) for key, value in (metadata or {}).items()})


def raw_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON object of a header, where the tensors begin and how long the file is, both in bytes.

    What it says is not checked. Raises InputError when there is none, or it has a name twice.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            raise InputError(f"{path}: is no whole safetensors file (bad header)", "get the file again")
        if length > MAX_HEADER_BYTES:
            what = f"{path}: has a safetensors header of {length:,} bytes"
            raise InputError(what, f"at most {MAX_HEADER_BYTES:,} are read")
        text = stream.read(length)
    if length > SMALL_HEADER_BYTES:
        _check_amount(path, text)
    try:
        header = parse(text.decode())
    except (ValueError, RecursionError) as error:
        what = f"{path}: its safetensors header cannot be read ({error})"
        raise InputError(what, "get the file again") from error
    if not isinstance(header, dict):
        raise _refusal(path, "it is no JSON object")
    return header, 8 + length, size


def parse_said(text: str) -> Any:
    """The JSON in one text of a header's metadata. Raises ValueError for none, and for more than makes sense there."""
    if len(text) > SMALL_HEADER_BYTES:
        raise ValueError(f"it has {len(text):,} characters")
    return parse(text)


def parse(text: str | bytes, *, may_hold_nan: bool = False) -> Any:
    """The value of a JSON text of others; no name may be there twice, of which a reader would take either.

    Raises ValueError for what is none and for more than MAX_DEPTH levels, RecursionError for very many more.
    """
    constants = float if may_hold_nan else _infinity
    value = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=constants)
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        inner = (entry for one in level for entry in (one.values() if isinstance(one, dict) else one))
        level = [entry for entry in inner if isinstance(entry, dict | list)]
    if level:
        raise ValueError(f"it has more than {MAX_DEPTH} levels")
    return value


def _check_amount(path: Path, text: bytes) -> None:
    """Raise InputError for a header of more values than it can need, before they take memory."""
    plain = text.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') <= MAX_MARKS[b'"']:
        plain = b'""'.join(plain.split(b'"')[::2])  # what stands in texts may have any marks
    for mark, most in MAX_MARKS.items():
        if plain.count(mark) > most:
            raise _refusal(path, f"it holds more than the names, types, shapes and places of {MAX_TENSORS:,} tensors")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; raises ValueError for two values of one name, of which a reader would take either."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {_shown(twice)} twice")
    return found


def _infinity(name: str) -> float:
    """What JSON has no word for, and schedulers' configs say for no limit. Raises ValueError for NaN."""
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    try:
        dtype, shape, (first, last) = value["dtype"], value["shape"], value["data_offsets"]
        is_valid = dtype in WIDTHS and len(shape) <= MAX_DIMENSIONS and all(_is_count(n) for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError) as error:
        raise _refusal(path, f"{_shown(name)} has no dtype, shape and data_offsets") from error
    if not is_valid:
        raise _refusal(path, f"{_shown(name)} is {reprlib.repr(value)}")
    if math.prod(shape) * WIDTHS[dtype] != last - first:
        what = f"{_shown(name)} of type {dtype} and shape {reprlib.repr(shape)} cannot have {last - first:,} bytes"
        raise _refusal(path, what)
    return Entry(dtype, tuple(shape), start + first, start + last)


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 63


def _shown(name: str) -> str:
    return reprlib.repr(name).strip("'\"")


def _refusal(path: Path, what: str) -> InputError:
    return InputError(f"{path}: its safetensors header makes no sense: {what}", "get the file again")
