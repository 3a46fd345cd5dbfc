"""`sdcli tokens`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdcli import output
from sdcli.cli import options
from sdcli.cli.stdin import prompt_from_stdin
from sdcli.lab.specs import TokensSpec

if TYPE_CHECKING:
    from sdcli.tokens import Row, Walk

PIECE_WIDTHS = (15, 48)  # of the table's column, in characters; a longer piece pushes the rest of its line aside

Prompt = Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.", show_default=False)]
Seed = Annotated[
    int, typer.Option("--seed", help="0 to 2^64-1; the {a|b} of the prompt are drawn as for the image of this seed.")
]
Embeddings = Annotated[
    list[Path],
    typer.Option(
        "--embeddings",
        metavar="FILE",
        help="Write token and position embeddings, their sum, mask and output: .safetensors or .png. Repeatable.",
    ),
]
Mask = Annotated[
    list[Path], typer.Option("--mask", metavar="FILE", help="Write the causal mask: .safetensors or .png. Repeatable.")
]


def tokens(
    prompt: Prompt,
    model: options.Model = TokensSpec.model,
    embedding: options.Embedding = TokensSpec.embedding,  # type: ignore[assignment]
    replace: options.Replace = TokensSpec.replace,  # type: ignore[assignment]
    mix: options.Mix = TokensSpec.mix,  # type: ignore[assignment]
    seed: Seed = TokensSpec.seed,
    clip_skip: options.ClipSkip = TokensSpec.clip_skip,
    embeddings: Embeddings = TokensSpec.embeddings,  # type: ignore[assignment]
    mask: Mask = TokensSpec.mask,  # type: ignore[assignment]
    if_exists: options.IfExists = TokensSpec.if_exists,
    offline: options.Offline = TokensSpec.offline,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show what the text encoder makes of a prompt: ids, pieces, weights, chunks, mask and vectors."""
    spec = TokensSpec(
        prompt=prompt_from_stdin() if prompt == "-" else prompt,
        model=model,
        embedding=tuple(embedding),
        replace=tuple(replace),
        mix=tuple(mix),
        seed=seed,
        clip_skip=clip_skip,
        embeddings=tuple(embeddings),
        mask=tuple(mask),
        if_exists=if_exists,
        offline=offline,
    )
    from sdcli.tokens import walk  # deferred: 0.02 s that --help does not need

    found = walk(spec)
    output.description("\n".join(_lines(found)), found.facts)


def _lines(found: Walk) -> Iterator[str]:
    """What wildcards drew; the walk as a table, a line a piece; each chunk's ids and mask, the tensors, the files."""
    if "prompt_template" in found.facts:
        yield f"prompt: {output.escape(found.facts['prompt'])}"
    shown = [row for row in found.rows if row.state != "padding"]
    width = min(max(PIECE_WIDTHS[0], *(len(_piece(row)) for row in shown)), PIECE_WIDTHS[1])
    yield f"{'chunk':>5} {'pos':>4} {'id':>6}  {'piece':{width}} {'':5} {'weight':>6} mask"
    yield from (_line(row, width) for row in shown)
    for number, chunk in enumerate(found.facts["chunks"], start=1):
        which = "" if len(found.facts["chunks"]) == 1 else f" of chunk {number}"
        yield f"ids{which}: {_shortened(chunk['ids'], sum(chunk['attention_mask']))}"
        ones = sum(chunk["attention_mask"])
        yield f"attention mask{which}: {ones} ones, {len(chunk['ids']) - ones} zeros"
    counts = found.facts["tokens"]
    yield f"tokens: {counts['kept']} kept, {counts['cut']} cut, chunks: {counts['chunks']}"
    yield from _table(found.facts.get("tensors", ()))
    yield from (output.escape(str(path)) for path in found.files)


def _line(row: Row, width: int) -> str:
    chunk, position = ("" if value is None else value for value in (row.chunk, row.position))
    start = f"{chunk:>5} {position:>4} {row.id:>6}  {_piece(row):{width}}"
    return f"{start} {row.state:5} {row.weight:>6.4g} {row.attention_mask:>4}"


def _piece(row: Row) -> str:
    return output.escape(row.piece if row.fed is None else f"{row.piece} -> {row.fed}")


def _shortened(ids: Sequence[int], attended: int) -> str:
    """Ids without the padding at their end, and how much of it there is."""
    shown = " ".join(map(str, ids[:attended]))
    rest = len(ids) - attended
    return f"{shown} and {rest} more {ids[-1]}" if rest else shown


def _table(tensors: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Shape and statistics of each tensor."""
    if not tensors:
        return
    yield f"{'tensor':20} {'shape':>12} {'mean':>11} {'std':>11} {'min':>11} {'max':>11}  first values"
    for one in tensors:
        numbers = " ".join(f"{one[key]:>11.4g}" for key in ("mean", "std", "min", "max"))
        first = " ".join(f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4e}" for value in one["first"])
        yield f"{one['name']:20} {'x'.join(map(str, one['shape'])):>12} {numbers}  {first} ..."
