"""What a folder of pictures is found to hold: samples, faults, and the layout they were found by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from sdcli.files import open_regular, open_slice
from sdcli.pipeline.images import MAX_FILE_BYTES
from sdcli.training.tar import Member

MAX_CAPTION_BYTES = 1 << 20
NAMED_AT_MOST = 5
MAX_LABEL_LENGTH = 255  # characters, as a folder's name


@dataclass(frozen=True)
class Sample:
    """One picture with what is said of it.

    path: the file that holds it: a picture, or a tar that has it as a member.
    captions: true ones, of which each use draws one; none means no text.
    label: the name of its class.
    """

    path: Path
    captions: tuple[str, ...]
    label: str | None = None
    member: Member | None = None

    @property
    def place(self) -> Path:
        """Which picture it is, for people and as a key: its path, for a member that of the tar with its name below."""
        return self.path if self.member is None else self.path / self.member.name

    def name(self, root: Path) -> str:
        """Which picture it is wherever the dataset lies: `0001.png`, `cats/0001.png`, `shard-000000.tar/0001.png`."""
        return self.place.relative_to(root).as_posix()

    def open(self) -> BufferedReader:
        """The picture's bytes. Raises InputError, as `open_regular` does."""
        if self.member is None:
            return open_regular(self.path, max_bytes=MAX_FILE_BYTES)
        return open_slice(self.path, self.member.offset, self.member.size)


@dataclass(frozen=True)
class Fault:
    """Something in a dataset that training cannot use: its kind, the file or line, what is wrong, how to mend it.

    is_mendable: whether `faults.mend` can do it.
    """

    kind: str
    path: str
    problem: str
    hint: str
    is_mendable: bool = False


@dataclass(frozen=True)
class Layout:
    """What a folder holds: the layout's name, its samples in a fixed order, and what of it is no sample.

    table: the file that lists the pictures, in a layout that has one.
    """

    name: str
    samples: list[Sample]
    faults: list[Fault]
    table: Path | None = None

    @classmethod
    def of(cls, name: str, rows: Iterable[Sample | Fault], table: Path | None = None) -> Layout:
        """A layout of samples and faults in the order in which they were found."""
        found = list(rows)
        samples = [row for row in found if isinstance(row, Sample)]
        return cls(name, samples, [row for row in found if isinstance(row, Fault)], table)


def class_names(samples: Iterable[Sample]) -> tuple[str, ...]:
    """The classes of some samples, each at its index: sorted by name, or by number where all names are numbers."""
    names = {sample.label for sample in samples if sample.label is not None}
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def is_label(text: str) -> bool:
    """Whether a text can name a class: one line that any terminal and any JSON file can show."""
    return text.isprintable() and 0 < len(text.strip()) <= MAX_LABEL_LENGTH


def some(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    shown = ", ".join(names[:NAMED_AT_MOST])
    more = len(names) - NAMED_AT_MOST
    return f"{shown} and {more} more" if more > 0 else shown
