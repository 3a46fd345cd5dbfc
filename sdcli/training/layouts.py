"""A folder -> the pictures in it with what is said of them, in the layouts that people use."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from sdcli.errors import InputError, SdcliWarning
from sdcli.files import read_bytes
from sdcli.pipeline.images import SUFFIXES
from sdcli.training import shards, tables
from sdcli.training.samples import MAX_CAPTION_BYTES, Fault, Layout, Sample, some

CAPTION_SUFFIXES = (".txt", ".caption")
REPEATED = re.compile(r"(?P<repeats>\d+)_(?P<caption>.+)")  # kohya's folder names: 10_sks dog
MAX_REPEATS = 10_000


def read(root: Path) -> Layout:
    """Find the samples of a folder, by the first of these layouts that it has.

    1. A table: metadata.jsonl, metadata.csv, kohya's meta_lat.json, meta_cap.json or meta.json (`tables.read`).
    2. Pictures right in the folder, those below it included, with captions beside them.
    3. WebDataset's tars (`shards.read`).
    4. kohya's folders, named by repeats and caption: `10_sks dog/`.
    5. Pictures in folders, with captions beside them.

    Opens captions, tables and the headers of tars, no pictures. Warns (SdcliWarning) of tars that another layout leaves
    out. Raises InputError when there is no such folder, or its table is none.
    """
    if not root.is_dir():
        raise InputError(f"{root}: is no folder", "name a folder of pictures with --data")
    found = _first(root, (tables.read, _beside_own_pictures, shards.read, _repeated, _beside))
    if found.name != shards.NAME and (tars := shards.tars(root)):
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
    return _beside(root) if any(path.suffix.lower() in SUFFIXES for path in root.iterdir()) else None


def _repeated(root: Path) -> Layout | None:
    """Folders whose names say how often an epoch shows their pictures, and what those show."""
    matches = ((folder, REPEATED.fullmatch(folder.name)) for folder in sorted(root.iterdir()) if folder.is_dir())
    folders = [(folder, int(match["repeats"][:9]), match["caption"]) for folder, match in matches if match is not None]
    return Layout.of("folders of repeats", (row for one in folders for row in _as_often(*one))) if folders else None


def _as_often(folder: Path, repeats: int, caption: str) -> Iterator[Sample | Fault]:
    """Every sample of a folder as often as its name says."""
    if not 1 <= repeats <= MAX_REPEATS:
        what = f"repeats its pictures {repeats} times"
        yield Fault("folder", str(folder), what, f"1 to {MAX_REPEATS:,} are possible")
        return
    for picture in _pictures(folder):
        row = _with_sidecar(picture, otherwise=caption)
        yield from [row] * (repeats if isinstance(row, Sample) else 1)


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
        return Fault("encoding", str(path), "is not UTF-8", "save the caption as UTF-8", is_mendable=True)
    except InputError as error:
        return Fault("caption", str(path), error.message.removeprefix(f"{path}: "), error.hint)
    return Sample(picture, (" ".join(text.split()),))


def _warn_of_left_out(root: Path, found: Layout, names: list[str]) -> None:
    text = f"{root}: {some(names)} left out: what is read is {found.name}"
    warnings.warn(text, SdcliWarning, stacklevel=2)
