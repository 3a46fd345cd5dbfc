"""The run folder: one owner, a configuration that must not change, and checkpoints that are whole or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import reprlib
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcli.errors import InputError, LockedError, OutputError, SdcliWarning
from sdcli.files import PART_NAME, atomic_write, make_folder, open_regular, output_error, read_bytes, reason, sync
from sdcli.layout import read_json, write_json

FORMAT_VERSION = 1
LOCK = ".lock"
RUN_KEYS = {"kind", "data_hash", "origin"}  # what the config.json of a run has, and that of a model has not
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{8})")
MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to go on as if it had never stopped."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]  # file stem -> tensors: model, model-optimizer, ema, rng
    state: dict[str, Any]  # plain JSON: optimizer groups, scaler


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock dies with the process.

    Raises LockedError when another process holds it, InputError, with nothing written, when it is no run's folder.
    """
    _recorded(folder)
    make_folder(folder)
    try:
        lock = (folder / LOCK).open("ab")
    except OSError as error:
        raise output_error(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(f"{folder}: another training owns this run folder", "wait for it to end") from error
        except OSError as error:
            raise output_error(folder, error) from error
        yield


def open_run(folder: Path, identity: dict[str, Any]) -> None:
    """Begin a run in `folder`, or check that the run found there has the same settings and data.

    A run that never came to its first step has nothing to protect: the new settings take its place.
    Raises InputError naming what differs.
    """
    _remove_parts(folder)
    known = _recorded(folder)
    if known == identity:
        return
    if known is not None and _has_begun(folder):
        changed = sorted(key for key in known.keys() | identity.keys() if known.get(key) != identity.get(key))
        raise InputError(
            f"{folder}: " + ", ".join(f"{k} was {known.get(k)!r} and is {identity.get(k)!r} now" for k in changed),
            "repeat the first command to resume, or begin another run with --run",
        )
    shutil.rmtree(folder / "cache", ignore_errors=True)
    write_json(folder / "config.json", identity)


def save(folder: Path, snapshot: Snapshot, *, config_hash: str) -> Path:
    """Write a checkpoint so that it exists whole or not at all. Raises OutputError; older checkpoints stay."""
    final = place(folder, snapshot.step)
    part = final.with_name(final.name + ".part")
    make_folder(final.parent)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for stem, tensors in snapshot.tensors.items():
            write_tensors(part / f"{stem}.safetensors", tensors)
        write_json(part / "state.json", {"step": snapshot.step, **snapshot.state})
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in sorted(part.iterdir())}
        write_json(part / "manifest.json", {"format": FORMAT_VERSION, "config": config_hash, "files": files})
        if final.exists():  # damaged: the run resumed from one before it
            shutil.rmtree(final)
        part.rename(final)
        sync(final.parent)
    except OSError as error:
        raise output_error(final, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / "checkpoints" / f"checkpoint-{step:08d}"


def steps(folder: Path) -> list[int]:
    """The steps of all checkpoints there are, whole or not, in order."""
    return [int(path.name.rpartition("-")[2]) for path in _all(folder)]


def prune(folder: Path, keep: Collection[int]) -> None:
    """Remove the checkpoints before the last to keep that are not among those to keep."""
    for step in steps(folder):
        if step < max(keep) and step not in keep:
            shutil.rmtree(place(folder, step), ignore_errors=True)


def newest(folder: Path, *, config_hash: str) -> Snapshot | None:
    """The newest checkpoint that is whole; None when the run has saved none yet.

    Warns of every damaged one that is passed over. Raises InputError when there are some and none is whole.
    """
    found = _all(folder)
    for path in reversed(found):
        problem = _problem(path, config_hash)
        if problem is None:
            return _load(path)
        warnings.warn(f"{path}: {problem}; the checkpoint before it is tried", SdcliWarning, stacklevel=2)
    if found:
        raise InputError(f"{folder}: none of its {len(found)} checkpoints is whole", "begin another run with --run")
    return None


def at(folder: Path, step: int, *, config_hash: str) -> Snapshot:
    """The checkpoint of one step. Raises InputError unless it is whole."""
    problem = _problem(place(folder, step), config_hash)
    if problem is not None:
        raise InputError(f"{place(folder, step)}: {problem}", "export the last step instead")
    return _load(place(folder, step))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole, synced and with the umask's mode. Raises OutputError."""
    try:
        with atomic_write(path) as part:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OutputError(f"{path}: {error}", "free some space") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _recorded(folder: Path) -> dict[str, Any] | None:
    """The identity of the run in `folder`; None where one may begin; InputError where it holds something else."""
    path = folder / "config.json"
    if path.exists():
        config = read_json(path)
        if config.keys() >= RUN_KEYS:
            return config
        others = [path.name]
    else:
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        others = sorted(name for name in names if name != LOCK and not PART_NAME.fullmatch(name))
    if others:
        raise InputError(f"{folder}: holds {others[0]} but no run", "name a new or empty folder with --run")
    return None


def _has_begun(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return bool(_all(folder)) or (metrics.exists() and metrics.stat().st_size > 0)


def _remove_parts(folder: Path) -> None:
    """Remove what a killed process left half written; this one holds the lock, so nobody else is writing."""
    parts = [*folder.glob("export*.part"), *(folder / "checkpoints").glob("checkpoint-*.part")]
    parts += (folder / "samples").glob("step-*.part")
    parts += [path for path in folder.iterdir() if PART_NAME.fullmatch(path.name)]
    parts += (folder / "cache").glob(".*")  # where safetensors leaves files of its own naming, too
    for path in parts:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "checkpoints").glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(p.name))


def _problem(path: Path, config_hash: str) -> str | None:
    try:
        manifest = json.loads(read_bytes(path / "manifest.json", max_bytes=MAX_MANIFEST_BYTES))
        if manifest["format"] != FORMAT_VERSION:
            return f"has format {manifest['format']}, {FORMAT_VERSION} is read"
        if manifest["config"] != config_hash:
            return "belongs to a run with other settings"
        files = manifest["files"]
        for name, facts in files.items():
            if Path(name).name != name or not _is(path / name, facts["bytes"], facts["sha256"]):
                return f"{reprlib.repr(name)[1:-1]} is damaged or missing"
        for name in ("state.json", *(file.name for file in path.glob("*.safetensors"))):
            if name not in files:
                return f"{reprlib.repr(name)[1:-1]} is not in its manifest"
    except (InputError, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        return f"its manifest cannot be read ({reason(error)})"
    return None


def _is(path: Path, size: int, digest: str) -> bool:
    """Whether a file of a checkpoint, which lies in it and not behind a link, is the one that was saved."""
    try:
        with open_regular(path, within=path.parent) as stream:
            same = os.fstat(stream.fileno()).st_size == size
            return same and hashlib.file_digest(stream, "sha256").hexdigest() == digest
    except InputError:
        return False


def _load(path: Path) -> Snapshot:
    try:
        state = json.loads(read_bytes(path / "state.json", max_bytes=MAX_MANIFEST_BYTES))
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        step = state.pop("step")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _no_checkpoint(path) from error
    if step != int(path.name.rpartition("-")[2]):
        raise _no_checkpoint(path)
    return Snapshot(step=step, tensors=tensors, state=state)


def _no_checkpoint(path: Path) -> InputError:
    what = f"{path}: its files are whole, but no checkpoint of this run"
    return InputError(what, "remove it; the one before is then taken")
