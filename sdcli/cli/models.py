"""`sdcli models`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdcli import output
from sdcli.cli import options
from sdcli.errors import InputError, NumericalError, UsageError
from sdcli.model_specs import ConvertSpec, PullSpec

app = typer.Typer(help="What models there are, and what they are.", rich_markup_mode=None)

Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="builtin, a model folder, a single file, or a Hub id owner/name[@revision].",
        autocompletion=options.model_refs,
    ),
]
HubRef = Annotated[
    str,
    typer.Argument(
        metavar="HUB_ID",
        help="owner/name, or owner/name/FILE of a single file; @REVISION (branch, tag, commit) may follow.",
        autocompletion=options.model_refs,
    ),
]
Copy = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Of weights published in both, float32 or float16; auto: what is in the cache, else float32.",
    ),
]
Out = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="PATH", help="What to write: a new folder, or a new .safetensors file."),
]
To = Annotated[
    str | None, typer.Option("--to", metavar="FORM", help="diffusers or single-file. Default: by the name of PATH.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16; auto leaves every tensor as it is.")]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged weights of the UNet that some files hold, too.")]
Vae = Annotated[
    str | None,
    typer.Option(
        "--vae",
        metavar="REF",
        help="Take the VAE of this model, folder or file instead.",
        autocompletion=options.model_refs,
    ),
]
TextEncoder = Annotated[
    str | None,
    typer.Option(
        "--text-encoder",
        metavar="REF",
        help="Take the text encoder of this model instead.",
        autocompletion=options.model_refs,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Remove it; without this it is only told what would go.")]


@app.command("list")
def list_models(json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False) -> None:
    """List the models that work without a network: the embedded one, the Hub cache, copies of pickled checkpoints."""
    from sdcli import listing  # deferred, as below: 0.03 s that --help does not need

    for row in listing.listed():
        output.result(output.escape(f"{row['model']}  {row['bytes'] / 1e6:.1f} MB  {row['folder']}"), row)
    for hub_id, size in listing.broken_off():
        what = f"{hub_id}: a download of {size / 1e6:.1f} MB so far is not whole"
        output.note(f"{what}; sdcli models pull goes on with it, sdcli models remove takes it away")


@app.command("show")
def show(
    ref: Ref,
    with_hash: Annotated[
        bool, typer.Option("--hash", help="Add the SHA-256 over the weights; reads all of them.")
    ] = False,
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Say what a model, a LoRA or a learned word is, from configs and headers alone."""
    from sdcli import facts, store

    pickled = facts.facts_of_pickle(Path(ref))  # before a copy is made of what is taken for a model
    if pickled is not None:
        output.document(pickled)
        return
    try:
        model = store.find(ref, offline=offline)
        told = facts.facts_of(model)
    except InputError:
        adapter = facts.facts_of_adapter(Path(ref))
        if adapter is None:
            raise
        output.document(adapter)
        return
    if with_hash:
        told["model_hash"] = store.model_hash(model)
    output.document(told)


@app.command("convert")
def convert(
    ref: Ref,
    out: Out,
    to: To = ConvertSpec.to,
    dtype: Dtype = ConvertSpec.dtype,
    ema: Ema = ConvertSpec.ema,
    prediction: options.Prediction = ConvertSpec.prediction,
    vae: Vae = ConvertSpec.vae,
    text_encoder: TextEncoder = ConvertSpec.text_encoder,
    offline: options.Offline = ConvertSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a model as a folder in the diffusers layout, or as a single file for other programs; prints its path."""
    given = locals()
    given["model"], given["output"] = given.pop("ref"), given.pop("out")
    spec = ConvertSpec(**{k: v for k, v in given.items() if k not in options.NO_SETTINGS})
    from sdcli import convert as story  # deferred: imports torch

    record = story.run(spec)
    output.result(record["path"], record)


@app.command("pull")
def pull(
    ref: HubRef,
    dtype: Copy = PullSpec.dtype,
    offline: options.Offline = PullSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fetch a model from the Hub into huggingface_hub's cache, or what is new of it; prints where it lies."""
    spec = PullSpec(model=ref, dtype=dtype, offline=offline)
    from sdcli import pull as story

    with output.progress() as bar:
        for event in story.run(spec):
            if isinstance(event, story.Arrived):
                bar.update(*event.shown(ref))
                continue
            output.result(output.escape(str(event.path)), event.facts)
            came = f"{event.received / 1e6:,.1f} MB fetched" if event.received else "nothing to fetch, all was there"
            output.note(f"{ref}: {came}; it is commit {event.commit}")


@app.command("verify")
def verify(
    ref: Ref,
    offline: options.Offline = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Look at every tensor of a model: all there, in the shapes its configs say, finite; and hash its files."""
    from sdcli import store

    model = store.find(ref, offline=offline)
    from sdcli import verify as story  # deferred: imports torch

    faults: list[str] = []
    not_finite: list[str] = []
    for report in story.run(model):
        facts = ", ".join(f"{key} {value}" for key, value in report.facts.items())
        output.result(output.escape(f"{report.what}: {report.words} ({facts})"), report.record())
        faults += report.faults
        not_finite += report.not_finite
    if found := faults + not_finite:
        kind = InputError if faults else NumericalError
        again = "sdcli models remove and pull get it again" if model.revision is not None else "get the model again"
        raise kind(f"{ref}: {len(found)} faults ({found[0]}, for one)", again)


@app.command("remove")
def remove(
    ref: Ref,
    yes: Yes = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Remove a downloaded model, or the copy of a pickled checkpoint, from the cache; never a file of your own."""
    from sdcli import removal

    planned = removal.plan_removal(ref)
    paths = [str(path) for path in planned.paths]
    if not yes:
        what = f"{ref}: {planned.size / 1e6:.1f} MB in {len(paths)} places would go ({paths[0]}, for one)"
        raise UsageError(what, "add --yes to remove it")
    removal.remove(planned)
    output.result("\n".join(map(output.escape, paths)), {"model": ref, "removed": paths, "bytes": planned.size})
