"""Models of the Hub: how they are named, and where huggingface_hub's cache holds them. Opens no socket.

The cache is huggingface_hub's own, so that what one program has fetched all have:

    models--owner--name/blobs/HASH              contents, by the SHA-256 of large files and git's SHA-1 of others
    models--owner--name/snapshots/COMMIT/...    the files of a commit, as links to blobs
    models--owner--name/refs/REVISION           the commit that a branch or tag meant when it was last asked for
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdcli.errors import InputError
from sdcli.files import read_bytes

SUFFIXES = (".safetensors", ".ckpt", ".pt")  # of models in a single file
DEFAULT_REVISION = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_REPO = 96  # characters of a repository's name with its owner's, as huggingface_hub has it
MAX_REF_BYTES = 100
MAX_NAME = 255  # bytes of a file's name, as file systems have it
INDEX = "model_index.json"  # what a folder with a model has
_NAME = r"\w(?:[\w.-]*\w)?"
_FILE = r"\w[\w.+ -]*"
_HUB_ID = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(?:/(?P<file>(?:{_FILE}/)*{_FILE}(?:{'|'.join(map(re.escape, SUFFIXES))})))?"
    r"(?:@(?P<revision>\w[\w.+-]*(?:/\w[\w.+-]*)*))?",
    re.ASCII,
)
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class HubId:
    """`owner/name`, perhaps one file of it, perhaps a branch, tag or commit."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        """As the user writes it."""
        name = f"{self.repo}/{self.file}" if self.file is not None else self.repo
        return f"{name}@{self.revision}" if self.revision is not None else name

    @property
    def branch(self) -> str:
        """The branch, tag or commit that is meant."""
        return self.revision if self.revision is not None else DEFAULT_REVISION

    @property
    def folder(self) -> Path:
        """Where the cache has the repository, if it has it."""
        return cache_folder() / f"models--{self.repo.replace('/', '--')}"


@dataclass(frozen=True)
class Snapshot:
    """The files of a commit that are in the cache."""

    commit: str
    folder: Path


def parse(ref: str) -> HubId | None:
    """The Hub id `owner/name[/FILE][@REVISION]` that a reference is; None for what cannot be one."""
    match = _HUB_ID.fullmatch(ref)
    if match is None:
        return None
    repo = match["repo"]
    is_odd = len(repo) > MAX_REPO or "--" in repo or ".." in repo or repo.endswith((".git", *SUFFIXES))
    return None if is_odd else HubId(repo, match["file"], match["revision"])


def is_offline() -> bool:
    """Whether the environment keeps huggingface_hub, and so everybody, from the network."""
    return (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper() in _TRUE


def cache_folder() -> Path:
    """Where huggingface_hub keeps its downloads, by its own environment variables."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(Path(chosen).expanduser())).absolute()


def snapshot(hub_id: HubId) -> Snapshot | None:
    """The files in the cache of the commit that an id means there; None where the cache does not know it."""
    commit = commit_of(hub_id)
    folder = hub_id.folder / "snapshots" / (commit or "none")
    return Snapshot(commit, folder) if commit is not None and folder.is_dir() else None


def commit_of(hub_id: HubId) -> str | None:
    """The commit that an id means by the cache; None where that does not tell."""
    if COMMIT.fullmatch(hub_id.branch):
        return hub_id.branch
    return _commit_in(hub_id.folder / "refs" / hub_id.branch)


def repositories() -> Iterator[HubId]:
    """The repositories of models that the cache has something of."""
    for folder in sorted(cache_folder().glob("models--*--*")):
        hub_id = parse(folder.name.removeprefix("models--").replace("--", "/", 1))
        if hub_id is not None and folder.is_dir():
            yield hub_id


def snapshots(hub_id: HubId) -> Iterator[tuple[HubId, Snapshot]]:
    """The commits of a repository in the cache, each by the shortest name that means it."""
    for folder in sorted((hub_id.folder / "snapshots").glob("*")):
        if COMMIT.fullmatch(folder.name) and folder.is_dir():
            names = sorted(refs(hub_id, folder.name))
            revision = None if DEFAULT_REVISION in names else next(iter(names), folder.name)
            yield HubId(hub_id.repo, revision=revision), Snapshot(folder.name, folder)


def partial_files(hub_id: HubId) -> list[Path]:
    """What has arrived of the files of downloads that broke off, or are under way."""
    return sorted((hub_id.folder / "blobs").glob("*.incomplete"))


def refs(hub_id: HubId, commit: str) -> list[str]:
    """The branches and tags of a repository that mean a commit, by the cache."""
    root = hub_id.folder / "refs"
    found = [path for path in root.rglob("*") if not path.name.startswith(".")]  # part files of ours do
    return [path.relative_to(root).as_posix() for path in found if _commit_in(path) == commit]


def lacking_mark(hub_id: HubId, commit: str) -> Path:
    """huggingface_hub's mark that a commit has no model_index.json; ours names the one file that it is instead."""
    return hub_id.folder / ".no_exist" / commit / INDEX


def sole_file(hub_id: HubId, commit: str) -> str | None:
    """The one file that a commit is known to be; None where huggingface_hub's mark does not tell it, having no name."""
    try:
        name = read_bytes(lacking_mark(hub_id, commit), max_bytes=MAX_REF_BYTES + MAX_NAME).decode("utf-8", "replace")
    except InputError:
        return None
    return name if name.endswith(".safetensors") and "/" not in name else None


def _commit_in(path: Path) -> str | None:
    try:
        text = read_bytes(path, max_bytes=MAX_REF_BYTES).decode("ascii", "replace").strip()
    except InputError:
        return None
    return text if COMMIT.fullmatch(text) else None
