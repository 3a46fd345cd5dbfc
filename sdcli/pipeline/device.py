"""Device and dtype, through accelerate."""

from __future__ import annotations

import torch
from accelerate import PartialState

from sdcli.errors import ResourceError, UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# float16 halves time and memory on CUDA; on a CPU it is slower than float32, on MPS it has given black pictures.
AUTO_DTYPES = {"cuda": torch.float16, "mps": torch.float32, "cpu": torch.float32}


def pick_device(name: str) -> torch.device:
    """The device of this process: the best there is for `auto`, else the one named (`cpu`, `cuda`, `cuda:1`, `mps`).

    Raises UsageError for a name that is none, ResourceError for a device this machine lacks.
    """
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


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of weights on a device: float32 on CPU and MPS, float16 on CUDA, unless one is named."""
    return AUTO_DTYPES.get(device.type, torch.float32) if name == "auto" else DTYPES[name]
