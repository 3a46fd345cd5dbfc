"""Which pictures of a batch's ledger a gallery shows, and in which order."""

from __future__ import annotations

import fcntl
import heapq
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.files import exists, open_regular, output_error
from sdcli.jobs.tally import Tally, key_of
from sdcli.ledger import LOCK, ROWS

BEHIND = 1 << 62  # all that no job asks for any more


@dataclass(frozen=True)
class Album:
    """Where in the ledger the records of the pictures stand that are shown, and how many more there are."""

    path: Path
    places: list[int]  # bytes
    left_out: int

    def records(self) -> Iterator[dict[str, Any]]:
        """One after another, as they are read."""
        with open_regular(self.path) as stream:
            for place in self.places:
                stream.seek(place)
                yield json.loads(stream.readline())


def arrange(folder: Path, names: Iterable[str], most: int) -> Album:
    """The first pictures that are there, in the order of `names`, those without a job after them as they were made.

    Of several records of one file the last one counts. Memory does not grow with the ledger.
    """
    order, last = Tally(), Tally()
    for position, name in enumerate(names):
        if order.get(key_of(name)) is None:
            order.put(key_of(name), position)
    for place, name in _named(folder):
        last.put(key_of(name), place)
    count = 0

    def found() -> Iterator[tuple[int, int]]:
        nonlocal count
        for place, name in _named(folder):
            if last.get(key_of(name)) == place and exists(folder / name):
                count += 1
                position = order.get(key_of(name))
                yield (position if position is not None else BEHIND), place

    places = [place for _, place in heapq.nsmallest(most, found())]
    return Album(folder / ROWS, places, count - len(places))


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process writes a gallery here: whose pictures are the last ones writes the last page."""
    path = folder / f"{LOCK}-gallery"
    try:
        # O_NONBLOCK: opening a FIFO must not hang.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _named(folder: Path) -> Iterator[tuple[int, str]]:
    """Every line of the ledger that is a record of a file in the folder: where it begins, and the file's name."""
    place = 0
    with open_regular(folder / ROWS) as stream:
        for line in stream:
            try:
                name = json.loads(line)["path"]
            except (ValueError, KeyError, TypeError, RecursionError):
                name = None
            if isinstance(name, str) and name == Path(name).name and name.strip("."):
                yield place, name
            place += len(line)
