"""Commands that look inside: `sdcli schedulers` and `sdcli doctor`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from sdcli import output
from sdcli import schedulers as registry
from sdcli.cli import options


def schedulers(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Tell all about one; without it, list them.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """List the schedulers with the UNet evaluations they make for a number of steps."""
    if name is not None:
        output.document(dataclasses.asdict(registry.describe(registry.find(name))))
        return
    listing = registry.listing()
    for text in listing.warnings:
        output.warning(text)
    output.heading(f"{'':10}evaluations for\n{'':10}" + "".join(f"{n:>4}" for n in registry.STEP_COUNTS) + " steps")
    for scheduler in listing.schedulers:
        row = registry.describe(scheduler)
        calls = "".join(f"{count:>4}" for count in row.evaluations.values())
        also = f" (also {', '.join(row.aliases)})" if row.aliases else ""
        output.result(f"{row.name:10}{calls}  {row.summary}{also}", dataclasses.asdict(row))


def doctor(json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False) -> None:
    """Say what this installation can do: versions, devices, memory, caches, and whether the embedded model is whole."""
    from sdcli.doctor import report  # deferred: imports torch

    output.document(report())
