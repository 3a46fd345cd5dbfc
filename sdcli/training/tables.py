"""Files that list the pictures of a folder with what they show: metadata.jsonl and .csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from sdcli.errors import InputError
from sdcli.files import open_regular, reason
from sdcli.training.samples import Fault, Layout, Sample

CAPTION_COLUMNS = ("text", "caption")
MAX_METADATA_BYTES = 1 << 30  # read line by line

Row = tuple[int, dict[str, object]]  # a line's number from 1, and what it says


def read(root: Path) -> Layout | None:
    """The samples of the table in a folder: metadata.jsonl, else metadata.csv.

    Raises InputError when a table cannot be read at all.
    """
    for name, rows in _LINES.items():
        if (path := root / name).exists():
            return Layout.of(name, _listed(root, path, rows))
    return None


def _listed(root: Path, path: Path, rows: Callable[[Path], Iterator[Row]]) -> Iterator[Sample | Fault]:
    for line, row in rows(path):
        try:
            yield Sample(_inside(root, row["file_name"]), captions_of(row))
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
        for number, line in enumerate(stream, start=1):
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
            reader = csv.DictReader(text)
            for row in reader:
                yield reader.line_num, {key: value for key, value in row.items() if value is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: {reason(error)}", "save it as UTF-8, with file_name and text in line 1"
            ) from error


_LINES = {"metadata.jsonl": _json_rows, "metadata.csv": _csv_rows}


def captions_of(row: dict[str, object]) -> tuple[str, ...]:
    text = next((row[name] for name in CAPTION_COLUMNS if name in row), [])
    captions = [text] if isinstance(text, str) else text
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise TypeError(f"text is {text!r}, neither a string nor a list of strings")
    return tuple(captions)


def _inside(root: Path, name: object) -> Path:
    """The picture a line names. Raises TypeError for what is no name, ValueError for what is no file of the folder."""
    if isinstance(name, Exception):
        raise ValueError(f"is no JSON ({name})")
    if not isinstance(name, str):
        raise TypeError(f"file_name is {name!r}, no string")
    picture = root / name
    try:
        if not picture.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{name!r} leads outside the folder")
        if not picture.is_file():
            raise ValueError(f"{name!r} does not exist")
    except (OSError, RuntimeError) as error:  # too long, a loop of links
        raise ValueError(f"{name!r}: {reason(error)}") from error
    return picture
