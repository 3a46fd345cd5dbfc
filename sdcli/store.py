"""Model reference -> local model. No torch: what is told of a model comes from its JSON files and weight headers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.errors import InputError, SdcliError
from sdcli.files import atomic_write, make_folder, open_regular, reason
from sdcli.layout import PARTS, STEMS, classes, parts, read_json, safetensors_header, weight_files

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).with_name("builtin") / "model"
TOKENIZER_FOLDER = BUILTIN_FOLDER / "tokenizer"
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_CONFIGS = ("model_index.json", "sdcli.json", *(f"{p}/*.json" for p in (*PARTS, "tokenizer", "scheduler")))
HUB_VOCABULARY = ("tokenizer/merges.txt",)
HUB_FILES = (
    *HUB_CONFIGS,
    *HUB_VOCABULARY,
    *(f"{part}/{stem}{tail}.safetensors" for part, stem in STEMS.items() for tail in ("", "-*-of-*")),
)
HUB_FILES_HALF = (*HUB_FILES, *(f"{part}/{stem}.fp16*.safetensors" for part, stem in STEMS.items()))
MAX_SHOWN = 100  # characters of a reference that is no path
MAX_CLASSES_SHOWN = 10
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # those with the parts we read


@dataclass(frozen=True)
class Model:
    """A model on this machine: how the user named it, and the folder that holds it."""

    ref: str
    folder: Path


def resolve(ref: str | None, *, offline: bool = False) -> Model:
    """Find the model a reference means: `builtin` (also None), a diffusers folder, or a Hub id `owner/name[@revision]`.

    offline: never open a socket; a Hub id must then be in the local cache.
    Raises InputError when there is no such model, or the folder is none.
    """
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
        raise InputError(f"{ref}: is a file", "name a model folder in the diffusers layout")
    match = HUB_ID.fullmatch(ref)
    if match is None or ref.startswith("."):
        raise InputError(
            f"{ref}: no such model", "use builtin, a folder in the diffusers layout, or a Hub id owner/name"
        )
    return Model(ref, _from_hub(match["repo"], match["revision"], offline))


def check_folder(folder: Path) -> None:
    """Raise InputError unless `folder` looks like a whole model in the diffusers layout."""
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: has no model_index.json", "name the folder of a model in the diffusers layout")
    name = read_json(folder / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise InputError(f"{folder}: is a {name!r}", "only models of Stable Diffusion 1.x and 2.x are supported")
    needed = parts(folder)
    for part in (*needed, *(["tokenizer"] if "text_encoder" in needed else []), "scheduler"):
        if not (folder / part).is_dir():
            raise InputError(f"{folder}: has no {part}/", "name the folder of a whole model")


def settings(model: Model) -> dict[str, Any]:
    """The model's own defaults (`scheduler, steps, guidance, size`), empty when it states none."""
    path = model.folder / "sdcli.json"
    return read_json(path) if path.exists() else {}


def model_hash(model: Model) -> str:
    """SHA-256 over the sorted (relative name, SHA-256) of a model's weight files, in hex.

    The file hashes are cached in the user's cache by path, size and modification time.
    """
    digest = hashlib.sha256()
    cache = _HashCache()
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


def cache_folder() -> Path:
    """Where sdcli keeps what it can make again: SDCLI_CACHE, else XDG's cache folder."""
    chosen = os.environ.get("SDCLI_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(chosen) if chosen else Path(base) / "sdcli"


def hub_cache_folder() -> Path:
    """Where huggingface_hub keeps its downloads, by its own environment variables."""
    home = os.environ.get("HF_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or base / "hub")


def listed() -> Iterator[dict[str, Any]]:
    """The models that work without a network: the embedded one, then those in the Hub cache."""
    yield _row(Model(BUILTIN, BUILTIN_FOLDER))
    for index in sorted(hub_cache_folder().glob("models--*--*/snapshots/*/model_index.json")):
        repo = index.parents[2].name.removeprefix("models--").replace("--", "/", 1)
        try:
            check_folder(index.parent)
            yield _row(Model(f"{repo}@{index.parent.name}", index.parent))
        except InputError:
            continue  # another kind of pipeline, or a download that was broken off


def facts(model: Model) -> dict[str, Any]:
    """What a model is, from its configs and weight headers alone.

    Raises InputError when a config or a header is malformed.
    """
    unet = read_json(model.folder / "unet" / "config.json")
    vae = read_json(model.folder / "vae" / "config.json")
    scheduler = read_json(model.folder / "scheduler" / "scheduler_config.json")
    conditioning = _conditioning(model.folder)
    try:
        return _facts(model, unet, vae, scheduler, conditioning)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{model.folder}: its configs make no sense ({reason(error)})", "get the model again"
        ) from error


def _facts(
    model: Model, unet: dict[str, Any], vae: dict[str, Any], scheduler: dict[str, Any], conditioning: dict[str, Any]
) -> dict[str, Any]:
    parameters, dtypes = {}, set()
    for part in parts(model.folder):
        headers = [safetensors_header(path) for path in weight_files(model.folder, part)]
        tensors = [tensor for header in headers for tensor in header.values()]
        parameters[part] = sum(math.prod(tensor["shape"]) for tensor in tensors)
        dtypes |= {str(tensor["dtype"]) for tensor in tensors}
    factor = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
    side = int(unet.get("sample_size") or 0) * factor
    total = sum(parameters.values())
    return {
        "model": model.ref,
        "folder": str(model.folder),
        "family": _family(unet) if conditioning["kind"] == "text" else "latent diffusion",
        "conditioning": conditioning,
        "size": f"{side}x{side}",
        "vae_factor": factor,
        "latent_channels": vae.get("latent_channels"),
        "scaling_factor": vae.get("scaling_factor"),
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        "scheduler": scheduler.get("_class_name"),
        "parameters": parameters | {"total": total},
        "dtypes": sorted(dtypes),
        "weights_bytes": {"float32": 4 * total, "float16": 2 * total},
        "settings": settings(model),
    }


def _conditioning(folder: Path) -> dict[str, Any]:
    """What a model draws from: text, one of its classes (how many, and the first of them), or nothing."""
    names = classes(folder)
    if names is None:
        return {"kind": "text"}
    if not names:
        return {"kind": "none"}
    return {"kind": "class", "classes": len(names), "first": list(names[:MAX_CLASSES_SHOWN])}


class _HashCache:
    """File hashes by path, size and time; a cache that cannot be read or written costs time and nothing else."""

    def __init__(self) -> None:
        self.path = cache_folder() / "hashes.json"
        self.is_changed = False
        try:
            self.rows: dict[str, Any] = read_json(self.path)
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
        "bytes": sum(path.stat().st_size for path in _all_weight_files(model.folder)),
    }


def _family(unet: dict[str, Any]) -> str:
    """Stable Diffusion's versions differ in the width of their text encoder."""
    name = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}.get(unet.get("cross_attention_dim", 0))
    task = " inpainting" if unet.get("in_channels") == 9 else ""
    return (name or "Stable Diffusion of its own size") + task


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
