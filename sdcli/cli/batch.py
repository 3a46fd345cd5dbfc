"""`sdcli batch`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli import output
from sdcli.cli import options, signals
from sdcli.cli.generate import generate
from sdcli.specs import BatchSpec, GenerateSpec

if TYPE_CHECKING:
    from sdcli.batch import Failed, Summary

# Options of this command alone; the others are generate's, as defaults of the jobs.
Jobs = Annotated[
    Path,
    typer.Argument(
        metavar="FILE|-",
        help="Jobs, one a line: .jsonl, .csv with a head, .txt with a prompt a line; - reads JSON lines from stdin.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the pictures and ledger.jsonl.")]
IfExists = Annotated[
    str, typer.Option("--if-exists", help="For a file that is no picture of its job: error, skip or overwrite.")
]
KeepGoing = Annotated[bool, typer.Option("--keep-going", help="Make the good jobs of a file that has bad lines.")]
MaxFailures = Annotated[
    int | None, typer.Option("--max-failures", metavar="N", help="Stop when N jobs have failed, 1 or more.")
]
Shard = Annotated[
    str, typer.Option("--shard", metavar="I/N", help="Make the I-th of N shares of the images, I from 1.")
]
Gallery = Annotated[
    bool, typer.Option("--gallery", help="Write gallery.html, too: one page of all pictures in the folder, to look at.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Look at every line, load no weights, draw nothing.")]

OWN: dict[str, tuple[Any, Any]] = {
    "jobs": (Jobs, inspect.Parameter.empty),
    "out": (Out, GenerateSpec.output),
    "if_exists": (IfExists, BatchSpec.IF_EXISTS),
    "keep_going": (KeepGoing, BatchSpec.keep_going),
    "max_failures": (MaxFailures, BatchSpec.max_failures),
    "shard": (Shard, BatchSpec.shard),
    "gallery": (Gallery, BatchSpec.gallery),
    "dry_run": (DryRun, BatchSpec.dry_run),
}
# For the jobs to say, or of generate alone.
NOT_TAKEN = ("prompt", "class_name", "grid", "save_steps", "save_latents", "preview", "no_serve")


def batch(**given: Any) -> None:
    """Draw the pictures of a job file; the same command again makes what is missing."""
    given["output"] = given.pop("out")
    mine = {name: given.pop(name) for name in ("jobs", "keep_going", "max_failures", "shard", "gallery", "dry_run")}
    if given["init_image"] is None:  # then they are for the pictures that jobs name
        mine |= {name: given.pop(name) for name in ("strength", "mask")}
    kept = {name: value for name, value in given.items() if name not in options.NO_SETTINGS}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    spec = BatchSpec(defaults=GenerateSpec(**values), **mine)
    from sdcli.jobs.plan import plan_batch  # deferred: 0.02 s that --help does not need

    checked = plan_batch(spec)
    if spec.dry_run:
        output.document({"images": checked.images, "lines": checked.lines, "bad": checked.bad})
        return
    from sdcli import batch as story  # deferred: imports torch

    with output.progress() as bar, signals.kept(1) as stop:
        for event in story.run(spec, checked, stop):
            if isinstance(event, story.Progress):
                bar.update(event.what, event.done, event.total)
            elif isinstance(event, story.Failed):
                _tell_failure(event)
            elif isinstance(event, story.Summary):
                _tell_summary(event)
            elif isinstance(event, story.Gallery):
                path = str(event.path)
                facts = {"path": path, "gallery": event.pictures, "left_out": event.left_out}
                output.result(output.escape(path), facts)
            else:
                output.result(output.escape(event.facts["path"]), event.facts)


def _signature() -> inspect.Signature:
    """Generate's options but for what to draw, and those of this command: what a job may say can be said for all."""
    taken = inspect.signature(generate, eval_str=True).parameters
    kind = inspect.Parameter.KEYWORD_ONLY
    own = {name: inspect.Parameter(name, kind, default=d, annotation=a) for name, (a, d) in OWN.items()}
    theirs = {name: one.replace(kind=kind) for name, one in taken.items() if name not in NOT_TAKEN}
    return inspect.Signature([*own.values(), *(one for name, one in theirs.items() if name not in own)])


batch.__signature__ = _signature()  # type: ignore[attr-defined]  # where Typer looks


def _tell_failure(failed: Failed) -> None:
    job = failed.job.names() if failed.job is not None else {}
    error = failed.error
    if failed.job is not None:
        output.warning(f"line {failed.line}: {error}", cause=f"{type(error)}")
    else:
        output.warning(str(error), cause="line")
    facts = {"error": error.message, "hint": error.hint, "exit_code": int(error.exit_code)}
    output.record({"line": failed.line, **job, **facts})


def _tell_summary(summary: Summary) -> None:
    words = {"made": summary.made, "adopted": summary.adopted, "there before": summary.done, "failed": summary.failed}
    output.note("images: " + ", ".join(f"{count} {word}" for word, count in words.items() if count or word == "made"))
