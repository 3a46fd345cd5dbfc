"""Commands that look inside: `sdcli schedulers` and `sdcli doctor`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from sdcli import output
from sdcli.checks import parse_output
from sdcli.cli import options
from sdcli.errors import UsageError
from sdcli.lab.specs import FigureSpec

# Options of `schedulers --plot` alone.
Plot = Annotated[
    str | None,
    typer.Option(
        "--plot",
        metavar="WHAT",
        help="Draw a figure: betas, alpha-bar or snr of the model, or the sigmas of NAME, or of all schedulers.",
    ),
]
FigureOut = Annotated[
    Path,
    typer.Option("--output", "-o", parser=parse_output, metavar="PATH", help="With --plot: a .png file, or a folder."),
]
FigureSteps = Annotated[
    int | None,
    typer.Option("--steps", "-s", help="With --plot sigmas: steps, 1 to 1000. Default: the model's own, else 25."),
]
FigureIfExists = Annotated[
    str, typer.Option("--if-exists", help="With --plot, for a file that is there: number, overwrite or error.")
]


def schedulers(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Tell all about one; without it, list them.")
    ] = None,
    sigmas: options.Sigmas = FigureSpec.sigmas,
    order: options.Order = FigureSpec.order,
    timestep_spacing: options.TimestepSpacing = FigureSpec.timestep_spacing,
    plot: Plot = None,
    out: FigureOut = FigureSpec.output,
    steps: FigureSteps = FigureSpec.steps,
    model: options.Model = FigureSpec.model,
    if_exists: FigureIfExists = FigureSpec.if_exists,
    offline: options.Offline = FigureSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """List the schedulers with the UNet evaluations they make for a number of steps, or draw a figure of them."""
    chosen = {"sigmas": sigmas, "order": order, "timestep_spacing": timestep_spacing}
    if name is None and any(value is not None for value in chosen.values()):
        raise UsageError("--sigmas, --order and --timestep-spacing are of one scheduler", "say which")
    if plot is not None:
        _draw(
            FigureSpec(
                plot=plot,
                name=name,
                sigmas=sigmas,
                order=order,
                timestep_spacing=timestep_spacing,
                steps=steps,
                model=model,
                output=out,
                if_exists=if_exists,
                offline=offline,
            )
        )
        return
    if out != FigureSpec.output or steps is not None or if_exists != FigureSpec.if_exists:
        raise UsageError("--output, --steps and --if-exists are of a figure", "say which with --plot")
    from sdcli import schedulers as registry  # deferred, here and below: 8 ms that --help does not need

    if name is not None:
        one = registry.choose(registry.find(name), sigmas=sigmas, order=order, timestep_spacing=timestep_spacing)
        output.document(dataclasses.asdict(registry.describe(one)))
        return
    _list()


def _list() -> None:
    from sdcli import schedulers as registry

    listing = registry.listing()
    for text in listing.warnings:
        output.warning(text)
    output.heading(f"{'':10}evaluations for\n{'':10}" + "".join(f"{n:>4}" for n in registry.STEP_COUNTS) + " steps")
    for scheduler in listing.schedulers:
        row = registry.describe(scheduler)
        calls = "".join(f"{count if count is not None else '-':>4}" for count in row.evaluations.values())
        also = f" (also {', '.join(row.aliases)})" if row.aliases else ""
        output.result(f"{row.name:10}{calls}  {row.summary}{also}", dataclasses.asdict(row))


def _draw(spec: FigureSpec) -> None:
    from sdcli import figures  # deferred: imports torch

    record = figures.run(spec)
    output.result(str(record.path), record.facts)


def doctor(json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False) -> None:
    """Say what this installation can do: versions, devices, memory, caches, and whether the embedded model is whole."""
    from sdcli.doctor import report  # deferred: imports torch

    output.document(report())
