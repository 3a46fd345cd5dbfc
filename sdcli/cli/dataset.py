"""`sdcli dataset`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdcli import output
from sdcli.checks import at_least
from sdcli.cli import options
from sdcli.errors import InputError

if TYPE_CHECKING:
    from sdcli.training.faults import Checked

app = typer.Typer(help="Look at training pictures before they are trained on.", rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Keep `check` a command of its own while it is the only one."""


@app.command("check")
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of pictures, laid out as for training.")],
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Mend captions that are not UTF-8 and wrong suffixes, but nothing inside a tar."),
    ] = False,
    workers: options.Workers = 2,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Name every fault of a dataset: unreadable, tiny, doubled or misnamed pictures, captions missing or unreadable."""
    at_least("workers", workers, 1)
    from sdcli.training import faults  # deferred: imports torch
    from sdcli.training.loop import Preparing

    left = mendable = 0
    with output.progress() as bar:
        for event in faults.find(folder, workers=workers):
            if isinstance(event, Preparing):
                bar.update(event.what, event.done, event.total)
            elif isinstance(event, faults.Checked):
                output.note(_summary(event))
            else:
                is_mended = fix and faults.mend(event)
                left += not is_mended
                mendable += event.is_mendable and not fix
                end = "mended" if is_mended else event.hint
                text = output.escape(f"{event.path}: {event.problem}; {end}")
                output.result(text, {**asdict(event), "is_mended": is_mended})
    if left:
        hint = "mend what is named" + (f"; --fix mends {mendable} of them" if mendable else "")
        raise InputError(f"{folder}: {left} fault{'s' if left > 1 else ''}", hint)


def _summary(checked: Checked) -> str:
    classes = f", {checked.classes} classes" if checked.classes else ""
    return f"{checked.layout}: {checked.pictures} pictures, {checked.captions} with captions{classes}"
