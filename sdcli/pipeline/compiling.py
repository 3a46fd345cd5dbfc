"""The UNet compiled by torch: slower at first, faster from then on."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import replace

import torch

from sdcli.errors import ResourceError
from sdcli.pipeline.bundle import ModelBundle

COMPILERS = ("g++", "clang++", "c++", "cl")  # of which torch needs one for a CPU


def check_compiler(device: torch.device) -> None:
    """Raise ResourceError where torch has nothing to compile with for a device."""
    if device.type == "cpu" and not any(map(shutil.which, (*os.environ.get("CXX", "").split()[:1], *COMPILERS))):
        what = f"--compile: no C++ compiler is here, none of {', '.join(COMPILERS)}"
        raise ResourceError(what, "install one, name it in CXX, or leave the option out")


def compiled(bundle: ModelBundle) -> ModelBundle:
    """A model whose UNet is compiled when it is called first, for the shapes that it is given then; weights are shared.

    Raises ResourceError as `check_compiler`.
    """
    check_compiler(bundle.device)
    shared: dict[int, object] = {id(one): one for one in (*bundle.unet.parameters(), *bundle.unet.buffers())}
    unet = copy.deepcopy(bundle.unet, memo=shared)
    unet.compile()
    return replace(bundle, unet=unet)
