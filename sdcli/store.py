"""Model reference -> local model. No torch: what is told of a model comes from its JSON files and weight headers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli import jail, layout
from sdcli.errors import InputError, SdcliError, SdcliWarning
from sdcli.files import atomic_write, make_folder, open_regular, reason
from sdcli.layout import ENCODERS, PARTS, STEMS, TOKENIZERS, parts, read_json, weight_files
from sdcli.original.checkpoint import PART_NAMES, Checkpoint

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).with_name("builtin") / "model"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_CONFIGS = (
    *("model_index.json", "sdcli.json"),
    *(f"{part}/*.json" for part in (*PARTS, *TOKENIZERS.values(), "scheduler")),
)
HUB_VOCABULARY = tuple(f"{tokenizer}/merges.txt" for tokenizer in TOKENIZERS.values())
HUB_FILES = (
    *HUB_CONFIGS,
    *HUB_VOCABULARY,
    *(f"{part}/{stem}{tail}.safetensors" for part, stem in STEMS.items() for tail in ("", "-*-of-*")),
)
HUB_FILES_HALF = (*HUB_FILES, *(f"{part}/{stem}.fp16*.safetensors" for part, stem in STEMS.items()))
PARTS_OF_A_WHOLE = ("unet", "vae", "text_encoder")
MAX_CACHE_BYTES = 64 << 20  # of file hashes
MAX_SHOWN = 100  # characters of a reference that is no path
# diffusers' pipelines with the parts that are read; those of XL have a second text encoder.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
PIPELINES_XL = (
    *("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    "StableDiffusionXLInpaintPipeline",
)


@dataclass(frozen=True)
class Model:
    """A model on this machine: how the user named it, and where it is.

    folder: in the diffusers layout, or a single file of safetensors.
    source: the file that it was read from and is known by, where that is another: a pickled checkpoint.
    """

    ref: str
    folder: Path
    source: Path | None = None


def resolve(ref: str | None, *, offline: bool = False, needs: Sequence[str] = PARTS_OF_A_WHOLE) -> Model:
    """Find the model a reference means: `builtin` (also None), a diffusers folder, a single file, or a Hub id
    `owner/name[@revision]`.

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
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # too long a name, or a folder that may not be searched
        raise InputError(f"{ref[:MAX_SHOWN]}: {reason(error)}", "name a folder in the diffusers layout") from error
    if is_folder:
        check_folder(path)
        return Model(ref, path)
    if is_there:
        return _from_file(ref, path)
    match = HUB_ID.fullmatch(ref)
    if match is None or ref.startswith("."):
        raise InputError(
            f"{ref}: no such model", "use builtin, a folder in the diffusers layout, a file, or a Hub id owner/name"
        )
    return Model(ref, _from_hub(match["repo"], match["revision"], offline))


def check_usable(model: Model, checkpoint: Checkpoint, needs: Sequence[str]) -> None:
    """Raise InputError unless a single file is of a kind that is read and has the parts that are needed.

    What else it holds, which nothing reads, is told in a warning.
    """
    if not checkpoint.is_supported:
        raise InputError(f"{model.ref}: is a {checkpoint.family}", "only Stable Diffusion 1.x and 2.x are supported")
    lacks = [PART_NAMES[part] for part in needs if part in checkpoint.lacks]
    if lacks:
        has = " and ".join(PART_NAMES[part] for part in checkpoint.sources)
        hint = "put the parts together with sdcli models convert --vae REF --text-encoder REF"
        raise InputError(f"{model.ref}: holds the {has} alone, no {' and no '.join(lacks)}", hint)
    if checkpoint.strangers:
        count, first = len(checkpoint.strangers), reprlib.repr(checkpoint.strangers[0])
        warnings.warn(f"{model.ref}: {count:,} of its tensors are not used ({first}, for one)", SdcliWarning, 3)


def check_folder(folder: Path) -> None:
    """Raise InputError unless `folder` looks like a whole model in the diffusers layout."""
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: has no model_index.json", "name the folder of a model in the diffusers layout")
    name = read_json(folder / "model_index.json", within=layout.root(folder)).get("_class_name")
    if name not in (*PIPELINES, *PIPELINES_XL):
        what = f"{folder}: is a {reprlib.repr(name)}"
        raise InputError(what, "only models of Stable Diffusion 1.x, 2.x and XL are supported")
    if name in PIPELINES_XL and (folder / ENCODERS[1]).is_dir() and not (folder / ENCODERS[0]).is_dir():
        raise InputError(
            f"{folder}: is a refiner of Stable Diffusion XL", "only whole models are supported; use the base"
        )
    needed = {**dict.fromkeys(parts(folder)), **dict.fromkeys(ENCODERS if name in PIPELINES_XL else ())}
    for part in (*needed, *(TOKENIZERS[part] for part in needed if part in TOKENIZERS), "scheduler"):
        if not (folder / part).is_dir():
            raise InputError(f"{folder}: has no {part}/", "name the folder of a whole model")


def settings(model: Model) -> dict[str, Any]:
    """The model's own defaults (`scheduler, steps, guidance, size`), empty when it states none."""
    return layout.settings(model.folder)


def model_hash(model: Model) -> str:
    """SHA-256 of a single file, else over the sorted (relative name, SHA-256) of a model's weight files, in hex.

    The file hashes are cached in the user's cache by path, size and modification time.
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


def hub_cache_folder() -> Path:
    """Where huggingface_hub keeps its downloads, by its own environment variables."""
    home = os.environ.get("HF_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or base / "hub")


def listed() -> Iterator[dict[str, Any]]:
    """The models that work without a network: the embedded one, those in the Hub cache, copies of pickled ones."""
    yield _row(Model(BUILTIN, BUILTIN_FOLDER))
    for index in sorted(hub_cache_folder().glob("models--*--*/snapshots/*/model_index.json")):
        repo = index.parents[2].name.removeprefix("models--").replace("--", "/", 1)
        try:
            check_folder(index.parent)
            yield _row(Model(f"{repo}@{index.parent.name}", index.parent))
        except InputError:
            continue  # another kind of pipeline, or a download that was broken off
    for path in sorted(checkpoints_folder().glob("*.safetensors")):
        yield _row(Model(str(path), path))


class _HashCache:
    """File hashes by path, size and time; a cache that cannot be read or written costs time and nothing else."""

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
        key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
        found = self.rows.get(key)
        if isinstance(found, str):
            return found
        with open_regular(path) as stream:
            self.rows[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        self.is_changed = True
        return str(self.rows[key])

    def save(self) -> None:
        if not self.is_changed:
            return
        try:
            make_folder(self.path.parent)
            with atomic_write(self.path) as part:
                part.write_text(json.dumps(self.rows), encoding="utf-8")
        except SdcliError:
            return


def _row(model: Model) -> dict[str, Any]:
    return {
        "model": model.ref,
        "folder": str(model.folder),
        "bytes": sum(path.stat().st_size for path in files(model)),
    }


def _from_file(ref: str, path: Path) -> Model:
    """The model in a single file: of safetensors that file, of a pickled checkpoint its copy in the cache."""
    if jail.is_pickled(path):
        return Model(ref, jail.as_safetensors(path, checkpoints_folder()), path)
    layout.single_file(path)
    return Model(ref, path)


def _from_hub(repo: str, revision: str | None, offline: bool) -> Path:
    """The folder of a Hub model: from the local cache if it is whole there, else fetched, and only what is read."""
    from huggingface_hub import snapshot_download  # deferred: 0.5 s, and only a Hub id needs it
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(patterns: tuple[str, ...], is_local: bool) -> Path:
        found = snapshot_download(repo, revision=revision, allow_patterns=list(patterns), local_files_only=is_local)
        return Path(found)

    try:
        folder = fetch(HUB_FILES, is_local=True)
        if _is_whole(folder):
            return folder
    except LocalEntryNotFoundError:
        pass  # not in the cache, or not all of it
    except ValueError as error:
        raise InputError(f"{repo}: is no Hub id ({reason(error)})", "write it as owner/name[@revision]") from error
    if offline:
        raise InputError(f"{repo}: is not in the local cache, or not whole", "run again without --offline")
    try:
        folder = fetch(HUB_FILES, is_local=False)
        if not _is_whole(folder):
            folder = fetch(HUB_FILES_HALF, is_local=False)
    except Exception as error:  # besides its own errors, those of whichever HTTP library this version stands on
        raise InputError(f"{repo}: cannot be fetched ({reason(error)})", "check the name and the network") from error
    check_folder(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        check_folder(folder)
        _all_weight_files(folder)
    except InputError:
        return False
    return True


def _all_weight_files(folder: Path) -> list[Path]:
    return sorted(path for part in parts(folder) for path in weight_files(folder, part))
