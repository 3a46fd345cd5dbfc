"""What to draw -> the context that the UNet is given, and beside it that of what to keep away from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdcli.pipeline import text
from sdcli.pipeline.bundle import Conditioner, TextEncoder
from sdcli.pipeline.classes import ClassEmbedder

Condition = str | int  # what says what to draw: a prompt, or the label of a class


@torch.no_grad()
def contexts(
    conditioner: Conditioner, conditions: Sequence[Condition], negative: Condition | None
) -> tuple[Tensor, Tensor | None]:
    """The context of each condition and, if there is a negative one, that of it beside each.

    conditions: prompts, in which words are swapped, and a negative prompt, in which none is; or labels of classes.
    Returns (B, 77 k, D) for prompts of up to k chunks, (B, 1, D) for labels. Shorter prompts get empty chunks: draw
    only prompts of equal `lengths` together, so that no image depends on its neighbours.
    """
    if isinstance(conditioner, ClassEmbedder):
        away = None if negative is None else _labels(conditioner, [negative] * len(conditions))
        return _labels(conditioner, conditions), away
    pairs = _pairs(conditioner, list(dict.fromkeys(map(str, conditions))), negative)
    chosen = [pairs[str(prompt)] for prompt in conditions]
    positive = torch.stack([context for context, _ in chosen])
    return positive, None if negative is None else torch.stack([away for _, away in chosen])


def lengths(conditioner: Conditioner, conditions: Sequence[Condition], negative: Condition | None) -> list[int]:
    """The chunks in the context of each condition beside the negative one: those alike can be drawn together."""
    if isinstance(conditioner, ClassEmbedder):
        return [1] * len(conditions)
    least = 1 if negative is None else len(text.read(text.without_swaps(conditioner), str(negative)).chunks)
    return [max(least, len(text.read(conditioner, str(prompt)).chunks)) for prompt in conditions]


def _labels(embedder: ClassEmbedder, labels: Sequence[Condition]) -> Tensor:
    context: Tensor = embedder(torch.tensor(labels, device=embedder.embedding.weight.device))
    return context  # (B, 1, D)


def _pairs(encoder: TextEncoder, prompts: list[str], negative: Condition | None) -> dict[str, tuple[Tensor, Tensor]]:
    """The contexts (77 k, D) of each prompt and of the negative one; where there is none, the prompt's own twice.

    Prompts and negative prompt are given empty chunks up to as many as the longest of them has.
    """
    plain = text.without_swaps(encoder)
    read = [text.read(encoder, prompt) for prompt in prompts]
    away = None if negative is None else text.read(plain, str(negative))
    count = max(len(one.chunks) for one in (*read, *([away] if away is not None else [])))
    positive = text.encode_chunks(encoder, [one.padded(count) for one in read])
    if away is None:
        return {prompt: (context, context) for prompt, context in zip(prompts, positive, strict=True)}
    (unconditional,) = text.encode_chunks(plain, [away.padded(count)])
    return {prompt: (context, unconditional) for prompt, context in zip(prompts, positive, strict=True)}
