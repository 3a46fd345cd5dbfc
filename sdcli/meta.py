"""STORY: pictures -> what they say about their making, or the same pictures without a word of it."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.archive import reading
from sdcli.archive.reading import MAX_FILE_BYTES
from sdcli.files import atomic_write, read_bytes, remove_dead_parts
from sdcli.pipeline import containers, provenance
from sdcli.specs import MetaSpec

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


def run(spec: MetaSpec) -> Iterator[MetaRecord]:
    """Read every picture, or rewrite each in place without metadata; all are looked at before the first is rewritten.

    Raises InputError for what is no whole PNG, JPEG or WebP file, or holds texts beyond all measure, OutputError when
    one cannot be rewritten.
    """
    if spec.strip:
        for path in spec.inputs:
            _stripped(path, read_bytes(path, max_bytes=MAX_FILE_BYTES))
    for path in spec.inputs:
        yield _strip(path) if spec.strip else _look(path)


def _look(path: Path) -> MetaRecord:
    said = reading.read(path)
    facts = said.facts
    first = {name: facts[name] for name in ORDER if name in facts}
    rest = {name: value for name, value in facts.items() if name not in (*ORDER, "schedule", "path", "source", "raw")}
    record = {"path": str(path), "source": said.source, **first, **rest, "raw": said.raw}
    return MetaRecord(path, said.source, record)


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
    turned = provenance.orientation(containers.exif(data, path))
    return containers.without_metadata(data, path, turned)
