"""Device and dtype, through accelerate."""

from __future__ import annotations

import bisect
import copy
import ctypes
import gc
import mmap
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.hooks import remove_hook_from_module
from torch import nn

from sdcli.errors import ResourceError, UsageError

Module = TypeVar("Module", bound=nn.Module)

# Options of glibc's mallopt, from its malloc.h: from how many bytes on a block, or what is free at the end of the heap,
# goes back to the system as soon as it is freed.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Bytes. A UNet of Stable Diffusion 1.5 asks for 84 MB at once at 512 x 512; older glibc takes no more than 32 MB.
KEPT_BLOCKS, KEPT_END = (128 << 20, 32 << 20), 256 << 20
MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")  # of the environment

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NO_GLIBC = (OSError, AttributeError, TypeError)  # what it is to ask another C library for what only glibc has
# float16 halves time and memory on CUDA; on a CPU it is slower than float32, on MPS it has given black pictures.
AUTO_DTYPES = {"cuda": torch.float16, "mps": torch.float32, "cpu": torch.float32}


def pick_device(name: str) -> torch.device:
    """The device of this process: the best there is for `auto`, else the one named (`cpu`, `cuda`, `cuda:1`, `mps`).

    Where it is a CPU, memory is kept from then on as `keep_freed` has it.
    Raises UsageError for a name that is none, ResourceError for a device this machine lacks.
    """
    device = _named(name)
    if device.type == "cpu":
        keep_freed()
    return device


def _named(name: str) -> torch.device:
    if name == "auto":
        return torch.device(PartialState().device)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: unknown", "use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cpu":
        return torch.device("cpu")
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type, 0)
    if (device.index or 0) >= there:
        raise ResourceError(f"--device {name}: this machine has no such device", "use --device auto or cpu")
    return device


def local_device(name: str) -> str:
    """The name of the device that is this process's own, of several that `accelerate launch` or `torchrun` began.

    Each works alone: no group of processes is formed, which would have all wait for the slowest, or for a dead one.
    """
    if name != "auto" or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return name
    is_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    count = 0 if is_cpu else torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else "cpu"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of weights on a device: float32 on CPU and MPS, float16 on CUDA, unless one is named."""
    return AUTO_DTYPES.get(device.type, torch.float32) if name == "auto" else DTYPES[name]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def computing_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where hooks of accelerate bring them for that."""
    for one in module.modules():
        hook = getattr(one, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):  # several are one
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    return next(module.parameters()).device


def computing_dtype(module: nn.Module) -> torch.dtype:
    """In which type a module computes: the widest of its weights, of which some may be widened as they compute."""
    return max((weight.dtype for weight in module.parameters()), key=lambda dtype: dtype.itemsize)


def unhooked(module: Module) -> Module:
    """A copy of a module, weights and all, without hooks of accelerate."""
    return remove_hook_from_module(copy.deepcopy(module), recurse=True)  # type: ignore[no-any-return]


def keep_freed() -> None:
    """Have the C library keep what this process frees for what it asks for next, where it is one that can.

    A UNet asks for the same activations in every step. Given back and asked for again, each page of them is cleared by
    the system: a tenth of the time of a step on a CPU. Where the environment says how to keep memory, it is left to it.
    """
    if any(name in os.environ for name in MALLOC_SETTINGS):
        return
    with suppress(*NO_GLIBC):
        library = ctypes.CDLL(None)
        # Either ends glibc's own guess at both, so the second alone would give back every block.
        if any(library.mallopt(M_MMAP_THRESHOLD, most) for most in KEPT_BLOCKS):
            library.mallopt(M_TRIM_THRESHOLD, KEPT_END)


def give_back() -> bool:
    """Give what is free back to the devices and the system; False where the C library is none that can."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return trim()


def trim() -> bool:
    """Give back to the system what is free of the main memory; False where the C library is none that can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except NO_GLIBC:
        return False
    return True


class Peak:
    """The most memory used between entering and leaving, in bytes, and of which kind.

    kind: `cuda`, what torch had allocated on the device; else `rss growth`, by how much the resident memory of this
    process was larger at the moments of `look` than on entering, when what is free has been given back to the system:
    kept, it would hide the growth. Where the system does not tell it, or takes nothing back, bytes is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.kind = "cuda" if device.type == "cuda" else "rss growth"
        self.bytes: int | None = None
        self._device = device
        self._before: int | None = 0  # bytes

    def __enter__(self) -> Peak:
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._before = _resident() if give_back() else None
        self.look()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.look()

    def look(self) -> None:
        """Take what is used now into account."""
        now = torch.cuda.max_memory_allocated(self._device) if self.kind == "cuda" else _resident()
        if now is not None and self._before is not None:
            self.bytes = max(self.bytes or 0, now - self._before)


def _resident() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # no Linux
        return None


def let_go(module: nn.Module) -> None:
    """Give back to the system what a module's weights take that are mapped from a file, until they are asked for again.

    None of them may have been changed. Where the system does not tell what is mapped, nothing is given back.
    """
    mapped = _mapped()
    starts = [first for first, _ in mapped]
    for weight in module.parameters():
        # Whole pages of it alone: what lies beside may be another's.
        first = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        place = bisect.bisect_right(starts, first) - 1
        if weight.device.type == "cpu" and first < last and place >= 0 and last <= mapped[place][1]:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _mapped() -> list[tuple[int, int]]:
    """Where in memory files are mapped, from the lowest address on; nothing where the system is no Linux."""
    try:
        rows = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    spans = [row[0].split("-") for row in rows if row[4] != "0"]  # of an inode
    return [(int(first, 16), int(last, 16)) for first, last in spans]
