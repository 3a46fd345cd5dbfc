"""What two processes must have in common for one to draw what the other would, to the bit and with the same errors."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import sdcli

ROOT = Path(sdcli.__file__).parent
# Of the environment what changes how torch, its libraries or accelerate compute, or where models and hashes are kept.
PREFIXES = (
    *("OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_", "ONEDNN_", "OPENBLAS_"),
    *("CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "HIP_", "HSA_", "ROCR_", "MIOPEN_"),
    *("TORCH_", "PYTORCH_", "ATEN_", "ACCELERATE_", "LD_"),
)
NAMES = (
    *("PYTHONPATH", "HOME", "XDG_CACHE_HOME", "SDCLI_CACHE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"),
    *("WORLD_SIZE", "RANK", "LOCAL_RANK"),
)

INSTALLED = (".dist-info", ".egg-info", ".egg-link", ".pth")  # what is there of every package


def own() -> dict[str, str]:
    """What this process is, as hashes by what they are of: to be compared, and to tell nothing else.

    To be asked before torch is imported, which adds to the environment.
    """
    facts: dict[str, object] = {
        "version": sdcli.__version__,
        "code": _code(),
        "Python": (sys.version, sys.prefix, sys.getfilesystemencoding()),
        "installed packages": _packages(),
        "user": (os.geteuid(), os.getegid(), sorted(os.getgroups())),
        "file system": _file_system(),
        "number of processors": _processors(),
        "limits": _limits(),
    }
    facts |= {name: value for name, value in os.environ.items() if name.startswith(PREFIXES) or name in NAMES}
    return {name: hashlib.sha256(repr(fact).encode(errors="replace")).hexdigest()[:16] for name, fact in facts.items()}


def difference(one: dict[str, str], other: dict[str, str]) -> str:
    """The first thing in which two processes differ, or nothing."""
    return next((name for name in {**one, **other} if one.get(name) != other.get(name)), "")


def _code() -> object:
    """Every module of this package by size and time: where it is worked on, the version says little."""
    files = sorted(str(path) for path in ROOT.rglob("*.py"))
    return [(path, status.st_size, status.st_mtime_ns) for path in files for status in [Path(path).stat()]]


def _packages() -> object:
    """What is installed, by name, version and time. Not by the folder's own time: Python's caches change that, too."""
    places = [Path(place) for place in sys.path if place.endswith("-packages")]
    found = sorted(path for place in places if place.is_dir() for path in place.iterdir() if path.suffix in INSTALLED)
    return [(path, path.stat().st_mtime_ns) for path in found]


def _file_system() -> object:
    """What tells one view of the files of this machine from another, that of a container for one."""
    root = Path("/").stat()
    try:
        space = str(Path("/proc/self/ns/mnt").readlink())
    except OSError:  # no Linux
        space = ""
    return root.st_dev, root.st_ino, space


def _processors() -> int:
    """On how many this process may run: torch takes as many threads, on which sums of floats depend."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0


def _limits() -> object:
    """How large a file, and how much memory, this process may have."""
    import resource  # deferred: there is none on Windows, where nobody gets here

    return [resource.getrlimit(kind) for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_DATA)]
