"""A folder -> the pictures in it with what is said of them, in the layouts that people use."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from sdcli.errors import InputError, SdcliWarning
from sdcli.files import read_bytes, reason
from sdcli.pipeline.images import SUFFIXES
from sdcli.training import shards, tables
from sdcli.training.samples import MAX_CAPTION_BYTES, Fault, Layout, Sample, is_label, some

CAPTION_SUFFIXES = (".txt", ".caption")
REPEATED = re.compile(r"(?P<repeats>\d+)_(?P<caption>.+)")  # kohya's folder names: 10_sks dog
MAX_REPEATS = 10_000
SPLITS = frozenset({"train", "test", "validation", "valid", "val", "dev", "eval"})


def read(root: Path) -> Layout:
    """Find the samples of a folder, by the first of these layouts that it has.

    1. A table: metadata.jsonl, metadata.csv, kohya's meta_lat.json, meta_cap.json or meta.json (`tables.read`).
    2. Pictures right in the folder, those below it included, with captions beside them.
    3. WebDataset's tars (`shards.read`).
    4. kohya's folders, named by repeats and caption: `10_sks dog/`.
    5. `train/` of a folder that is split into train, test and so on, itself in any of these layouts.
    6. Class folders: two or more with pictures, of which none has a caption beside it.
    7. Pictures in folders, with captions beside them.

    Opens captions, tables and the headers of tars, no pictures. Warns (SdcliWarning) of what has pictures, too, and is
    left out. Raises InputError when the folder cannot be read, or its table is none.
    """
    if not root.is_dir():
        raise InputError(f"{root}: is no folder", "name a folder of pictures with --data")
    try:
        found = _first(root, (tables.read, _beside_own_pictures, shards.read, _repeated, _split, _classes, _beside))
        tars = shards.tars(root)
    except OSError as error:
        raise InputError(f"{error.filename}: {reason(error)}", "name a folder that can be read") from error
    if tars and found.name != shards.NAME:
        _warn_of_left_out(root, found, [tar.name for tar in tars])
    return found


def caption_file(picture: Path) -> Path | None:
    """The file beside a picture that says what it shows, if there is one."""
    paths = (picture.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _first(root: Path, readers: tuple[Callable[[Path], Layout | None], ...]) -> Layout:
    return next(found for reader in readers if (found := reader(root)) is not None)


def _beside(root: Path) -> Layout:
    return Layout.of("captions beside the pictures", (_with_sidecar(picture) for picture in _pictures(root)))


def _beside_own_pictures(root: Path) -> Layout | None:
    return _beside(root) if any(_is_picture(path) for path in root.iterdir()) else None


def _repeated(root: Path) -> Layout | None:
    """Folders whose names say how often an epoch shows their pictures, and what those show."""
    folders = _folders(root)
    matches = [(folder, match) for folder in folders if (match := REPEATED.fullmatch(folder.name)) is not None]
    if not matches:
        return None
    rows = (row for folder, match in matches for row in _as_often(folder, int(match["repeats"][:9]), match["caption"]))
    found = Layout.of("folders of repeats", rows)
    others = [folder.name for folder in folders if REPEATED.fullmatch(folder.name) is None and _pictures(folder)]
    if others:
        _warn_of_left_out(root, found, others)
    return found


def _as_often(folder: Path, repeats: int, caption: str) -> Iterator[Sample | Fault]:
    """Every sample of a folder as often as its name says."""
    if not 1 <= repeats <= MAX_REPEATS:
        what = f"repeats its pictures {repeats} times"
        yield Fault("folder", str(folder), what, f"1 to {MAX_REPEATS:,} are possible")
        return
    for picture in _pictures(folder):
        row = _with_sidecar(picture, otherwise=caption)
        yield from [row] * (repeats if isinstance(row, Sample) else 1)


def _split(root: Path) -> Layout | None:
    """The part to train on, of a folder that holds several and nothing else, or whose train/ has a table."""
    train, folders = root / "train", _folders(root)
    if train not in folders:
        return None
    others = [folder.name for folder in folders if folder.name not in SPLITS and _pictures(folder)]
    if others and not tables.is_in(train):
        return None
    found = _first(train, (tables.read, _beside_own_pictures, shards.read, _repeated, _classes, _beside))
    found = replace(found, name=f"{found.name} in train/")
    if others:
        _warn_of_left_out(root, found, others)
    return found


def _classes(root: Path) -> Layout | None:
    """Folders of which each is a class, with all that is below it."""
    folders = {folder: found for folder in _folders(root) if (found := _pictures(folder))}
    if len(folders) < 2 or any(caption_file(picture) for found in folders.values() for picture in found):
        return None
    return Layout.of("class folders", (row for folder, found in folders.items() for row in _of_class(folder, found)))


def _of_class(folder: Path, pictures: list[Path]) -> Iterator[Sample | Fault]:
    if is_label(folder.name):
        yield from (Sample(picture, (), label=folder.name) for picture in pictures)
    else:
        yield Fault("folder", str(folder), "has a name that cannot name a class", "rename it to printable UTF-8")


def _pictures(folder: Path) -> list[Path]:
    """All pictures in a folder and below, but for what is hidden or lies in hidden folders."""
    found = []
    for place, folders, names in os.walk(folder, onerror=_warn_of_unreadable):
        found += [path for name in (*folders, *names) if _is_picture(path := Path(place, name))]
        folders[:] = [name for name in folders if name[0] != "."]
    return sorted(found)


def _is_picture(path: Path) -> bool:
    """Whether a path is called like a picture, and not hidden."""
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


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
        return Fault("encoding", str(path), "is not UTF-8", "save the caption as UTF-8", is_mendable=True)
    except InputError as error:
        return Fault("caption", str(path), error.message.removeprefix(f"{path}: "), error.hint)
    return Sample(picture, (" ".join(text.split()),))


def _warn_of_left_out(root: Path, found: Layout, names: list[str]) -> None:
    text = f"{root}: {some(names)} left out: what is read is {found.name}"
    warnings.warn(text, SdcliWarning, stacklevel=2)


def _warn_of_unreadable(error: OSError) -> None:
    warnings.warn(f"{error.filename}: left out: {reason(error)}", SdcliWarning, stacklevel=2)
