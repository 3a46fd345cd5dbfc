"""Options that several commands share, each with its unit and range."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from sdcli.checks import parse_output
from sdcli.errors import InputError, UsageError

MAX_CONFIG_BYTES = 1 << 20


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

NO_SETTINGS = ("json", "quiet", "debug", "config")  # how a command speaks, and where its settings are: in no spec


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let the options' defaults be those of a TOML file."""
    if path is None:
        return None
    import tomllib  # deferred, as the next: only this option needs them

    from sdcli.files import read_bytes

    try:
        given = tomllib.loads(read_bytes(path, max_bytes=MAX_CONFIG_BYTES).decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is no TOML ({error})", "write a line an option, as in batch-size = 8") from error
    values = {name.replace("-", "_"): value for name, value in given.items()}
    known = {parameter.name for parameter in context.command.params} - {*NO_SETTINGS, "help"}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, [str(one) for one in known], 1)
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else "its options are in --help"
            raise UsageError(f"{path}: {name}: is no option of {context.info_name}", hint)
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _start_from(context: typer.Context, value: str | None) -> str | None:
    """The model to start from; that of the environment counts only where no option and no file of options says one."""
    source = context.get_parameter_source("model")
    if source is None or source.name != "ENVIRONMENT":
        return value
    settings = context.default_map or {}
    if context.params.get("init", settings.get("init")) is not None:
        return None
    return str(settings["model"]) if "model" in settings else value


# Training
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        is_eager=True,
        callback=_read_config,
        help="Options from a TOML file, a line each; those of the command line win.",
    ),
]
Data = Annotated[
    Path,
    typer.Option("--data", metavar="DIR", help="Folder of pictures, in any layout that sdcli dataset check reads."),
]
TrainModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="SDCLI_MODEL",
        metavar="REF",
        callback=_start_from,
        help="Start from this model (default: builtin).",
        autocompletion=model_refs,
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        "--init", metavar="PRESET|FILE", help="Start from scratch: tiny, small, sd15, or a JSON file of configs."
    ),
]
Run = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        help="Run folder; the same command again resumes. Default: ./runs/<what>-<hash of the settings>.",
    ),
]
Caption = Annotated[
    str | None, typer.Option("--caption", metavar="TEXT", help="Caption for every picture that has none.")
]
Resolution = Annotated[
    int | None,
    typer.Option(
        "--resolution", metavar="PX", help="Side of the training pictures in pixels. Default: the model's own."
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Pictures at once in each process, 1 or more.")]
Accumulate = Annotated[
    int,
    typer.Option(
        "--accumulate", help="Batches whose gradients make one step, 1 or more; an adaptive weight is each one's own."
    ),
]
Steps = Annotated[int, typer.Option("--steps", "-s", help="Optimizer steps of the whole run, 1 or more.")]
Optimizer = Annotated[
    str,
    typer.Option("--optimizer", help="adamw, or adamw8bit (of bitsandbytes: its state in a quarter of the memory)."),
]
Lr = Annotated[
    float | None,
    typer.Option("--lr", help="Peak learning rate, 0 to 1. Default: 1e-5 (LoRA 1e-4, embedding 5e-3)."),
]
LrSchedule = Annotated[str, typer.Option("--lr-schedule", help="constant, linear or cosine (both fall to 0).")]
LrWarmup = Annotated[int, typer.Option("--lr-warmup", help="Steps of linear warm-up, 0 or more.")]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="Weight decay of AdamW, 0 to 1.")]
ClipNorm = Annotated[float, typer.Option("--clip-norm", help="Clip the gradient to this norm, 0 (never) or more.")]
Ema = Annotated[float, typer.Option("--ema", help="Decay of the moving average that is exported, 0 (none) to below 1.")]
MixedPrecision = Annotated[str, typer.Option("--mixed-precision", help="no, bf16 or fp16.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all chance in the run, 0 to 2^64-1.")]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute activations twice instead of keeping them.")
]
Holdout = Annotated[
    float, typer.Option("--holdout", metavar="SHARE", help="Share of the pictures that validate, not train; 0 to 0.9.")
]
ValidateEvery = Annotated[
    int | None,
    typer.Option("--validate-every", metavar="N", help="Steps between validations, 1 or more. Default: --save-every."),
]
SampleEvery = Annotated[
    int | None,
    typer.Option(
        "--sample-every", metavar="N", help="Steps between pictures in RUN/samples, 1 or more. Default: never."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, tell what would be done, write nothing.")]
Tracker = Annotated[
    str | None, typer.Option("--tracker", metavar="NAME", help="Log to tensorboard (in RUN/tracker) or wandb, too.")
]
Export = Annotated[
    str, typer.Option("--export", help="What is exported: the last step, or of those kept the best by validation.")
]
SaveEvery = Annotated[int, typer.Option("--save-every", help="Steps between checkpoints, 1 or more.")]
Keep = Annotated[int, typer.Option("--keep", help="Checkpoints to keep, 1 or more.")]
StopAfter = Annotated[
    int | None, typer.Option("--stop-after", metavar="N", help="Stop, saved, after N steps of this call.")
]
Workers = Annotated[int, typer.Option("--workers", help="Threads that read pictures, 1 or more.")]
ExportDtype = Annotated[
    str, typer.Option("--export-dtype", help="Type of the exported weights: float32, float16 or bfloat16.")
]
Buckets = Annotated[
    bool, typer.Option("--buckets", help="Keep about the pictures' own shapes, at about the resolution's area.")
]
SnrGamma = Annotated[float, typer.Option("--snr-gamma", help="Where min-snr caps the signal-to-noise ratio, above 0.")]
VlbWeight = Annotated[float, typer.Option("--vlb-weight", help="Weight of the bound in hybrid, 0 or more.")]
OffsetNoise = Annotated[
    float, typer.Option("--offset-noise", help="Noise common to a whole channel, 0 to 1; 0.05 to 0.1 is usual.")
]
CaptionDropout = Annotated[
    float, typer.Option("--caption-dropout", help="Share of captions or classes left out, for guidance; 0 to 1.")
]
SamplePrompt = Annotated[
    list[str], typer.Option("--sample-prompt", metavar="TEXT", help="What to draw on the way; repeatable.")
]
