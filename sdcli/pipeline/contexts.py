"""What to draw -> the context that the UNet is given, and beside it that of what to keep away from."""

from __future__ import annotations

import math
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
    Returns (B, 77 k, D) for prompts of up to k chunks, (B, 1, D) for labels.
    """
    if isinstance(conditioner, ClassEmbedder):
        away = None if negative is None else _labels(conditioner, [negative] * len(conditions))
        return _labels(conditioner, conditions), away
    pairs = _pairs(conditioner, list(dict.fromkeys(map(str, conditions))), negative)
    chosen = [pairs[str(prompt)] for prompt in conditions]
    positive = torch.stack([context for context, _ in chosen])
    return positive, None if negative is None else torch.stack([away for _, away in chosen])


def _labels(embedder: ClassEmbedder, labels: Sequence[Condition]) -> Tensor:
    context: Tensor = embedder(torch.tensor(labels, device=embedder.embedding.weight.device))
    return context  # (B, 1, D)


def _pairs(encoder: TextEncoder, prompts: list[str], negative: Condition | None) -> dict[str, tuple[Tensor, Tensor]]:
    """The contexts (77 k, D) of each prompt and of the negative one; where there is none, the prompt's own twice.

    Prompt and negative prompt are given empty chunks up to as many as the longer of them has. Prompts that come to
    different lengths are then repeated to the least length that all of them divide: attention over copies of a context
    is attention over the context, so that no image depends on its neighbours.
    """
    plain = text.without_swaps(encoder)
    read = {prompt: text.read(encoder, prompt) for prompt in prompts}
    away = None if negative is None else text.read(plain, str(negative))
    least = 1 if away is None else len(away.chunks)
    counts = {prompt: max(least, len(read[prompt].chunks)) for prompt in prompts}
    longest = math.lcm(*counts.values())
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for count in sorted(set(counts.values())):
        alike, times = [prompt for prompt in prompts if counts[prompt] == count], (1, longest // count, 1)
        positive = text.encode_chunks(encoder, [read[prompt].padded(count) for prompt in alike]).repeat(times)
        found |= {prompt: (context, context) for prompt, context in zip(alike, positive, strict=True)}
        if away is not None:
            unconditional = text.encode_chunks(plain, [away.padded(count)]).repeat(times)[0]
            found |= {prompt: (found[prompt][0], unconditional) for prompt in alike}
    return found
