"""Attention as it learns fastest on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

MOST_TOKENS = 256  # attended to; with 1,024, plain products take one and a half times as long


class ShortAttention:
    """diffusers' attention of a layer, by plain products of matrices while it learns from few tokens, else torch's own.

    torch's keeps no matrix of weights and computes it anew on the way back. In bfloat16 on a CPU that takes 2 to 5
    times as long for up to 256 tokens (torch 2.13, AMX). Without gradients, or for more tokens, torch's is the faster.
    """

    def __init__(self) -> None:
        self._plain, self._fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **options: Any
    ) -> Tensor:
        """hidden_states: (B, N, D); encoder_hidden_states: (B, M, C), what is attended to if not the former."""
        tokens = (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape[1]
        is_short = torch.is_grad_enabled() and tokens <= MOST_TOKENS
        attend = self._plain if is_short else self._fused
        attended: Tensor = attend(attn, hidden_states, encoder_hidden_states, **options)
        return attended
