"""What to draw -> the context that the UNet is given, and beside it that of what to keep away from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdcli.pipeline import text
from sdcli.pipeline.bundle import Conditioner, Encoders, TextPair
from sdcli.pipeline.classes import ClassEmbedder
from sdcli.pipeline.context import Context
from sdcli.pipeline.device import computing_device

Condition = str | int  # what says what to draw: a prompt, or the label of a class


@torch.no_grad()
def contexts(
    conditioner: Conditioner, conditions: Sequence[Condition], negative: Condition | None
) -> tuple[Context, Context | None]:
    """The context of each condition and, if there is a negative one, that of it beside each.

    conditions: prompts, in which words are swapped, and a negative prompt, in which none is; or labels of classes.
    Shorter prompts get empty chunks: draw only prompts of equal `lengths` together, so that no image depends on its
    neighbours.
    """
    if isinstance(conditioner, ClassEmbedder):
        away = None if negative is None else labelled(conditioner, [negative] * len(conditions))
        return labelled(conditioner, conditions), away
    different = list(dict.fromkeys(map(str, conditions)))
    count = max(lengths(conditioner, different, negative))
    positive = text.encode_prompts(conditioner, different, count)
    places = [different.index(str(prompt)) for prompt in conditions]
    if negative is None:
        return positive.at(places), None
    return positive.at(places), led_away(conditioner, str(negative), count).at([0] * len(conditions))


def lengths(conditioner: Conditioner, conditions: Sequence[Condition], negative: Condition | None) -> list[int]:
    """The chunks in the context of each condition beside the negative one: those alike can be drawn together."""
    if isinstance(conditioner, ClassEmbedder):
        return [1] * len(conditions)
    least = 1 if negative is None else len(text.read(text.without_swaps(conditioner), str(negative)).chunks)
    return [max(least, len(text.read(conditioner, str(prompt)).chunks)) for prompt in conditions]


def led_away(encoders: Encoders, negative: str, count: int) -> Context:
    """The context (B = 1) of a negative prompt filled to so many chunks, no word of it swapped.

    An empty one of Stable Diffusion XL is all zeros, unless the model says that it is encoded as any other.
    """
    found = text.encode_prompts(text.without_swaps(encoders), [negative], count)
    is_zero = isinstance(encoders, TextPair) and encoders.is_empty_zero and not negative.strip()
    return found.zeros() if is_zero else found


def labelled(embedder: ClassEmbedder, labels: Sequence[Condition]) -> Context:
    """The contexts (B, 1, D) of classes."""
    return Context(embedder(torch.tensor(labels, device=computing_device(embedder))))
