"""A process behind the socket that speaks as a test has it: in a thread, for one connection."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sdcli.warm import identity, place
from sdcli.warm.messages import Line, LineEnded

Script = Callable[[Line], None]


@contextmanager
def listening(script: Script) -> Iterator[list[BaseException]]:
    """Answer the first who connects by a script and hang up; what went wrong in it, when the block has ended."""
    path = place.socket_path()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    wrong: list[BaseException] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen()

        def answer() -> None:
            try:
                with Line(listener.accept()[0]) as line, suppress(LineEnded):
                    script(line)
            except BaseException as error:  # noqa: BLE001 - the test is told
                wrong.append(error)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield wrong
        thread.join(timeout=30)
    path.unlink(missing_ok=True)


def greeting(**changes: Any) -> dict[str, Any]:
    """What a warm process that is all as this one says first."""
    return {"identity": identity.own(), "still_seconds": 0.0, **changes}


def telling(*messages: dict[str, Any]) -> Script:
    """A script that takes a request and tells of it, then hangs up."""

    def script(line: Line) -> None:
        line.send(greeting())
        line.send({"turn": True})
        line.receive(30)
        for message in messages:
            line.send(message)
            if "record" in message:
                line.receive(30)

    return script
