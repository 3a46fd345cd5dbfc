"""Prompts become the tokens and the context that diffusers' own pipeline would make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdcli.pipeline import text
from sdcli.pipeline.bundle import TextEncoder, load_text
from tests import models

PROMPTS = [
    "",
    "a picture of a puppy",
    "A  PICTURE\n\tof a (fluffy:1.2) puppy, 35mm!!!",
    "Ein kleines Hündchen, naïve façade",
    "小狗的照片",
    "🐶 ❤️ a dog",
    "e\u0301 é",
    "<|endoftext|> in the middle <|startoftext|>",
    "\x00\x01\x1b control",
    "!!! ... ???",
    "dog " * 75,
    "dog " * 76,
    "a supercalifragilisticexpialidocious puppy " * 40,
]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TextEncoder, StableDiffusionPipeline]:
    """The same text encoder, loaded by us and by diffusers; sd2 pads with "!" instead of the end mark."""
    write = {"sd1": models.write_sd1, "sd2": models.write_sd2}[request.param]
    folder: Path = write(tmp_path_factory.mktemp(request.param))
    return load_text(folder, device=torch.device("cpu"), dtype=torch.float32), models.pipeline(folder)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_are_those_of_diffusers(both: tuple[TextEncoder, StableDiffusionPipeline], prompt: str) -> None:
    ours, theirs = both
    expected = theirs.tokenizer(prompt, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert list(text.tokenize(ours, prompt).ids) == expected


@torch.no_grad()
def test_contexts_are_those_of_diffusers(both: tuple[TextEncoder, StableDiffusionPipeline]) -> None:
    ours, theirs = both
    together = text.encode(ours, [text.tokenize(ours, prompt) for prompt in PROMPTS])
    assert together.shape == (len(PROMPTS), 77, 16)
    for row, prompt in zip(together, PROMPTS, strict=True):
        expected, _ = theirs.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        assert torch.allclose(row, expected[0], rtol=0, atol=1e-5)


def test_the_padding_of_the_model_is_used(both: tuple[TextEncoder, StableDiffusionPipeline]) -> None:
    ours, theirs = both
    padding = {"<|endoftext|>": 49407, "!": 0}[theirs.tokenizer.pad_token]
    assert text.tokenize(ours, "a dog").ids == (49406, 320, 1929, 49407, *[padding] * 73)


@pytest.mark.parametrize(("words", "kept", "cut"), [(0, 0, 0), (74, 74, 0), (75, 75, 0), (76, 75, 1), (200, 75, 125)])
def test_what_does_not_fit_is_counted(
    both: tuple[TextEncoder, StableDiffusionPipeline], words: int, kept: int, cut: int
) -> None:
    tokens = text.tokenize(both[0], "dog " * words)
    assert (tokens.kept, tokens.cut) == (kept, cut)
    assert len(tokens.ids) == 77
    assert tokens.ids[kept + 1] == 49407  # the end mark stands behind what was kept


def test_a_shorter_encoder_is_filled_and_no_further(tmp_path: Path) -> None:
    folder = models.write_sd1(tmp_path / "sd1")
    key = "embeddings.position_embedding.weight"
    models.edit_weights(folder / "text_encoder", lambda weights: weights | {key: weights[key][:20]})
    models.edit_json(folder / "text_encoder" / "config.json", max_position_embeddings=20)
    encoder = load_text(folder, device=torch.device("cpu"), dtype=torch.float32)
    tokens = text.tokenize(encoder, "dog " * 30)
    assert (len(tokens.ids), tokens.kept, tokens.cut) == (20, 18, 12)
    assert text.encode(encoder, [tokens]).shape == (1, 20, 16)
