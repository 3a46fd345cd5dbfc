"""Prompts -> tokens -> context, with learned tokens among them; what happens on the way, step by step.

Captions are plain text and end where the text encoder's length does (`tokenize`, `encode`): a model learns what is
written. Prompts have syntax, and as many chunks as they need (`read`, `encode_chunks`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from sdcli.errors import InputError, NumericalError
from sdcli.pipeline import vocabulary
from sdcli.pipeline.adapters import Embedding
from sdcli.pipeline.bundle import Encoders, TextEncoder, TextPair
from sdcli.pipeline.context import Context
from sdcli.pipeline.device import computing_device
from sdcli.pipeline.prompt import Chunks, Piece
from sdcli.pipeline.vocabulary import Swap

if TYPE_CHECKING:
    from transformers import CLIPTextModel


MOST_RESTORED = 2.0


@dataclass(frozen=True)
class Tokens:
    """The ids of one caption, and how much of it they hold."""

    ids: tuple[int, ...]  # begin, pieces, end, padding: as many as the encoder has positions
    kept: int  # pieces of the caption among them
    cut: int  # pieces that did not fit


def tokenize(text: TextEncoder, caption: str) -> Tokens:
    """CLIP tokens of a caption, padded or cut to the encoder's length (77), with the count of pieces cut."""
    words = text.vocabulary
    pieces = [row for piece in vocabulary.pieces(words, [caption])[0] for row in text.learned.get(piece, (piece,))]
    kept = pieces[: words.room]
    return Tokens(vocabulary.marked(words, kept), kept=len(kept), cut=len(pieces) - len(kept))


def encode(text: TextEncoder, tokens: Sequence[Tokens]) -> Tensor:
    """Context of captions: the last hidden state of the text encoder, after its final layer norm.

    Returns (B, 77, 768) for SD 1.x, in the encoder's dtype.
    Source: Radford et al. 2021, arXiv:2103.00020; padded positions are attended to, as in Stable Diffusion.
    """
    return _encoded(text, [one.ids for one in tokens])


def read(text: Encoders, prompt: str) -> Chunks:
    """The weighted pieces of a prompt in chunks. Raises UsageError for a weight out of range."""
    return vocabulary.read(text.vocabulary, prompt)


def encode_prompts(text: Encoders, prompts: Sequence[str], count: int) -> Context:
    """Context of prompts filled to so many chunks, each of which has no more, by whatever reads them."""
    if isinstance(text, TextPair):
        return encode_pair(text, prompts, count)
    return Context(encode_chunks(text, [read(text, prompt).padded(count) for prompt in prompts]))


def encode_chunks(text: TextEncoder, prompts: Sequence[Chunks]) -> Tensor:
    """Context of prompts of k chunks each: every chunk encoded apart, with marks of its own, then weighted.

    Returns (B, 77 k, 768) for SD 1.x, in the encoder's dtype; of prompts without weights in one chunk, the context
    that `encode` gives.
    Source: AUTOMATIC1111/stable-diffusion-webui, modules/sd_hijack_clip.py (chunks) and modules/sd_emphasis.py.
    """
    chunks = [chunk for prompt in prompts for chunk in prompt.chunks]
    hidden = _encoded(text, [vocabulary.chunk_rows(text.vocabulary, chunk) for chunk in chunks])  # (B k, 77, D)
    return _weighted(text, hidden, chunks).reshape(len(prompts), -1, hidden.shape[-1])  # (B, 77 k, D)


def encode_pair(pair: TextPair, prompts: Sequence[str], count: int) -> Context:
    """Context of prompts filled to k chunks for Stable Diffusion XL: (B, 77 k, D) and pooled (B, P).

    Each encoder reads the prompt by its own tokenizer (to the second's "!" is a piece apart, as in diffusers), encodes
    every chunk apart and weights it as `encode_chunks` does; what is taken is its hidden state before the last layer,
    and before those that clip-skip leaves out, without the final layer norm.
    pooled: the second encoder's whole output at the end mark of the first chunk, projected; no weight touches it, and
    of further chunks it says nothing, as in AUTOMATIC1111's program.
    Source: Podell et al. 2023, arXiv:2307.01952, section 2.1.
    """
    first, _ = _hidden(pair.first, prompts, count, skip=pair.skip)
    second, ends = _hidden(pair.second, prompts, count, skip=pair.skip)
    pooled: Tensor = pair.projection(ends)  # (B, P)
    return Context(torch.cat([first, second], dim=-1), pooled)


def weighted(hidden: Tensor, weights: Tensor) -> Tensor:
    """Hidden states (N, 77, D) times the weights (N, 77) of their positions, brought back to the mean they had.

    Chunks whose weights are all 1 stay bit-equal. A mean near 0 says nothing of the size: where it would change the
    states by more than a factor of 2, or their sign, they stay as weighted.
    Source: AUTOMATIC1111/stable-diffusion-webui, modules/sd_emphasis.py, "Original" emphasis, without that exception;
    the mean there is that of all prompts in a batch, here of each chunk alone.
    """
    is_plain = (weights == 1).all(1)
    if is_plain.all():
        return hidden
    before = hidden.float()
    after = before * weights[..., None]
    scale = before.mean((1, 2), keepdim=True) / after.mean((1, 2), keepdim=True)  # (N, 1, 1)
    scale = torch.where((scale > 1 / MOST_RESTORED) & (scale < MOST_RESTORED), scale, 1.0)  # of NaN neither is true
    return torch.where(is_plain[:, None, None], hidden, (after * scale).to(hidden.dtype))


def knowing(text: Encoders, embeddings: Sequence[Embedding]) -> Encoders:
    """What reads prompts, with learned tokens as by `with_embeddings`; of two encoders each gets its own of a pair."""
    if not isinstance(text, TextPair):
        return with_embeddings(text, embeddings)
    others = [Embedding(one.token, one.second) for one in embeddings if one.second is not None]
    assert len(others) == len(embeddings)
    return replace(text, first=with_embeddings(text.first, embeddings), second=with_embeddings(text.second, others))


def with_embeddings(text: TextEncoder, embeddings: Sequence[Embedding]) -> TextEncoder:
    """A text encoder that also knows learned tokens; the one given stays as it is.

    Names match as CLIP reads words, in any case; one of letters at both ends as a whole word only.
    The table of tokens is a copy, (V + n, D), whose first V rows are bit-equal to those given; all other weights are
    the same tensors.
    Raises InputError for a token that the vocabulary has or that is given twice, or vectors of another width,
    NumericalError where the type of the table cannot hold the vectors.
    """
    table = _table(text)
    parts = [_fitting(embedding, table) for embedding in embeddings]
    counts = [(embedding.token, len(part)) for embedding, part in zip(embeddings, parts, strict=True)]
    words = vocabulary.with_tokens(text.vocabulary, counts)
    model = _with_table(text.model, torch.cat([table, *parts]))
    return replace(text, tokenizer=words.tokenizer, model=model, learned=words.learned)


def with_swaps(text: TextEncoder, swaps: Sequence[Swap]) -> TextEncoder:
    """A text encoder that feeds other vectors wherever the words of some swaps stand; the one given stays as it is.

    swaps: made by the same vocabulary, in this order; sums of vectors become rows at the end of a copy of the table.
    Raises NumericalError where the type of the table cannot hold them.
    """
    table, model = _table(text), text.model
    for swap in swaps:
        if swap.is_new:
            parts = [weight * table[list(rows)].float() for weight, rows in swap.terms]
            vectors = torch.stack(parts).sum(0).to(table.dtype)  # (n, D)
            table = torch.cat([table, _finite(vectors, f"the vectors of {swap.option}")])
    if any(swap.is_new for swap in swaps):
        model = _with_table(model, table)
    return replace(text, model=model, swaps=(*text.swaps, *swaps))


def without_swaps(text: Encoders) -> Encoders:
    """The same text encoder, or two, each word fed as its own vectors again."""
    return each(text, lambda one: replace(one, swaps=()))


def each(text: Encoders, change: Callable[[TextEncoder], TextEncoder]) -> Encoders:
    """What reads prompts with a change made to the text encoder, or to both."""
    if isinstance(text, TextPair):
        return replace(text, first=change(text.first), second=change(text.second))
    return change(text)


def without_last_layers(text: Encoders, count: int) -> Encoders:
    """A text encoder whose last layers are left out, but not its final layer norm; the one given stays as it is.

    Of two, whose context never is that of the last layer, so many more are left out; the summary is as it was.
    count: fewer than it has layers. All weights are the same tensors.
    Source: `clip_skip` of diffusers' pipelines; A1111's "Clip skip" is one more.
    """
    if isinstance(text, TextPair):
        return replace(text, skip=count)
    if count == 0:
        return text
    model = _copied(text.model)
    model.encoder.layers = model.encoder.layers[: len(model.encoder.layers) - count]
    model.config.num_hidden_layers = len(model.encoder.layers)
    return replace(text, model=model)


def names(text: Encoders, prompt: str, token: str) -> bool:
    """Whether a prompt has a learned token fed, by its name as the tokenizer reads it or for a word swapped by it."""
    if isinstance(text, TextPair):
        return names(text.first, prompt, token)
    own = set(text.learned.get(cast("int", text.tokenizer.convert_tokens_to_ids(token)), ()))
    pieces = [piece for chunk in read(text, prompt).chunks for piece in chunk]
    swapped = {piece.swap for piece in pieces}
    summed = [rows for swap in text.swaps if swap.option in swapped for _, rows in swap.terms]
    return any(own & set(rows) for rows in (*summed, *(piece.rows for piece in pieces)))


# What the encoder does, in steps.


def walk_through(text: Encoders, prompt: str) -> dict[str, Tensor]:
    """What a prompt of k chunks becomes on its way, by name.

    token_embedding (k, 77, D), position_embedding (77, D), input_embedding (k, 77, D): their sum,
    context (1, 77 k, D): the output, weighted. Of two encoders the names of what is in the second end in `_2`, the
    context is that of both, and there is a pooled (1, P), too.
    """
    found: dict[str, Tensor] = {}
    count = len(read(text, prompt).chunks)
    for ending, one in (("", text.first), ("_2", text.second)) if isinstance(text, TextPair) else (("", text),):
        chunks = read(one, prompt).padded(count).chunks
        ids = torch.tensor([vocabulary.chunk_rows(one.vocabulary, chunk) for chunk in chunks])
        tokens, positions = token_embeddings(one, ids.to(one.model.device)), position_embeddings(one)
        found |= {f"token_embedding{ending}": tokens, f"position_embedding{ending}": positions}
        found[f"input_embedding{ending}"] = tokens + positions
    context = encode_prompts(text, [prompt], count)
    found["context"] = context.hidden
    return found if context.pooled is None else found | {"pooled": context.pooled}


def token_embeddings(text: TextEncoder, ids: Tensor) -> Tensor:
    """(N, 77) ids -> (N, 77, D), a row of the token table each."""
    looked_up: Tensor = text.model.get_input_embeddings()(ids)
    return looked_up


def position_embeddings(text: TextEncoder) -> Tensor:
    """(77, D): what is added for each position; with the token embeddings, the input of the first layer."""
    table: Tensor = text.model.embeddings.position_embedding.weight.detach()
    return table


def causal_mask(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(77, 77), added to the logits of attention: 0 where a position (row) may look, the type's least number where not.

    Source: Radford et al. 2021, arXiv:2103.00020, section 2.4: masked self-attention; the number is transformers'.
    """
    return torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)


def _hidden(text: TextEncoder, prompts: Sequence[str], count: int, *, skip: int) -> tuple[Tensor, Tensor]:
    """Weighted states (B, 77 k, D) before the last layers, and the last (B, D) at the end mark of each first chunk."""
    read_all = [read(text, prompt).padded(count) for prompt in prompts]
    chunks = [chunk for one in read_all for chunk in one.chunks]
    rows = [vocabulary.chunk_rows(text.vocabulary, chunk) for chunk in chunks]
    ids = torch.tensor(rows, device=computing_device(text.model))
    output = text.model(input_ids=ids, output_hidden_states=True)
    hidden = output.hidden_states[-2 - skip]  # (B k, 77, D), each what goes into a layer but the last
    last = output.last_hidden_state.unflatten(0, (len(prompts), count))[:, 0]  # (B, 77, D)
    ends = [1 + sum(len(piece.rows) for piece in one.chunks[0]) for one in read_all]
    weighted_states = _weighted(text, hidden, chunks).reshape(len(prompts), -1, hidden.shape[-1])
    return weighted_states, last[list(range(len(ends))), ends]


def _weighted(text: TextEncoder, hidden: Tensor, chunks: Sequence[Sequence[Piece]]) -> Tensor:
    """Hidden states (N, 77, D) of N chunks with the weights of their pieces."""
    weights = [vocabulary.chunk_weights(text.vocabulary, chunk) for chunk in chunks]
    return weighted(hidden, torch.tensor(weights, device=hidden.device))


def _encoded(text: TextEncoder, rows: Iterable[Sequence[int]]) -> Tensor:
    ids = torch.tensor(list(rows), device=computing_device(text.model))  # (N, 77)
    hidden: Tensor = text.model(input_ids=ids).last_hidden_state
    return hidden


def _table(text: TextEncoder) -> Tensor:
    """The vectors of all tokens, (V, D)."""
    return cast("nn.Embedding", text.model.get_input_embeddings()).weight.detach()


def _fitting(embedding: Embedding, table: Tensor) -> Tensor:
    """The vectors of an embedding as rows of a token table."""
    vectors = embedding.vectors.detach().to(table.device, table.dtype)
    if vectors.shape[1:] != table.shape[1:]:
        what = f"the vectors of {embedding.token} have shape {tuple(vectors.shape)}"
        raise InputError(what, f"expected is a width of {table.shape[1]}")
    return _finite(vectors, f"the vectors of {embedding.token}")


def _finite(vectors: Tensor, what: str) -> Tensor:
    if not vectors.isfinite().all():
        raise NumericalError(f"{what} are not finite in {vectors.dtype}", "try float32")
    return vectors


def _with_table(model: CLIPTextModel, table: Tensor) -> CLIPTextModel:
    """A copy of a text model with another token table, (V, D); it shares all other parameters with the original."""
    copied = _copied(model)
    copied.set_input_embeddings(nn.Embedding.from_pretrained(table))
    copied.config.vocab_size = len(table)
    return copied


def _copied(model: CLIPTextModel) -> CLIPTextModel:
    """A copy of a text model that shares all parameters with the original."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo=shared)
