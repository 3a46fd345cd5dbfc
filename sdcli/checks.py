"""Whether one value that the user gave is what its option takes; what the specs of all commands are checked with."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sdcli.errors import UsageError

if TYPE_CHECKING:
    PlainPath = Path
else:
    PlainPath = type(Path())  # of this system: before Python 3.12 only that can have children

MAX_SEED = 2**64 - 1
MAX_STEPS = 1000
MAX_COUNT = 100_000  # images of one command or job; what is decided of each before the first takes over 1 kB
MIN_SIDE, MAX_SIDE = 8, 16384  # px
IF_EXISTS = ("number", "skip", "overwrite", "error")
PICTURE_FORMATS = ("png", "webp", "jpg")
IDLE_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}  # seconds
MAX_IDLE_SECONDS = 720 * 3600.0
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}  # our words, and diffusers'
OFFLOADS = ("auto", "model", "sequential")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def parse_size(text: str) -> tuple[int, int]:
    """`WxH` in pixels as (width, height). Raises UsageError."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= 9 for part in parts):
        raise UsageError(f"--size {text}: is no size", "write it as 512x512, in pixels")
    width, height = int(parts[0]), int(parts[1])
    between("size", width, MIN_SIDE, MAX_SIDE)
    between("size", height, MIN_SIDE, MAX_SIDE)
    return width, height


class FolderPath(PlainPath):
    """A path that is to be a folder whatever its name looks like; what is put together with it is a plain one."""

    def __truediv__(self, key: str | os.PathLike[str]) -> Path:  # type: ignore[override]  # a child is no folder
        return Path(str(self)) / key


def parse_output(text: str | Path) -> Path:
    """Where results are to go: with a slash at its end a folder, as shells write one, which `Path` would forget."""
    is_folder = isinstance(text, str) and text.endswith(("/", os.sep))
    return FolderPath(text) if is_folder else Path(text)


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N`, the I-th of N shares, as two numbers. Raises UsageError unless 1 <= I <= N."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= 6 for part in parts):
        raise UsageError(f"--shard {text}: is no share", "write it as 1/4, 2/4, 3/4, 4/4")
    index, count = int(parts[0]), int(parts[1])
    if not 1 <= index <= count:
        raise UsageError(f"--shard {text}: out of range", "expected is I/N with 1 <= I <= N")
    return index, count


def parse_idle(text: str) -> float | None:
    """`90s`, `10m`, `2h` in seconds, None for `never`. Raises UsageError for what is no time, none, or over 30 days."""
    if text == "never":
        return None
    number, unit = text[:-1], text[-1:]
    if unit not in IDLE_UNITS or not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", number, re.ASCII):
        raise UsageError(f"--idle {text}: is no time", "write it as 90s, 10m, 2h or never")
    seconds = float(number) * IDLE_UNITS[unit]
    if not 0 < seconds <= MAX_IDLE_SECONDS:
        raise UsageError(f"--idle {text}: out of range", "it must be above 0 and at most 720h, or never")
    return seconds


def parse_interval(text: str) -> tuple[float, float]:
    """`A:B`, fractions of the steps, as two numbers. Raises UsageError unless 0 <= A < B <= 1."""
    try:
        first, last = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise UsageError(f"--guidance-interval {text}: is no interval", "write it as 0.2:0.8") from error
    if not 0 <= first < last <= 1:
        raise UsageError(f"--guidance-interval {text}: out of range", "expected is A:B with 0 <= A < B <= 1")
    return first, last


def check_offload(offload: str, *, is_compiled: bool) -> None:
    """Raise UsageError for an unknown `--offload`, or one of a UNet that is compiled."""
    one_of("offload", offload, OFFLOADS)
    if is_compiled and offload != "auto":
        what = f"--compile with --offload {offload}: what is compiled has its weights at hand"
        raise UsageError(what, "give one of them")


def check_picture_options(form: str | None, quality: int | None) -> None:
    """Raise UsageError for an unknown `--format`, or a `--quality` out of range."""
    if form is not None:
        one_of("format", form, PICTURE_FORMATS)
    if quality is not None:
        between("quality", quality, 1, 100)


def option(name: str) -> str:
    """The option of a field's name."""
    return "--" + name.replace("_", "-")


def at_least(name: str, value: float, least: float) -> None:
    """Raise UsageError, naming the option, for a number below the least one."""
    if not value >= least or math.isinf(value):
        raise UsageError(f"{option(name)} {value}: out of range", f"it must be at least {least}")


def between(name: str, value: float, low: float, high: float) -> None:
    """Raise UsageError, naming the option, for a number out of its range."""
    if not low <= value <= high:
        raise UsageError(f"{option(name)} {value}: out of range", f"it must lie in {low}..{high}")


def in_unicode(name: str, text: str) -> None:
    """Raise UsageError, naming the option, for bytes that are no text: they arrive as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{option(name)} {text!r}: is no valid text", "write it in UTF-8") from error


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UsageError, naming the option, for a word that is none of those allowed."""
    if value not in allowed:
        raise UsageError(f"{option(name)} {value}: unknown", f"use one of {', '.join(allowed)}")
