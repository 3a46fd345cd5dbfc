"""Removing models: only what sdcli or huggingface_hub put into their caches, never a user's own file."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sdcli import hub, jail, store
from sdcli.errors import InputError, UsageError
from sdcli.files import exists, output_error
from sdcli.hub import HubId


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
    hub_id = hub.parse(ref)
    if hub_id is None:
        raise InputError(f"{ref}: no such model", "sdcli models list says which there are")
    return _downloaded(ref, hub_id)


def remove(removal: Removal) -> None:
    """Remove it. Raises UsageError, and removes nothing, if any of it lies outside its cache; OutputError."""
    root = removal.root.resolve()
    for path in removal.paths:
        if (path.is_symlink() and path.is_dir()) or not path.parent.resolve().is_relative_to(root):
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


def _downloaded(ref: str, hub_id: HubId) -> Removal:
    """A file of a commit, a commit, or all of a repository, with the contents that nothing else uses.

    With all of it, and with a commit, goes what there is of downloads that broke off.
    """
    root, folder = hub.cache_folder(), hub_id.folder
    if not folder.is_dir():
        raise InputError(f"{ref}: is not in the cache", "sdcli models list says which are")
    there = [one for one in folder.glob("snapshots/*") if one.is_dir()]
    names = ", ".join(sorted(one.name for one in there)) or "none"
    if hub_id.revision is None and hub_id.file is None:
        return _removal(ref, root, _all_of(hub_id))
    found = hub.snapshot(hub_id)
    if found is None:
        raise InputError(f"{ref}: is not in the cache", f"of {hub_id.repo} there are {names}")
    links = {one for one in found.folder.rglob("*") if not one.is_dir()}
    if hub_id.file is not None:
        if found.folder / hub_id.file not in links:
            raise InputError(f"{ref}: is not in the cache", "sdcli models list says what is")
        if links != {found.folder / hub_id.file}:
            return _removal(ref, root, [found.folder / hub_id.file, *_freed(folder, {found.folder / hub_id.file})])
    if there == [found.folder]:
        return _removal(ref, root, _all_of(hub_id))
    refs = [folder / "refs" / name for name in hub.refs(hub_id, found.commit)]
    marks = [hub.lacking_mark(hub_id, found.commit).parent, folder / "trees" / f"{found.commit}.json"]
    paths = [found.folder, *_freed(folder, links), *hub.partial_files(hub_id), *refs]
    return _removal(ref, root, [*paths, *(one for one in marks if exists(one))])


def _all_of(hub_id: HubId) -> list[Path]:
    return [hub_id.folder, *_unshared(hub_id.folder, set(hub_id.folder.glob("blobs/*")))]


def _freed(folder: Path, links: set[Path]) -> list[Path]:
    """The contents that these links of a repository lead to, and no others."""
    others = {_blob(one) for one in folder.glob("snapshots/**/*") if one not in links}
    blobs = {blob for one in links if (blob := _blob(one)) is not None and blob.parent == folder / "blobs"} - others
    return [*sorted(blobs), *_unshared(folder, blobs)]


def _unshared(folder: Path, blobs: set[Path]) -> list[Path]:
    """What the store that repositories share (huggingface_hub's, of Xet files) has for these blobs alone."""
    shared = folder.parent / "blobs"
    theirs = {target for one in blobs if (target := _blob(one)) is not None and target.parent.parent == shared}
    used = {_blob(one) for one in folder.parent.glob("*--*/blobs/*") if theirs and one not in blobs}
    beside = [one.with_name(one.name + tail) for one in sorted(theirs - used) for tail in ("", ".refs", ".lock")]
    return [one for one in beside if exists(one)]


def _blob(link: Path) -> Path | None:
    """What a link leads to in one step; None for what is no link."""
    return Path(os.path.normpath(link.parent / link.readlink())) if link.is_symlink() else None


def _removal(ref: str, root: Path, paths: list[Path]) -> Removal:
    inside = [one for path in paths for one in (path.rglob("*") if path.is_dir() else [path])]
    size = sum(one.stat().st_size for one in inside if one.is_file() and not one.is_symlink())
    return Removal(ref, root, tuple(paths), size)
