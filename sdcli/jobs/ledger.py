"""`ledger.jsonl` in a batch's output folder: a record of every finished image, by the hash of its job.

Each line is appended whole and synced, under a lock, so that processes with shares of one batch write one file. Half a
line of a killed process is cut off by the next that opens or appends.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sdcli.errors import LockedError
from sdcli.files import make_folder, output_error, remove_dead_parts
from sdcli.jobs.tally import Tally, key_of, number
from sdcli.ledger import KEY, LOCK, ROWS

NEWLINE = b"\n"


class Ledger:
    """Which images are finished. `add` may be called by another thread, all else only by the one that opened it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._keys = Tally()  # the key of the picture at each path: of several records the last one counts
        self._descriptor = descriptor
        with self._locked():
            self._read()

    def has(self, key: str, name: str) -> bool:
        """Whether the file of this name was the picture of this job when it was last written."""
        return self._keys.get(key_of(name)) == number(key)

    def note(self, key: str, name: str) -> None:
        """Let `has` know of a record that was added."""
        self._keys.put(key_of(name), number(key))

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Append the record of a finished image. Raises OutputError when the disk refuses; nothing is then appended."""
        line = f"{json.dumps({KEY: key, **record})}\n".encode()
        with self._locked():
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
                with suppress(ValueError, KeyError, TypeError):  # such a picture is found on the disk, or made again
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
        try:
            descriptor = os.open(folder / ROWS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise output_error(folder / ROWS, error) from error
        stack.callback(os.close, descriptor)
        yield Ledger(folder / ROWS, descriptor)


def _lock(stack: ExitStack, path: Path, kind: int) -> bool:
    """Take a lock that ends with this process, if it can be had."""
    try:
        stream = stack.enter_context(path.open("ab"))
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise output_error(path, error) from error
    return True
