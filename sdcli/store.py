"""Model reference -> local model. No torch: what is told of a model comes from its JSON files and weight headers."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdcli import display, hub, jail, layout
from sdcli.errors import InputError, SdcliError, SdcliWarning
from sdcli.files import atomic_write, exists, is_folder, is_utf8, make_folder, open_regular, reason, stamp
from sdcli.hub import HubId
from sdcli.layout import ENCODERS, check_folder, parts, read_json, weight_files
from sdcli.original.checkpoint import PART_NAMES, REFINER_HINT, Checkpoint

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).with_name("builtin") / "model"
PARTS_OF_A_WHOLE = ("unet", "vae", "text_encoder")
MAX_CACHE_BYTES = 64 << 20  # of file hashes
MAX_SHOWN = 100  # characters of a reference that is no path


@dataclass(frozen=True)
class Model:
    """A model on this machine: how the user named it, and where it is.

    folder: in the diffusers layout, or a single file of safetensors.
    source: the file that it was read from and is known by, where that is another: a pickled checkpoint.
    revision: the commit, of a model of the Hub.
    """

    ref: str
    folder: Path
    source: Path | None = None
    revision: str | None = None

    def pinned(self) -> dict[str, str]:
        """What a record says of a model besides its name and its hash."""
        return {"model_revision": self.revision} if self.revision is not None else {}


def resolve(ref: str | None, *, offline: bool = False, needs: Sequence[str] = PARTS_OF_A_WHOLE) -> Model:
    """Find the model a reference means: `builtin` (also None), a diffusers folder, a single file, or a Hub id
    `owner/name[/file][@revision]`, which is fetched if it is not in the cache.

    offline: never open a socket; a Hub id must then be in the local cache.
    needs: the parts that a single file must hold to be of use.
    Raises InputError when there is no such model, the folder is none, or the file is none that can be drawn with.
    """
    model = find(ref, offline=offline)
    checkpoint = layout.single_file(model.folder)
    if checkpoint is not None:
        check_usable(model, checkpoint, needs)
    return model


def find(ref: str | None, *, offline: bool = False) -> Model:
    """The model a reference means, be it one that pictures can be drawn with or not; as `resolve`."""
    if ref is None or ref == BUILTIN:
        return Model(BUILTIN, BUILTIN_FOLDER)
    try:
        path = Path(ref).expanduser()
        is_dir, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # too long a name, or a folder that may not be searched
        raise InputError(f"{ref[:MAX_SHOWN]}: {reason(error)}", "name a folder in the diffusers layout") from error
    if is_there and not is_utf8(path):
        raise InputError(f"{ref}: is no UTF-8, and the libraries that read models open no such path", "rename it")
    if is_dir:
        check_folder(path)
        return Model(ref, path)
    if is_there:
        return _from_file(ref, path)
    hub_id = hub.parse(ref)
    if hub_id is None or (hub_id.file is not None and Path(path.parts[0]).is_dir()):  # a path with a slip in it
        raise InputError(
            f"{ref}: no such model", "use builtin, a folder in the diffusers layout, a file, or a Hub id owner/name"
        )
    return _from_hub(ref, hub_id, offline)


def place_of(ref: str | None, part: str, *, offline: bool = False) -> Path:
    """Where one part of a model is: in any model, or in a folder of that part alone, as train-vae exports it.

    Raises InputError as `resolve`.
    """
    if ref is not None and ref != BUILTIN:
        with suppress(RuntimeError):  # there is no such user, as `resolve` says
            folder = Path(ref).expanduser()
            if is_folder(folder / part) and is_utf8(folder):
                return folder
    return resolve(ref, offline=offline, needs=(part,)).folder


def check_usable(model: Model, checkpoint: Checkpoint, needs: Sequence[str]) -> None:
    """Raise InputError unless a single file is of a kind that is read and has the parts that are needed.

    What else it holds, which nothing reads, is told in a warning.
    """
    if not checkpoint.is_supported:
        raise InputError(f"{model.ref}: is a {checkpoint.family}", REFINER_HINT)
    needed = {*needs, *(ENCODERS if ENCODERS[0] in needs else ())}
    lacks = [PART_NAMES[part] for part in PART_NAMES if part in needed and part in checkpoint.lacks]
    if lacks:
        has = " and ".join(PART_NAMES[part] for part in checkpoint.sources)
        hint = "put the parts together with sdcli models convert --vae REF --text-encoder REF"
        raise InputError(f"{model.ref}: holds the {has} alone, no {' and no '.join(lacks)}", hint)
    if checkpoint.strangers:
        count, first = len(checkpoint.strangers), reprlib.repr(checkpoint.strangers[0])
        warnings.warn(f"{model.ref}: {count:,} of its tensors are not used ({first}, for one)", SdcliWarning, 3)


def settings(model: Model) -> dict[str, Any]:
    """The model's own defaults (`scheduler, steps, guidance, size`), empty when it states none."""
    return layout.settings(model.folder)


def model_hash(model: Model) -> str:
    """SHA-256 of a single file, else over the sorted (relative name, SHA-256) of a model's weight files, in hex.

    The file hashes are cached in the user's cache, by what is another in a file written anew.
    """
    digest = hashlib.sha256()
    cache = _HashCache()
    if model.folder.is_file():
        found = cache.of(model.source if model.source is not None else model.folder)
        cache.save()
        return found
    for path in _all_weight_files(model.folder):
        digest.update(f"{path.relative_to(model.folder).as_posix()} {cache.of(path)}\n".encode())
    cache.save()
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of one file, cached as those of `model_hash`. Raises InputError."""
    cache = _HashCache()
    found = cache.of(path)
    cache.save()
    return found


def files(model: Model) -> list[Path]:
    """The files that hold a model's weights."""
    return [model.source or model.folder] if model.folder.is_file() else _all_weight_files(model.folder)


def hashes(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The SHA-256 of each file, in hex, read anew: unlike `model_hash`, not from the cache."""
    for path in paths:
        with open_regular(path) as stream:
            yield path, hashlib.file_digest(stream, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where sdcli keeps what it can make again: SDCLI_CACHE, else XDG's cache folder."""
    chosen = os.environ.get("SDCLI_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(chosen) if chosen else Path(base) / "sdcli"


def checkpoints_folder() -> Path:
    """Where the copies of pickled checkpoints lie, as safetensors."""
    return cache_folder() / "checkpoints"


class _HashCache:
    """The hash of each file by its path, while nothing puts another in its place.

    A cache that cannot be read or written costs time and nothing else.
    """

    def __init__(self) -> None:
        self.path = cache_folder() / "hashes.json"
        self.is_changed = False
        try:
            self.rows: dict[str, Any] = read_json(self.path, max_bytes=MAX_CACHE_BYTES)
        except InputError:
            self.rows = {}

    def of(self, path: Path) -> str:
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: {reason(error)}", "name a file that can be read") from error
        place, known = str(path.resolve()), ":".join(map(str, stamp(status)))
        row = self.rows.get(place)
        if isinstance(row, list) and len(row) == 2 and row[0] == known:
            return str(row[1])
        with open_regular(path) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        self.rows[place] = [known, found]
        self.is_changed = True
        return found

    def save(self) -> None:
        if not self.is_changed:
            return
        try:
            make_folder(self.path.parent)
            there = {place: row for place, row in self.rows.items() if exists(Path(place))}
            with atomic_write(self.path) as part:
                part.write_text(json.dumps(there), encoding="utf-8")
        except SdcliError:
            return


def _from_file(ref: str, path: Path) -> Model:
    """The model in a single file: of safetensors that file, of a pickled checkpoint its copy in the cache."""
    if jail.is_pickled(path):
        return Model(ref, jail.as_safetensors(path, checkpoints_folder()), path)
    layout.single_file(path)
    return Model(ref, path)


def _from_hub(ref: str, hub_id: HubId, offline: bool) -> Model:
    """A model of the Hub: from the cache if it is whole there, else fetched."""
    from sdcli.hub import pulling  # deferred: only a Hub id needs it

    found = pulling.in_cache(hub_id)
    if found is None:
        if offline or hub.is_offline():
            others = pulling.others_in_cache(hub_id)
            hint = f"sdcli models pull {ref} fetches it{f', or name {others[0]}, which is whole' if others else ''}"
            raise InputError(f"{ref}: is not in the local cache, or not whole", hint)
        with display.progress() as shown:
            for step in pulling.pull(hub_id):
                shown.update(*step.shown(ref))
        found = pulling.in_cache(hub_id)
    if found is None:
        raise InputError(f"{ref}: is not whole on the Hub", "name another model, or another revision of it")
    model = _from_file(ref, found.path) if hub_id.file is not None or found.path.is_file() else Model(ref, found.path)
    return replace(model, revision=found.commit)


def _all_weight_files(folder: Path) -> list[Path]:
    return sorted(path for part in parts(folder) for path in weight_files(folder, part))
