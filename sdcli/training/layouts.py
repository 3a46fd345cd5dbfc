"""A folder -> the pictures in it with what is said of them, in the layouts that people use."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sdcli.errors import InputError
from sdcli.files import open_regular, read_bytes, reason
from sdcli.pipeline.images import SUFFIXES

CAPTION_SUFFIXES = (".txt", ".caption")
CAPTION_COLUMNS = ("text", "caption")
REPEATED = re.compile(r"(?P<repeats>\d+)_(?P<caption>.+)")  # kohya's folder names: 10_sks dog
MAX_CAPTION_BYTES = 1 << 20
MAX_METADATA_BYTES = 1 << 30
MAX_REPEATS = 10_000


@dataclass(frozen=True)
class Sample:
    """One picture with its true captions, of which each use draws one; none means no text."""

    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """Something in a dataset that training cannot use: its kind, the file or line, what is wrong, how to mend it."""

    kind: str
    path: str
    problem: str
    hint: str


@dataclass(frozen=True)
class Layout:
    """What a folder holds: the layout's name, its samples in a fixed order, and what of it is no sample."""

    name: str
    samples: list[Sample]
    faults: list[Fault]


def read(root: Path) -> Layout:
    """Find the samples of a folder: by metadata.jsonl or .csv, else kohya's folders, else captions beside the pictures.

    Opens captions and metadata, no pictures. Raises InputError when there is no such folder.
    """
    if not root.is_dir():
        raise InputError(f"{root}: is no folder", "name a folder of pictures with --data")
    rows: Iterator[Sample | Fault]
    if (root / "metadata.jsonl").exists():
        name, rows = "metadata.jsonl", _listed(root, root / "metadata.jsonl", _json_rows)
    elif (root / "metadata.csv").exists():
        name, rows = "metadata.csv", _listed(root, root / "metadata.csv", _csv_rows)
    elif folders := _repeated_folders(root):
        name, rows = "folders of repeats", _repeated(folders)
    else:
        name, rows = "captions beside the pictures", (_with_sidecar(picture) for picture in _pictures(root))
    found = list(rows)
    samples = [row for row in found if isinstance(row, Sample)]
    return Layout(name, samples, [row for row in found if isinstance(row, Fault)])


def caption_file(picture: Path) -> Path | None:
    """The file beside a picture that says what it shows, if there is one."""
    paths = (picture.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _with_sidecar(picture: Path, otherwise: str = "") -> Sample | Fault:
    """A picture and the caption beside it.

    otherwise: its caption where there is no such file.
    """
    path = caption_file(picture)
    if path is None:
        return Sample(picture, (otherwise,) if otherwise else ())
    try:
        text = read_bytes(path, max_bytes=MAX_CAPTION_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        return Fault("encoding", str(path), "is not UTF-8", "save the caption as UTF-8")
    except InputError as error:
        return Fault("caption", str(path), error.message.removeprefix(f"{path}: "), error.hint)
    return Sample(picture, (" ".join(text.split()),))


def _repeated_folders(root: Path) -> list[tuple[Path, int, str]]:
    """kohya's layout, if `root` has it: folders named by repeats and caption, and no pictures beside them."""
    if any(p.suffix.lower() in SUFFIXES for p in root.iterdir()):
        return []
    matches = ((folder, REPEATED.fullmatch(folder.name)) for folder in sorted(root.iterdir()) if folder.is_dir())
    return [(folder, int(match["repeats"][:9]), match["caption"]) for folder, match in matches if match is not None]


def _repeated(folders: list[tuple[Path, int, str]]) -> Iterator[Sample | Fault]:
    """Every sample as often as its folder's name says, so that an epoch sees it as often."""
    for folder, repeats, caption in folders:
        if not 1 <= repeats <= MAX_REPEATS:
            yield Fault(
                "folder", str(folder), f"repeats its pictures {repeats} times", f"1 to {MAX_REPEATS:,} are possible"
            )
            continue
        for picture in _pictures(folder):
            row = _with_sidecar(picture, otherwise=caption)
            yield from [row] * (repeats if isinstance(row, Sample) else 1)


def _listed(root: Path, path: Path, rows: Callable[[Path], Iterator[_Row]]) -> Iterator[Sample | Fault]:
    for line, row in rows(path):
        try:
            yield Sample(_inside(root, row["file_name"]), _captions(row))
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


_Row = tuple[int, dict[str, object]]  # a line's number from 1, and what it says


def _json_rows(path: Path) -> Iterator[_Row]:
    with open_regular(path, max_bytes=MAX_METADATA_BYTES) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                row = {"file_name": error}
            yield number, row if isinstance(row, dict) else {"file_name": row}


def _csv_rows(path: Path) -> Iterator[_Row]:
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


def _captions(row: dict[str, object]) -> tuple[str, ...]:
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
