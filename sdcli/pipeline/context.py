"""What the UNet is told of the images that it draws, besides latents and timestep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Context:
    """What the UNet is told of B images.

    hidden: (B, 77 k, D) of prompts of k chunks, (B, 1, D) of labels.
    Stable Diffusion XL is told more: pooled (B, P), a summary of each prompt, and sizes (B, 6) in px: height and width
    of the picture as it was before it was cropped, where the crop begins from the top and the left, and its height and
    width. Source: Podell et al. 2023, arXiv:2307.01952, section 2.2.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def at(self, places: Sequence[int]) -> Context:
        """The contexts of the images at these places, in their order."""
        return self._each(lambda one: one[list(places)])

    def of_size(self, width: int, height: int) -> Context:
        """The same for pictures of a size in px, none of them cropped; itself where the UNet is not told of sizes."""
        if self.pooled is None:
            return self
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=self.hidden.device)
        return replace(self, sizes=sizes.expand(len(self), -1))  # (B, 6)

    def to(self, dtype: torch.dtype) -> Context:
        """The same in another type of numbers."""
        return self._each(lambda one: one.to(dtype))

    def zeros(self) -> Context:
        """A context of the same shape that says nothing."""
        return self._each(torch.zeros_like)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the UNet by which it is told."""
        told: dict[str, Any] = {"encoder_hidden_states": self.hidden}
        if self.pooled is not None:
            told["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.sizes}
        return told

    def _each(self, change: Callable[[Tensor], Tensor]) -> Context:
        pooled, sizes = (change(one) if one is not None else None for one in (self.pooled, self.sizes))
        return Context(change(self.hidden), pooled, sizes)


def joined(parts: Sequence[Context]) -> Context:
    """The contexts of some images as one, in their order; all of one model and of equal shapes but for B."""
    pooled = [one.pooled for one in parts if one.pooled is not None]
    sizes = [one.sizes for one in parts if one.sizes is not None]
    hidden = torch.cat([one.hidden for one in parts])
    return Context(hidden, torch.cat(pooled) if pooled else None, torch.cat(sizes) if sizes else None)
