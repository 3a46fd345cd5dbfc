"""Contexts of prompts of any length, each beside that of the negative prompt, and of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdcli.pipeline import text, vocabulary
from sdcli.pipeline.bundle import Conditioner, TextEncoder, load_conditioner, load_text
from sdcli.pipeline.contexts import contexts, lengths

SHORT, LONG, LONGER = "a puppy", "cat " * 80, "dog " * 160


@pytest.fixture(scope="module")
def encoder(sd1: Path) -> TextEncoder:
    return load_text(sd1, device=torch.device("cpu"), dtype=torch.float32)


@torch.no_grad()
def encoded(encoder: TextEncoder, prompt: str, chunks: int = 1) -> torch.Tensor:
    return text.encode_chunks(encoder, [text.read(encoder, prompt).padded(chunks)])[0]


def hidden(conditioner: Conditioner, *asked: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What `contexts` gives where there is a negative prompt, as tensors."""
    context, away = contexts(conditioner, *asked)
    assert away is not None and context.pooled is None is away.pooled
    return context.hidden, away.hidden


def test_short_prompts_have_the_context_of_captions(encoder: TextEncoder) -> None:
    context, away = hidden(encoder, [SHORT, SHORT], "blurry")
    assert context.shape == (2, 77, 16)
    for row in range(2):
        assert torch.equal(context[row], encoded(encoder, SHORT))
        assert torch.equal(away[row], encoded(encoder, "blurry"))


def test_without_a_negative_prompt_there_is_none(encoder: TextEncoder) -> None:
    assert contexts(encoder, [SHORT], None)[1] is None


@pytest.mark.parametrize(("prompt", "negative", "chunks"), [(LONG, "", 2), (SHORT, LONGER, 3), (LONG, LONGER, 3)])
def test_the_shorter_of_the_two_is_filled_with_empty_chunks(
    encoder: TextEncoder, prompt: str, negative: str, chunks: int
) -> None:
    context, away = hidden(encoder, [prompt], negative)
    assert context.shape == away.shape == (1, 77 * chunks, 16)
    assert torch.allclose(context[0], encoded(encoder, prompt, chunks), rtol=0, atol=1e-6)
    assert torch.allclose(away[0], encoded(encoder, negative, chunks), rtol=0, atol=1e-6)
    nothing = encoded(encoder, "")
    assert any(torch.allclose(one[0, -77:], nothing, rtol=0, atol=1e-6) for one in (context, away))


def test_prompts_of_other_lengths_get_empty_chunks_and_lengths_tell_which_are_alike(encoder: TextEncoder) -> None:
    prompts = [SHORT, LONG, LONGER, SHORT]
    assert lengths(encoder, prompts, None) == [1, 2, 3, 1]
    assert lengths(encoder, prompts, LONG) == [2, 2, 3, 2]
    context, away = hidden(encoder, prompts, "")
    assert context.shape == away.shape == (4, 3 * 77, 16)
    for row, prompt in enumerate(prompts):
        assert torch.allclose(context[row], encoded(encoder, prompt, 3), rtol=0, atol=1e-6)


def test_words_are_swapped_in_the_prompt_and_not_in_the_negative(encoder: TextEncoder) -> None:
    swaps = vocabulary.with_swap(encoder.vocabulary, "--mix", "puppy", [("puppy", 0.5), ("cat", 0.5)]).swaps
    swapped = text.with_swaps(encoder, swaps)
    context, away = hidden(swapped, [SHORT], SHORT)
    assert torch.equal(away[0], encoded(encoder, SHORT))
    assert torch.equal(context[0], encoded(swapped, SHORT))
    assert not torch.allclose(context[0], away[0], rtol=0, atol=1e-3)


def test_labels_have_one_row_each(classed: Path) -> None:
    embedder = load_conditioner(classed, device=torch.device("cpu"), dtype=torch.float32)
    context, away = hidden(embedder, [2, 0], 4)
    assert context.shape == away.shape == (2, 1, 16)
    assert torch.equal(away[0], away[1]) and not torch.equal(context[0], context[1])
    assert contexts(embedder, [2], None)[1] is None
    assert lengths(embedder, [2, 0], None) == [1, 1]
