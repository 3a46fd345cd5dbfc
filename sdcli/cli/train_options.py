"""Options that the trainers share, each with its unit and range, and the file that may hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcli.cli import options
from sdcli.errors import InputError, UsageError

MAX_CONFIG_BYTES = 1 << 20


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let the options' defaults be those of a TOML file."""
    if path is None:
        return None
    import difflib  # deferred, as the next two: only this option needs them
    import tomllib

    from sdcli.files import read_bytes

    try:
        given = tomllib.loads(read_bytes(path, max_bytes=MAX_CONFIG_BYTES).decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is no TOML ({error})", "write a line an option, as in batch-size = 8") from error
    values = {name.replace("-", "_"): value for name, value in given.items()}
    known = {parameter.name for parameter in context.command.params} - {*options.NO_SETTINGS, "help"}
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
        autocompletion=options.model_refs,
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
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile what is trained first, by torch: minutes that a thousand steps pay back."),
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
