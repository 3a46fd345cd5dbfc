"""`sdcli generate`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdcli import output
from sdcli.checks import parse_output
from sdcli.cli import options
from sdcli.cli.stdin import prompt_from_stdin
from sdcli.errors import UsageError
from sdcli.specs import GenerateSpec

if TYPE_CHECKING:
    from sdcli.cli.preview import Screen
    from sdcli.events import Event, ImageRecord
    from sdcli.plan import Plan

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
Count = Annotated[int, typer.Option("--count", "-n", help="Images to draw, 1 to 100000.")]
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
        parser=parse_output,
        metavar="PATH",
        help="Write the final latents, too, for sdcli decode: a .safetensors file or a folder.",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        parser=parse_output,
        metavar="PATH",
        help="A picture file, a folder, a template of fields, or - for stdout.",
    ),
]
Grid = Annotated[
    Path | None,
    typer.Option(
        "--grid", parser=parse_output, metavar="FILE", help="A contact sheet of all pictures, with their seeds, too."
    ),
]
SaveSteps = Annotated[
    Path | None,
    typer.Option(
        "--save-steps",
        parser=parse_output,
        metavar="FILE.webp|DIR",
        help="The denoising step by step, too: as an animation, or as a PNG a step in a folder.",
    ),
]
NoMetadata = Annotated[bool, typer.Option("--no-metadata", help="Write nothing about the making into the picture.")]
Preview = Annotated[
    bool,
    typer.Option("--preview", help="Show each picture in the terminal, too: kitty, iTerm2, sixel, else half blocks."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Decide everything, load no weights, draw nothing.")]
NoServe = Annotated[bool, typer.Option("--no-serve", help="Draw in this process, even where sdcli serve is there.")]


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
    lora: options.Lora = GenerateSpec.lora,  # type: ignore[assignment]
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
    preview: Preview = False,
    dry_run: DryRun = False,
    device: options.Device = GenerateSpec.device,
    dtype: options.Dtype = GenerateSpec.dtype,
    offload: options.Offload = GenerateSpec.offload,
    tiling: options.Tiling = GenerateSpec.tiling,
    compile: options.Compile = GenerateSpec.compile,
    offline: options.Offline = GenerateSpec.offline,
    no_serve: NoServe = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Draw pictures of a prompt, or of a class; prints the path of each."""
    given = locals()
    given["prompt"] = prompt_from_stdin() if prompt == "-" else prompt
    given["output"] = given.pop("out")
    given |= {"lora": tuple(lora), "embedding": tuple(embedding), "replace": tuple(replace), "mix": tuple(mix)}
    apart = (*options.NO_SETTINGS, "preview", "dry_run", "no_serve")
    spec = GenerateSpec(**{name: value for name, value in given.items() if name not in apart})
    if json and str(out) == "-" and not dry_run:
        raise UsageError("--json with --output -: stdout takes the picture", "leave out --json, or name a file")
    from sdcli.events import Progress, Waiting  # deferred, as the next two: 0.02 s that --help does not need
    from sdcli.plan import plan
    from sdcli.warm.client import drawn

    decided = plan(spec)
    if dry_run:
        from sdcli.tokens import counted  # deferred: the tokenizer, without torch

        output.document(decided.describe() | counted(decided))
        return
    screen = _screen() if preview else None
    events = _here(spec, decided)
    with output.progress() as bar:
        for event in events if no_serve or debug or compile else drawn(spec, decided, events):
            if isinstance(event, Progress):
                bar.update("denoising", event.done, event.total)
                continue
            if isinstance(event, Waiting):
                bar.update("waiting for the warm process", event.done, event.total)
                continue
            if screen is not None and "prompt" in event.facts:  # one of the pictures, made now
                bar.show(_shown(event, screen))
            if event.data is not None:
                output.results_in_bytes(event.data)
            else:
                output.result(str(event.path), event.facts)


def _screen() -> Screen | None:
    """The terminal to show pictures on; None, with a note on a terminal that cannot, where there is none."""
    if not output.shows_pictures():
        return None
    from sdcli.cli.preview import Screen, find_screen  # deferred, as below: 10 ms that --help does not need

    found = find_screen(os.environ)
    if isinstance(found, Screen):
        return found
    output.note(f"no preview: {found}")
    return None


def _shown(record: ImageRecord, screen: Screen) -> str:
    """A picture that was written, or goes to stdout, as the terminal shows it."""
    from sdcli.cli.preview import picture_text

    return picture_text(record.data or Path(record.facts["path"]), screen)


def _here(spec: GenerateSpec, decided: Plan) -> Iterator[Event]:
    """The events of a plan that this process draws."""
    from sdcli import generate as story  # deferred: imports torch

    yield from story.run(spec, decided)
