"""STORY: pictures -> what they say about their making, or the same pictures without a word of it."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdcli.archive import reading
from sdcli.archive.reading import MAX_FILE_BYTES
from sdcli.errors import InputError, OutputError, SdcliError
from sdcli.files import atomic_write, check_writable, exists, read_bytes, remove_dead_parts
from sdcli.pipeline import containers, exif
from sdcli.specs import MetaSpec

T = TypeVar("T")
ORDER = (
    "prompt",
    "negative",
    "model",
    "model_hash",
    "seed",
    "width",
    "height",
    "scheduler",
    "sampler",
    "steps",
    "guidance",
)


@dataclass(frozen=True)
class MetaRecord:
    """One picture: what it says, or where it is without it. source: None where nothing is said."""

    path: Path
    source: str | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A picture that cannot be read (InputError), or not be rewritten (OutputError), and why."""

    path: Path
    error: SdcliError


def run(spec: MetaSpec) -> Iterator[MetaRecord | Failed]:
    """Read every picture, or rewrite each in place without metadata: none, unless all of them can be.

    What fails, in the order of the inputs, is no whole PNG, JPEG or WebP file, holds texts beyond all measure, or lies
    where nothing can be written.
    """
    if spec.strip:
        bad = [one for one in _each(spec.inputs, _check_strip) if isinstance(one, Failed)]
        if bad:
            yield from bad
            return
    yield from _each(spec.inputs, _strip if spec.strip else _look)


def _each(paths: Sequence[Path], act: Callable[[Path], T]) -> Iterator[T | Failed]:
    for path in paths:
        try:
            yield act(path)
        except (InputError, OutputError) as error:
            yield Failed(path, error)


def _look(path: Path) -> MetaRecord:
    said = reading.read(path)
    facts = said.facts
    first = {name: facts[name] for name in ORDER if name in facts}
    rest = {name: value for name, value in facts.items() if name not in (*ORDER, "schedule", "path", "source", "raw")}
    record = {"path": str(path), "source": said.source, **first, **rest, "raw": said.raw}
    return MetaRecord(path, said.source, record)


def _check_strip(path: Path) -> None:
    """Raise InputError or OutputError where `_strip` would."""
    data, target = read_bytes(path, max_bytes=MAX_FILE_BYTES), path.resolve()
    if _stripped(path, data) == data:
        return
    if not exists(target):  # /proc/self/fd/3, of a file without a name
        raise OutputError(f"{path}: lies in no folder", "copy it to a file")
    check_writable(target.parent)


def _strip(path: Path) -> MetaRecord:
    target = path.resolve()  # of a link, what it leads to is rewritten
    before = read_bytes(path, max_bytes=MAX_FILE_BYTES)
    after = _stripped(path, before)
    if after != before:
        remove_dead_parts(target.parent)
        with atomic_write(target, mode=stat.S_IMODE(target.stat().st_mode)) as part:
            part.write_bytes(after)
    return MetaRecord(path, None, {"path": str(path), "bytes": len(after), "removed": len(before) - len(after)})


def _stripped(path: Path, data: bytes) -> bytes:
    turned = exif.orientation(containers.exif(data, path))
    return containers.without_metadata(data, path, turned)
