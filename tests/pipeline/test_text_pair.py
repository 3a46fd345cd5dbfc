"""The two text encoders of Stable Diffusion XL, against diffusers' pipeline and against each encoder alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdcli.errors import UsageError
from sdcli.pipeline import text, vocabulary
from sdcli.pipeline.bundle import TextPair, load_text
from sdcli.pipeline.context import Context
from sdcli.pipeline.contexts import contexts, lengths
from tests import models

WIDTHS = [models.CONTEXT, models.CONTEXT_2]


@pytest.fixture(scope="module")
def pair(sdxl: Path) -> TextPair:
    found = load_text(sdxl, device=torch.device("cpu"), dtype=torch.float32)
    assert isinstance(found, TextPair)
    return found


@pytest.fixture(scope="module")
def pipe(sdxl: Path) -> Any:
    return models.pipeline_xl(sdxl, vae=None, unet=None)


@torch.no_grad()
def encoded(pair: TextPair, *prompts: str, chunks: int = 1) -> Context:
    return text.encode_prompts(pair, prompts, chunks)


@torch.no_grad()
def by_diffusers(pipe: Any, prompt: str, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    embeds, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **how)
    return embeds, pooled


def assert_same(one: Context, hidden: torch.Tensor, pooled: torch.Tensor) -> None:
    assert one.pooled is not None
    torch.testing.assert_close(one.hidden, hidden, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.pooled, pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", ["a cat", "", "a cat!!! on the! moon", "a red dog " * 18])
@pytest.mark.parametrize("skip", [0, 1])
def test_context_and_summary_are_those_of_diffusers(pair: TextPair, pipe: Any, prompt: str, skip: int) -> None:
    ours = encoded(replace(pair, skip=skip), prompt)
    assert ours.hidden.shape == (1, 77, sum(WIDTHS)) and ours.pooled is not None
    assert ours.pooled.shape == (1, models.POOLED)
    assert_same(ours, *by_diffusers(pipe, prompt, clip_skip=skip or None))


def test_chunks_are_encoded_apart_and_the_first_is_summed_up(pair: TextPair, pipe: Any) -> None:
    ours = encoded(pair, "a cat BREAK a red dog", "a house BREAK in the snow", chunks=3)
    for row, prompts in enumerate((("a cat", "a red dog", ""), ("a house", "in the snow", ""))):
        parts = [by_diffusers(pipe, prompt) for prompt in prompts]
        assert_same(ours.at([row]), torch.cat([hidden for hidden, _ in parts], dim=1), parts[0][1])


def test_weights_touch_each_encoders_states_alone_and_not_the_summary(pair: TextPair, pipe: Any) -> None:
    hidden, pooled = by_diffusers(pipe, "a red cat")
    weights = torch.tensor([[1.0, 1.0, 1.3, 1.0] + [1.0] * 73])
    sides = [text.weighted(side, weights) for side in hidden.split(WIDTHS, dim=-1)]
    assert not torch.equal(torch.cat(sides, dim=-1), hidden)
    assert_same(encoded(pair, "a (red:1.3) cat"), torch.cat(sides, dim=-1), pooled)


def test_a_word_swapped_by_another_is_that_other_word_to_both(pair: TextPair) -> None:
    swaps = vocabulary.with_swap(pair.vocabulary, "--replace", "puppy", [("cat", 1.0)]).swaps
    swapped = text.each(pair, lambda one: text.with_swaps(one, swaps))
    assert isinstance(swapped, TextPair)
    ours, plain = encoded(swapped, "a puppy"), encoded(pair, "a cat")
    assert plain.pooled is not None
    assert_same(ours, plain.hidden, plain.pooled)
    again = text.without_swaps(swapped)
    assert isinstance(again, TextPair)
    assert torch.equal(encoded(again, "a puppy").hidden, encoded(pair, "a puppy").hidden)


def test_a_word_that_the_two_read_apart_is_not_swapped(sdxl: Path) -> None:
    words = vocabulary.load_vocabulary(sdxl)
    with pytest.raises(UsageError, match=r"--replace a!=a\.: to the second text encoder"):
        vocabulary.with_swap(words, "--replace a!=a.", "a!", [("a.", 1.0)])


def test_a_prompt_is_filled_to_the_chunks_of_the_encoder_that_needs_more(pair: TextPair) -> None:
    """To the second "!" is a piece apart: 60 of one piece for the first are 120 for it."""
    prompt = "wow!! " * 30
    found = [len(text.read(one, prompt).chunks) for one in (pair.first, pair.second)]
    assert found == [1, 2] and len(text.read(pair, prompt).chunks) == 2
    assert encoded(pair, prompt, chunks=2).hidden.shape == (1, 154, 40)


def test_a_sum_of_words_is_fed_to_both(pair: TextPair) -> None:
    swaps = vocabulary.with_swap(pair.vocabulary, "--mix", "puppy", [("puppy", 0.5), ("cat", 0.5)]).swaps
    swapped = text.each(pair, lambda one: text.with_swaps(one, swaps))
    assert isinstance(swapped, TextPair)
    ours, plain = encoded(swapped, "a puppy"), encoded(pair, "a puppy")
    for mixed, own in zip(ours.hidden.split(WIDTHS, dim=-1), plain.hidden.split(WIDTHS, dim=-1), strict=True):
        assert float((mixed - own).abs().max()) > 1e-3
    assert ours.pooled is not None and plain.pooled is not None
    assert float((ours.pooled - plain.pooled).abs().max()) > 1e-3


def test_an_empty_negative_prompt_is_zeros_unless_it_is_to_be_encoded(pair: TextPair) -> None:
    context, away = contexts(pair, ["a cat", "a dog BREAK a cow"], " ")
    assert away is not None and away.pooled is not None and context.hidden.shape == away.hidden.shape == (2, 154, 40)
    assert not away.hidden.any() and not away.pooled.any() and context.hidden.any()
    _, other = contexts(replace(pair, is_empty_zero=False), ["a cat"], "")
    empty = encoded(pair, "")
    assert other is not None and empty.pooled is not None
    assert_same(other, empty.hidden, empty.pooled)
    assert lengths(pair, ["a cat", "a dog BREAK a cow"], "") == [1, 2]
