"""STORY: pictures -> what they say about their making, or the same pictures without a word of it."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdcli import schedulers
from sdcli.errors import InputError, OutputError, SdcliError, UsageError
from sdcli.files import atomic_write, check_writable, exists, read_bytes, remove_dead_parts
from sdcli.pipeline import containers, provenance
from sdcli.specs import MetaSpec

MAX_FILE_BYTES = 1 << 28
MAX_NAME_LENGTH = 100  # of a scheduler in another program's words
# Words for a noise schedule that other programs write behind a sampler's name.
SCHEDULES = frozenset({"automatic", "ays", "beta", "discrete", "exponential", "gits", "karras", "kl_optimal", "normal"})
SCHEDULES |= {"sgm_uniform", "simple", "smoothstep", "uniform"}
USUAL_SCHEDULES = frozenset({"", "automatic", "normal", "discrete", "default", "uniform", "none"})
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
    inside = containers.look_inside(read_bytes(path, max_bytes=MAX_FILE_BYTES), path)
    said = provenance.find_out(inside, path)
    facts = said.facts | _scheduler(said.facts)
    first = {name: facts[name] for name in ORDER if name in facts}
    rest = {name: value for name, value in facts.items() if name not in (*ORDER, "schedule", "path", "source", "raw")}
    record = {"path": str(path), "source": said.source, **first, **rest, "raw": said.raw}
    return MetaRecord(path, said.source, record)


def _scheduler(facts: dict[str, Any]) -> dict[str, Any]:
    """The scheduler by our name, with the options that its name there stands for; None where we have no such."""
    if "sampler" not in facts:
        return {}
    sampler, schedule = str(facts["sampler"]), str(facts.get("schedule", ""))
    is_usual = schedule.casefold() in USUAL_SCHEDULES
    words = sampler if is_usual else f"{sampler} {schedule}"
    before, _, last = sampler.rpartition(" ")  # stable-diffusion.cpp: `euler_a karras`, which ours may not have
    for name in dict.fromkeys((words, sampler, before if last.casefold() in SCHEDULES else sampler)):
        try:
            found = schedulers.find(name[:MAX_NAME_LENGTH])
        except UsageError:
            continue
        return {"scheduler": found.name, **found.choices, "sampler": words}
    return {"scheduler": None, "sampler": words}


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
    turned = provenance.orientation(containers.exif(data, path))
    return containers.without_metadata(data, path, turned)
