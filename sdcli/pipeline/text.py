"""Prompts -> tokens -> context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdcli.pipeline.bundle import TextEncoder


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
    pieces = list(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
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
