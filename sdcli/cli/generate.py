"""`sdcli generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcli import output
from sdcli.cli import options
from sdcli.cli.stdin import prompt_from_stdin
from sdcli.specs import GenerateSpec

# Options of this command alone; those of several are in options.py.
Prompt = Annotated[
    str,
    typer.Argument(help="What to draw; (x:1.2) weighs, {a|b} is one of them, - is stdin.", show_default=False),
]
Negative = Annotated[str, typer.Option("--negative", "-N", help="What to keep away from.")]
ClassName = Annotated[
    str | None,
    typer.Option(
        "--class",
        metavar="NAME|INDEX",
        help="What to draw, for a model of classes: the exact name; else, if all digits, the index from 0.",
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="0 to 2^64-1; image i uses seed + i. Default: drawn and reported.")
]
Count = Annotated[int, typer.Option("--count", "-n", help="Images to draw, 1 or more.")]
Width = Annotated[int | None, typer.Option("--width", metavar="PX", help="Width alone, in pixels.")]
Height = Annotated[int | None, typer.Option("--height", metavar="PX", help="Height alone, in pixels.")]
Latents = Annotated[
    Path | None,
    typer.Option(
        "--latents",
        metavar="FILE",
        help="Start from this noise, as of sdcli encode --invert, in place of that of --seed; sets the size.",
    ),
]
InitImage = Annotated[
    Path | None,
    typer.Option("--init-image", metavar="FILE", help="Start from this picture, at its own size unless --size says."),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength",
        help="Share of the steps made on --init-image, 0 (none) to 1. Default: 0.75, for inpainting models 1.",
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option("--mask", metavar="FILE", help="Repaint --init-image where this is white, keep it where it is black."),
]
SaveLatents = Annotated[
    Path | None,
    typer.Option(
        "--save-latents",
        metavar="PATH",
        help="Write the final latents, too, for sdcli decode: a .safetensors file or a folder.",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="PATH", help="A picture file, a folder, a template of fields, or - for stdout."
    ),
]
Grid = Annotated[
    Path | None, typer.Option("--grid", metavar="FILE", help="A contact sheet of all pictures, with their seeds, too.")
]
SaveSteps = Annotated[
    Path | None,
    typer.Option(
        "--save-steps",
        metavar="FILE.webp|DIR",
        help="The denoising step by step, too: as an animation, or as a PNG a step in a folder.",
    ),
]
NoMetadata = Annotated[bool, typer.Option("--no-metadata", help="Write nothing about the making into the picture.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Decide everything, load no weights, draw nothing.")]


def generate(
    prompt: Prompt = GenerateSpec.prompt,
    negative: Negative = GenerateSpec.negative,
    class_name: ClassName = GenerateSpec.class_name,
    model: options.Model = GenerateSpec.model,
    prediction: options.Prediction = GenerateSpec.prediction,
    steps: options.DrawingSteps = GenerateSpec.steps,
    scheduler: options.Scheduler = GenerateSpec.scheduler,
    sigmas: options.Sigmas = GenerateSpec.sigmas,
    order: options.Order = GenerateSpec.order,
    eta: options.Eta = GenerateSpec.eta,
    timestep_spacing: options.TimestepSpacing = GenerateSpec.timestep_spacing,
    variance: options.Variance = GenerateSpec.variance,
    guidance: options.Guidance = GenerateSpec.guidance,
    guidance_interval: options.GuidanceInterval = GenerateSpec.guidance_interval,
    guidance_rescale: options.GuidanceRescale = GenerateSpec.guidance_rescale,
    seed: Seed = GenerateSpec.seed,
    count: Count = GenerateSpec.count,
    size: options.Size = GenerateSpec.size,
    width: Width = GenerateSpec.width,
    height: Height = GenerateSpec.height,
    batch_size: options.DrawingBatchSize = GenerateSpec.batch_size,
    deterministic: options.Deterministic = GenerateSpec.deterministic,
    embedding: options.Embedding = GenerateSpec.embedding,  # type: ignore[assignment]
    replace: options.Replace = GenerateSpec.replace,  # type: ignore[assignment]
    mix: options.Mix = GenerateSpec.mix,  # type: ignore[assignment]
    clip_skip: options.ClipSkip = GenerateSpec.clip_skip,
    latents: Latents = GenerateSpec.latents,
    init_image: InitImage = GenerateSpec.init_image,
    strength: Strength = GenerateSpec.strength,
    mask: Mask = GenerateSpec.mask,
    save_latents: SaveLatents = GenerateSpec.save_latents,
    out: Out = GenerateSpec.output,
    format: options.Format = GenerateSpec.format,
    quality: options.Quality = GenerateSpec.quality,
    grid: Grid = GenerateSpec.grid,
    save_steps: SaveSteps = GenerateSpec.save_steps,
    if_exists: options.IfExists = GenerateSpec.if_exists,
    no_metadata: NoMetadata = GenerateSpec.no_metadata,
    dry_run: DryRun = False,
    device: options.Device = GenerateSpec.device,
    dtype: options.Dtype = GenerateSpec.dtype,
    offline: options.Offline = GenerateSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Draw pictures of a prompt, or of a class; prints the path of each."""
    given = locals()
    given["prompt"] = prompt_from_stdin() if prompt == "-" else prompt
    given["output"] = given.pop("out")
    given |= {"embedding": tuple(embedding), "replace": tuple(replace), "mix": tuple(mix)}
    spec = GenerateSpec(**{k: v for k, v in given.items() if k not in (*options.NO_SETTINGS, "dry_run")})
    from sdcli.plan import plan  # deferred: 0.02 s that --help does not need

    decided = plan(spec)
    if dry_run:
        from sdcli.tokens import counted  # deferred: the tokenizer, without torch

        output.document(decided.describe() | counted(decided))
        return
    from sdcli import generate as story  # deferred: imports torch

    with output.progress() as bar:
        for event in story.run(spec, decided):
            if isinstance(event, story.Progress):
                bar.update("denoising", event.done, event.total)
            elif event.data is not None:
                output.results_in_bytes(event.data)
            else:
                output.result(str(event.path), event.facts)
