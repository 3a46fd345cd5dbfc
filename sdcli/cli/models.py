"""`sdcli models`."""

from __future__ import annotations

from typing import Annotated

import typer

from sdcli import output, store
from sdcli.facts import facts_of
from sdcli.cli import options

app = typer.Typer(help="What models there are, and what they are.", rich_markup_mode=None)


@app.command("list")
def list_models(json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False) -> None:
    """List the models that work without a network: the embedded one and the Hub cache."""
    for row in store.listed():
        output.result(f"{row['model']}  {row['bytes'] / 1e6:.1f} MB  {row['folder']}", row)


@app.command("show")
def show(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="builtin, a model folder, or a Hub id owner/name[@revision].")
    ],
    with_hash: Annotated[
        bool, typer.Option("--hash", help="Add the SHA-256 over the weights; reads all of them.")
    ] = False,
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Say what a model is, from its configs and weight headers alone."""
    model = store.find(ref, offline=offline)
    facts = facts_of(model)
    if with_hash:
        facts["model_hash"] = store.model_hash(model)
    output.document(facts)
