"""Removing models: only what sdcli or huggingface_hub put into their caches, never a user's own file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdcli import jail, store
from sdcli.errors import InputError, UsageError
from sdcli.files import exists, output_error


@dataclass(frozen=True)
class Removal:
    """What goes with a model: files and folders, all within `root`, and the bytes that this frees."""

    ref: str
    root: Path
    paths: tuple[Path, ...]
    size: int  # bytes


def plan_removal(ref: str) -> Removal:
    """What would be removed for a reference: a Hub id's files in the cache, or the copy of a pickled checkpoint.

    Raises UsageError for what is not in a cache, InputError for what is not there.
    """
    if ref == store.BUILTIN:
        raise UsageError("builtin: comes with sdcli", "it goes with pip uninstall sdcli")
    try:
        path = Path(ref).expanduser()
    except RuntimeError as error:  # ~nobody
        raise InputError(f"{ref}: no such model", "sdcli models list says which there are") from error
    if exists(path):
        return _copy(ref, path)
    match = store.HUB_ID.fullmatch(ref)
    if match is None:
        raise InputError(f"{ref}: no such model", "sdcli models list says which there are")
    return _downloaded(ref, match["repo"], match["revision"])


def remove(removal: Removal) -> None:
    """Remove it. Raises UsageError, and removes nothing, if any of it lies outside its cache; OutputError."""
    root = removal.root.resolve()
    for path in removal.paths:
        if path.is_symlink() or not path.parent.resolve().is_relative_to(root):
            raise UsageError(f"{path}: leads outside {removal.root}", "remove it yourself if you mean it")
    try:
        for path in removal.paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise output_error(removal.root, error) from error


def _copy(ref: str, path: Path) -> Removal:
    root = store.checkpoints_folder()
    is_copy = path.resolve().parent == root.resolve() and jail.COPY_NAME.fullmatch(path.name) is not None
    copies = [path] if is_copy else []
    if not is_copy and path.is_file() and jail.is_pickled(path):
        copies = jail.copies_of(path, root)
        if not copies:
            raise InputError(f"{ref}: has no copy in the cache", "nothing is to be removed; the file itself is yours")
    if not copies:
        raise UsageError(f"{ref}: is yours, and in no cache", "remove it yourself if you mean it")
    both = (one for copy in copies for one in (copy, copy.with_suffix(".yaml")))
    return _removal(ref, root, [one for one in both if exists(one)])


def _downloaded(ref: str, repo: str, revision: str | None) -> Removal:
    """A revision's snapshot, and what no other uses of its files; without a revision all of the repository."""
    root = store.hub_cache_folder()
    folder = root / f"models--{repo.replace('/', '--')}"
    if ".." in repo or not folder.is_dir():
        raise InputError(f"{ref}: is not in the cache", "sdcli models list says which are")
    if revision is None:
        return _removal(ref, root, [folder])
    snapshots = folder / "snapshots"
    names = [path.name for path in snapshots.iterdir()] if snapshots.is_dir() else []
    named = folder / "refs" / revision
    is_inside = ".." not in named.parts and named.is_relative_to(folder)
    commit = named.read_text(encoding="utf-8", errors="replace").strip() if is_inside and named.is_file() else revision
    if commit not in names:
        raise InputError(f"{ref}: is not in the cache", f"of {repo} there are {', '.join(sorted(names)) or 'none'}")
    if names == [commit]:
        return _removal(ref, root, [folder])
    others = {blob for name in names if name != commit for blob in _blobs(snapshots / name)}
    freed = [blob for blob in _blobs(snapshots / commit) if blob not in others]
    refs = [one for one in (folder / "refs").rglob("*") if one.is_file() and _says(one, commit)]
    return _removal(ref, root, [snapshots / commit, *sorted(set(freed)), *refs])


def _blobs(snapshot: Path) -> Iterator[Path]:
    """The files that the links of a snapshot lead to."""
    for path in snapshot.rglob("*"):
        if path.is_symlink() and path.resolve().parent == (snapshot.parents[1] / "blobs").resolve():
            yield path.resolve()


def _says(ref: Path, commit: str) -> bool:
    return ref.read_text(encoding="utf-8", errors="replace").strip() == commit


def _removal(ref: str, root: Path, paths: list[Path]) -> Removal:
    inside = [one for path in paths for one in (path.rglob("*") if path.is_dir() else [path])]
    size = sum(one.stat().st_size for one in inside if one.is_file() and not one.is_symlink())
    return Removal(ref, root, tuple(paths), size)
