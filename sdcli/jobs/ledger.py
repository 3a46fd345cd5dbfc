"""`ledger.jsonl` in a batch's output folder: a record of every finished image, by the hash of its job.

Each line is appended whole and synced, under a lock, so that processes with shares of one batch write one file. Half a
line of a killed process is cut off by the next that opens or appends.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sdcli.errors import LockedError, OutputError
from sdcli.files import make_folder, output_error, remove_dead_parts
from sdcli.jobs.tally import Tally, key_of, number
from sdcli.ledger import KEY, LOCK, ROWS

NEWLINE = b"\n"
# What a line that is no record of ours raises: no JSON, too deep, another form, a key of more bits than we have.
DAMAGES = (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError)


class Ledger:
    """Which images are finished. `add` may be called by another thread, all else only by the one that opened it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._keys = Tally()  # the key of the picture at each path: of several records the last one counts
        self._descriptor = descriptor
        self._turn = threading.Lock()  # flock is of the descriptor: it keeps other processes out, not other threads
        with self._locked():
            self._read()

    def has(self, key: str, name: str) -> bool:
        """Whether the file of this name was the picture of this job when it was last written."""
        return self._keys.get(key_of(name)) == number(key)

    def note(self, key: str, name: str) -> None:
        """Let `has` know of a record that was added."""
        self._keys.put(key_of(name), number(key))

    def check_in_place(self) -> None:
        """Raise OutputError when the file is no longer that of its name: nobody would find what is written to it."""
        with suppress(OSError):
            if os.path.samestat(self.path.stat(), os.fstat(self._descriptor)):
                return
        what = f"{self.path}: was removed or replaced while the batch ran"
        raise OutputError(what, "the same command again makes what is missing")

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Append the record of a finished image. Raises OutputError when the disk refuses; nothing is then appended."""
        line = f"{json.dumps({KEY: key, **record})}\n".encode()
        with self._locked():
            self.check_in_place()
            end = self._whole_end()
            try:
                os.ftruncate(self._descriptor, end)
                written = os.pwrite(self._descriptor, line, end)
                while written < len(line):
                    written += os.pwrite(self._descriptor, line[written:], end + written)
                os.fsync(self._descriptor)
            except OSError as error:
                os.ftruncate(self._descriptor, end)
                raise output_error(self.path, error) from error

    def _read(self) -> None:
        os.ftruncate(self._descriptor, self._whole_end())
        with os.fdopen(os.dup(self._descriptor), "rb") as stream:
            stream.seek(0)
            for line in stream:
                with suppress(*DAMAGES):  # such a picture is found on the disk, or made again
                    record = json.loads(line)
                    self.note(record[KEY], record["path"])

    def _whole_end(self) -> int:
        """Where the last whole line ends, in bytes."""
        size = end = os.fstat(self._descriptor).st_size
        while end > 0:
            start = max(0, end - 4096)
            found = os.pread(self._descriptor, end - start, start).rfind(NEWLINE)
            if found >= 0:
                return start + found + 1
            end = start
        return 0 if size else size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._turn:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)


@contextmanager
def opened(folder: Path, share: tuple[int, int]) -> Iterator[Ledger]:
    """Own a batch's folder, or one share of it (I of N), for this process.

    Raises LockedError when another process has it, OutputError when it cannot be written.
    """
    make_folder(folder)
    index, count = share
    with ExitStack() as stack:
        whole = _lock(stack, folder / LOCK, fcntl.LOCK_EX if count == 1 else fcntl.LOCK_SH)
        mine = count == 1 or _lock(stack, folder / f"{LOCK}-{index}-of-{count}", fcntl.LOCK_EX)
        if not whole or not mine:
            what = "another batch" if count == 1 or not whole else f"another process with share {index}/{count}"
            raise LockedError(f"{folder}: {what} owns this folder", "wait for it to end, or name another --output")
        remove_dead_parts(folder)
        yield Ledger(folder / ROWS, _open(stack, folder / ROWS))


def _lock(stack: ExitStack, path: Path, kind: int) -> bool:
    """Take a lock that ends with this process, if it can be had."""
    descriptor = _open(stack, path)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise output_error(path, error) from error
    return True


def _open(stack: ExitStack, path: Path) -> int:
    """Open a file of the folder for as long as it is owned. Raises OutputError for what is none, or refuses."""
    try:
        # O_NONBLOCK: opening a FIFO must not hang.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise output_error(path, error) from error
    stack.callback(os.close, descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OutputError(f"{path}: is no regular file", "remove it, or name another output")
    return descriptor
