"""`sdcli serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from sdcli import output
from sdcli.cli import options
from sdcli.specs import ServeSpec

Idle = Annotated[
    str,
    typer.Option(
        "--idle",
        metavar="TIME",
        help="End when nothing was to be drawn for so long: 90s, 10m, 2h, up to 720h; or never.",
    ),
]


def serve(
    idle: Idle = ServeSpec.idle,
    model: options.Model = ServeSpec.model,
    device: options.Device = ServeSpec.device,
    dtype: options.Dtype = ServeSpec.dtype,
    offline: options.Offline = ServeSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Keep a model loaded for sdcli generate, which then starts at once; prints where it listens, and what it drew."""
    spec = ServeSpec(idle=idle, model=model, device=device, dtype=dtype, offline=offline)
    from sdcli.warm import identity, place  # deferred, as all that opens sockets

    with place.owned() as path:
        who = identity.own()  # before torch is imported, which adds to the environment
        from sdcli import serve as story  # deferred: imports torch

        for event in story.run(spec, path, who):
            if isinstance(event, story.Ready):
                output.result(f"ready: {event.socket}", {"ready": str(event.socket), "model": event.model})
                continue
            seconds = round(event.seconds, 3)
            end = {0: "", None: ", the client has gone"}.get(event.exit_code, f", exit code {event.exit_code}")
            facts = {"images": event.images, "seconds": seconds, "exit_code": event.exit_code}
            output.result(f"images: {event.images} in {seconds} s{end}", facts)
    output.note(f"nothing to draw for {idle}: ended")
