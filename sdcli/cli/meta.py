"""`sdcli meta`."""

from __future__ import annotations

import json as jsons
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sdcli import output
from sdcli.cli import options
from sdcli.errors import ExitCode
from sdcli.specs import MetaSpec

Pictures = Annotated[list[Path], typer.Argument(metavar="FILE...", help="PNG, JPEG or WebP pictures.")]
Strip = Annotated[
    bool, typer.Option("--strip", help="Rewrite the files without any metadata; their pixels stay as they are.")
]


def meta(
    inputs: Pictures,
    strip: Strip = MetaSpec.strip,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Tell what pictures say about their making: our own, A1111's, ComfyUI's, InvokeAI's and others'."""
    spec = MetaSpec(inputs=tuple(inputs), strip=strip)
    from sdcli import meta as story  # deferred: imports Pillow

    code = ExitCode.OK
    for event in story.run(spec):
        if isinstance(event, story.Failed):
            output.error(event.error)
            code = code or event.error.exit_code  # of the first
        else:
            output.result(str(event.path) if strip else _lines(event.facts), event.facts)
    return code


def _lines(record: Mapping[str, Any]) -> str:
    """The picture and the program, then a fact a line; the texts as they stand in the file are for --json."""
    said = record["source"] if record["source"] is not None else "says nothing about its making"
    lines = [output.escape(f"{record['path']}: {said}")]
    for name, value in record.items():
        if name not in ("path", "source", "raw"):
            shown = value if isinstance(value, str | int | float) else jsons.dumps(value, ensure_ascii=False)
            lines.append(f"  {output.escape(f'{name}: {shown}')}")
    return "\n".join(lines)
