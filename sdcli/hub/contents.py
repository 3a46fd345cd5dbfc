"""The content of a file in the cache: where it lies whole or in part, who may write it, and whether it is sound."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from sdcli.files import exists
from sdcli.hub import HubId
from sdcli.hub.choosing import Remote, Repository


def blob_of(repository: Repository, remote: Remote) -> Path:
    """Where the content of a file lies."""
    return repository.hub_id.folder / "blobs" / remote.digest


def partial_of(repository: Repository, remote: Remote) -> Path:
    """What has arrived of a file: by the name that huggingface_hub knows as a download that broke off."""
    return repository.hub_id.folder / "blobs" / f"{remote.digest}.incomplete"


def is_here(repository: Repository, remote: Remote) -> bool:
    """Whether the cache has the content of a file, of this commit or another."""
    return exists(blob_of(repository, remote)) or exists(repository.folder / remote.name)


def is_whole(path: Path, size: int) -> bool:
    """Whether there is a file of this size."""
    return exists(path) and path.stat().st_size == size


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if exists(path) else 0


def lock(hub_id: HubId, digest: str, *, patience: float) -> AbstractContextManager[object]:
    """The lock of a file of the cache; who enters may have to wait, and after some seconds of it gets TimeoutError."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # in its __all__, at run time

    path = hub_id.folder.parent / ".locks" / hub_id.folder.name / f"{digest}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(path, timeout=patience)


def drop(hub_id: HubId, partial: Path, *, patience: float) -> None:
    """Remove what has arrived of a file; but where its lock is not to be had, somebody is writing it."""
    with suppress(TimeoutError), lock(hub_id, partial.name.partition(".")[0], patience=patience):
        partial.unlink(missing_ok=True)


def is_sound(repository: Repository, remote: Remote) -> bool:
    """Whether the partial file is what the Hub says that it is."""
    is_large = len(remote.digest) == 64
    known = hashlib.sha256() if is_large else hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False)
    with partial_of(repository, remote).open("rb") as stream:
        return hashlib.file_digest(stream, lambda: known).hexdigest() == remote.digest


def link(blob: Path, place: Path) -> None:
    """Put a file into its snapshot, as a link to its content."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        place.symlink_to(os.path.relpath(blob, place.parent))
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        blob.replace(place)  # a file system without links: huggingface_hub, too, then has the file itself there
