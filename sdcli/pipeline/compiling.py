"""Networks compiled by torch: slower at first, faster from then on."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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

    Calling it raises ResourceError where compiling fails.
    """
    shared: dict[int, object] = {id(one): one for one in (*bundle.unet.parameters(), *bundle.unet.buffers())}
    unet = copy.deepcopy(bundle.unet, memo=shared)
    unet.compile()
    assert unet._compiled_call_impl is not None
    unet._compiled_call_impl = explained()(unet._compiled_call_impl)
    return replace(bundle, unet=unet)


@contextmanager
def explained() -> Iterator[None]:
    """Raise ResourceError where torch cannot compile what is computed within, forwards or, for gradients, backwards."""
    from torch._dynamo.exc import TorchDynamoException  # takes over a second, for which only who compiles waits
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        yield
    except (TorchDynamoException, CppCompileError, InvalidCxxCompiler) as error:
        first = str(error).partition("\n")[0]  # what follows is of torch's own logs
        what = f"--compile: torch could not compile the network ({first})"
        raise ResourceError(what, "see whether the compiler works, or leave the option out") from error
