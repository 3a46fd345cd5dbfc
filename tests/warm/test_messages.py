from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdcli.checks import parse_output
from sdcli.warm import messages
from sdcli.warm.messages import Line, LineEnded, plain, valued


@pytest.fixture
def ends() -> Iterator[tuple[Line, socket.socket]]:
    """A line, and the bare other end of it."""
    ours, theirs = socket.socketpair()
    with Line(ours) as line, theirs:
        yield line, theirs


def test_messages_and_bytes_arrive_as_they_were_sent_whatever_their_size() -> None:
    ours, theirs = socket.socketpair()
    data = os.urandom(3 << 20)
    with Line(ours) as here, Line(theirs) as there:
        sender = threading.Thread(target=lambda: (here.send({"a": "\udcff\n"}), here.send({"b": [1.5]}, data)))
        sender.start()
        assert there.receive(30) == ({"a": "\udcff\n"}, b"")
        assert there.receive(30) == ({"b": [1.5], "bytes": len(data)}, data)
        sender.join()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0\0",
        b"\0\0\0\5{}",
        b"\0\0\0\2[]",
        b"\0\0\0\2{x",
        b"\0\0\0\1\xff",
        b"\xff\xff\xff\xff{}",
        b'\0\0\0\x0c{"bytes":-1}',
        b'\0\0\0\x0c{"bytes":"x"}'[:4] + b'{"bytes":[]}',
        b'\0\0\0\x0b{"bytes":9}x',
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_message_ends_the_line(ends: tuple[Line, socket.socket], sent: bytes) -> None:
    line, other = ends
    other.sendall(sent)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(LineEnded):
        line.receive(30)


def test_a_message_too_large_is_refused_before_it_is_read(
    ends: tuple[Line, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, other = ends
    monkeypatch.setattr(messages, "MAX_DATA", 10)
    Line(other).send({}, b"01234567890")
    with pytest.raises(LineEnded):
        line.receive(30)


def test_silence_and_the_end_are_told_apart_and_what_has_come_is_kept(ends: tuple[Line, socket.socket]) -> None:
    line, other = ends
    assert line.is_silent()
    assert line.is_silent(0.01)
    with pytest.raises(LineEnded):
        line.receive(0.01)
    Line(other).send({"a": 1})
    assert not line.is_silent(30)
    assert line.receive(30) == ({"a": 1}, b"")
    other.close()
    assert not line.is_silent(30)
    with pytest.raises(LineEnded):
        line.send({"a": 1}, b"x" * (1 << 20))


def test_the_other_end_is_known_by_its_user(ends: tuple[Line, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends[0].is_of_this_user()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert not ends[0].is_of_this_user()


@pytest.mark.parametrize(
    "value",
    [None, "a", 7, 2**64 - 1, 0.1, True, Path("a/b"), Path("\udcff"), parse_output("a.d/"), (), ("a", "b")],
)
def test_values_of_specs_come_back_as_they_were(value: object) -> None:
    again = valued(json.loads(json.dumps(plain(value))))
    assert again == value and type(again) is type(value)
