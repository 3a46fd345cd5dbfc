"""STORY: what this machine and this installation can do."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

from sdcli import __version__, hub, layout, store
from sdcli.errors import InputError
from sdcli.pipeline.device import pick_device, pick_dtype
from sdcli.warm import client

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "scipy", "pillow", "typer")


def report() -> dict[str, Any]:
    """Versions, devices, memory in bytes, cache, and whether the embedded model works offline, as plain values."""
    warm_process = client.look()  # before devices are looked for, which adds to the environment
    device = pick_device("auto")
    return {
        "sdcli": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": str(device),
        "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
        "devices": _devices(),
        "cpu_threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "cache": str(store.cache_folder()),
        "hub_cache": str(hub.cache_folder()),
        "builtin": _builtin(),
        "warm_process": warm_process,
        "executable": sys.executable,
    }


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": "cpu", "memory_bytes": _memory()}]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append({"name": f"cuda:{index}", "model": facts.name, "memory_bytes": facts.total_memory})
    if torch.backends.mps.is_available():
        found.append({"name": "mps"})
    return found


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # a system that does not tell
        return None


def _builtin() -> str:
    try:
        layout.check_folder(store.BUILTIN_FOLDER)
        for part in layout.parts(store.BUILTIN_FOLDER):
            for path in layout.weight_files(store.BUILTIN_FOLDER, part):
                layout.safetensors_header(path)
    except InputError as error:
        return str(error)
    return "ok, works offline"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
