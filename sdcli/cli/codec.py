"""`sdcli encode`, `sdcli decode` and `sdcli roundtrip`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli import output
from sdcli.checks import parse_output
from sdcli.cli import options
from sdcli.lab.specs import RoundtripSpec
from sdcli.specs import CodecSpec

if TYPE_CHECKING:
    from sdcli.codec import CodecRecord, Progress

Sample = Annotated[bool, typer.Option("--sample", help="Draw from the posterior with --seed; otherwise take its mean.")]
Seed = Annotated[int, typer.Option("--seed", help="With --sample: seed of the draw, 0 to 2^64-1.")]
Size = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Scale and crop to this size in pixels first.")]


def encode(
    inputs: options.Inputs,
    out: options.OutputPath = CodecSpec.output,
    model: options.Model = CodecSpec.model,
    sample: Sample = CodecSpec.sample,
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
    prediction: options.Prediction = CodecSpec.prediction,
    clip_skip: options.ClipSkip = CodecSpec.clip_skip,
    lora: options.Lora = CodecSpec.lora,  # type: ignore[assignment]
    steps: Annotated[
        int | None,
        typer.Option("--steps", "-s", help="Steps of the inversion, 1 to 1000. Default: the model's own, else 25."),
    ] = CodecSpec.steps,
    guidance: Annotated[
        float, typer.Option("--guidance", "-g", help="How strongly TEXT steers the inversion, from 1 (off, best).")
    ] = CodecSpec.guidance,
    seed: Seed = CodecSpec.seed,
    size: Size = CodecSpec.size,
    if_exists: options.IfExists = CodecSpec.if_exists,
    device: options.Device = CodecSpec.device,
    dtype: options.Dtype = CodecSpec.dtype,
    tiling: options.Tiling = CodecSpec.tiling,
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
        prediction=prediction,
        clip_skip=clip_skip,
        lora=tuple(lora),
        steps=steps,
        guidance=guidance,
        seed=seed,
        size=size,
        if_exists=if_exists,
        device=device,
        dtype=dtype,
        tiling=tiling,
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
    tiling: options.Tiling = CodecSpec.tiling,
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
        tiling=tiling,
        offline=offline,
    )
    from sdcli import codec  # deferred: imports torch

    _show(codec.decode(spec))


def roundtrip(
    inputs: options.Inputs,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=parse_output,
            metavar="PATH",
            help="Write each picture beside its reconstruction: a file, or a folder.",
        ),
    ] = RoundtripSpec.output,
    model: options.Model = RoundtripSpec.model,
    sample: Sample = RoundtripSpec.sample,
    seed: Seed = RoundtripSpec.seed,
    size: Size = RoundtripSpec.size,
    if_exists: options.IfExists = RoundtripSpec.if_exists,
    device: options.Device = RoundtripSpec.device,
    dtype: options.Dtype = RoundtripSpec.dtype,
    offline: options.Offline = RoundtripSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Tell what pictures keep through the VAE and back (PSNR, SSIM, perceptual distance), and the sizes on the way."""
    spec = RoundtripSpec(
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

    for record in codec.roundtrip(spec):
        output.result(_figures(record.facts), record.facts)


def _figures(facts: Mapping[str, Any]) -> str:
    """What a round trip kept, and in how much; below it where the pair went."""
    if "psnr" not in facts:
        return output.escape(f"{facts['source']}: skipped, {facts['path']} is there")
    nearness = f"PSNR {facts['psnr']:.1f} dB, SSIM {facts['ssim']:.3f}"
    if "perceptual" in facts:
        nearness += f", perceptual distance {facts['perceptual']:.3f} ({facts['network']})"
    pixels, latents = (
        f"{' x '.join(map(str, facts[name]['shape']))} {name}, {facts[name]['bytes']:,} bytes"
        for name in ("pixels", "latents")
    )
    lines = [f"{facts['source']}: {nearness}", f"  {pixels} -> {latents}: {facts['ratio']:g} to 1"]
    return "\n".join(output.escape(line) for line in [*lines, *([f"  {facts['path']}"] if "path" in facts else [])])


def _show(events: Iterator[Progress | CodecRecord]) -> None:
    from sdcli.codec import Progress  # deferred: imports torch

    with output.progress() as bar:
        for event in events:
            if isinstance(event, Progress):
                bar.update("inverting", event.done, event.total)
            else:
                output.result(str(event.path), event.facts)
