"""`sdcli encode` and `sdcli decode`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sdcli import output
from sdcli.cli import options
from sdcli.specs import CodecSpec

if TYPE_CHECKING:
    from sdcli.codec import CodecRecord


def encode(
    inputs: options.Inputs,
    out: options.OutputPath = CodecSpec.output,
    model: options.Model = CodecSpec.model,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw from the posterior with --seed; otherwise take its mean.")
    ] = CodecSpec.sample,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draw, 0 to 2^64-1.")] = CodecSpec.seed,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Scale and crop to this size in pixels first.")
    ] = CodecSpec.size,
    if_exists: options.IfExists = CodecSpec.if_exists,
    device: options.Device = CodecSpec.device,
    dtype: options.Dtype = CodecSpec.dtype,
    offline: options.Offline = CodecSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Turn pictures into latent files (NAME.latents.safetensors); prints the path of each."""
    spec = CodecSpec(
        inputs=tuple(inputs),
        output=out,
        model=model,
        sample=sample,
        seed=seed,
        size=size,
        if_exists=if_exists,
        device=device,
        dtype=dtype,
        offline=offline,
    )
    from sdcli import codec  # deferred: imports torch

    _show(codec.encode(spec))


def decode(
    inputs: options.Inputs,
    out: options.OutputPath = CodecSpec.output,
    model: options.Model = CodecSpec.model,
    if_exists: options.IfExists = CodecSpec.if_exists,
    device: options.Device = CodecSpec.device,
    dtype: options.Dtype = CodecSpec.dtype,
    offline: options.Offline = CodecSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Turn latent files into PNG pictures; prints the path of each."""
    spec = CodecSpec(
        inputs=tuple(inputs), output=out, model=model, if_exists=if_exists, device=device, dtype=dtype, offline=offline
    )
    from sdcli import codec  # deferred: imports torch

    _show(codec.decode(spec))


def _show(records: Iterator[CodecRecord]) -> None:
    for record in records:
        output.result(str(record.path), record.facts)
