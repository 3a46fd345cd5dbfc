"""`sdcli diffuse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcli import output
from sdcli.checks import parse_output
from sdcli.cli import options
from sdcli.lab.specs import DiffuseSpec

Picture = Annotated[Path, typer.Argument(metavar="FILE", help="The picture.")]
Timesteps = Annotated[
    str | None,
    typer.Option(
        "--t", metavar="T,T,...", help="Steps into the noise, 0 to 999 for most models. Default: five of them."
    ),
]
Space = Annotated[str, typer.Option("--space", help="Add the noise to pixels, to latents (shown decoded) or to both.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the noise, 0 to 2^64-1; it is the same at every step.")]
Size = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Scale and crop to this size in pixels first.")]
Out = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        parser=parse_output,
        metavar="PATH",
        help="A .png file for a strip, or a folder for a file a step.",
    ),
]
SaveLatents = Annotated[
    Path | None,
    typer.Option(
        "--save-latents",
        parser=parse_output,
        metavar="DIR",
        help="Write the noised latents of each step as a latent file, too.",
    ),
]
IfExists = Annotated[
    str, typer.Option("--if-exists", help="For a file that is there: number (strip-2.png), overwrite or error.")
]


def diffuse(
    picture: Picture,
    t: Timesteps = DiffuseSpec.t,
    space: Space = DiffuseSpec.space,
    seed: Seed = DiffuseSpec.seed,
    size: Size = DiffuseSpec.size,
    model: options.Model = DiffuseSpec.model,
    out: Out = DiffuseSpec.output,
    save_latents: SaveLatents = DiffuseSpec.save_latents,
    if_exists: IfExists = DiffuseSpec.if_exists,
    device: options.Device = DiffuseSpec.device,
    dtype: options.Dtype = DiffuseSpec.dtype,
    offline: options.Offline = DiffuseSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show a picture at chosen steps into the noise, q(x_t | x_0) by the model's noise schedule; prints the paths."""
    given = locals()
    given["input"], given["output"] = given.pop("picture"), given.pop("out")
    spec = DiffuseSpec(**{k: v for k, v in given.items() if k not in options.NO_SETTINGS})
    from sdcli import diffuse as story  # deferred: imports torch

    for record in story.run(spec):
        output.result(str(record.path), record.facts)
