"""Classes -> context: what conditions a UNet that was trained on labelled pictures, or on pictures alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class ClassEmbedder(nn.Module):
    """One embedding layer: a row for each class, and a last one, the null class, for a picture of any.

    Without names there is the null class alone: the one learned token of an unconditional model.
    Source: Rombach et al. 2022, arXiv:2112.10752, section 4 (class-conditional ImageNet).
    """

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.names = tuple(names)
        self.embedding = nn.Embedding(len(self.names) + 1, width)

    @property
    def null(self) -> int:
        """The label of a picture of any class: what training drops a label to, and what guidance leads away from."""
        return len(self.names)

    @property
    def config(self) -> dict[str, Any]:
        """What builds it again, as `class_embedder/config.json` holds it."""
        return {"width": self.embedding.embedding_dim, "names": list(self.names)}

    def forward(self, labels: Tensor) -> Tensor:
        """Context of labels: (B,) int64 in 0..null -> (B, 1, D), one token each."""
        context: Tensor = self.embedding(labels)  # (B, D)
        return context.unsqueeze(1)
