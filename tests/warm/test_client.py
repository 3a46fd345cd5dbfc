from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdcli.errors import InputError, ResourceError, SdcliError, SdcliWarning
from sdcli.events import Event, ImageRecord, Progress, Waiting
from sdcli.plan import plan
from sdcli.specs import GenerateSpec
from sdcli.warm import client, place
from sdcli.warm.messages import Line
from tests.warm.fake import greeting, listening, telling
from tests.warm.test_place import leave_dead_socket

COLD = [Progress(1, 2), ImageRecord({"path": "cold.png"}, Path("cold.png"))]


def drawn(folder: Path, **options: object) -> list[Event]:
    """The events of a plan, those of COLD where no warm process tells any."""
    return list(events(folder, **options))


def events(folder: Path, **options: object) -> Iterator[Event]:
    spec = GenerateSpec(prompt="a puppy", output=folder / "a.png", **options)  # type: ignore[arg-type]
    return client.drawn(spec, plan(spec), iter(COLD))


def test_without_a_warm_process_nothing_is_said_and_nothing_made(runtime: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(tmp_path) == COLD
        assert client.look() == "none"
    assert list(runtime.iterdir()) == []


def test_a_dead_socket_is_told_once_and_removed(runtime: Path, tmp_path: Path) -> None:
    path = place.socket_path()
    path.parent.mkdir(mode=0o700)
    leave_dead_socket(path)
    with pytest.warns(SdcliWarning, match=rf"{path}: the warm process is dead; drawing without it"):
        assert drawn(tmp_path) == COLD
    assert not path.exists()
    assert drawn(tmp_path) == COLD


@pytest.mark.parametrize("kind", ["file", "link", "open"])
def test_what_is_not_the_users_own_socket_is_not_spoken_to(runtime: Path, tmp_path: Path, kind: str) -> None:
    path = place.socket_path()
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path if kind == "open" else runtime / "there.sock"))
        listener.listen()
        listener.setblocking(False)
        if kind == "open":
            path.chmod(0o666)
        elif kind == "link":
            path.symlink_to(runtime / "there.sock")
        else:
            path.write_text("no socket")
        with pytest.warns(SdcliWarning, match="is open to other users" if kind == "open" else "is no socket"):
            assert drawn(tmp_path) == COLD
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": "0"}, r"differs in version \(end it and start sdcli serve again, or use --no-serve\)"),
        ({"code": "0"}, "differs in code"),
        ({"OMP_X": "0"}, "differs in OMP_X"),
    ],
)
def test_a_process_that_would_draw_otherwise_is_ignored_with_a_warning(
    runtime: Path, tmp_path: Path, changes: dict[str, str], why: str
) -> None:
    first = greeting(identity=greeting()["identity"] | changes)
    with listening(lambda line: line.send(first)), pytest.warns(SdcliWarning, match=f"{why}.*; drawing without it$"):
        assert drawn(tmp_path) == COLD


@pytest.mark.parametrize("first", [{"identity": "x", "still_seconds": 0}, {"identity": {}}, {"hello": "HTTP"}])
def test_a_process_that_speaks_otherwise_is_ignored_with_a_warning(
    runtime: Path, tmp_path: Path, first: dict[str, object]
) -> None:
    with listening(lambda line: line.send(first)), pytest.warns(SdcliWarning, match="does not answer"):
        assert drawn(tmp_path) == COLD


def test_a_process_of_another_user_is_ignored_with_a_warning(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Line, "is_of_this_user", lambda line: False)
    with listening(lambda line: None), pytest.warns(SdcliWarning, match="belongs to another user's process"):
        assert drawn(tmp_path) == COLD


def test_a_process_that_says_nothing_is_not_waited_for(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.05)
    with listening(lambda line: line.is_silent(30) and None), pytest.warns(SdcliWarning, match="does not answer"):
        assert drawn(tmp_path) == COLD


def test_events_are_told_as_the_story_tells_them(runtime: Path, tmp_path: Path) -> None:
    script = telling(
        {"progress": [1, 2], "is_unwritten": True},
        {"warning": "something", "file": "drawing.py", "line": 7},
        {"record": {"path": "a.png", "seed": 7}, "path": "a.png"},
        {"done": True},
    )
    with listening(script), pytest.warns(SdcliWarning, match="^something$") as told:
        found = drawn(tmp_path)
    assert found == [Progress(1, 2), ImageRecord({"path": "a.png", "seed": 7}, Path("a.png"))]
    assert [(one.filename, one.lineno) for one in told] == [("drawing.py", 7)]


def test_a_request_has_all_that_was_asked_for_with_the_seed_that_was_decided(runtime: Path, tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []

    def script(line: Line) -> None:
        line.send(greeting())
        line.send({"turn": True})
        asked.append(line.receive(30)[0])
        line.send({"done": True})

    with listening(script):
        assert drawn(tmp_path, replace=("puppy=cat",)) == []
    (request,) = asked
    assert request["folder"] == str(Path.cwd())
    spec = request["spec"]
    assert isinstance(spec, dict) and spec["output"] == {"path": str(tmp_path / "a.png")}
    assert spec["replace"] == ["puppy=cat"] and isinstance(spec["seed"], int)


@pytest.mark.parametrize(
    ("kind", "error"), [("InputError", InputError), ("ResourceError", ResourceError), ("SdcliError", SdcliError)]
)
def test_an_error_is_raised_as_the_story_raises_it(
    runtime: Path, tmp_path: Path, kind: str, error: type[SdcliError]
) -> None:
    with listening(telling({"error": kind, "text": "bad", "hint": "mend it"})), pytest.raises(SdcliError) as raised:
        drawn(tmp_path)
    assert (type(raised.value), raised.value.message, raised.value.hint) == (error, "bad", "mend it")


@pytest.mark.parametrize("is_unwritten", [True, False])
def test_where_it_dies_in_the_middle_this_process_draws_unless_something_may_be_written(
    runtime: Path, tmp_path: Path, is_unwritten: bool
) -> None:
    begun = Progress(1, 2)
    with listening(telling({"progress": [1, 2], "is_unwritten": is_unwritten})):
        if is_unwritten:
            with pytest.warns(SdcliWarning, match="ended in the middle; drawing without it"):
                assert drawn(tmp_path) == [begun, *COLD]
        else:
            with pytest.raises(ResourceError, match="ended in the middle; what is written is whole"):
                drawn(tmp_path)


def test_after_a_picture_was_told_nothing_is_drawn_again(runtime: Path, tmp_path: Path) -> None:
    script = telling({"record": {"path": "a.png"}, "path": "a.png"}, {"progress": [1, 2], "is_unwritten": True})
    with listening(script), pytest.raises(ResourceError, match="ended in the middle"):
        drawn(tmp_path)


def test_a_refusal_is_a_reason_to_draw_here(runtime: Path, tmp_path: Path) -> None:
    with listening(telling({"refusal": "no"})), pytest.warns(SdcliWarning, match="^no; drawing without it$"):
        assert drawn(tmp_path) == COLD


def test_who_waits_is_told_and_does_not_wait_for_ever(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TICK", 0.01)
    monkeypatch.setattr(client, "LONGEST_WAIT", 0.05)

    def busy(line: Line) -> None:
        line.send(greeting())
        assert not line.is_silent(30)  # it has gone

    with listening(busy) as wrong:
        found = drawn(tmp_path)
    assert wrong == []
    waited = [event for event in found if isinstance(event, Waiting)]
    assert len(waited) > 1 and found == [*waited, *COLD]
    assert waited[-1].done == waited[-1].total  # the bar is taken away


def test_nobody_waits_for_a_drawing_that_stands_still(runtime: Path, tmp_path: Path) -> None:
    def hanging(line: Line) -> None:
        line.send(greeting(still_seconds=client.LONGEST_WAIT + 1))
        assert not line.is_silent(30)

    with listening(hanging):
        assert drawn(tmp_path) == COLD


def test_in_a_folder_that_was_removed_this_process_draws(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = GenerateSpec(prompt="a puppy", output=tmp_path / "a.png")
    decided = plan(spec)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(client.drawn(spec, decided, iter(COLD))) == COLD


@pytest.mark.parametrize("path", ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_a_file_that_is_another_to_another_process_is_not_sent(runtime: Path, tmp_path: Path, path: str) -> None:
    spec = GenerateSpec(prompt="a puppy", output=tmp_path, embedding=(f"{path}:x",))
    with listening(telling({"done": True})):
        assert list(client.drawn(spec, plan(GenerateSpec(prompt="a", output=tmp_path)), iter(COLD))) == COLD
        assert drawn(tmp_path) == []  # what it would else have told


def test_without_unix_sockets_there_is_no_warm_process(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    assert drawn(tmp_path) == COLD


def test_asking_for_a_warm_process_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sdcli.warm import client; client.look()\n"
        "print(*sorted({'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'asyncio', 'ssl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
