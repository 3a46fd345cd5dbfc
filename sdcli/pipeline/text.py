"""Prompts -> tokens -> context, with learned tokens among them."""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from sdcli.errors import InputError, NumericalError
from sdcli.pipeline.adapters import Embedding
from sdcli.pipeline.bundle import TextEncoder

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True)
class Tokens:
    """The ids of one prompt, and how much of it they hold."""

    ids: tuple[int, ...]  # begin, pieces, end, padding: as many as the encoder has positions
    kept: int  # pieces of the prompt among them
    cut: int  # pieces that did not fit


def tokenize(text: TextEncoder, prompt: str) -> Tokens:
    """CLIP tokens of a prompt, padded or cut to the encoder's length (77), with the count of pieces cut."""
    tokenizer = text.tokenizer
    length = int(text.model.config.max_position_embeddings)
    pieces = [row for piece in _pieces(text, prompt) for row in text.learned.get(piece, (piece,))]
    room = length - 2  # the begin and end marks
    kept = pieces[:room]
    padding = [int(tokenizer.pad_token_id)] * (room - len(kept))
    ids = [int(tokenizer.bos_token_id), *kept, int(tokenizer.eos_token_id), *padding]
    return Tokens(tuple(ids), kept=len(kept), cut=len(pieces) - len(kept))


def encode(text: TextEncoder, tokens: Sequence[Tokens]) -> Tensor:
    """Context of prompts: the last hidden state of the text encoder, after its final layer norm.

    Returns (B, 77, 768) for SD 1.x, in the encoder's dtype.
    Source: Radford et al. 2021, arXiv:2103.00020; padded positions are attended to, as in Stable Diffusion.
    """
    ids = torch.tensor([one.ids for one in tokens], device=text.model.device)  # (B, 77)
    context: Tensor = text.model(input_ids=ids).last_hidden_state
    return context


def with_embeddings(text: TextEncoder, embeddings: Sequence[Embedding]) -> TextEncoder:
    """A text encoder that also knows learned tokens; the one given stays as it is.

    A token of n vectors is `tok tok_1 ... tok_{n-1}` to the tokenizer, as in diffusers, and a prompt that names `tok`
    gets all n in order. Names match as CLIP reads words, in any case; one of letters at both ends as a whole word only.
    The table of tokens is a copy, (V + n, D), whose first V rows are bit-equal to those given; all other weights are
    the same tensors.
    Raises InputError for a token that the vocabulary has or that is given twice, or vectors of another width,
    NumericalError where the type of the table cannot hold the vectors.
    """
    tokenizer, learned = copy.deepcopy(text.tokenizer), dict(text.learned)
    table = cast("nn.Embedding", text.model.get_input_embeddings()).weight.detach()
    parts, end = [table], len(table)
    for embedding in embeddings:
        parts.append(_fitting(embedding, table))
        first, end = end, end + len(parts[-1])
        for row in range(first, end):
            name = embedding.token if row == first else f"{embedding.token}_{row - first}"
            learned[_add_token(tokenizer, name, learned)] = tuple(range(row, end)) if row == first else (row,)
    return TextEncoder(tokenizer, _with_table(text.model, torch.cat(parts)), learned)


def names(text: TextEncoder, prompt: str, token: str) -> bool:
    """Whether a prompt names a learned token, as the tokenizer reads it."""
    return text.tokenizer.convert_tokens_to_ids(token) in _pieces(text, prompt)


def _pieces(text: TextEncoder, prompt: str) -> list[int]:
    """The tokenizer's ids for a prompt, all of them and no marks."""
    return list(text.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])


def _fitting(embedding: Embedding, table: Tensor) -> Tensor:
    """The vectors of an embedding as rows of a token table."""
    vectors = embedding.vectors.detach().to(table.device, table.dtype)
    if vectors.shape[1:] != table.shape[1:]:
        what = f"the vectors of {embedding.token} have shape {tuple(vectors.shape)}"
        raise InputError(what, f"expected is a width of {table.shape[1]}")
    if not vectors.isfinite().all():
        raise NumericalError(f"the vectors of {embedding.token} are not finite in {table.dtype}", "try float32")
    return vectors


def _add_token(tokenizer: CLIPTokenizer, name: str, learned: Container[int]) -> int:
    """Teach a tokenizer a new name and return its id. Raises InputError for one that it knows."""
    pieces, known = tokenizer(name, add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids(name)
    if len(pieces) == 1 or known != tokenizer.unk_token_id:
        what = "is given twice" if pieces[0] in learned else "is in the vocabulary already"
        raise InputError(f"the token {name} {what}", "name another, as in FILE:<my-cat>")
    is_word = re.fullmatch(r"\w(.*\w)?", name) is not None
    from tokenizers import AddedToken  # deferred: only what adds tokens pays for it

    tokenizer.add_tokens([AddedToken(name, single_word=is_word, normalized=True)])
    return cast("int", tokenizer.convert_tokens_to_ids(name))


def _with_table(model: CLIPTextModel, table: Tensor) -> CLIPTextModel:
    """A copy of a text model with another token table, (V, D); it shares all other parameters with the original."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    copied = copy.deepcopy(model, memo=shared)
    copied.set_input_embeddings(nn.Embedding.from_pretrained(table))
    copied.config.vocab_size = len(table)
    return copied
