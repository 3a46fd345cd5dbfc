"""Files that list the pictures of a folder with what is said of them: metadata.jsonl and .csv, kohya's JSON."""

from __future__ import annotations

import csv
import io
import json
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, AnyStr

from sdcli.errors import InputError
from sdcli.files import open_regular, read_bytes, reason
from sdcli.pipeline.images import SUFFIXES
from sdcli.training.samples import Fault, Layout, Sample, is_label

CAPTION_COLUMNS = ("text", "caption")
KOHYA_COLUMNS = ("caption", "tags")
KOHYA_NAMES = ("meta_lat.json", "meta_cap.json", "meta.json")  # the last step of his preparation first
MAX_METADATA_BYTES = 1 << 30  # read line by line
MAX_LINE_BYTES = 1 << 20
MAX_KOHYA_BYTES = 1 << 26  # one JSON object, read as a whole: half a million pictures
BYTES_A_BRACKET = 20  # at least, in kohya's JSON: an entry has four, around a path, a caption and a size

Row = tuple[int, dict[str, object]]  # a line's number from 1, and what it says


def read(root: Path) -> Layout | None:
    """The samples of the table in a folder: metadata.jsonl, else metadata.csv, else kohya's JSON, the later step first.

    A metadata.parquet alone is a fault, and a JSON file called like kohya's that holds something else is no table.
    Raises InputError when a table cannot be read at all.
    """
    for name, rows in _LINES.items():
        if (path := root / name).exists():
            return Layout.of(name, _listed(root, path, rows), path)
    if (path := root / "metadata.parquet").exists():
        hint = 'convert it to metadata.jsonl, a line a picture: {"file_name": "0001.png", "text": "a cat"}'
        return Layout(path.name, [], [Fault("metadata", str(path), "is not read", hint)], path)
    for path in (root / name for name in KOHYA_NAMES):
        if path.exists() and (entries := _entries(path)) is not None:
            return Layout.of(path.name, _keyed(root, path, entries), path)
    return None


def is_in(folder: Path) -> bool:
    """Whether a folder has a metadata.jsonl or .csv."""
    return any((folder / name).exists() for name in _LINES)


def captions_of(row: dict[str, object], columns: tuple[str, ...] = CAPTION_COLUMNS) -> tuple[str, ...]:
    """The captions in the first of the columns that says something. Raises TypeError for what is no caption."""
    said = [(name, row[name]) for name in columns if row.get(name) is not None]
    if not said:
        return ()
    name, value = next((pair for pair in said if pair[1]), said[0])
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise TypeError(f"{name} is {reprlib.repr(value)}, neither a string nor a list of strings")
    return tuple(captions)


def _listed(root: Path, path: Path, rows: Callable[[Path], Iterator[Row]]) -> Iterator[Sample | Fault]:
    for line, row in rows(path):
        try:
            yield Sample(_inside(root, row["file_name"]), captions_of(row), label=_label(row.get("label")))
        except (KeyError, TypeError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            yield Fault(
                "metadata",
                f"{path}:{line}",
                what,
                "a line names a picture by file_name, and says what it shows by text",
            )
        except ValueError as error:
            yield Fault("metadata", f"{path}:{line}", str(error), "mend or remove the line")


def _json_rows(path: Path) -> Iterator[Row]:
    with open_regular(path, max_bytes=MAX_METADATA_BYTES) as stream:
        for number, line in enumerate(_lines(stream, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                row = {"file_name": error}
            yield number, row if isinstance(row, dict) else {"file_name": row}


def _csv_rows(path: Path) -> Iterator[Row]:
    with open_regular(path, max_bytes=MAX_METADATA_BYTES) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            reader = csv.DictReader(_lines(text, path))
            for row in reader:
                yield reader.line_num, {key: value for key, value in row.items() if value is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: {reason(error)}", "save it as UTF-8, with file_name and text in line 1"
            ) from error


def _lines(stream: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """The lines of a table. Raises InputError for one that no caption fills."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"{path}:{number}: has over {MAX_LINE_BYTES:,} characters", "mend or remove the line")
        yield line


_LINES = {"metadata.jsonl": _json_rows, "metadata.csv": _csv_rows}


def _label(value: object) -> str | None:
    """The class that a row names, by a name or a number. Raises TypeError for anything else."""
    if value is None or value == "":
        return None
    if type(value) not in (str, int) or not is_label(str(value)):
        raise TypeError(f"label is {reprlib.repr(value)}, neither a name nor a number")
    return str(value)


def _inside(root: Path, name: object) -> Path:
    """The picture a line names. Raises TypeError for what is no name, ValueError for what is no file of the folder."""
    if isinstance(name, Exception):
        raise ValueError(f"is no JSON ({name})")
    if not isinstance(name, str):
        raise TypeError(f"file_name is {reprlib.repr(name)}, no string")
    picture = root / name
    try:
        if not picture.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{reprlib.repr(name)} leads outside the folder")
        if not picture.is_file():
            raise ValueError(f"{reprlib.repr(name)} does not exist")
        is_below = not Path(name).is_absolute()
        return picture if is_below else root / picture.resolve().relative_to(root.resolve())
    except (OSError, RuntimeError) as error:  # too long, a loop of links
        raise ValueError(f"{reprlib.repr(name)}: {reason(error)}") from error


def _entries(path: Path) -> dict[str, object] | None:
    """What kohya's JSON says of each picture, or None where it is JSON of another kind."""
    try:
        data = read_bytes(path, max_bytes=MAX_KOHYA_BYTES)
        if (data.count(b"[") + data.count(b"{")) * BYTES_A_BRACKET > len(data) + MAX_LINE_BYTES:
            raise ValueError("it holds lists of nothing")
        entries = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no JSON ({reason(error)})", "mend it, or remove it") from error
    if not isinstance(entries, dict):
        return None
    is_kohyas = any(isinstance(entry, dict) and entry.keys() & set(KOHYA_COLUMNS) for entry in entries.values())
    return entries if is_kohyas else None


def _keyed(root: Path, path: Path, entries: dict[str, object]) -> Iterator[Sample | Fault]:
    for key, entry in entries.items():
        try:
            if not isinstance(entry, dict):
                raise TypeError(f"says {reprlib.repr(entry)}, no object")
            yield Sample(_inside(root, _with_suffix(root, key)), captions_of(entry, KOHYA_COLUMNS))
        except TypeError as error:
            hint = 'an entry is "0001.png": {"caption": "a cat", "tags": "cat, red"}'
            yield Fault("metadata", f"{path}:{key}", str(error), hint)
        except ValueError as error:
            yield Fault("metadata", f"{path}:{key}", str(error), "mend or remove the entry")


def _with_suffix(root: Path, key: str) -> str:
    """The name of the picture that a key stands for: itself, or with one of the suffixes that pictures have."""
    try:
        if (root / key).is_file():
            return key
        for suffixes in (sorted(SUFFIXES), sorted(suffix.upper() for suffix in SUFFIXES)):
            found = [key + suffix for suffix in suffixes if (root / (key + suffix)).is_file()]
            if found:
                break
    except OSError:  # too long: told by whoever looks for it
        return key
    if len(found) > 1:
        raise ValueError(f"stands for {' and '.join(found)}")
    return found[0] if found else key
