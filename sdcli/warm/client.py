"""A picture drawn by the warm process, if there is one that would draw it as this process would. No torch."""

from __future__ import annotations

import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sdcli.errors import ResourceError, SdcliError, SdcliWarning
from sdcli.events import Event, ImageRecord, Progress, Waiting
from sdcli.plan import Plan
from sdcli.specs import GenerateSpec
from sdcli.warm import identity, place
from sdcli.warm.messages import Line, LineEnded, plain

ANSWER_SECONDS = 5.0  # in which a process that lives has said who it is
LONGEST_WAIT = 10.0  # seconds; about what starting without the warm process would take
TICK = 0.2  # seconds between two looks whether it is our turn
OF_ONE_PROCESS = ("/dev/stdin", "/dev/fd/", "/proc/")  # what is another file to another process


class Unserved(Exception):
    """The warm process does not draw this; `reason` is for the user, empty where there is nothing to tell."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


def drawn(spec: GenerateSpec, plan: Plan, cold: Iterator[Event]) -> Iterator[Event]:
    """The events of a plan from the warm process, or, where it does not draw it, those of `cold`, not begun before.

    Warns (SdcliWarning) where a warm process is there and cannot be used. Raises what the story itself would, and
    ResourceError when the warm process ends after it may have written a picture.
    """
    try:
        yield from draw(spec, plan)
        return
    except Unserved as unserved:
        if unserved.reason:
            warnings.warn(f"{unserved.reason}; drawing without it", SdcliWarning, stacklevel=2)
    yield from cold


def draw(spec: GenerateSpec, plan: Plan) -> Iterator[Event]:
    """The events of a plan from the warm process. Raises Unserved, and errors as `drawn`."""
    try:
        folder = Path.cwd()
    except OSError:  # it has been removed
        raise Unserved from None
    if _names_own_files(spec, folder):
        raise Unserved
    with connected() as (line, still_seconds):
        yield from _wait_for_turn(line, still_seconds)
        yield from _told(line, _request(spec, plan, folder), is_unwritten=spec.save_steps is None)


def look() -> str:
    """Whether there is a warm process, and whether this one would use it, in words."""
    try:
        with connected() as (_, still_seconds):
            return "ready" if not still_seconds else "drawing"
    except Unserved as unserved:
        return f"not used: {unserved.reason}" if unserved.reason else "none"


@contextmanager
def connected() -> Iterator[tuple[Line, float]]:
    """A line to the warm process, and for how many seconds it has stood still on what it draws for others.

    Raises Unserved unless it is one that can be trusted and would do everything as this process.
    """
    if not hasattr(socket, "AF_UNIX") or not hasattr(os, "geteuid"):
        raise Unserved
    path = place.socket_path()
    with _dialled(path) as line:
        if not line.is_of_this_user():
            raise Unserved(f"{path}: belongs to another user's process")
        try:
            hello, _ = line.receive(ANSWER_SECONDS)
            theirs, still_seconds = dict(hello["identity"]), float(hello["still_seconds"])
        except (LineEnded, KeyError, ValueError, TypeError):
            raise Unserved(f"{path}: the warm process does not answer") from None
        try:
            name = identity.difference(identity.own(), theirs)
        except OSError:  # a file has gone while it was looked at
            name = "what is being installed"
        if name:
            hint = "end it and start sdcli serve again, or use --no-serve"
            raise Unserved(f"{path}: the warm process differs in {name} ({hint})")
        yield line, still_seconds


def _dialled(path: Path) -> Line:
    try:
        if problem := place.fault(path):
            raise Unserved(problem)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except FileNotFoundError:
        raise Unserved from None
    except OSError as error:
        raise Unserved(f"{path}: {os.strerror(error.errno or 0).lower()}") from error
    try:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(os.fspath(path))
    except OSError as error:
        connection.close()
        if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
            place.remove_dead(path)
            raise Unserved(f"{path}: the warm process is dead") from error
        raise Unserved(f"{path}: the warm process does not answer") from error
    return Line(connection)


def _names_own_files(spec: GenerateSpec, folder: Path) -> bool:
    """Whether a path of a spec, or what may be one, means another file to another process."""
    given = [one for value in vars(spec).values() for one in (value if isinstance(value, tuple) else (value,))]
    return any(str(folder / one).startswith(OF_ONE_PROCESS) for one in given if isinstance(one, str | Path))


def _wait_for_turn(line: Line, still_seconds: float) -> Iterator[Event]:
    """Wait while the warm process draws for others; not for one that hangs, and never for long: nobody waits for ever
    for a process that waits for him."""
    began, seconds, is_silent = time.monotonic(), 0.0, line.is_silent(TICK)
    while is_silent and max(seconds, still_seconds) < LONGEST_WAIT:
        yield Waiting(int(seconds), int(LONGEST_WAIT))
        is_silent, seconds = line.is_silent(TICK), time.monotonic() - began
    if seconds:
        yield Waiting(int(LONGEST_WAIT), int(LONGEST_WAIT))  # over
    if is_silent:
        raise Unserved
    try:
        line.receive(ANSWER_SECONDS)
    except LineEnded:
        raise Unserved("the warm process has ended") from None


def _request(spec: GenerateSpec, plan: Plan, folder: Path) -> dict[str, Any]:
    """What is to be drawn, with the seed that was decided, and in which folder."""
    spec = replace(spec, seed=plan.seeds[0])
    umask = os.umask(0o077)
    os.umask(umask)
    status = folder.stat()
    return {
        "spec": {one.name: plain(getattr(spec, one.name)) for one in fields(spec)},
        "folder": str(folder),
        "folder_file": [status.st_dev, status.st_ino],
        "umask": umask,
    }


def _told(line: Line, request: dict[str, Any], *, is_unwritten: bool) -> Iterator[Event]:
    """What the warm process tells, as the story would; each record is taken before it goes on to the next.

    is_unwritten: whether it writes nothing before it has told of progress.
    """
    try:
        line.send(request)
        while True:
            message, data = line.receive()
            if "done" in message:
                return
            if "error" in message:
                break
            if "refusal" in message:
                raise Unserved(message["refusal"])
            if "warning" in message:
                warnings.warn_explicit(message["warning"], SdcliWarning, message["file"], message["line"])
            elif "progress" in message:
                is_unwritten = is_unwritten and message["is_unwritten"]
                yield Progress(*message["progress"])
            else:
                is_unwritten = False
                path = Path(message["path"]) if message["path"] is not None else None
                yield ImageRecord(message["record"], path, data or None)
                line.send({})
    except LineEnded:
        what = "the warm process ended in the middle"
        if is_unwritten:
            raise Unserved(what) from None
        raise ResourceError(what, "what is written is whole; run the command again for the rest") from None
    kinds = {kind.__name__: kind for kind in SdcliError.__subclasses__()}
    raise kinds.get(message["error"], SdcliError)(message["text"], message["hint"])
