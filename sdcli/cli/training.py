"""What the trainers' commands share: arguments -> a spec, and the reports of a run shown."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdcli import output
from sdcli.cli import options, signals
from sdcli.errors import Stopped

if TYPE_CHECKING:
    from sdcli.training.loop import Report


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments as its spec's fields: the names are the same, which a test holds."""
    kept = {name: value for name, value in given.items() if name not in options.NO_SETTINGS}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}


def fetch(*refs: str | None, offline: bool) -> None:
    """Bring models of the Hub into the cache while a signal still stops that: within a run it waits for a report."""
    from sdcli import hub, store  # deferred: 0.03 s that --help does not need

    for ref in refs:
        if ref is not None and hub.parse(ref) is not None and not Path(ref).exists():
            store.find(ref, offline=offline)


def show(reports: Iterator[Report]) -> None:
    """Show a run as it goes; a signal is thrown into it between two steps. While it compiles, it ends at once."""
    from sdcli.training.loop import Compiling, Finished, Paused, Planned, Preparing, Saved, StepDone, Validated

    if os.environ.get("RANK", "0") != "0":  # of the processes that accelerate launched, the first one speaks
        output.mute()
    stream = cast("Generator[Report, None, None]", reports)
    with output.progress() as bar, signals.kept() as stop:
        for report in stream:
            stop.patience = 0 if isinstance(report, Compiling) else None  # a launcher repeats what a terminal sent
            if isinstance(report, Compiling):
                bar.update("compiling, which takes minutes", 0, 1)
            elif isinstance(report, Preparing):
                bar.update(report.what, report.done, report.total)
            elif isinstance(report, StepDone):
                info = f"loss {report.terms['loss']:.4f}  {report.images_per_second:.1f} images/s"
                bar.update("training", report.step, report.steps, info)
            elif isinstance(report, Saved):
                output.note(f"saved {report.path}")
            elif isinstance(report, Validated):
                output.note(f"step {report.step}, on held-out pictures: {_facts(report.terms)}")
            elif isinstance(report, Planned):
                output.document(report.facts)
            elif isinstance(report, Paused):
                text = f"stopped at step {report.step} of {report.steps}; the same command goes on"
                output.result(text, {"step": report.step, "steps": report.steps, "export": None})
            elif isinstance(report, Finished):
                output.note(_facts(report.summary))
                output.result(str(report.export), {"export": str(report.export), **report.summary})
            if stop:
                stream.throw(Stopped(stop[0], "stopped; the same command goes on from here"))


def _facts(terms: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
