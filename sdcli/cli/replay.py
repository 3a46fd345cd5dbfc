"""`sdcli replay`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli import output
from sdcli.archive.specs import ReplaySpec
from sdcli.checks import parse_output
from sdcli.cli import options

if TYPE_CHECKING:
    from sdcli.replay import Event, Failed, Replayed

Pictures = Annotated[list[Path], typer.Argument(metavar="FILE...", help="PNG, JPEG or WebP pictures, or folders.")]
Check = Annotated[bool, typer.Option("--check", help="Write nothing; compare with the picture, name what has drifted.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        parser=parse_output,
        metavar="PATH",
        help="A file (for one picture), a folder, or - for stdout.",
    ),
]
Format = Annotated[
    str | None, typer.Option("--format", metavar="NAME", help="png, webp or jpg. Default: that of the picture.")
]
# What takes the place of what a picture says; the default of each is what it says.
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="REF", help="As in generate; needed where the picture's own is not here."),
]
Prediction = Annotated[
    str | None,
    typer.Option("--prediction", metavar="NAME", help="By the UNet: epsilon, v or x0. With --model: as that says."),
]
Prompt = Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="What to draw.")]
Negative = Annotated[str | None, typer.Option("--negative", "-N", metavar="TEXT", help="What to keep away from.")]
Replace = Annotated[
    list[str], typer.Option("--replace", metavar="A=B", help="As in generate, in place of all named in it. Repeatable.")
]
Mix = Annotated[
    list[str], typer.Option("--mix", metavar="A=W,B=V", help="As in generate, in place of all named in it. Repeatable.")
]
ClipSkip = Annotated[int | None, typer.Option("--clip-skip", help="Layers of the text encoder left out, 0 or more.")]
ClassName = Annotated[str | None, typer.Option("--class", metavar="NAME|INDEX", help="What to draw, of classes.")]
Seed = Annotated[int | None, typer.Option("--seed", help="0 to 2^64-1.")]
Size = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Pixels, multiples of the VAE factor.")]
Steps = Annotated[int | None, typer.Option("--steps", "-s", help="Denoising steps, 1 to 1000.")]
Scheduler = Annotated[
    str | None, typer.Option("--scheduler", metavar="NAME", help="Another one, without the options of the first.")
]
Sigmas = Annotated[
    str | None, typer.Option("--sigmas", metavar="NAME", help="Noise levels: model, karras, exponential or beta.")
]
Order = Annotated[int | None, typer.Option("--order", help="Order of the method, 1 to 4, where it has a choice.")]
Eta = Annotated[float | None, typer.Option("--eta", help="Share of fresh noise in ddim and tcd, 0 to 1.")]
Spacing = Annotated[
    str | None, typer.Option("--timestep-spacing", metavar="NAME", help="leading, trailing or linspace.")
]
Variance = Annotated[
    str | None,
    typer.Option("--variance", metavar="NAME", help="Of ddpm: fixed-small, fixed-large or learned-range."),
]
Guidance = Annotated[float | None, typer.Option("--guidance", "-g", help="From 1 (off).")]
Interval = Annotated[
    str | None, typer.Option("--guidance-interval", metavar="A:B", help="Guide in these fractions of the steps alone.")
]
Rescale = Annotated[float | None, typer.Option("--guidance-rescale", help="0 (not) to 1.")]
InitImage = Annotated[
    Path | None, typer.Option("--init-image", metavar="FILE", help="The picture it started from, if not beside it.")
]
Strength = Annotated[float | None, typer.Option("--strength", help="Share of the steps made on that, 0 to 1.")]
Mask = Annotated[Path | None, typer.Option("--mask", metavar="FILE", help="The mask of that, if not beside it.")]
Latents = Annotated[Path | None, typer.Option("--latents", metavar="FILE", help="The initial noise, if not beside it.")]
Embedding = Annotated[
    list[str],
    typer.Option(
        "--embedding", metavar="FILE[:TOKEN]", help="Textual inversion, in place of all named in it. Repeatable."
    ),
]
Lora = Annotated[
    list[str],
    typer.Option("--lora", metavar="FILE[:SCALE]", help="LoRA file, in place of all named in it. Repeatable."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="auto, float32, float16 or bfloat16. Default: as told, of our own else float32."),
]


def replay(
    inputs: Pictures,
    check: Check = ReplaySpec.check,
    out: Out = ReplaySpec.output,
    format: Format = ReplaySpec.format,
    quality: options.Quality = ReplaySpec.quality,
    if_exists: options.IfExists = ReplaySpec.if_exists,
    model: Model = ReplaySpec.model,
    prediction: Prediction = ReplaySpec.prediction,
    prompt: Prompt = ReplaySpec.prompt,
    negative: Negative = ReplaySpec.negative,
    replace: Replace = ReplaySpec.replace,  # type: ignore[assignment]
    mix: Mix = ReplaySpec.mix,  # type: ignore[assignment]
    clip_skip: ClipSkip = ReplaySpec.clip_skip,
    class_name: ClassName = ReplaySpec.class_name,
    seed: Seed = ReplaySpec.seed,
    size: Size = ReplaySpec.size,
    steps: Steps = ReplaySpec.steps,
    scheduler: Scheduler = ReplaySpec.scheduler,
    sigmas: Sigmas = ReplaySpec.sigmas,
    order: Order = ReplaySpec.order,
    eta: Eta = ReplaySpec.eta,
    timestep_spacing: Spacing = ReplaySpec.timestep_spacing,
    variance: Variance = ReplaySpec.variance,
    guidance: Guidance = ReplaySpec.guidance,
    guidance_interval: Interval = ReplaySpec.guidance_interval,
    guidance_rescale: Rescale = ReplaySpec.guidance_rescale,
    init_image: InitImage = ReplaySpec.init_image,
    strength: Strength = ReplaySpec.strength,
    mask: Mask = ReplaySpec.mask,
    latents: Latents = ReplaySpec.latents,
    embedding: Embedding = ReplaySpec.embedding,  # type: ignore[assignment]
    lora: Lora = ReplaySpec.lora,  # type: ignore[assignment]
    device: options.Device = ReplaySpec.device,
    dtype: Dtype = ReplaySpec.dtype,
    offload: options.Offload = ReplaySpec.offload,
    tiling: options.Tiling = ReplaySpec.tiling,
    offline: options.Offline = ReplaySpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Draw pictures again from what they say about themselves; options take the place of what they say."""
    given: dict[str, Any] = locals()
    given["output"] = given.pop("out")
    given |= {"inputs": tuple(inputs), "replace": tuple(replace), "mix": tuple(mix)}
    given |= {"embedding": tuple(embedding), "lora": tuple(lora)}
    spec = ReplaySpec(**{name: value for name, value in given.items() if name not in options.NO_SETTINGS})
    from sdcli import replay as story  # deferred: imports torch

    _show(story.run(spec))


def _show(events: Iterator[Event]) -> None:
    from sdcli import replay as story  # deferred: imports torch

    with output.progress() as bar:
        for event in events:
            if isinstance(event, story.Progress):
                bar.update("denoising", event.done, event.total)
            elif isinstance(event, story.Unheeded):
                output.warning(f"{event.source}: {event.remark.text}", cause=f"unheeded {event.remark.about}")
            elif isinstance(event, story.Failed):
                _tell_failure(event)
            elif event.data is not None:
                output.results_in_bytes(event.data)
            else:
                output.result(_verdict(event), event.facts)


def _tell_failure(failed: Failed) -> None:
    error = failed.error
    output.warning(str(error), cause=f"failed {failed.source}")
    facts = {"error": error.message, "hint": error.hint, "exit_code": int(error.exit_code)}
    output.record({"source": str(failed.source), **facts})


def _verdict(replayed: Replayed) -> str:
    """The path of a picture drawn again; of a check how near it is, what has drifted below it."""
    found = replayed.comparison
    if found is None:
        return output.escape(str(replayed.path))
    if found.equal is not None:
        said = f"{found.equal[:-1]}-equal"
    elif found.largest is None:
        said = "has another size"
    else:
        said = f"differs by up to {found.largest}/255, on average {found.mean:g}/255, PSNR {found.psnr:.1f} dB"
    encoded = f" ({found.encoded})" if found.encoded is not None else ""
    lines = [f"{replayed.source}: {said}{encoded}", *(f"  {one}" for one in replayed.drift)]
    return "\n".join(output.escape(line) for line in [*lines, *([f"  {replayed.path}"] if replayed.path else [])])
