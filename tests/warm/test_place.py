from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from sdcli.errors import LockedError, OutputError, ResourceError
from sdcli.warm import place


def test_the_socket_lies_in_the_runtime_folder_if_that_is_the_users_own_else_in_the_cache(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert place.socket_path() == runtime / "sdcli" / "serve.sock"
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path))
    in_cache = tmp_path / f"serve-{os.uname().nodename}-{os.geteuid()}" / "serve.sock"
    for other in ("", "relative", str(runtime / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", other)
        assert place.socket_path() == in_cache
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert place.socket_path().parent.parent == tmp_path


def test_the_folder_is_the_users_alone_and_is_made_once(runtime: Path) -> None:
    for _ in range(2):
        with place.owned() as path:
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert path.parent.parent == runtime
    assert not path.exists()


def test_a_second_owner_is_refused_and_a_dead_ones_socket_removed(runtime: Path) -> None:
    with place.owned() as path:
        leave_dead_socket(path)
        told = f"sdcli serve is there, as process {os.getpid()}; use it, or end it first"
        with pytest.raises(LockedError, match=told):
            place.owned().__enter__()
        assert path.exists()
    leave_dead_socket(path)
    with place.owned():
        assert not path.exists()


def test_a_dead_socket_is_removed_but_not_from_who_is_just_coming(runtime: Path) -> None:
    with place.owned() as path:
        leave_dead_socket(path)
        place.remove_dead(path)
        assert path.exists()
    leave_dead_socket(path)
    place.remove_dead(path)
    assert not path.exists()
    place.remove_dead(runtime / "missing" / "serve.sock")


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_no_folder_or_socket_or_is_open_to_others_is_not_trusted(runtime: Path, is_folder: bool) -> None:
    path = place.socket_path()
    path.parent.mkdir(mode=0o700)
    with pytest.raises(FileNotFoundError):
        place.fault(path)
    leave_dead_socket(path)
    assert place.fault(path) == ""
    spoiled, kind = (path.parent, "folder") if is_folder else (path, "socket")
    spoiled.chmod(0o770)
    assert place.fault(path) == f"{spoiled} is open to other users"
    spoiled.chmod(0o700)
    moved = spoiled.rename(runtime / "elsewhere")
    spoiled.symlink_to(moved)
    assert place.fault(path) == f"{spoiled} is no {kind}"
    spoiled.unlink()
    spoiled.write_text("")
    assert place.fault(path) == f"{spoiled} is no {kind}"


def test_what_belongs_to_another_user_is_not_trusted(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place.socket_path()
    path.parent.mkdir(mode=0o700)
    leave_dead_socket(path)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert place.fault(path) == f"{path.parent} belongs to another user"


@pytest.mark.parametrize("spoiled", ["open", "file", "link"])
def test_nobody_serves_from_a_folder_that_is_not_his_own(runtime: Path, spoiled: str) -> None:
    folder = runtime / "sdcli"
    if spoiled == "file":
        folder.write_text("mine")
    elif spoiled == "link":
        (runtime / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(runtime / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o755)
    with pytest.raises(OutputError, match="is open to other users" if spoiled == "open" else "is no folder"):
        place.owned().__enter__()
    assert not (folder / "serve.lock").exists()


def test_a_system_without_unix_sockets_is_refused_in_words(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(ResourceError, match="no Unix sockets"):
        place.owned().__enter__()
    assert list(runtime.iterdir()) == []


def leave_dead_socket(path: Path) -> None:
    """A socket that nobody listens on, as a process leaves that was killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(os.fspath(path))
    path.chmod(0o600)
