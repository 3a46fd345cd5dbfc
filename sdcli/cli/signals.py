"""What INT, TERM and HUP do to a command; one that was ignored (nohup, a script's `&`) stays ignored."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], None]


class Signalled(BaseException):
    """A signal on its way up the stack; no Exception, which a library would take for an error of its own and go on."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def raised() -> Iterator[None]:
    """A signal unwinds the stack as Signalled, so that no half file stays."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Signalled(number)

    with _handled(stop):
        yield


class Caught(list[int]):
    """The numbers of the signals so far.

    patience: how many are only collected; what was in place before is called by those that follow. None: all of them.
    """

    def __init__(self, patience: int | None) -> None:
        super().__init__()
        self.patience = patience


@contextmanager
def kept(patience: int | None = None) -> Iterator[Caught]:
    """Collect the signals' numbers instead of dying of them; as many as `patience`, which may change meanwhile."""
    caught = Caught(patience)

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        handler = before[signal.Signals(number)]
        if caught.patience is not None and len(caught) > caught.patience and callable(handler):
            handler(number, frame)

    before = {number: signal.getsignal(number) for number in NUMBERS}
    with _handled(remember):
        yield caught


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    heeded = [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, handled in before.items():
            signal.signal(number, handled)
