"""Options that several commands share, each with its unit and range."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcli.checks import parse_output


def _scheduler_names() -> list[str]:
    from sdcli import schedulers  # deferred: only completion asks

    return list(schedulers.names())


def model_refs() -> list[str]:
    """The models that a shell offers: those that work without a network."""
    from sdcli import listing  # deferred: only completion asks

    return [row["model"] for row in listing.listed()]


Json = Annotated[bool, typer.Option("--json", help="One JSON line a result on stdout; errors as JSON on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", envvar="SDCLI_DEBUG", help="Show the traceback of an error.")]
Offline = Annotated[
    bool, typer.Option("--offline", envvar="SDCLI_OFFLINE", help="Open no socket; a Hub id must be in the local cache.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="SDCLI_MODEL",
        metavar="REF",
        help="builtin, a model folder, a single file, or a Hub id owner/name[@rev].",
        autocompletion=model_refs,
    ),
]
Prediction = Annotated[
    str | None,
    typer.Option(
        "--prediction", metavar="NAME", help="What the UNet predicts: epsilon, v or x0. Default: as the model says."
    ),
]
Device = Annotated[
    str, typer.Option("--device", envvar="SDCLI_DEVICE", help="auto, cpu, cuda, cuda:N or mps.", metavar="NAME")
]

Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="NAME",
        help="See sdcli schedulers. Default: the model's own, else dpm.",
        autocompletion=_scheduler_names,
    ),
]
DrawingSteps = Annotated[
    int | None, typer.Option("--steps", "-s", help="Denoising steps, 1 to 1000. Default: the model's own, else 25.")
]
Sigmas = Annotated[
    str | None,
    typer.Option(
        "--sigmas",
        metavar="NAME",
        help="Noise levels: model (at the timesteps), karras, exponential or beta. Default: the model's own.",
    ),
]
Order = Annotated[int | None, typer.Option("--order", help="Order of the method, 1 to 4, where it has a choice.")]
Eta = Annotated[
    float | None, typer.Option("--eta", help="Share of fresh noise in ddim and tcd, 0 (none) to 1. Default: 0 and 0.3.")
]
TimestepSpacing = Annotated[
    str | None,
    typer.Option("--timestep-spacing", metavar="NAME", help="leading, trailing or linspace. Default: the model's own."),
]
Variance = Annotated[
    str | None,
    typer.Option(
        "--variance",
        metavar="NAME",
        help="Of ddpm's noise: fixed-small, fixed-large or learned-range. Default: the model's own.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        "-g",
        help="How strongly the prompt or class steers, from 1 (off). Default: the model's own, else 7.5.",
    ),
]
GuidanceInterval = Annotated[
    str,
    typer.Option(
        "--guidance-interval", metavar="A:B", help="Guide from this to that fraction of the steps alone; 0:1 is all."
    ),
]
GuidanceRescale = Annotated[
    float,
    typer.Option(
        "--guidance-rescale", help="How far guidance leaves the prediction its contrast, 0 (not) to 1; 0.7 is usual."
    ),
]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="WxH", help="Pixels, multiples of the VAE factor. Default: the model's own."),
]
DrawingBatchSize = Annotated[
    int | None, typer.Option("--batch-size", "-b", help="Images denoised together, 1 or more. Default: by size.")
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Draw each image alone: bit-equal on one machine, whatever --batch-size and neighbours.",
    ),
]
Lora = Annotated[
    list[str],  # what Typer takes for repeatable
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="Add a LoRA, LoHa or LoKr file to the model, SCALE times, -100 to 100. Default: 1. Repeatable.",
    ),
]
Embedding = Annotated[
    list[str],  # what Typer takes for repeatable
    typer.Option(
        "--embedding",
        metavar="FILE[:TOKEN]",
        help="Textual inversion: prompts may name its token, or TOKEN in its place. Repeatable.",
    ),
]
Replace = Annotated[
    list[str],
    typer.Option(
        "--replace",
        metavar="A=B",
        help="Feed B's vectors wherever A stands in the prompt, not the negative. Repeatable.",
    ),
]
Mix = Annotated[
    list[str],
    typer.Option(
        "--mix",
        metavar="A=W,B=V",
        help="Feed W times A's vectors plus V times B's wherever A stands; weights -10 to 10. Repeatable.",
    ),
]
ClipSkip = Annotated[
    int,
    typer.Option(
        "--clip-skip",
        metavar="N",
        help="Layers of the text encoder left out at its end, from 0; A1111's number minus 1.",
    ),
]
IfExists = Annotated[
    str, typer.Option("--if-exists", help="For a file that is there: number (puppy-2.png), skip, overwrite or error.")
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="NAME", help="Of pictures: png, webp or jpg. Default: by the suffix of --output, else png."
    ),
]
Quality = Annotated[
    int | None,
    typer.Option("--quality", help="Of webp and jpg, 1 to 100; webp at 100 loses nothing. Default: 90."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, float16 or bfloat16.")]
Offload = Annotated[
    str,
    typer.Option(
        "--offload",
        metavar="NAME",
        help="auto: all of the model on the device; model: the part that works; sequential: the layer that works.",
    ),
]
Tiling = Annotated[
    bool,
    typer.Option("--tiling", help="Encode and decode pictures above 64 latents a side (512 px) in tiles."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the UNet first, by torch: minutes that many steps pay back.")
]
Inputs = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files, or folders of files.")]
OutputPath = Annotated[
    Path,
    typer.Option("--output", "-o", parser=parse_output, metavar="PATH", help="A file (for one input) or a folder."),
]
Workers = Annotated[int, typer.Option("--workers", help="Threads that read pictures, 1 or more.")]

NO_SETTINGS = ("json", "quiet", "debug", "config")  # how a command speaks, and where its settings are: in no spec
