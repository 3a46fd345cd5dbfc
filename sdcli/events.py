"""What the story of generate tells on its way, whichever process tells it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
