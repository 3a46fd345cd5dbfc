"""Where the socket of the warm process lies: in a folder that only its user can open, with a lock for who owns it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdcli import store
from sdcli.errors import LockedError, OutputError, ResourceError
from sdcli.files import is_folder, make_folder, output_error

SOCKET, LOCK = "serve.sock", "serve.lock"
OTHERS = 0o077  # the rights of everybody but the user


def socket_path() -> Path:
    """The one place of the socket of this user on this machine.

    It is below XDG_RUNTIME_DIR where that is the user's own, else in the cache, by the machine's name: a home that
    several machines share is no place where they find each other's sockets.
    """
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute() and is_folder(runtime) and runtime.stat().st_uid == os.geteuid():
        return runtime / "sdcli" / SOCKET
    return store.cache_folder().absolute() / f"serve-{os.uname().nodename}-{os.geteuid()}" / SOCKET


def fault(socket: Path) -> str:
    """What forbids to trust a socket: that it, or its folder, is another user's, open to others, or something else.

    Empty where nothing does. Raises FileNotFoundError where there is no socket.
    """
    for path, is_kind, kind in ((socket.parent, stat.S_ISDIR, "folder"), (socket, stat.S_ISSOCK, "socket")):
        status = os.lstat(path)
        if not is_kind(status.st_mode):
            return f"{path} is no {kind}"
        if status.st_uid != os.geteuid():
            return f"{path} belongs to another user"
        if status.st_mode & OTHERS:
            return f"{path} is open to other users"
    return ""


@contextmanager
def owned() -> Iterator[Path]:
    """Own the place of the socket for this process: what a dead one left is gone, and at the end nothing is there.

    Raises LockedError when another process has it, OutputError when the folder cannot be made or is not the user's
    own, ResourceError on a system without Unix sockets.
    """
    import socket  # deferred: whoever looks for a socket that is not there needs none

    if not hasattr(socket, "AF_UNIX") or not hasattr(os, "geteuid"):
        raise ResourceError("this system has no Unix sockets", "use sdcli batch -, which stays warm between its lines")
    path = socket_path()
    lock = _claimed(path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def remove_dead(socket: Path) -> None:
    """Remove a socket that nobody listens on, unless somebody is just coming or a right is missing."""
    with suppress(OSError):
        lock = _lock(socket.parent)
        if lock is not None:
            socket.unlink(missing_ok=True)
            os.close(lock)


def _claimed(path: Path) -> int:
    """The lock of a place that is there, is the user's own and has no socket any more; errors as `owned`."""
    make_folder(path.parent.parent)
    try:
        with suppress(FileExistsError):
            path.parent.mkdir(mode=0o700)
        problem = ""
        with suppress(FileNotFoundError):
            problem = fault(path)
        if problem:
            raise OutputError(problem, "remove it, or let XDG_RUNTIME_DIR name a folder of your own")
        lock = _lock(path.parent)
        if lock is None:
            number = (path.parent / LOCK).read_bytes()[:20].decode("ascii", "replace").strip()
            raise LockedError(f"{path.parent}: sdcli serve is there, as process {number}", "use it, or end it first")
        os.truncate(lock, 0)
        os.write(lock, b"%d\n" % os.getpid())
        path.unlink(missing_ok=True)
    except OSError as error:
        raise output_error(path, error) from error
    return lock


def _lock(folder: Path) -> int | None:
    """The lock of the folder, which ends when it is closed or with this process; None where another has it."""
    import fcntl  # deferred: there is none on Windows, where nobody gets here

    lock = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
