"""Files of the Hub -> its cache: over HTTP, resumed where it broke off, each checked by its hash before it is there.

huggingface_hub finds the way (addresses, token, proxies) and tells what went wrong. The bytes are received here: it
begins a file anew with every call since its version 2, and looks at the sizes alone.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from sdcli import hub
from sdcli.errors import InputError, OutputError, ResourceError
from sdcli.files import atomic_write, exists, make_folder, output_error, remove_dead_parts, sync
from sdcli.headers import MAX_HEADER_BYTES
from sdcli.hub import COMMIT, MAX_NAME, HubId
from sdcli.hub.choosing import Remote, Repository
from sdcli.hub.contents import blob_of, drop, is_sound, is_whole, link, lock, partial_of, size_of
from sdcli.hub.refusals import BrokenOff, told

TIMEOUT = 20.0  # seconds in which something must come
TRIES = 4  # in a row in which nothing came that had not come before
PAUSE = 0.25  # seconds before the second; twice as long before each that follows
PATIENCE = 0.5  # seconds between two looks at what another process fetches
MAKE_ROOM = "free some space, or let HF_HUB_CACHE name a folder on another disk"
MAX_ABOUT_BYTES = 16 << 20  # of what the Hub tells of a repository: some 300 a file
OF_BODIES = ("content-", "transfer-")  # headers that mean nothing without a body
MAX_PATH = 1_000  # bytes of a file's name with its folders
OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
HEADER_LENGTH = 8  # bytes, at the beginning of a safetensors file


@dataclass(frozen=True)
class Arrived:
    """How far the files of one call are, in bytes. received: what came over the network since the last one."""

    done: int
    total: int
    received: int = 0

    def shown(self, name: str) -> tuple[str, int, int]:
        """As a bar shows it, in MB."""
        total = -(-self.total // 1_000_000)
        return f"{name}, MB", self.done // 1_000_000 if self.done < self.total else total, total


def look_up(hub_id: HubId) -> Repository:
    """What the Hub has under an id just now. Raises InputError where it has nothing, or does not answer."""
    from huggingface_hub import ModelInfo  # deferred, as below: 0.4 s, and only what is fetched needs it

    try:
        info = ModelInfo(**_about(hub_id))  # type: ignore[no-untyped-call]
        commit, siblings = str(info.sha), info.siblings or []
        files = {}
        for one in siblings:
            digest = one.lfs.sha256 if one.lfs is not None else one.blob_id
            size = one.lfs.size if one.lfs is not None else one.size
            is_known = _is_hash(digest, 64 if one.lfs is not None else 40)
            if is_known and type(size) is int and size >= 0 and _is_name(one.rfilename):
                files[one.rfilename] = Remote(one.rfilename, size, str(digest))
    except Exception as error:  # its own, those of its HTTP library, and what a senseless answer gives
        refusal = told(error, hub_id)
        if isinstance(refusal, BrokenOff):
            refusal = InputError(f"{hub_id}: the Hub cannot be asked ({refusal})", "check the network, or try later")
        raise refusal from error
    if not COMMIT.fullmatch(commit):
        what = f"{hub_id}: the Hub answers what makes no sense (commit {commit[:50]!r})"
        raise InputError(what, "try another server")
    return Repository(hub_id, commit, files)


def fetch(repository: Repository, files: Sequence[Remote]) -> Iterator[Arrived]:
    """Bring files into the cache that are not there yet, yielding on the way.

    What has arrived stays when it ends early, by an error or a signal, and the next call goes on there.
    Raises InputError where the Hub does not give a file, OutputError where there is no room for it.
    """
    todo = [one for one in files if not is_whole(repository.folder / one.name, one.size)]
    total = sum(one.size for one in files)
    done = total - sum(one.size for one in todo)
    try:
        _check_room(repository, todo)
        for one in todo:
            for here, received in _into_cache(repository, one):
                yield Arrived(done + here, total, received)
            done += one.size
    except OSError as error:
        raise _no_room(repository, error) from error


def head(repository: Repository, remote: Remote, place: Path) -> Iterator[Arrived]:
    """Fetch the header of a safetensors file, and make `place` a file of that header and of the whole length, empty.

    So it is known what a file is before gigabytes of it are fetched. Errors as `fetch`.
    """
    try:
        _check_room(repository, [remote])
        with ExitStack() as held:
            for _ in _wait(repository, remote, held):
                yield Arrived(0, remote.size)
            partial, ends = partial_of(repository, remote), HEADER_LENGTH
            for _ in range(2):  # its length, then the header itself
                for here, received in _receive(repository, remote, min(ends, remote.size)):
                    yield Arrived(here, remote.size, received)
                with partial.open("rb") as stream:
                    length = int.from_bytes(stream.read(HEADER_LENGTH), "little")
                    ends = HEADER_LENGTH + min(length, MAX_HEADER_BYTES + 1)
            with partial.open("rb") as stream, place.open("wb") as copy:
                copy.write(stream.read(ends))
                copy.truncate(remote.size)
    except OSError as error:
        raise _no_room(repository, error) from error


def settle(repository: Repository, sole: Remote | None) -> None:
    """Say in the cache that all is there: what branch or tag means this commit, and what file alone it is, if it is.

    Only now, and not before the first file as huggingface_hub does, so that a newer commit whose fetching breaks off
    does not take the place of one that is whole. What broke off before goes, but of files of this commit, which another
    call may go on with.
    """
    hub_id, of_use = repository.hub_id, {one.digest for one in repository.files.values()}
    for partial in hub.partial_files(hub_id):
        if partial.name.partition(".")[0] not in of_use:
            drop(hub_id, partial, patience=PATIENCE)
    marks = {}
    if not COMMIT.fullmatch(hub_id.branch):
        marks[hub_id.folder / "refs" / hub_id.branch] = repository.commit
    if sole is not None:
        marks[hub.lacking_mark(hub_id, repository.commit)] = sole.name
    for path, text in marks.items():
        make_folder(path.parent)
        remove_dead_parts(path.parent)
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8")


def _check_room(repository: Repository, files: Sequence[Remote]) -> None:
    """Raise OutputError where the disk cannot take what is still to come."""
    place = repository.hub_id.folder
    lacking = [one for one in files if not exists(blob_of(repository, one))]
    needed = sum(one.size - size_of(partial_of(repository, one)) for one in lacking)
    free = shutil.disk_usage(next(one for one in (place, *place.parents) if exists(one))).free
    if needed > free:
        what = f"needs {needed / 1e6:,.1f} MB in {place.parent}, where {free / 1e6:,.1f} MB are free"
        raise OutputError(f"{repository.hub_id}: {what}", MAKE_ROOM)


def _no_room(repository: Repository, error: OSError) -> OutputError | ResourceError:
    problem = output_error(repository.hub_id.folder, error)
    if not isinstance(problem, OutputError):
        return problem
    if error.errno == errno.ENOENT:
        return OutputError(f"{problem.message} (removed by another process)", "run the same command again")
    return OutputError(problem.message, MAKE_ROOM if error.errno in OF_DISK else "try again, or look at that disk")


def _into_cache(repository: Repository, remote: Remote) -> Iterator[tuple[int, int]]:
    """Fetch one file, or wait while another process does, and link it in; bytes there, and of them new, on the way."""
    blob = blob_of(repository, remote)
    with ExitStack() as held:
        for here in _wait(repository, remote, held):
            yield here, 0
        if exists(blob) and blob.stat().st_size != remote.size:
            blob.unlink()  # cut short by something else
        if not exists(blob):
            had_some = size_of(partial_of(repository, remote)) > 0
            yield from _receive(repository, remote, remote.size)
            is_it = is_sound(repository, remote)
            if not is_it and had_some:  # what was there may be of something else
                partial_of(repository, remote).unlink()
                yield from _receive(repository, remote, remote.size)
                is_it = is_sound(repository, remote)
            _accept(repository, remote, is_it)
        link(blob, repository.folder / remote.name)
        yield remote.size, 0


def _wait(repository: Repository, remote: Remote, held: ExitStack) -> Iterator[int]:
    """Become the only one to write a file, by the lock that huggingface_hub has for it; what is there, meanwhile."""
    (repository.hub_id.folder / "blobs").mkdir(parents=True, exist_ok=True)
    while True:
        try:
            held.enter_context(lock(repository.hub_id, remote.digest, patience=PATIENCE))
            return
        except TimeoutError:
            yield min(size_of(partial_of(repository, remote)), remote.size)


def _receive(repository: Repository, remote: Remote, ends: int) -> Iterator[tuple[int, int]]:
    """Let the partial file grow to `ends` bytes, again from where it broke off; bytes there, and of them new."""
    with partial_of(repository, remote).open("ab") as stream:
        if stream.tell() > remote.size:
            stream.truncate(0)
            stream.seek(0)
        tries, furthest = 0, stream.tell()
        while stream.tell() < ends:
            problem = "it ended early"
            try:
                with closing(_pieces(repository, remote, stream.tell())) as pieces:
                    for piece in pieces:
                        if not piece:  # the server does not go on, but begins anew
                            stream.truncate(0)
                            stream.seek(0)
                        _write(stream, piece, repository, remote)
                        yield stream.tell(), len(piece)
                        if stream.tell() >= ends:
                            return
            except BrokenOff as error:
                problem = str(error)
            tries = tries + 1 if stream.tell() <= furthest else 0
            furthest = max(furthest, stream.tell())
            if tries == TRIES:
                what = f"{repository.hub_id}: {remote.name} broke off ({problem})"
                raise InputError(what, "what has arrived is kept: the same command goes on from there")
            time.sleep(PAUSE * 2**tries)


def _write(stream: BinaryIO, piece: bytes, repository: Repository, remote: Remote) -> None:
    if stream.tell() + len(piece) > remote.size:
        what = f"{repository.hub_id}: {remote.name} is longer than the {remote.size:,} bytes it should have"
        raise InputError(what, "try again, or another server")
    stream.write(piece)
    stream.flush()  # whatever ends us, what has come is there


def _pieces(repository: Repository, remote: Remote, start: int) -> Generator[bytes, None, None]:
    """What the server sends of a file from byte `start` on; empty first where it begins at byte 0 all the same.

    Raises BrokenOff where it may go on another time, InputError where the Hub refuses.
    """
    from huggingface_hub import hf_hub_url

    hub_id = repository.hub_id
    url = hf_hub_url(hub_id.repo, remote.name, revision=repository.commit)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with _answer(url, headers) as response:
            if start and response.status_code != 206:
                yield b""
            yield from response.iter_bytes()  # as it comes: what waits for a full portion is lost when it breaks off
    except Exception as error:  # as in look_up
        raise told(error, hub_id) from error


def _about(hub_id: HubId) -> dict[str, Any]:
    """What the Hub tells of a repository and its files: HfApi.model_info, but for the length of what is read."""
    from huggingface_hub.constants import ENDPOINT

    revision = f"/revision/{quote(hub_id.revision, safe='')}" if hub_id.revision is not None else ""
    told_of_it = bytearray()
    with _answer(f"{ENDPOINT}/api/models/{hub_id.repo}{revision}?blobs=true", {}) as response:
        for piece in response.iter_bytes():
            told_of_it += piece
            if len(told_of_it) > MAX_ABOUT_BYTES:
                what = f"{hub_id}: the Hub tells more than {MAX_ABOUT_BYTES:,} bytes of it"
                raise InputError(what, "try another repository, or another server")
    return dict(json.loads(told_of_it))


@contextmanager
def _answer(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """What the Hub answers, as a response of its HTTP library, its body not read yet.

    Raises huggingface_hub's own errors where it refuses, for which the headers are enough: a body may have no end.
    """
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # as WeakFileLock

    with get_session().stream("GET", url, headers=build_hf_headers() | dict(headers), timeout=TIMEOUT) as response:
        if response.status_code >= 400:
            of_us = {name: value for name, value in response.headers.items() if not name.lower().startswith(OF_BODIES)}
            hf_raise_for_status(type(response)(response.status_code, headers=of_us, request=response.request))
        yield response


def _accept(repository: Repository, remote: Remote, is_it: bool) -> None:
    partial = partial_of(repository, remote)
    if not is_it:
        partial.unlink()
        what = f"{repository.hub_id}: {remote.name} did not arrive as it is on the Hub (its hash is another)"
        raise InputError(what, "run the same command again to fetch it anew")
    sync(partial)
    partial.replace(blob_of(repository, remote))


def _is_name(value: object) -> bool:
    """Whether a file may be called so here: in letters that can be shown, and no longer than file systems take."""
    if not isinstance(value, str) or not value.isprintable():  # halves of surrogate pairs are not, either
        return False
    return len(value.encode()) <= MAX_PATH and all(len(one.encode()) <= MAX_NAME for one in value.split("/"))


def _is_hash(value: object, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", value) is not None
