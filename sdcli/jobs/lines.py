"""Job files: lines of JSON or CSV, or a prompt a line -> what each asks for, by the options' names. No torch.

What is wrong with a line is found here as far as the line alone tells it, and kept with its number: reading goes on.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from sdcli.errors import InputError
from sdcli.files import open_regular
from sdcli.specs import BatchSpec, GenerateSpec

ID = "id"
MAX_LINE_BYTES = 1 << 20
MAX_ID_BYTES = 200  # room for a number, a suffix and the name of a part file
BOM = b"\xef\xbb\xbf"
SPELLINGS = {"class_name": "class"}  # fields whose option has another name
NOT_IN_NAMES = re.compile(r'[/\\:*?"<>|]')  # on any system that the pictures may be copied to
JSON_HINT = 'write it as {"prompt": "a picture of a puppy", "seed": 7}'
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,20}")


@dataclass(frozen=True)
class Line:
    """A line that says something: what it asks for, by GenerateSpec's fields, or what is wrong with it."""

    number: int  # from 1
    values: dict[str, Any] = field(default_factory=dict)
    id: str | None = None
    error: InputError | None = None


def check(path: Path) -> None:
    """Raise InputError unless a path names a job file that can be read."""
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".csv", ".txt"):
        raise InputError(f"{path}: is no job file", "name a .jsonl, .csv or .txt file, or - for JSON lines on stdin")
    open_regular(path).close()


def read(path: Path) -> Iterator[Line]:
    """The lines of a job file that are not empty, one at a time. Raises InputError when there is no such file."""
    check(path)
    with open_regular(path) as stream:
        rows = _raw_lines(stream, path)
        if path.suffix.lower() == ".csv":
            yield from _read_csv(rows, path)
            return
        parse = _prompt if path.suffix.lower() == ".txt" else parse_json
        for number, data in rows:
            line = parse(path, number, data)
            if line is not None:
                yield line


def parse_json(source: Path, number: int, data: bytes | None) -> Line | None:
    """A line of JSON, without its end; None for one that is empty. data: None stands for a line that is too long."""
    try:
        text = _text(data).strip()
        if not text:
            return None
        try:
            value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise _Wrong(f"is no JSON ({error})", JSON_HINT) from error
        if not isinstance(value, dict):
            raise _Wrong("is no JSON object", JSON_HINT)
        return _line(number, {key: one for key, one in value.items() if one is not None}, _from_json)
    except _Wrong as wrong:
        return Line(number, error=located(source, number, wrong.what, wrong.hint))


def located(source: Path, number: int, what: str, hint: str) -> InputError:
    """What is wrong with a line of a job file, as an error."""
    return InputError(f"{source if str(source) != '-' else 'stdin'}:{number}: {what}", hint)


class _Wrong(Exception):
    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint


def _raw_lines(stream: BufferedReader, path: Path) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file by number; None for one that is too long to be kept."""
    number = 0
    while data := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            data = data.removeprefix(BOM)
        if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, data


def _text(data: bytes | None) -> str:
    if data is None:
        raise _Wrong(f"has over {MAX_LINE_BYTES:,} bytes", "give shorter jobs, one a line")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _Wrong("is no valid text", "write it in UTF-8") from error


def _prompt(path: Path, number: int, data: bytes | None) -> Line | None:
    try:
        text = _text(data).strip()
    except _Wrong as wrong:
        return Line(number, error=located(path, number, wrong.what, wrong.hint))
    return Line(number, {"prompt": text}) if text else None


def _read_csv(rows: Iterator[tuple[int, bytes | None]], path: Path) -> Iterator[Line]:
    """The rows below the head of a table, whose columns are named as the keys of JSON; empty cells say nothing."""
    # What is no text is found with the row that it is in: an error here would end csv's reader.
    texts = (data.decode(errors="surrogateescape") if data is not None else "\udcff\n" for _, data in rows)
    # Not strict, a quote without its partner would make one prompt of all that follows.
    reader, head = csv.reader(texts, strict=True), list[str]()
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Line(number, error=located(path, number, f"is no CSV ({error})", "quote cells that hold commas"))
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if not head:
            head = _head(path, number, cells)
            continue
        try:
            if len(cells) > len(head):
                raise _Wrong(f"has {len(cells)} cells, the head {len(head)}", "quote cells that hold commas")
            given = {name: cell for name, cell in zip(head, cells, strict=False) if cell.strip()}
            if not all(cell.isprintable() or _is_text(cell) for cell in given.values()):
                raise _Wrong("is no valid text", "write it in UTF-8")
            yield _line(number, given, _from_text)
        except _Wrong as wrong:
            yield Line(number, error=located(path, number, wrong.what, wrong.hint))


def _head(path: Path, number: int, cells: list[str]) -> list[str]:
    """The names of the columns. Raises InputError for one that is unknown or there twice: no row could be read."""
    names = [cell.strip() for cell in cells]
    try:
        for name in names:
            _field_of(name)
        fields = [name if name == ID else _field_of(name) for name in names]
        for name, one in zip(names, fields, strict=True):
            if fields.count(one) > 1:
                raise _Wrong(f"{name}: two columns are for it", "name every column once")
    except _Wrong as wrong:
        raise located(path, number, wrong.what, wrong.hint) from wrong
    return names


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Wrong(f"{_shown(twice)}: is given twice", "give it once")
    return found


def _no_number(text: str) -> NoReturn:
    raise _Wrong(f"{text}: is no number", "leave it out")


def _line(number: int, given: dict[str, Any], convert: Any) -> Line:
    values: dict[str, Any] = {}
    name = None
    for key, value in given.items():
        if key == ID:
            name = _id(value)
            continue
        known = _field_of(key)
        if known in values:
            raise _Wrong(f"{_shown(key)}: is given twice", "give it once")
        values[known] = convert(key, value, _kinds()[known])
    return Line(number, values, name)


def _id(value: object) -> str:
    """A job's id, which names its file. Raises _Wrong for what is no file name, wherever the file may be taken."""
    text = str(value) if type(value) is int else value
    if not isinstance(text, str):
        raise _Wrong(f"id: is {_shown(value)}", "expected is text or a whole number")
    text = text.strip()
    is_name = text.isprintable() and not NOT_IN_NAMES.search(text) and text[:1] not in ("", ".", "-") and _is_text(text)
    if not is_name or len(text.encode()) > MAX_ID_BYTES or text.endswith("."):
        hint = f"it names the file: up to {MAX_ID_BYTES} bytes, no slash and the like, no dot or hyphen first"
        raise _Wrong(f"id: {_shown(text)} is no file name", hint)
    return text


@cache
def _kinds() -> dict[str, str]:
    """The type of each field that a job may give."""
    fields = dataclasses.fields(GenerateSpec)
    return {one.name: str(one.type).removesuffix(" | None") for one in fields if one.name not in BatchSpec.OF_THE_RUN}


@lru_cache(maxsize=1024)
def _field_of(key: str) -> str:
    """The field that a key means. Raises _Wrong, with the nearest key, when there is none."""
    if key == ID:
        return key
    fields = {SPELLINGS.get(name, name): name for name in _kinds()}
    name = key.replace("-", "_")
    if name in fields:
        return fields[name]
    if name in BatchSpec.OF_THE_RUN:
        raise _Wrong(f"{_shown(key)}: is of the whole run", f"give it on the command line: --{name.replace('_', '-')}")
    near = difflib.get_close_matches(name[:64], [*fields, ID], 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join([*fields, ID])}"
    raise _Wrong(f"{_shown(key)}: unknown key", hint)


def _from_json(key: str, value: Any, kind: str) -> Any:
    """A JSON value as a field's type. Raises _Wrong."""
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "str" and key == "class" and type(value) is int:
        return str(value)
    if (kind == "int" and type(value) is int) or (kind == "bool" and type(value) is bool):
        return value
    if kind == "float" and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind == "Path" and isinstance(value, str) and value:
        return Path(value)
    if kind.startswith("tuple"):
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(one, str) for one in values):
            return tuple(Path(one) if "Path" in kind else one for one in values)
    raise _Wrong(f"{_shown(key)}: is {_shown(value)}", f"expected is {_expected(kind)}")


def _from_text(key: str, cell: str, kind: str) -> Any:
    """A cell of a table as a field's type. Raises _Wrong."""
    text = cell.strip()
    try:
        if kind == "int" and WHOLE_NUMBER.fullmatch(text):
            return int(text)
        if kind == "float" and math.isfinite(float(text)):
            return float(text)
    except ValueError:
        pass
    if kind == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind in ("int", "float", "bool"):
        raise _Wrong(f"{_shown(key)}: is {_shown(text)}", f"expected is {_expected(kind)}")
    return _from_json(key, text, kind)


def _expected(kind: str) -> str:
    words = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "Path": "a path"}
    return words.get(kind, "a list of texts")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return reprlib.repr(text) if isinstance(value, str) and not value.isidentifier() else text[:60]
