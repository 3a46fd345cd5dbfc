"""What a folder of pictures is found to hold: samples, faults, and the layout they were found by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """One picture with its true captions, of which each use draws one; none means no text."""

    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """Something in a dataset that training cannot use: its kind, the file or line, what is wrong, how to mend it."""

    kind: str
    path: str
    problem: str
    hint: str


@dataclass(frozen=True)
class Layout:
    """What a folder holds: the layout's name, its samples in a fixed order, and what of it is no sample."""

    name: str
    samples: list[Sample]
    faults: list[Fault]

    @classmethod
    def of(cls, name: str, rows: Iterable[Sample | Fault]) -> Layout:
        """A layout of samples and faults in the order in which they were found."""
        found = list(rows)
        samples = [row for row in found if isinstance(row, Sample)]
        return cls(name, samples, [row for row in found if isinstance(row, Fault)])
