"""Prompts become the tokens and the context that diffusers' own pipeline would make of them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdcli.errors import InputError, NumericalError
from sdcli.pipeline import text, vocabulary
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


# Prompts: chunks, weights, swapped words.


@torch.no_grad()
def test_a_prompt_of_one_chunk_without_weights_has_the_context_of_a_caption(
    both: tuple[TextEncoder, StableDiffusionPipeline],
) -> None:
    encoder, _ = both
    for prompt in ("", "a picture of a puppy", "a :) dog", "dog " * 75):
        context = text.encode_chunks(encoder, [text.read(encoder, prompt)])
        assert torch.equal(context, text.encode(encoder, [text.tokenize(encoder, prompt)]))


def test_captions_have_no_syntax_and_one_chunk(plain: TextEncoder) -> None:
    for caption in ("a (red:1.4) [dog]", "a BREAK b", r"\(a\)", "(dog:99)"):
        own = plain.tokenizer(caption, add_special_tokens=False)["input_ids"]
        assert list(text.tokenize(plain, caption).ids[1 : len(own) + 1]) == own
    assert text.tokenize(plain, "dog " * 80) == text.Tokens((49406, *[1929] * 75, 49407), kept=75, cut=5)


@torch.no_grad()
def test_chunks_are_encoded_apart_and_joined(plain: TextEncoder) -> None:
    parts = ["dog " * 75, "cat " * 75, "a picture of a puppy"]
    expected = torch.cat([text.encode(plain, [text.tokenize(plain, part)]) for part in parts], dim=1)
    for prompt in ("".join(parts), " BREAK ".join(parts)):
        context = text.encode_chunks(plain, [text.read(plain, prompt)])
        assert context.shape == (1, 3 * 77, 16)
        assert torch.allclose(context, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_weights_multiply_the_hidden_states_and_the_mean_is_restored(plain: TextEncoder) -> None:
    (plainly,) = text.encode(plain, [text.tokenize(plain, "a red apple")]) + 0.5  # a mean that is not near 0
    weights = torch.ones(77)
    weights[2] = 1.4
    expected = plainly * weights[:, None]
    expected = expected * (plainly.mean() / expected.mean())
    assert torch.allclose(text.weighted(plainly[None], weights[None])[0], expected, rtol=0, atol=1e-6)

    context = text.encode_chunks(plain, [text.read(plain, "a (red:1.4) apple")])
    hidden = text.encode(plain, [text.tokenize(plain, "a red apple")])
    assert torch.equal(context, text.weighted(hidden, weights[None]))
    assert not torch.equal(context[0, 2], hidden[0, 2])


def test_a_chunk_without_weights_beside_one_with_them_stays_bit_equal() -> None:
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)) + 1
    found = text.weighted(hidden, torch.tensor([[1.0] * 5, [1.0, 2.0, 1.0, 1.0, 1.0]]))
    assert torch.equal(found[0], hidden[0])
    assert found[1].mean() == pytest.approx(hidden[1].mean())


@pytest.mark.parametrize("mean", [0.0, 0.01, -0.01])
def test_a_mean_near_zero_neither_blows_the_states_up_nor_turns_them_round(mean: float) -> None:
    hidden = torch.tensor([[[1.0], [-1.0], [3 * mean]]])
    weights = torch.tensor([[1.0, 1.2, 1.0]])
    assert torch.equal(text.weighted(hidden, weights), hidden * weights[..., None])


def test_weights_keep_half_precision(sd1: Path) -> None:
    half = load_text(sd1, device=torch.device("cpu"), dtype=torch.bfloat16)
    with torch.no_grad():
        assert text.encode_chunks(half, [text.read(half, "a (dog:1.3)")]).dtype is torch.bfloat16


@torch.no_grad()
def test_a_word_swapped_by_itself_changes_no_bit(plain: TextEncoder) -> None:
    prompt = "a picture of a (puppy:1.2)"
    expected = text.encode_chunks(plain, [text.read(plain, prompt)])
    for terms in ([("puppy", 1.0)], [("puppy", 1.0), ("cat", 0.0)], [("puppy", 0.5), ("puppy", 0.5)]):
        encoder = swapped(plain, "puppy", terms)
        assert encoder.swaps
        assert torch.equal(text.encode_chunks(encoder, [text.read(encoder, prompt)]), expected)


@torch.no_grad()
def test_a_word_swapped_by_another_is_that_other_word(plain: TextEncoder) -> None:
    encoder = swapped(plain, "puppy", [("cat", 1.0)])
    expected = text.encode_chunks(plain, [text.read(plain, "a cat, a dog")])
    assert torch.equal(text.encode_chunks(encoder, [text.read(encoder, "a puppy, a dog")]), expected)
    assert encoder.model is plain.model
    back = text.without_swaps(encoder)
    assert text.read(back, "a puppy") == text.read(plain, "a puppy")


@torch.no_grad()
def test_a_sum_of_vectors_is_fed_where_the_word_stands(plain: TextEncoder) -> None:
    encoder = swapped(plain, "puppy", [("puppy", 0.25), ("cat", 2.0)])
    table = plain.model.get_input_embeddings().weight
    fed = text.walk_through(encoder, "a puppy")["token_embedding"]
    assert torch.allclose(fed[0, 2], 0.25 * table[6829] + 2 * table[2368], rtol=0, atol=1e-7)
    assert torch.equal(fed[0, 1], table[320])
    assert len(plain.model.get_input_embeddings().weight) == 49408


def test_a_sum_that_the_type_cannot_hold_is_refused(sd1: Path) -> None:
    half = load_text(sd1, device=torch.device("cpu"), dtype=torch.float16)
    half = text.with_embeddings(half, [Embedding("<big>", torch.full((1, 16), 6e4))])
    with pytest.raises(NumericalError, match=r"the vectors of --mix are not finite in torch\.float16"):
        swapped(half, "<big>", [("<big>", 2.0)])


def swapped(encoder: TextEncoder, word: str, terms: list[tuple[str, float]]) -> TextEncoder:
    return text.with_swaps(encoder, vocabulary.with_swap(encoder.vocabulary, "--mix", word, terms).swaps)


# What the encoder does, in steps.


@torch.no_grad()
def test_token_and_position_embeddings_sum_to_the_encoders_own(
    both: tuple[TextEncoder, StableDiffusionPipeline],
) -> None:
    encoder, pipe = both
    steps = text.walk_through(encoder, "A picture of a puppy BREAK a cat")
    ids = torch.tensor([text.tokenize(encoder, prompt).ids for prompt in ("A picture of a puppy", "a cat")])
    assert torch.equal(steps["input_embedding"], pipe.text_encoder.embeddings(ids))
    assert torch.equal(steps["token_embedding"] + steps["position_embedding"], steps["input_embedding"])
    assert steps["position_embedding"].shape == (77, 16)
    assert steps["context"].shape == (1, 154, 16)


def encoded(encoder: TextEncoder, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Vectors (N, 77, D) through all layers under a mask (77, 77); the model takes ids alone and makes its own."""
    hidden = inputs
    for layer in encoder.model.encoder.layers:
        hidden = layer(hidden, mask[None, None])
    normed: torch.Tensor = encoder.model.final_layer_norm(hidden)
    return normed


@torch.no_grad()
def test_our_own_mask_and_forward_give_the_models_output(both: tuple[TextEncoder, StableDiffusionPipeline]) -> None:
    encoder, pipe = both
    ids = torch.tensor([text.tokenize(encoder, prompt).ids for prompt in PROMPTS[:5]])
    inputs = text.token_embeddings(encoder, ids) + text.position_embeddings(encoder)
    output = encoded(encoder, inputs, text.causal_mask(77))
    assert torch.allclose(output, pipe.text_encoder(ids).last_hidden_state, rtol=0, atol=1e-6)
    unmasked = encoded(encoder, inputs, torch.zeros(77, 77))
    assert not torch.allclose(output, unmasked, rtol=0, atol=1e-3)


def test_the_mask_hides_what_comes_later() -> None:
    least = torch.finfo(torch.float32).min
    expected = torch.tensor([[0, least, least], [0, 0, least], [0, 0, 0]])
    assert torch.equal(text.causal_mask(3), expected)
    assert text.causal_mask(77)[0, 1] == pytest.approx(-3.4028e38, rel=1e-4)


# Layers left out.


@torch.no_grad()
def test_layers_left_out_give_the_hidden_states_of_transformers_after_the_final_layer_norm() -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(num_hidden_layers=4, bos_token_id=49406, eos_token_id=49407, **sizes)).eval()
    encoder = TextEncoder(CLIPTokenizer.from_pretrained(models.TOKENIZER), model)
    tokens = [text.tokenize(encoder, prompt) for prompt in PROMPTS[:4]]
    states = model(torch.tensor([one.ids for one in tokens]), output_hidden_states=True).hidden_states
    found = [text.encode(text.without_last_layers(encoder, count), tokens) for count in range(4)]
    for count, context in enumerate(found):
        assert torch.allclose(context, model.final_layer_norm(states[-(count + 1)]), rtol=0, atol=1e-6)
    assert min(float((one - other).abs().max()) for one, other in combinations(found, 2)) > 0.1
    assert (len(model.encoder.layers), model.config.num_hidden_layers) == (4, 4)


@torch.no_grad()
def test_layers_may_be_left_out_before_or_after_words_are_added(sd1: Path) -> None:
    encoder = load_text(sd1, device=torch.device("cpu"), dtype=torch.float32)
    learned = [Embedding("<my-cat>", torch.ones(1, models.CONTEXT))]
    one = text.without_last_layers(text.with_embeddings(encoder, learned), 1)
    other = text.with_embeddings(text.without_last_layers(encoder, 1), learned)
    contexts = [text.encode_chunks(each, [text.read(each, "a (<my-cat>:1.2)")]) for each in (one, other)]
    assert torch.equal(*contexts)
    kept = {id(parameter) for parameter in encoder.model.parameters()}
    assert sum(id(parameter) not in kept for parameter in one.model.parameters()) == 1  # the table of tokens
