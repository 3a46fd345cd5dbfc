"""STORY: what a prompt becomes: pieces and ids in chunks, and on request the vectors, the mask and the output.

Torch is imported for vectors alone, and of a model's weights only the text encoder's are read, for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdcli import layout, store
from sdcli.errors import UsageError
from sdcli.files import place
from sdcli.lab.specs import TokensSpec
from sdcli.pipeline import known_words, vocabulary, wildcards
from sdcli.pipeline import prompt as syntax
from sdcli.pipeline.prompt import Chunks, Piece
from sdcli.pipeline.vocabulary import Vocabulary
from sdcli.plan import Plan
from sdcli.plan.naming import check_targets
from sdcli.plan.parts import check_clip_skip, text_widths
from sdcli.plan.words import (
    EmbeddingFile,
    check_no_words,
    check_text,
    embedding_file,
    warn_of_networks,
)
from sdcli.specs import WordSwap, word_swaps

if TYPE_CHECKING:
    from torch import Tensor

    from sdcli.pipeline.adapters import Embedding

FIRST_VALUES = 4  # of each tensor that are told


@dataclass(frozen=True)
class Row:
    """One position of a chunk, or one piece that is cut."""

    id: int  # the row of the token table that is fed
    piece: str  # of the prompt, as the vocabulary writes it; `cat</w>` ends a word
    state: str  # mark, kept, padding or cut
    weight: float
    chunk: int | None  # from 1; None where cut, as for the position
    position: int | None  # from 0
    attention_mask: int
    fed: str | None = None  # what is fed in place of a swapped word


@dataclass(frozen=True)
class Walk:
    """What is told of a prompt."""

    rows: tuple[Row, ...]
    facts: Mapping[str, Any]
    files: tuple[Path, ...]


def walk(spec: TokensSpec) -> Walk:
    """Follow a prompt through tokenizer and text encoder; write the tensors that are asked for.

    Raises UsageError for a model that reads no prompts, a weight out of range or words that cannot be swapped,
    InputError for a malformed model or embedding, OutputError when a file cannot be written.
    """
    for text in (spec.prompt, *spec.replace, *spec.mix):
        check_text(text)
    template = wildcards.template(spec.prompt)
    syntax.check(template.choices)
    drawn = {"prompt_template": spec.prompt, "seed": spec.seed} if template.has_wildcards else {}
    spec = replace(spec, prompt=template.drawn(spec.seed, "prompt"))
    files = tuple(embedding_file(text) for text in spec.embedding)
    swaps = word_swaps(spec.replace, spec.mix)
    targets = (*spec.embeddings, *spec.mask)
    check_targets(targets, spec.if_exists)
    model = store.resolve(spec.model, offline=spec.offline, needs=("text_encoder",))
    if layout.classes(model.folder) is not None:
        check_no_words(files, swaps)
        raise UsageError("--model: this one reads no prompts", "use a model that does; see sdcli models show")
    check_clip_skip(model.folder, spec.clip_skip)
    warn_of_networks(syntax.networks(spec.prompt))
    words, embeddings = _words(model.folder, files, swaps)
    chunks = vocabulary.read(words, spec.prompt)
    vocabulary.warn_of_cut(chunks, "prompt")
    vocabulary.warn_of_unused(words.swaps, chunks)
    rows = tuple(_rows(words, chunks))
    facts = _facts(spec, model, words, chunks, rows) | drawn
    tensors = _tensors(spec, model.folder, words, embeddings)
    written = tuple(_write(spec, path, tensors, chunks, rows) for path in targets)
    if tensors:
        facts |= {"tensors": [_statistics(name, one) for name, one in tensors.items()]}
        facts |= {"files": [str(path) for path in written]}
    return Walk(rows, facts, written)


def counted(plan: Plan) -> dict[str, Any]:
    """How many tokens of the prompt `generate` keeps and cuts, in how many chunks, with its warnings; without torch.

    Where a prompt has wildcards, a list: of each image. Nothing for a model that reads no prompts, or where vectors
    would have to be read from a file.
    """
    warn_of_networks(syntax.networks(*(text for one in plan.prompts for text in (one.prompt, one.negative))))
    if plan.embeddings or layout.classes(plan.model.folder) is not None:
        return {}
    words, _ = _words(plan.model.folder, (), plan.swaps)
    choices = vocabulary.read(words, plan.prompts[0].prompt_choices)
    found: dict[str, dict[str, int]] = {}
    unknown: dict[str, None] = {}
    for prompt in dict.fromkeys(one.prompt for one in plan.prompts):
        chunks = vocabulary.read(words, prompt)
        vocabulary.warn_of_cut(chunks, "prompt")
        vocabulary.warn_of_unused(words.swaps, chunks, choices)
        found[prompt] = chunks.counts()
        unknown |= dict.fromkeys(known_words.unknown(plan.known_words, prompt))
    known_words.warn_of_unknown(tuple(unknown), "prompt")
    counts = [found[one.prompt] for one in plan.prompts]
    facts: dict[str, Any] = {"tokens": counts[0] if plan.prompts[0].prompt_template is None else counts}
    facts |= {"unknown_words": list(unknown)} if unknown else {}
    return facts | _counted_negative(replace(words, swaps=()), plan)


def _counted_negative(words: Vocabulary, plan: Plan) -> dict[str, Any]:
    """The same of the negative prompt, where some of it is cut."""
    found: dict[str, dict[str, int]] = {}
    for negative in dict.fromkeys(one.negative for one in plan.prompts):
        if plan.guidance > 1:
            chunks = vocabulary.read(words, negative)
            vocabulary.warn_of_cut(chunks, "negative prompt")
            found[negative] = chunks.counts()
        else:
            vocabulary.warn_of_unheard(negative)
    if not any(one["cut"] for one in found.values()):
        return {}
    counts = [found[one.negative] for one in plan.prompts]
    return {"negative_tokens": counts[0] if plan.prompts[0].negative_template is None else counts}


def _words(
    folder: Path, files: Sequence[EmbeddingFile], swaps: Sequence[WordSwap]
) -> tuple[Vocabulary, list[Embedding]]:
    """The vocabulary of a model with its learned tokens and swapped words, and the vectors of the former."""
    words, embeddings = vocabulary.load_vocabulary(folder), []
    if files:
        from sdcli.pipeline.adapters import read_embedding  # deferred: imports torch, as all below in this file

        width, second = text_widths(folder)
        embeddings = [read_embedding(one.path, width=width, second=second, token=one.token) for one in files]
        words = vocabulary.with_tokens(words, [(one.token, len(one.vectors)) for one in embeddings])
    for swap in swaps:
        words = vocabulary.with_swap(words, swap.option, swap.word, swap.terms)
    return words, embeddings


def _rows(words: Vocabulary, chunks: Chunks) -> Iterator[Row]:
    """Every position of every chunk, then what is cut."""
    for number, chunk in enumerate(chunks.chunks, start=1):
        pieces = [(piece, index) for piece in chunk for index in range(len(piece.rows))]
        ids = vocabulary.chunk_rows(words, chunk)
        for position, one in enumerate(ids):
            if 1 <= position <= len(pieces):
                yield replace(_row(words, *pieces[position - 1]), chunk=number, position=position, attention_mask=1)
                continue
            is_mark = position in (0, len(pieces) + 1)
            state, name = "mark" if is_mark else "padding", vocabulary.row_name(words, one)
            yield Row(one, name, state, 1.0, number, position, int(is_mark))
    for piece in chunks.rest:
        yield from (replace(_row(words, piece, index), state="cut") for index in range(len(piece.rows)))


def _row(words: Vocabulary, piece: Piece, index: int) -> Row:
    own = words.learned.get(piece.id, (piece.id,))
    row = piece.rows[index]
    if piece.swap:
        name, fed = vocabulary.row_name(words, own[min(index, len(own) - 1)]), vocabulary.row_name(words, row)
    else:
        name, fed = vocabulary.row_name(words, row), None
    return Row(row, name, "kept", piece.weight, None, None, 0, fed)


def _facts(
    spec: TokensSpec, model: store.Model, words: Vocabulary, chunks: Chunks, rows: Sequence[Row]
) -> dict[str, Any]:
    facts: dict[str, Any] = {"prompt": spec.prompt, "model": model.ref, "encoders": list(layout.encoders(model.folder))}
    facts["tokens"] = chunks.counts()
    facts |= {key: list(given) for key, given in (("replace", spec.replace), ("mix", spec.mix)) if given}
    facts |= {"clip_skip": spec.clip_skip} if spec.clip_skip else {}
    facts |= {"length": words.length, "vocabulary": words.rows}
    facts["chunks"] = [
        {
            "ids": [row.id for row in rows if row.chunk == number],
            "attention_mask": [row.attention_mask for row in rows if row.chunk == number],
            "weights": [row.weight for row in rows if row.chunk == number],
        }
        for number in range(1, len(chunks.chunks) + 1)
    ]
    facts["rows"] = [{key: value for key, value in vars(row).items() if value is not None} for row in rows]
    return facts


def _tensors(spec: TokensSpec, folder: Path, words: Vocabulary, embeddings: Sequence[Embedding]) -> dict[str, Tensor]:
    """What is asked for, by name: the mask alone needs no weights."""
    if not spec.embeddings and not spec.mask:
        return {}
    import torch

    from sdcli.pipeline import text
    from sdcli.pipeline.bundle import load_text

    mask = text.causal_mask(words.length)
    if not spec.embeddings:
        return {"causal_mask": mask}
    encoder = load_text(folder, device=torch.device("cpu"), dtype=torch.float32)
    if embeddings:
        encoder = text.knowing(encoder, embeddings)
    encoder = text.each(encoder, lambda one: text.with_swaps(one, words.swaps))
    encoder = text.without_last_layers(encoder, spec.clip_skip)
    with torch.no_grad():
        return text.walk_through(encoder, spec.prompt) | {"causal_mask": mask}


def _statistics(name: str, tensor: Tensor) -> dict[str, Any]:
    values = tensor.double()
    return {
        "name": name,
        "shape": list(tensor.shape),
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "min": values.min().item(),
        "max": values.max().item(),
        "first": values.flatten()[:FIRST_VALUES].tolist(),
    }


def _write(spec: TokensSpec, path: Path, tensors: Mapping[str, Tensor], chunks: Chunks, rows: Sequence[Row]) -> Path:
    chosen = dict(tensors) if path in spec.embeddings else {"causal_mask": tensors["causal_mask"]}
    if spec.if_exists == "skip" and path.exists():
        return path
    data = _picture(chosen, rows) if path.suffix.lower() == ".png" else _safetensors(chosen, spec, rows)
    return place(data, path, spec.if_exists)


def _safetensors(tensors: Mapping[str, Tensor], spec: TokensSpec, rows: Sequence[Row]) -> bytes:
    """The tensors, with ids, attention mask and weights (k, 77) where there are chunks."""
    import torch
    from safetensors.torch import save

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    placed = [row for row in rows if row.chunk is not None]
    if len(whole) > 1:
        length = len(tensors["causal_mask"])
        whole |= {
            "ids": torch.tensor([row.id for row in placed]).reshape(-1, length),
            "attention_mask": torch.tensor([row.attention_mask for row in placed]).reshape(-1, length),
            "weights": torch.tensor([row.weight for row in placed]).reshape(-1, length),
        }
    return layout.with_sorted_header(save(whole, metadata={"prompt": spec.prompt.replace("\0", "")}))


def _picture(tensors: Mapping[str, Tensor], rows: Sequence[Row]) -> bytes:
    """The tensors as heat maps: a row of them for each chunk, and the mask alone where it is alone."""
    from sdcli.pipeline.heatmaps import Panel, picture
    from sdcli.pipeline.metadata import png_bytes

    mask = Panel("causal mask", tensors["causal_mask"])
    length = len(mask.values)
    if len(tensors) == 1:
        return png_bytes(picture([[mask]], [[str(position) for position in range(length)]]), None)
    groups, labels = [], []
    context = tensors["context"].unflatten(1, (-1, length))[0]  # (k, 77, D)
    for index, out in enumerate(context):
        panels = []
        for ending, whose in (("", ""), ("_2", " of the second encoder")):
            if f"token_embedding{ending}" in tensors:
                panels.append(Panel(f"token embedding{whose}", tensors[f"token_embedding{ending}"][index]))
                panels.append(Panel(f"position embedding{whose}", tensors[f"position_embedding{ending}"]))
                panels.append(Panel(f"their sum, the input{whose}", tensors[f"input_embedding{ending}"][index]))
        groups.append([*panels, Panel("output: context", out), mask])
        here = [row for row in rows if row.chunk == index + 1]
        labels.append([f"{row.position:>2} {row.fed or row.piece}" for row in here])
    return png_bytes(picture(groups, labels), None)
