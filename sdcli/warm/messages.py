"""Messages over a socket: four bytes of length and a JSON object, after some of which raw bytes follow.

Versions need no number of their own: both ends are the same code, or part after the first message.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sdcli.checks import FolderPath, parse_output

LENGTH = struct.Struct(">I")  # bytes
MAX_MESSAGE = 16 << 20  # bytes of JSON: a prompt has at most 1 MiB, which escaped is six
MAX_DATA = 1 << 30  # bytes of a picture: 16,384 x 16,384 px of noise are 0.8 GB as PNG


class LineEnded(Exception):
    """The other end has gone, or does not speak as we do."""


class Line:
    """A connection, and who is at its other end."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, which the other end hears."""
        self._socket.close()

    def is_of_this_user(self) -> bool:
        """Whether the process at the other end runs for the same user; True where the system does not tell."""
        if hasattr(socket, "SO_PEERCRED"):  # Linux: struct ucred, of pid, uid and gid
            data = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return bool(struct.unpack("3i", data)[1] == os.geteuid())
        if hasattr(socket, "LOCAL_PEERCRED"):  # macOS, FreeBSD: struct xucred, which begins with a version and the uid
            data = self._socket.getsockopt(0, socket.LOCAL_PEERCRED, 128)
            return bool(struct.unpack_from("=2I", data)[1] == os.geteuid())
        return True  # the rights of folder and socket have let nobody else in

    def send(self, message: Mapping[str, Any], data: bytes = b"") -> None:
        """Send a message, and raw bytes after it if there are any. Raises LineEnded."""
        if data:
            message = {**message, "bytes": len(data)}
        text = json.dumps(message).encode()  # ASCII: names of files may hold what is no text
        try:
            self._socket.settimeout(None)
            self._socket.sendall(LENGTH.pack(len(text)) + text)
            if data:  # an empty one would fail where the other end has what it wanted and is gone
                self._socket.sendall(data)
        except OSError as error:
            raise LineEnded("the connection is broken") from error

    def receive(self, seconds: float | None = None) -> tuple[dict[str, Any], bytes]:
        """The next message and the bytes after it; `seconds` is how long no byte may come.

        Raises LineEnded when the other end has gone, is silent for too long or sends what is no message.
        """
        try:
            self._socket.settimeout(seconds)
            message = json.loads(self._exactly(LENGTH.unpack(self._exactly(LENGTH.size, LENGTH.size))[0], MAX_MESSAGE))
            return message, self._exactly(int(message.get("bytes", 0)), MAX_DATA)
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise LineEnded("the connection is broken") from error

    def is_silent(self, seconds: float = 0.0) -> bool:
        """Whether nothing has come within some seconds; False, too, when the other end has gone."""
        try:
            self._socket.settimeout(seconds)
            self._socket.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, TimeoutError):
            return True
        except OSError:
            return False
        return False

    def _exactly(self, size: int, most: int) -> bytes:
        if not 0 <= size <= most:
            raise ValueError(f"{size} bytes")
        data = bytearray()
        while len(data) < size:
            piece = self._socket.recv(min(size - len(data), 1 << 20))
            if not piece:
                raise ValueError("the end")
            data += piece
        return bytes(data)


def plain(value: object) -> object:
    """A value of a spec as JSON has it: paths and tuples keep their kinds."""
    if isinstance(value, Path):
        return {"path": str(value).rstrip("/") + "/" if isinstance(value, FolderPath) else str(value)}
    return [plain(one) for one in value] if isinstance(value, tuple) else value


def valued(value: Any) -> Any:
    """The value that `plain` was given."""
    if isinstance(value, dict):
        return parse_output(value["path"])
    return tuple(valued(one) for one in value) if isinstance(value, list) else value
