"""What the story of generate tells on its way, whichever process tells it. No torch.

A model that is fetched where it is first named has no story that could yield: it is told to `display`, which the
command line sets, as it sets `warnings.showwarning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Progress:
    """Where the denoising of all images stands, in steps."""

    done: int
    total: int


@dataclass(frozen=True)
class Waiting:
    """How long the warm process has drawn for others, in seconds, and how long it may before it is left alone."""

    done: int
    total: int


@dataclass(frozen=True)
class ImageRecord:
    """One image: how it was made, where it is, and its bytes when it went to no file."""

    facts: Mapping[str, Any]
    path: Path | None
    data: bytes | None = None


Event = Progress | Waiting | ImageRecord


class Display(Protocol):
    """What shows where long work stands."""

    def update(self, what: str, done: int, total: int, info: str = "") -> None:
        """Show `done` of `total` of one piece of work."""


class _Nowhere:
    def update(self, what: str, done: int, total: int, info: str = "") -> None:
        """Show nothing."""


@contextmanager
def _nowhere() -> Iterator[Display]:
    yield _Nowhere()


display: Callable[[], AbstractContextManager[Display]] = _nowhere
