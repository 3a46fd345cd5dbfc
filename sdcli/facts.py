"""What a model is, from its configs and the headers of its weights alone. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sdcli import layout
from sdcli.errors import InputError
from sdcli.files import exists, reason
from sdcli.jail import is_pickled
from sdcli.layout import XL_EMBEDDING, classes, parts, safetensors_header, weight_files
from sdcli.original.checkpoint import Checkpoint
from sdcli.original.names import FAMILIES, SDXL
from sdcli.pipeline.adapter_facts import describe
from sdcli.store import Model, settings

MAX_CLASSES_SHOWN = 10
MAX_PICKLED_BYTES = 256 << 20  # of an adapter that is read to be told of


def facts_of_adapter(path: Path) -> dict[str, Any] | None:
    """What a LoRA or textual-inversion file is, of its header; None for all that is neither, and for a pickled one."""
    try:
        told = describe(path) if exists(path) else None
    except InputError:
        return None
    return {"file": str(path), **told} if told is not None else None


def facts_of_pickle(path: Path) -> dict[str, Any] | None:
    """The same of a pickled one, which has no header and is read whole; None for a file larger than those are, or one
    that is named as only checkpoints are. Raises ResourceError where there is no room to read it."""
    try:
        if path.suffix == ".ckpt" or not exists(path) or not is_pickled(path):
            return None
        from sdcli.pipeline.adapters import describe_pickle  # deferred: imports torch

        told = describe_pickle(path, max_bytes=MAX_PICKLED_BYTES)
    except InputError:
        return None  # what is wrong with it is told by whoever takes it for a model
    return {"file": str(path), **told} if told is not None else None


def facts_of(model: Model) -> dict[str, Any]:
    """What a model is, from its configs and weight headers alone.

    Raises InputError when a config or a header is malformed.
    """
    checkpoint = layout.single_file(model.folder)
    try:
        if checkpoint is not None:
            return _facts_of_file(model, checkpoint)
        unet, vae, scheduler = (layout.config(model.folder, part) for part in ("unet", "vae", "scheduler"))
        return _facts_of_folder(model, unet, vae, scheduler, _conditioning(model.folder))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{model.folder}: its configs make no sense ({reason(error)})", "get the model again"
        ) from error


def _facts_of_folder(
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
        **model.pinned(),
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


def _facts_of_file(model: Model, checkpoint: Checkpoint) -> dict[str, Any]:
    """The same of a single file, and of what it holds besides; of a part alone what that part says."""
    unet, vae = checkpoint.configs.get("unet", {}), checkpoint.configs.get("vae", {})
    parameters = {
        part: sum(math.prod(source.shape) for source in sources.values())
        for part, sources in checkpoint.sources.items()
    }
    facts: dict[str, Any] = {"model": model.ref, **model.pinned(), "file": str(model.source or model.folder)}
    facts |= {
        "family": _family(unet) if unet and checkpoint.is_supported else checkpoint.family,
        "parts": list(checkpoint.sources),
        "lacks": list(checkpoint.lacks),
    }
    if vae:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        facts |= {"vae_factor": factor, "latent_channels": vae["latent_channels"]}
        facts |= {"scaling_factor": vae["scaling_factor"]}
        side = unet.get("sample_size")
        if type(side) is int:
            facts["size"] = f"{side * factor}x{side * factor}"
    if unet:
        facts |= {"prediction_type": checkpoint.scheduler.get("prediction_type", "epsilon")}
        facts |= {"prediction_told_by": checkpoint.prediction.told_by, "ema": bool(checkpoint.averages)}
        facts |= {"scheduler": checkpoint.scheduler.get("_class_name")}
    total = sum(parameters.values())
    entries = checkpoint.header.entries
    return facts | {
        "parameters": parameters | {"total": total},
        "tensors": len(entries),
        "unused_tensors": len(checkpoint.strangers),
        "dtypes": sorted({source.entry.dtype for part in checkpoint.sources.values() for source in part.values()}),
        "weights_bytes": {"float32": 4 * total, "float16": 2 * total},
        "settings": dict(checkpoint.settings),
    }


def _conditioning(folder: Path) -> dict[str, Any]:
    """What a model draws from: text, one of its classes (how many, and the first of them), or nothing."""
    names = classes(folder)
    if names is None:
        return {"kind": "text"}
    if not names:
        return {"kind": "none"}
    return {"kind": "class", "classes": len(names), "first": list(names[:MAX_CLASSES_SHOWN])}


def _family(unet: dict[str, Any]) -> str:
    """XL's UNet is told of sizes; 1.x and 2.x differ in the width of their text encoder."""
    name = FAMILIES.get(unet.get("cross_attention_dim", 0))
    name = SDXL if unet.get("addition_embed_type") == XL_EMBEDDING else name
    task = " inpainting" if unet.get("in_channels") == 9 else ""
    return (name or "Stable Diffusion of its own size") + task
