"""Work on a large tensor in tiles that overlap, and fade into each other where they do."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor


def in_tiles(work: Callable[[Tensor], Tensor], whole: Tensor, *, side: int, overlap: int, unit: int = 1) -> Tensor:
    """What `work` makes of (B, C, H, W), in tiles of up to `side` along each; all at once where that is one tile.

    work: makes (B, D, s h, s w) of (B, C, h, w), the factor s being its own. overlap: the least that two tiles share;
    across it the weight of one falls as that of the other rises. unit: tiles begin at multiples of it.
    """
    height, width = whole.shape[2:]
    if height <= side and width <= side:
        return work(whole)
    rows, columns = _starts(height, side, overlap, unit), _starts(width, side, overlap, unit)
    result = weights = torch.empty(0)
    for top in rows:
        for left in columns:
            made = work(whole[:, :, top : top + side, left : left + side])
            factor = made.shape[2] / min(side, height)
            if not result.numel():
                size = (round(height * factor), round(width * factor))
                result, weights = made.new_zeros(*made.shape[:2], *size), made.new_zeros(size)
            y, x, ramp = round(top * factor), round(left * factor), round(overlap * factor)
            fade = _fade(made.shape[2], ramp).unsqueeze(1) * _fade(made.shape[3], ramp)  # (h, w)
            place = (slice(y, y + made.shape[2]), slice(x, x + made.shape[3]))
            result[:, :, *place] += made * fade.to(made)
            weights[place] += fade.to(made)
    return result.div_(weights)


def _starts(length: int, side: int, overlap: int, unit: int) -> list[int]:
    """Where tiles begin along a side: as few as can be, at even distances, the last ending where the whole does."""
    if length <= side:
        return [0]
    steps = ceil((length - side) / (side - overlap))
    return [unit * round(i * (length - side) / (steps * unit)) for i in range(steps + 1)]


def _fade(length: int, ramp: int) -> Tensor:
    """Weights (n): rising at the beginning and falling at the end of a tile, never 0."""
    from_edge = torch.arange(length).minimum(torch.arange(length - 1, -1, -1)) + 1
    return (from_edge / (ramp + 1)).clamp(max=1.0)
