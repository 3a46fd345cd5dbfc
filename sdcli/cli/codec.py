"""`sdcli encode` and `sdcli decode`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sdcli import output
from sdcli.cli import options
from sdcli.specs import CodecSpec

if TYPE_CHECKING:
    from sdcli.codec import CodecRecord, Progress


def encode(
    inputs: options.Inputs,
    out: options.OutputPath = CodecSpec.output,
    model: options.Model = CodecSpec.model,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw from the posterior with --seed; otherwise take its mean.")
    ] = CodecSpec.sample,
    invert: Annotated[
        str | None,
        typer.Option(
            "--invert",
            metavar="TEXT",
            help="Write the noise from which DDIM draws this picture of TEXT: a prompt, or a model's class.",
        ),
    ] = CodecSpec.invert,
    negative: Annotated[
        str, typer.Option("--negative", "-N", help="What guidance above 1 keeps away from in the inversion.")
    ] = CodecSpec.negative,
    clip_skip: options.ClipSkip = CodecSpec.clip_skip,
    lora: options.Lora = CodecSpec.lora,  # type: ignore[assignment]
    steps: Annotated[
        int | None,
        typer.Option("--steps", "-s", help="Steps of the inversion, 1 to 1000. Default: the model's own, else 25."),
    ] = CodecSpec.steps,
    guidance: Annotated[
        float, typer.Option("--guidance", "-g", help="How strongly TEXT steers the inversion, from 1 (off, best).")
    ] = CodecSpec.guidance,
    seed: Annotated[int, typer.Option("--seed", help="With --sample: seed of the draw, 0 to 2^64-1.")] = CodecSpec.seed,
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
        invert=invert,
        negative=negative,
        clip_skip=clip_skip,
        lora=tuple(lora),
        steps=steps,
        guidance=guidance,
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
    format: options.Format = CodecSpec.format,
    quality: options.Quality = CodecSpec.quality,
    if_exists: options.IfExists = CodecSpec.if_exists,
    device: options.Device = CodecSpec.device,
    dtype: options.Dtype = CodecSpec.dtype,
    offline: options.Offline = CodecSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Turn latent files into pictures; prints the path of each."""
    spec = CodecSpec(
        inputs=tuple(inputs),
        output=out,
        model=model,
        format=format,
        quality=quality,
        if_exists=if_exists,
        device=device,
        dtype=dtype,
        offline=offline,
    )
    from sdcli import codec  # deferred: imports torch

    _show(codec.decode(spec))


def _show(events: Iterator[Progress | CodecRecord]) -> None:
    from sdcli.codec import Progress  # deferred: imports torch

    with output.progress() as bar:
        for event in events:
            if isinstance(event, Progress):
                bar.update("inverting", event.done, event.total)
            else:
                output.result(str(event.path), event.facts)
