"""A model of the Hub: where the cache has it whole, and what brings it there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sdcli import hub
from sdcli.errors import InputError
from sdcli.files import exists
from sdcli.hub import INDEX, HubId
from sdcli.hub.choosing import Remote, Repository, configs, index, single, weights
from sdcli.hub.contents import drop, is_here, partial_of
from sdcli.hub.fetching import PATIENCE, Arrived, fetch, head, look_up, settle
from sdcli.layout import check_folder, check_kind, parts, weight_files
from sdcli.original.checkpoint import read_checkpoint


@dataclass(frozen=True)
class Found:
    """A model in the cache: a folder or a single file, and the commit it is of."""

    path: Path
    commit: str


def in_cache(hub_id: HubId) -> Found | None:
    """Where the cache has a model whole; None where it does not.

    Raises InputError where it is known to be of a kind that is not read.
    """
    there = hub.snapshot(hub_id)
    if there is None:
        return None
    path = there.folder
    if hub_id.file is not None:
        path /= hub_id.file
    elif exists(path / INDEX):
        check_kind(path, str(hub_id))
        return Found(path, there.commit) if _is_whole(path) else None
    else:
        sole = hub.sole_file(hub_id, there.commit)
        if sole is None:
            return None
        path /= sole
    return Found(path, there.commit) if path.is_file() else None


def place_of(hub_id: HubId) -> Path | None:
    """Where the cache has a model whole; None where it does not, or has another kind of model."""
    try:
        found = in_cache(hub_id)
    except InputError:
        return None
    return found.path if found is not None else None


def others_in_cache(hub_id: HubId) -> list[HubId]:
    """Other commits of a model that the cache has whole."""
    ids = [replace(one, file=hub_id.file) for one, _ in hub.snapshots(hub_id)]
    return [one for one in ids if place_of(one) is not None]


def pull(hub_id: HubId, dtype: str = "auto") -> Iterator[Arrived]:
    """Bring a model, as it is on the Hub now, into the cache: what is read of it, and what is not there yet.

    dtype: `float16` takes the copy in float16 where one is published besides, `float32` the other, `auto` the one that
    is in the cache, else what is published.
    Raises InputError where the Hub has no such model or does not give it, or what it has is none that is read;
    OutputError where there is no room for it.
    """
    repository = look_up(hub_id)
    file = single(repository)
    if file is not None:
        yield from _pull_file(repository, file)
    else:
        yield from fetch(repository, index(repository))
        check_kind(repository.folder, str(hub_id))
        yield from fetch(repository, configs(repository, dtype))
        check_folder(repository.folder, str(hub_id))
        yield from fetch(repository, weights(repository, dtype))
    settle(repository, file if hub_id.file is None else None)


def _pull_file(repository: Repository, file: Remote) -> Iterator[Arrived]:
    """Fetch a single file, after its header says that it is a model. Of a pickled one only reading it tells."""
    if file.name.endswith(".safetensors") and not is_here(repository, file):
        with tempfile.TemporaryDirectory() as folder:
            sketch = Path(folder) / Path(file.name).name
            yield from head(repository, file, sketch)
            try:
                read_checkpoint(sketch)
            except InputError as error:
                drop(repository.hub_id, partial_of(repository, file), patience=PATIENCE)
                name = str(repository.hub_id)
                raise InputError(error.message.replace(str(sketch), name), error.hint) from error
    yield from fetch(repository, [file])


def _is_whole(folder: Path) -> bool:
    try:
        check_folder(folder)
        return bool([path for part in parts(folder) for path in weight_files(folder, part)])
    except InputError:
        return False
