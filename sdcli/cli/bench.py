"""`sdcli bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli import output
from sdcli.cli import options
from sdcli.lab.specs import BenchSpec

if TYPE_CHECKING:
    from sdcli.bench import Settings, Solved

# Options of this command alone; those of several are in options.py.
Schedulers = Annotated[
    str,
    typer.Option(
        "--schedulers",
        metavar="all|A,B,C",
        help="Names with commas between, options after colons: ddim,dpm:sigmas=karras:order=3; see sdcli schedulers.",
    ),
]
StepCounts = Annotated[
    str, typer.Option("--steps", "-s", metavar="N,N,...", help="Numbers of steps with commas between, each 1 to 1000.")
]
Prompt = Annotated[
    list[str],  # what Typer takes for repeatable
    typer.Option(
        "--prompt", metavar="TEXT", help="What to draw; repeatable. Default: four that the embedded model knows."
    ),
]
ClassName = Annotated[
    list[str],
    typer.Option("--class", metavar="NAME|INDEX", help="Of a model of classes, repeatable. Default: its first four."),
]
Negative = Annotated[str, typer.Option("--negative", "-N", help="What to keep away from.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the first picture, 0 to 2^64-1; each has the next one.")]
Seeds = Annotated[int, typer.Option("--seeds", "-n", metavar="N", help="Pictures of each prompt, 1 or more.")]
ReferenceSteps = Annotated[
    int, typer.Option("--reference-steps", metavar="N", help="Heun steps of the reference solution, 4 or more.")
]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Folder of pictures, for the Frechet distance to them.")
]
Features = Annotated[
    str,
    typer.Option(
        "--features",
        metavar="builtin|FILE",
        help="Network of the Frechet distance: builtin, or a file with the weights of VGG16 or of FID's Inception v3.",
    ),
]
Csv = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="The table as a .csv file, too.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="A .png file: quality over cost, a curve a scheduler.")
]
PlotQuality = Annotated[
    str, typer.Option("--plot-quality", help="What is plotted: rmse or psnr (to the reference), or frechet.")
]
PlotOver = Annotated[
    str, typer.Option("--plot-over", help="Over what: seconds (an image), evaluations (of the UNet) or steps.")
]
Run = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        help="Folder that keeps the rows; the same command again does what is missing. "
        "Default: ./runs/bench-<hash of the settings>.",
    ),
]

NAME_WIDTH = 22
HEAD = f"{'steps':>6}{'evaluations':>12}{'s/step':>9}{'s/image':>9}{'RMSE':>10}{'PSNR dB':>9}{'Frechet':>9}{'MiB':>7}"


def bench(
    schedulers: Schedulers = BenchSpec.schedulers,
    steps: StepCounts = BenchSpec.steps,
    model: options.Model = BenchSpec.model,
    prompt: Prompt = BenchSpec.prompt,  # type: ignore[assignment]
    class_name: ClassName = BenchSpec.class_name,  # type: ignore[assignment]
    negative: Negative = BenchSpec.negative,
    prediction: options.Prediction = BenchSpec.prediction,
    lora: options.Lora = BenchSpec.lora,  # type: ignore[assignment]
    embedding: options.Embedding = BenchSpec.embedding,  # type: ignore[assignment]
    guidance: options.Guidance = BenchSpec.guidance,
    seed: Seed = BenchSpec.seed,
    seeds: Seeds = BenchSpec.seeds,
    size: options.Size = BenchSpec.size,
    batch_size: options.DrawingBatchSize = BenchSpec.batch_size,
    reference_steps: ReferenceSteps = BenchSpec.reference_steps,
    data: Data = BenchSpec.data,
    features: Features = BenchSpec.features,
    csv: Csv = BenchSpec.csv,
    plot: Plot = BenchSpec.plot,
    plot_quality: PlotQuality = BenchSpec.plot_quality,
    plot_over: PlotOver = BenchSpec.plot_over,
    run: Run = BenchSpec.run,
    if_exists: options.IfExists = BenchSpec.if_exists,
    device: options.Device = BenchSpec.device,
    dtype: options.Dtype = BenchSpec.dtype,
    offload: options.Offload = BenchSpec.offload,
    compile: options.Compile = BenchSpec.compile,
    offline: options.Offline = BenchSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compare schedulers: UNet evaluations, time, and how far from the solution of their ODE they end."""
    given = locals() | {"prompt": tuple(prompt), "class_name": tuple(class_name)}
    given |= {"lora": tuple(lora), "embedding": tuple(embedding)}
    spec = BenchSpec(**{k: v for k, v in given.items() if k not in options.NO_SETTINGS})
    from sdcli.lab.plan import plan_bench  # deferred: 0.02 s that --help does not need

    decided = plan_bench(spec)
    for text in decided.notes:
        output.warning(text)
    from sdcli import bench as story  # deferred: imports torch

    width = max(NAME_WIDTH, *(len(cell.label) + 1 for cell in decided.cells))
    is_headed = is_told = False
    with output.progress() as bar:
        for event in story.run(spec, decided):
            if isinstance(event, story.Progress):
                bar.update(event.what, event.done, event.total)
            elif isinstance(event, story.Settings):
                _tell_settings(event)
            elif isinstance(event, story.Solved):
                _tell_reference(event)
            elif isinstance(event, story.Row):
                if not is_headed:
                    output.heading(f"{'scheduler':{width}}{HEAD}")
                is_headed = True
                if event.facts["frechet_distance"] is not None and not is_told:
                    is_told = True
                    _tell_frechet(event.facts)
                output.result(_line(event.facts, width), event.facts)
            else:
                skipped = {"skipped": True} if event.is_skipped else {}
                output.result(str(event.path), {"path": str(event.path), **skipped})


def _tell_settings(settings: Settings) -> None:
    facts = settings.facts
    output.note(f"run folder {settings.folder}: {settings.done} of {settings.total} rows are there already")
    output.record({"run": str(settings.folder), "done": settings.done, "rows": settings.total, **facts})


def _tell_reference(solved: Solved) -> None:
    facts = solved.facts
    output.note(
        f"reference: {facts['steps']} Heun steps in {facts['dtype']}, {facts['evaluations']} evaluations; "
        f"RMSE to half as many steps {facts['error']:.1e}"
    )
    output.record({"reference": facts})


def _tell_frechet(row: dict[str, Any]) -> None:
    """What the distances of all rows are worth: which network looked, and at how many pictures."""
    drawn, data, dimensions = row["pictures"], row["data_pictures"], row["feature_dimensions"]
    output.note(
        f"Frechet distance: {row['features']}, {dimensions} features; {drawn} pictures drawn, {data} of the data"
    )
    if min(drawn, data) < dimensions:
        output.warning(
            f"the Frechet distance is of fewer pictures ({min(drawn, data)}) than features ({dimensions}): "
            "compare it among these rows only, or raise --seeds"
        )


def _line(row: dict[str, Any], width: int) -> str:
    """A row for a person; what was not measured is a hyphen."""

    def cell(name: str, width: int, form: str, scale: float = 1.0) -> str:
        value = row[name]
        return f"{'-' if value is None else format(value * scale, form):>{width}}"

    figures = cell("evaluations", 12, "d", 1) + cell("seconds_per_step", 9, ".4f") + cell("seconds_per_image", 9, ".3f")
    figures += cell("latent_rmse", 10, ".5f") + cell("psnr_db", 9, ".1f") + cell("frechet_distance", 9, ".2f")
    figures += cell("memory_bytes", 7, ".0f", 1 / (1 << 20))
    note = f"  {row['status'] + ': ' if row['status'] != 'done' else ''}{row['note']}" if row["note"] else ""
    return output.escape(f"{row['scheduler']:{width}}{row['steps']:>6}{figures}{note}")
