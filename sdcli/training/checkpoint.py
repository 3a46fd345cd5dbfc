"""The run folder: one owner, a configuration that must not change, and checkpoints that are whole or not there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcli.errors import InputError, LockedError, SdcliWarning
from sdcli.files import atomic_write, make_folder, output_error, read_bytes, sync
from sdcli.pipeline.bundle import write_json

FORMAT_VERSION = 1
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d{8})")
MAX_MANIFEST_BYTES = 16 << 20
HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to go on as if it had never stopped."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # file stem -> tensors: weights, ema, optimizer, rng
    state: dict[str, Any]  # plain JSON: optimizer groups, scaler


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; the lock dies with the process. Raises LockedError."""
    make_folder(folder)
    try:
        lock = (folder / ".lock").open("ab")
    except OSError as error:
        raise output_error(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LockedError(f"{folder}: another training owns this run folder", "wait for it to end") from error
        yield


def open_run(folder: Path, identity: dict[str, Any]) -> None:
    """Begin a run in `folder`, or check that the run found there has the same settings and data.

    Raises InputError naming what differs.
    """
    path = folder / "config.json"
    if not path.exists():
        others = [p.name for p in folder.iterdir() if p.name != ".lock" and not p.name.endswith(".part")]
        if others:
            raise InputError(f"{folder}: holds {min(others)} but no run", "name a new or empty folder with --run")
        write_json(path, identity)
        return
    known = json.loads(read_bytes(path, max_bytes=MAX_MANIFEST_BYTES))
    changed = sorted(key for key in known.keys() | identity.keys() if known.get(key) != identity.get(key))
    if changed:
        key = changed[0]
        raise InputError(
            f"{folder}: {key} was {known.get(key)!r} and is {identity.get(key)!r} now",
            "repeat the first command to resume, or begin another run with --run",
        )


def save(folder: Path, snapshot: Snapshot, *, keep: int, config_hash: str) -> Path:
    """Write a checkpoint so that it exists whole or not at all, then prune all but the newest `keep`.

    Raises OutputError when the disk refuses; older checkpoints stay.
    """
    final = folder / "checkpoints" / f"checkpoint-{snapshot.step:08d}"
    part = final.with_name(final.name + ".part")
    make_folder(final.parent)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for stem, tensors in snapshot.tensors.items():
            # fsync by atomic_write: save_file alone would leave the data in the page cache.
            with atomic_write(part / f"{stem}.safetensors") as path:
                save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
        write_json(part / "state.json", {"step": snapshot.step, **snapshot.state})
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in sorted(part.iterdir())}
        write_json(part / "manifest.json", {"format": FORMAT_VERSION, "config": config_hash, "files": files})
        if final.exists():  # left by a run that was killed after a resume; same step, same content
            shutil.rmtree(final)
        part.rename(final)
        sync(final.parent)
    except OSError as error:
        raise output_error(final, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def truncate_metrics(folder: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`: they will be written again."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break  # the half line of a killed process
    with atomic_write(path) as part:
        part.write_text("".join(kept), encoding="utf-8")


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "checkpoints").glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(p.name))


def _problem(path: Path, config_hash: str) -> str | None:
    try:
        manifest = json.loads(read_bytes(path / "manifest.json", max_bytes=MAX_MANIFEST_BYTES))
        if manifest["format"] != FORMAT_VERSION:
            return f"has format {manifest['format']}, {FORMAT_VERSION} is read"
        if manifest["config"] != config_hash:
            return "belongs to a run with other settings"
        for name, facts in manifest["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != facts["bytes"] or file_hash(file) != facts["sha256"]:
                return f"{name} is damaged or missing"
    except (InputError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"its manifest cannot be read ({error})"
    return None


def _load(path: Path) -> Snapshot:
    state = json.loads(read_bytes(path / "state.json", max_bytes=MAX_MANIFEST_BYTES))
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    return Snapshot(step=state.pop("step"), tensors=tensors, state=state)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors named `<parameter>.<quantity>`, and its settings as plain JSON."""
    whole = optimizer.state_dict()
    tensors = {f"{i}.{key}": torch.as_tensor(v) for i, row in whole["state"].items() for key, v in row.items()}
    return tensors, {"param_groups": whole["param_groups"]}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """The inverse of `optimizer_state`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": settings["param_groups"]})
