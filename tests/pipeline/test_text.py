"""Prompts become the tokens and the context that diffusers' own pipeline would make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdcli.errors import InputError, NumericalError
from sdcli.pipeline import text
from sdcli.pipeline.adapters import Embedding, write_embedding
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


# Learned tokens.


@pytest.fixture(scope="module")
def plain(sd1: Path) -> TextEncoder:
    return load_text(sd1, device=torch.device("cpu"), dtype=torch.float32)


def learned(token: str, count: int = 1, *, seed: int = 0) -> Embedding:
    return Embedding(token, torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)))


NAMING = [
    "<my-cat>",
    "a picture of <my-cat>, in the rain",
    "a <MY-CAT>and<my-cat>",
    "<my-cat> " * 30,
    "dog " * 74 + "<my-cat>",
    "a dog in my-style",
    "My-Style dog, (my-style:1.2)",
    "<my-cat> in my-style",
    "no token at all",
]


@torch.no_grad()
def test_contexts_with_learned_tokens_are_those_of_diffusers(plain: TextEncoder, sd1: Path, tmp_path: Path) -> None:
    embeddings = [learned("<my-cat>", 3), learned("my-style", seed=1)]
    pipe = models.pipeline(sd1)
    for embedding in embeddings:
        write_embedding(tmp_path, embedding)
    pipe.load_textual_inversion(str(tmp_path), weight_name="my-cat.safetensors")
    pipe.load_textual_inversion(str(tmp_path), weight_name="my-style.pt")
    ours = text.with_embeddings(plain, embeddings)
    for prompt in NAMING:
        # diffusers puts the further vectors into the prompt's text, and finds a token there in its own case alone.
        expected, _ = pipe.encode_prompt(prompt.lower(), "cpu", 1, do_classifier_free_guidance=False)
        context = text.encode(ours, [text.tokenize(ours, prompt)])
        assert torch.allclose(context, expected, rtol=0, atol=1e-5), prompt


def test_a_token_stands_for_all_its_vectors_in_order(plain: TextEncoder) -> None:
    encoder = text.with_embeddings(plain, [learned("<my-cat>", 3), learned("my-style")])
    tokens = text.tokenize(encoder, "a <my-cat> in my-style, <my-cat>_1")
    assert tokens.ids[:10] == (49406, 320, 49408, 49409, 49410, 530, 49411, 267, 49409, 49407)
    assert (tokens.kept, tokens.cut) == (8, 0)


@pytest.fixture(scope="module")
def taught(plain: TextEncoder) -> TextEncoder:
    tokens = ["<My-Cat>", "my-style", "toy story", "naïve cat", "小狗"]
    return text.with_embeddings(plain, [learned(token) for token in tokens])


@pytest.mark.parametrize(
    ("token", "prompt", "is_named"),
    [
        ("<My-Cat>", "a <My-Cat>", True),
        ("<My-Cat>", "a<my-cat>!", True),
        ("<My-Cat>", "a my-cat", False),
        ("<My-Cat>", "a < my-cat >", False),
        ("my-style", "a dog,my-style", True),
        ("my-style", "MY-STYLE", True),
        ("my-style", "my-stylegan", False),
        ("my-style", "army-style", False),
        ("toy story", "in  Toy\nstory", True),
        ("naïve cat", "a NAI\u0308VE cat", True),
        ("小狗", "小狗", True),
    ],
)
def test_a_prompt_names_a_token_as_clip_reads_words(
    taught: TextEncoder, token: str, prompt: str, is_named: bool
) -> None:
    assert text.names(taught, prompt, token) == is_named
    assert any(row >= 49408 for row in text.tokenize(taught, prompt).ids) == is_named


@pytest.mark.parametrize(
    ("before", "vectors", "kept", "cut"),
    [(0, 75, 75, 0), (72, 3, 75, 0), (73, 3, 75, 1), (75, 3, 75, 3), (1, 75, 75, 1)],
)
def test_every_vector_of_a_token_is_counted(plain: TextEncoder, before: int, vectors: int, kept: int, cut: int) -> None:
    encoder = text.with_embeddings(plain, [learned("<my-cat>", vectors)])
    tokens = text.tokenize(encoder, "dog " * before + "<my-cat>")
    assert (len(tokens.ids), tokens.kept, tokens.cut) == (77, kept, cut)


def test_the_encoder_given_stays_as_it_is_and_is_shared_but_for_the_table(plain: TextEncoder) -> None:
    before = {key: (value.data_ptr(), value.clone()) for key, value in plain.model.state_dict().items()}
    prompt = "a <my-cat>, a dog"
    ids = text.tokenize(plain, prompt).ids
    encoder = text.with_embeddings(plain, [learned("<my-cat>", 3)])

    after = encoder.model.state_dict()
    table = "embeddings.token_embedding.weight"
    assert torch.equal(after[table][:49408], before[table][1])
    assert torch.equal(after[table][49408:], learned("<my-cat>", 3).vectors)
    assert [key for key, value in after.items() if value.data_ptr() != before[key][0]] == [table]
    assert (encoder.model.config.vocab_size, plain.model.config.vocab_size) == (49411, 49408)
    assert (len(encoder.tokenizer), len(plain.tokenizer)) == (49411, 49408)

    assert text.tokenize(plain, prompt).ids == ids
    assert all(torch.equal(value, before[key][1]) for key, value in plain.model.state_dict().items())
    assert text.tokenize(encoder, "a dog").ids == text.tokenize(plain, "a dog").ids


def test_tokens_may_be_added_to_those_learned_before(plain: TextEncoder) -> None:
    encoder = text.with_embeddings(text.with_embeddings(plain, [learned("<a>", 2)]), [learned("<b>", 2)])
    assert text.tokenize(encoder, "<b><a>").ids[1:5] == (49410, 49411, 49408, 49409)


def test_a_table_longer_than_the_vocabulary_keeps_its_rows(tmp_path: Path) -> None:
    folder = models.write_sd1(tmp_path / "sd1")
    key = "embeddings.token_embedding.weight"
    models.edit_weights(folder / "text_encoder", lambda w: w | {key: torch.cat([w[key], torch.ones(3, 16)])})
    models.edit_json(folder / "text_encoder" / "config.json", vocab_size=49411)
    encoder = load_text(folder, device=torch.device("cpu"), dtype=torch.float32)
    taught = text.with_embeddings(encoder, [learned("<my-cat>", 2)])
    assert text.tokenize(taught, "<my-cat>").ids[1:3] == (49411, 49412)
    assert torch.equal(taught.model.get_input_embeddings().weight[49411:], learned("<my-cat>", 2).vectors)


def test_the_vectors_take_the_type_of_the_table(sd1: Path) -> None:
    half = load_text(sd1, device=torch.device("cpu"), dtype=torch.float16)
    assert text.with_embeddings(half, [learned("<my-cat>")]).model.get_input_embeddings().weight.dtype is torch.float16
    with pytest.raises(NumericalError, match=r"<my-cat> are not finite in torch\.float16"):
        text.with_embeddings(half, [Embedding("<my-cat>", torch.full((1, 16), 1e6))])


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["puppy"], "the token puppy is in the vocabulary already; name another"),
        (["Puppy"], "the token Puppy is in the vocabulary already"),
        (["<|endoftext|>"], "is in the vocabulary already"),
        (["!"], "the token ! is in the vocabulary already"),
        (["<cat>", "<dog>", "<cat>"], "the token <cat> is given twice; name another"),
        (["<cat>", "<CAT>"], "the token <CAT> is given twice"),
        (["<cat>_1", "<cat>"], "the token <cat>_1 is given twice"),
    ],
)
def test_a_token_that_is_known_is_refused(plain: TextEncoder, tokens: list[str], said: str) -> None:
    with pytest.raises(InputError) as caught:
        text.with_embeddings(plain, [learned(token, 2) for token in tokens])
    assert said in str(caught.value)


def test_vectors_of_another_width_are_refused(plain: TextEncoder) -> None:
    with pytest.raises(InputError, match=r"vectors of <my-cat> have shape \(2, 17\); expected is a width of 16"):
        text.with_embeddings(plain, [Embedding("<my-cat>", torch.ones(2, 17))])
