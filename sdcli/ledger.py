"""A folder that keeps the rows of long work as they are done, so that the same command again does only what is missing.

`config.json` says what the rows belong to, `ledger.jsonl` has one a line, each appended whole and synced. A run that is
killed leaves at most one half line, which the next one drops.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sdcli.errors import InputError, LockedError, SdcliWarning
from sdcli.files import PART_NAME, atomic_write, exists, make_folder, open_regular, output_error, remove_dead_parts
from sdcli.layout import read_json, write_json

CONFIG, ROWS, LOCK = "config.json", "ledger.jsonl", ".lock"
HASH_LENGTH = 12
KEY = "key"
LARGEST = 2.0**63

Columns = Mapping[str, tuple[type, ...]]


class Ledger:
    """The rows of one run, by key. Only its owner has one: see `opened`."""

    def __init__(self, path: Path, rows: dict[str, dict[str, Any]], stream: IO[bytes]) -> None:
        self.rows = rows
        self._path, self._stream = path, stream

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep a row from now on, whatever happens. Raises OutputError when the disk refuses."""
        try:
            self._stream.write(_line(key, row))
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise output_error(self._path, error) from error
        self.rows[key] = dict(row)


def digest(identity: Mapping[str, Any]) -> str:
    """The hash of plain JSON values that names a run, or a row, in hex."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:HASH_LENGTH]


@contextmanager
def opened(folder: Path, identity: Mapping[str, Any], columns: Columns | None = None) -> Iterator[Ledger]:
    """Own a run folder for this process: a new one, or that of the same settings with the rows it has.

    identity: plain JSON values, `kind` among them; the settings that all rows share. A folder without a row takes new
    ones.
    columns: what a row has, and of which types; one that does not fit, in a file that somebody edited, is done again
    with a warning (SdcliWarning). None takes any.
    Raises LockedError when another process owns the folder, InputError when it holds other settings or another
    thing, OutputError when it cannot be written.
    """
    _recorded(folder, identity["kind"])
    make_folder(folder)
    try:
        # O_NONBLOCK: opening a FIFO nobody reads must not hang.
        lock = os.fdopen(os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666), "ab")
    except OSError as error:
        raise output_error(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = f"{folder}: another {identity['kind']} owns this run folder"
            raise LockedError(what, "wait for it to end, or name another with --run") from error
        except OSError as error:
            raise output_error(folder, error) from error
        remove_dead_parts(folder)
        path = folder / ROWS
        rows = _kept(path, columns)
        _check(folder, identity, rows)
        try:
            _mend(path, rows)
            stream = path.open("ab", buffering=0)
        except OSError as error:
            raise output_error(path, error) from error
        with stream:
            yield Ledger(path, rows, stream)


def _check(folder: Path, identity: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    """Write the identity of a run that has no row yet; else raise InputError naming what differs."""
    known = _recorded(folder, identity["kind"])
    if known == identity:
        return
    if known is not None and rows:
        changed = sorted(key for key in known.keys() | identity.keys() if known.get(key) != identity.get(key))
        words = ", ".join(f"{k} was {known.get(k)!r} and is {identity.get(k)!r} now" for k in changed)
        raise InputError(f"{folder}: {words}", "repeat the first command to resume, or begin another run with --run")
    write_json(folder / CONFIG, identity)


def _recorded(folder: Path, kind: str) -> dict[str, Any] | None:
    """The identity of the run in `folder`; None where one may begin; InputError where it holds something else."""
    if (folder / CONFIG).exists():
        config = read_json(folder / CONFIG)
        if config.get("kind") == kind:
            return config
        others = [CONFIG]
    else:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        others = sorted(name for name in names if name != LOCK and not PART_NAME.fullmatch(name))
    if others:
        raise InputError(f"{folder}: holds {others[0]} but no {kind}", "name a new or empty folder with --run")
    return None


def _kept(path: Path, columns: Columns | None) -> dict[str, dict[str, Any]]:
    """The rows up to the first that is not whole, without those that do not fit."""
    rows: dict[str, dict[str, Any]] = {}
    if not exists(path):
        return rows
    with open_regular(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = json.loads(line)
                key = str(row.pop(KEY))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                break
            if columns is None or _fits(row, columns):
                rows[key] = row
            else:
                what = f"{path}:{number}: is no row of this run and is done again"
                warnings.warn(what, SdcliWarning, stacklevel=2)
    return rows


def _fits(row: Mapping[str, Any], columns: Columns) -> bool:
    """Whether a row has these columns and no others, each of its types; numbers are finite and of 64 bits."""
    return row.keys() == columns.keys() and all(
        type(row[name]) in types and not (type(row[name]) in (int, float) and not abs(row[name]) < LARGEST)
        for name, types in columns.items()
    )


def _mend(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Rewrite the file where it holds more than these rows: half a line of a killed process."""
    whole = b"".join(_line(key, row) for key, row in rows.items())
    if not path.exists() or path.read_bytes() != whole:
        with atomic_write(path) as part:
            part.write_bytes(whole)


def _line(key: str, row: Mapping[str, Any]) -> bytes:
    return f"{json.dumps({KEY: key, **row})}\n".encode()
