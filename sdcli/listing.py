"""What models lie in the caches: those that work without a network, and downloads that broke off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdcli import hub, store
from sdcli.errors import InputError
from sdcli.hub import HubId, Snapshot, pulling
from sdcli.layout import PARTS, check_kind
from sdcli.original.checkpoint import read_checkpoint
from sdcli.store import Model


def listed() -> Iterator[dict[str, Any]]:
    """The models that work without a network: the embedded one, those in the Hub's cache, copies of pickled ones.

    Each by the name that means it: a model of the Hub by the branch or tag that last meant its commit, if one did.
    """
    yield _row(Model(store.BUILTIN, store.BUILTIN_FOLDER))
    for repository in hub.repositories():
        for hub_id, there in hub.snapshots(repository):
            for one, path in _models_in(hub_id, there):
                yield _row(Model(str(one), path, revision=there.commit))
    for path in sorted(store.checkpoints_folder().glob("*.safetensors")):
        yield _row(Model(str(path), path))


def broken_off() -> Iterator[tuple[HubId, int]]:
    """The repositories with a model that has not come whole, and the bytes of it that are there.

    Those of other programs, in which nothing says that it is a model of ours, are none of our business.
    """
    for hub_id in hub.repositories():
        there = list(hub.snapshots(hub_id))
        ours = [(commit_id, one.folder) for commit_id, one in there if _is_of_our_kind(one)]
        files = hub.partial_files(hub_id) if ours or not there else []
        for commit_id, folder in ours:
            if pulling.place_of(commit_id) is None:
                files += [path for path in folder.rglob("*.safetensors") if path.is_file()]
        if files:
            yield hub_id, sum(path.stat().st_size for path in files)


def _models_in(hub_id: HubId, there: Snapshot) -> Iterator[tuple[HubId, Path]]:
    """What of a commit is a model by itself: all of it, and each single file."""
    whole = pulling.place_of(hub_id)
    if whole is not None:
        yield hub_id, whole
    for path in sorted(there.folder.rglob("*")):
        one = replace(hub_id, file=path.relative_to(there.folder).as_posix())
        is_other = path != whole and path.parent.name not in PARTS and hub.parse(str(one)) is not None
        if is_other and _is_single_file(path):
            yield one, path


def _is_of_our_kind(there: Snapshot) -> bool:
    try:
        check_kind(there.folder)
    except InputError:
        return False
    return True


def _is_single_file(path: Path) -> bool:
    """Whether a file is a model by its header; of a pickled one, which has none, by its name."""
    if path.suffix == ".ckpt":
        return path.is_file()
    try:
        return path.suffix == ".safetensors" and bool(read_checkpoint(path).sources)
    except InputError:
        return False


def _row(model: Model) -> dict[str, Any]:
    return {
        "model": model.ref,
        **model.pinned(),
        "folder": str(model.folder),
        "bytes": sum(path.stat().st_size for path in store.files(model)),
    }
