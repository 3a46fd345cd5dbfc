"""A compiled UNet draws what the plain one draws; where nothing can compile, that is told before it is tried."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._inductor import compile_fx
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from sdcli import generate
from sdcli.errors import ResourceError
from sdcli.pipeline.bundle import load_bundle
from sdcli.pipeline.compiling import check_compiler, compiled, explained
from sdcli.plan import plan
from sdcli.specs import GenerateSpec

CPU = torch.device("cpu")


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_without_a_compiler_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ResourceError, match=r"--compile: no C\+\+ compiler is here, none of g\+\+, clang\+\+"):
        check_compiler(CPU)
    check_compiler(torch.device("cuda"))  # for which torch brings its own
    (tmp_path / "own").write_text("")
    (tmp_path / "own").chmod(0o755)
    monkeypatch.setenv("CXX", "own -O2")
    check_compiler(CPU)


def test_a_compiler_that_does_not_work_is_a_lack_too(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(compile_fx, "compile_fx", broken)
    bundle = load_bundle(sd1, device=CPU, dtype=torch.float32)
    double: Any = Double()  # in place of a UNet: quick to look through
    with pytest.raises(ResourceError, match="--compile: torch could not compile the network"):
        compiled(replace(bundle, unet=double)).unet(torch.ones(1, 2))


@pytest.mark.parametrize("error", [CppCompileError(["g++"], "no space left"), InvalidCxxCompiler()])
def test_what_a_compiler_fails_at_on_the_way_back_is_explained(error: Exception) -> None:
    with pytest.raises(ResourceError, match="--compile: torch could not compile the network"), explained():
        raise error


def test_whether_there_is_a_compiler_is_looked_at_before_weights_are(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    spec = GenerateSpec(prompt="a cat", model=str(sd1), output=tmp_path / "x.png", device="cpu", compile=True)
    with pytest.raises(ResourceError, match="no C"):
        list(generate.run(spec, plan(spec), lambda *_, **__: pytest.fail("loads")))


def test_the_model_that_was_given_stays_uncompiled_and_shares_its_weights(sd1: Path) -> None:
    bundle = load_bundle(sd1, device=CPU, dtype=torch.float32)
    other = compiled(bundle)
    assert other.unet is not bundle.unet and bundle.unet._compiled_call_impl is None
    assert other.unet.conv_in.weight is bundle.unet.conv_in.weight


@pytest.mark.slow
def test_a_compiled_unet_draws_the_same_picture(sd1: Path, tmp_path: Path) -> None:
    pixels = []
    for name, is_compiled in (("plain", False), ("compiled", True)):
        target = tmp_path / f"{name}.png"
        spec = GenerateSpec(prompt="a cat", model=str(sd1), output=target, steps=3, seed=3, compile=is_compiled)
        for _ in generate.run(spec, plan(spec)):
            pass
        pixels.append(np.asarray(Image.open(target), dtype=np.int16))
    assert abs(pixels[0] - pixels[1]).max() <= 2
