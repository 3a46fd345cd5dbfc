"""The only place that opens an untrusted input or puts an output in place. Knows no formats."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from sdcli.errors import InputError, OutputError, ResourceError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PART_NAME = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-[0-9a-f]{8}\.part")
MAX_REASON_LENGTH = 200
PART_GRACE_SECONDS = 60.0  # a part file younger than this may belong to a process of another container


def open_regular(path: Path, *, max_bytes: int | None = None, within: Path | None = None) -> BufferedReader:
    """Open an input for reading in binary, refusing all that is not a plain file.

    max_bytes: the largest size accepted, in bytes; None takes any.
    within: a folder whose real path must contain the file's, so that no link leads out of a model.
    Raises InputError when the file is missing, unreadable, a folder, a device or a pipe, too large or outside.
    """
    try:
        if within is not None and not path.resolve().is_relative_to(within.resolve()):
            raise InputError(f"{path}: leads outside {within}", "files of a model must lie inside its folder")
        # O_NONBLOCK: opening a FIFO nobody writes to must not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError, RuntimeError) as error:  # a null byte; a loop of links before Python 3.13
        raise InputError(f"{path}: {reason(error)}", "name a file that can be read") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise InputError(f"{path}: is {kind}", "name a regular file")
    if max_bytes is not None and status.st_size > max_bytes:
        os.close(descriptor)
        raise InputError(f"{path}: has {status.st_size:,} bytes", f"at most {max_bytes:,} are accepted here")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, *, max_bytes: int, within: Path | None = None) -> bytes:
    """The whole content of an input file; errors as in `open_regular`."""
    with open_regular(path, max_bytes=max_bytes, within=within) as stream:
        return stream.read()


def sha256(path: Path, *, max_bytes: int) -> str:
    """The hash of an input file, in hexadecimal digits; errors as in `open_regular`."""
    with open_regular(path, max_bytes=max_bytes) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_slice(path: Path, offset: int, size: int) -> BufferedReader:
    """Open `size` bytes of an input from byte `offset` on as if they were a file; errors as in `open_regular`."""
    return BufferedReader(_Slice(open_regular(path), offset, size))


@contextmanager
def atomic_write(target: Path, *, overwrite: bool = True, mode: int | None = None) -> Iterator[Path]:
    """Give a temporary path beside `target`; when the block ends well, sync it and rename it into place.

    A reader never sees half a file, and after an error nothing is left behind.
    overwrite: False raises FileExistsError, with the existing file untouched, when `target` is there.
    mode: the file's permissions, until it has which it is its owner's alone; None leaves them to the umask.
    Raises OutputError when the folder or the disk refuses.
    """
    # 200 bytes: a name may have 255, whatever its alphabet.
    name = os.fsdecode(os.fsencode(target.name)[:200])
    part = target.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        # Created here so that the mode follows the umask even where a library renames a private file over it.
        usual = _create(part, 0o666 if mode is None else 0o600)
        yield part
        os.chmod(part, mode if mode is not None else usual)
        sync(part)
        _rename(part, target, overwrite)
        sync(target.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise output_error(target, error) from error
    finally:
        _remove(part)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target`; when the block ends well, sync it and rename it into place.

    After an error nothing is left behind. Raises OutputError when the target exists, or the disk refuses.
    """
    make_folder(target.parent)
    remove_dead_parts(target.parent)
    name = os.fsdecode(os.fsencode(target.name)[:200])
    part = target.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    if os.path.lexists(target):
        raise OutputError(f"{target}: exists", "name another folder")
    try:
        part.mkdir()
        yield part
        sync(part)
        os.rename(part, target)
        sync(target.parent)
    except OSError as error:
        raise output_error(target, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def place(data: bytes, target: Path, if_exists: str, *, ending: str = "") -> Path:
    """Write a result atomically and return where it went.

    if_exists: `number` takes the next free name (`puppy-2.png`), `overwrite` replaces, others raise OutputError.
    ending: what a number stands before; by default the suffix.
    """
    make_folder(target.parent)
    ending = ending if ending and target.name.endswith(ending) else target.suffix
    path, number = target, 2
    while True:
        try:
            with atomic_write(path, overwrite=if_exists == "overwrite") as part:
                part.write_bytes(data)
            return path
        except FileExistsError as error:
            if if_exists != "number":
                raise OutputError(f"{path}: exists", "choose another name or --if-exists") from error
            path, number = target.with_name(f"{target.name.removesuffix(ending)}-{number}{ending}"), number + 1


def make_folder(folder: Path) -> Path:
    """Create `folder` with its parents; what was there before stays. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error
    return folder


@contextmanager
def folder_for(target: Path) -> Iterator[None]:
    """Make the folder that `target` is to lie in, with its parents; if the block fails, those that it made go again.

    Raises OutputError.
    """
    made = [folder for folder in target.parents if not exists(folder)]  # the innermost first
    try:
        make_folder(target.parent)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # something else was put there meanwhile
                folder.rmdir()
        raise


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; False where that cannot be asked, for which Path.is_dir raises before Python 3.12."""
    return os.path.isdir(path)


def is_utf8(path: Path) -> bool:
    """Whether a path is text; others, which Linux allows, come as text with halves of surrogate pairs in it."""
    return not any("\ud800" <= c <= "\udfff" for c in str(path))


def exists(path: Path) -> bool:
    """Whether there is anything at a path; False where that cannot be asked, for which Path.exists may raise."""
    return os.path.exists(path)


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """What is another as soon as a file is written anew or another put in its place, even one of its size and time."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_writable(folder: Path) -> None:
    """Raise OutputError now, before any work, if nothing could be written into `folder` or where it would be made.

    A file is made there and let go: /proc and others let root write by their rights, and refuse all the same.
    """
    place = folder.absolute()
    while not exists(place) and place != place.parent:
        place = place.parent
    if not is_folder(place):
        raise OutputError(f"{folder}: {place} is a file", "name a folder for the output")
    try:
        _try_to_write(place)
    except OSError as error:
        hint = "name a folder you may write to with --output"
        raise OutputError(f"{folder}: cannot be written ({reason(error)})", hint) from error


def _try_to_write(folder: Path) -> None:
    """Make a file in a folder and let it go: one without a name where the system has them, so that nothing can stay."""
    if hasattr(os, "O_TMPFILE"):
        try:
            os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    part = folder / f".check.{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        _create(part, 0o600)
    finally:
        part.unlink(missing_ok=True)


def remove_dead_parts(folder: Path) -> None:
    """Delete the part files and folders that processes killed in the middle of a write left in `folder`."""
    for path in folder.glob(".*.part"):
        match = PART_NAME.fullmatch(path.name)
        if match is None or _is_alive(int(match["pid"])):
            continue
        try:
            if time.time() - path.stat().st_mtime > PART_GRACE_SECONDS:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError:
            continue  # gone already, or not ours to delete


def sync(path: Path) -> None:
    """Force a file or a folder to disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """The system's or a library's words for an error: one line, without the path, not longer than is read."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text[:1].lower() + text[1:MAX_REASON_LENGTH]


def output_error(path: Path, error: OSError) -> OutputError | ResourceError:
    """Translate what the system says of a write into our own error."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return ResourceError(f"{path}: {reason(error)}", "close other programs and try again")
    hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "name another output"
    return OutputError(f"{path}: {reason(error)}", hint)


class _Slice(RawIOBase):
    """A part of an open file that reads and seeks as a whole one, and has no descriptor of its own to read past it."""

    def __init__(self, whole: BufferedReader, offset: int, size: int) -> None:
        self._whole, self._offset, self._size = whole, offset, size
        self._position = 0  # within the part

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to byte {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._position))
        data = os.pread(self._whole.fileno(), wanted, self._offset + self._position)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._whole.close()
        super().close()


def _create(path: Path, mode: int) -> int:
    """Make an empty file, and tell what the umask has left of its mode."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)


def _rename(part: Path, target: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(part, target)
        return
    try:
        os.link(part, target)  # unlike rename, fails when the target exists: no window for a race
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, "file exists", str(target)) from None
        os.rename(part, target)


def _remove(part: Path) -> None:
    """Delete a part file if it is there; an error here must not hide the one that led here."""
    try:
        part.unlink()
    except OSError:
        return
    except BaseException:  # a signal may arrive just here, and what it raises must leave nothing behind either
        with suppress(OSError):
            part.unlink()
        raise


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # a number that no process has
        return False
    except OSError:
        return True
    return True
