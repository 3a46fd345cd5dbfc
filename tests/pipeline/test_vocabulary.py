"""Prompts become weighted rows of the token table, in chunks, without torch and without weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sdcli import store
from sdcli.errors import InputError, SdcliWarning, UsageError
from sdcli.pipeline import vocabulary
from sdcli.pipeline.vocabulary import Vocabulary, load_vocabulary, read, with_swap, with_tokens
from tests import models

BEGIN, END = 49406, 49407
A, PICTURE, OF, PUPPY, CAT, DOG = 320, 1674, 539, 6829, 2368, 1929


@pytest.fixture(scope="module")
def words(sd1: Path) -> Vocabulary:
    return load_vocabulary(sd1)


def rows(words: Vocabulary, prompt: str) -> list[list[int]]:
    return [[row for piece in chunk for row in piece.rows] for chunk in read(words, prompt).chunks]


def weights(words: Vocabulary, prompt: str) -> list[float]:
    return [piece.weight for chunk in read(words, prompt).chunks for piece in chunk]


def test_the_articles_prompt_has_the_articles_ids(words: Vocabulary) -> None:
    (chunk,) = read(words, "A picture of a puppy").chunks
    assert vocabulary.chunk_rows(words, chunk) == (BEGIN, A, PICTURE, OF, A, PUPPY, *[END] * 71)
    assert vocabulary.chunk_weights(words, chunk) == (1.0,) * 77


def test_weights_go_with_the_pieces(words: Vocabulary) -> None:
    assert rows(words, "a (puppy:1.4), [cat]") == [[A, PUPPY, 267, CAT]]
    assert weights(words, "a (puppy:1.4), [cat]") == pytest.approx([1, 1.4, 1, 1 / 1.1])
    (chunk,) = read(words, "a (puppy:1.4)").chunks
    assert vocabulary.chunk_weights(words, chunk) == (1.0, 1.0, 1.4, *[1.0] * 74)


def test_a_word_may_be_weighted_in_part(words: Vocabulary) -> None:
    assert rows(words, "pup(py:1.2)") == [[*rows(words, "pup")[0], *rows(words, "py")[0]]]


@pytest.mark.parametrize("prompt", ["a :) puppy", "a dog (", "(:3", "1:2) a", "é\u0301 小狗 🐶 \x00", "a  \n b"])
def test_a_prompt_without_syntax_has_the_tokenizers_own_ids(words: Vocabulary, prompt: str) -> None:
    own = words.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert rows(words, prompt) == [own]


@pytest.mark.parametrize(("count", "chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_seventy_five_pieces_make_a_chunk(words: Vocabulary, count: int, chunks: int) -> None:
    assert read(words, "dog " * count).counts() == {"kept": count, "cut": 0, "chunks": chunks}


def test_more_than_sixteen_chunks_are_cut_with_a_warning(words: Vocabulary) -> None:
    found = read(words, "dog " * 1203)
    assert found.counts() == {"kept": 1200, "cut": 3, "chunks": 16}
    with pytest.warns(SdcliWarning, match="the negative prompt is too long: the last 3 of 1203 tokens are not used"):
        vocabulary.warn_of_cut(found, "negative prompt")


def test_a_break_pads_the_chunk(words: Vocabulary) -> None:
    assert rows(words, "a dog BREAK a cat") == [[A, DOG], [A, CAT]]


def test_many_spans_are_tokenized_at_once(words: Vocabulary) -> None:
    assert rows(words, "(dog:1.2) cat " * 30) == [[DOG, CAT] * 30]


def test_a_learned_token_is_not_torn_between_chunks(words: Vocabulary) -> None:
    taught = with_tokens(words, [("<my-cat>", 4)])
    first, second = rows(taught, "dog " * 73 + "(<my-cat>:1.2)")
    assert (len(first), second) == (73, [49408, 49409, 49410, 49411])
    assert rows(taught, "dog " * 71 + "<my-cat>")[0][71:] == second
    assert words.learned == {} and len(words.tokenizer) == 49408


# Swapped words.


def test_another_words_rows_stand_where_the_word_stood(words: Vocabulary) -> None:
    swapped = with_swap(words, "--replace puppy=cat", "puppy", [("cat", 1.0)])
    assert rows(swapped, "a (Puppy:1.2) and a puppy") == [[A, CAT, 537, A, CAT]]
    assert weights(swapped, "a (puppy:1.2)") == [1, 1.2]
    assert swapped.rows == words.rows
    assert rows(swapped, "puppyish pup") == rows(words, "puppyish pup")


def test_a_sum_is_a_new_row_at_the_end_of_the_table(words: Vocabulary) -> None:
    swapped = with_swap(words, "--mix", "puppy", [("puppy", 0.5), ("cat", 0.5)])
    assert rows(swapped, "a puppy, puppy cat") == [[A, 49408, 267, 49408, CAT]]
    assert (swapped.rows, swapped.swaps[0].terms) == (49409, ((0.5, (PUPPY,)), (0.5, (CAT,))))
    assert vocabulary.row_name(swapped, 49408) == "0.5 puppy</w> + 0.5 cat</w>"


def test_words_of_equally_many_tokens_are_swapped_piece_by_piece(words: Vocabulary) -> None:
    swapped = with_swap(words, "--replace", "hot dog", [("red cat", 1.0)])
    assert rows(swapped, "a hot dog, hot") == [[A, *rows(words, "red cat, hot")[0]]]
    assert rows(swapped, "a (hot) dog") == rows(words, "a red cat")  # the brackets weigh, they part no words
    assert rows(swapped, "hot BREAK dog") == rows(words, "hot BREAK dog")


def test_the_longer_of_two_words_that_begin_alike_counts(words: Vocabulary) -> None:
    swapped = with_swap(words, "--replace", "hot", [("red", 1.0)])
    swapped = with_swap(swapped, "--replace", "hot dog", [("big cat", 1.0)])
    assert rows(swapped, "hot dog, hot cat") == rows(words, "big cat, red cat")


def test_a_learned_token_may_be_swapped_and_stand_for_a_word(words: Vocabulary) -> None:
    taught = with_tokens(words, [("<my-cat>", 2)])
    assert rows(with_swap(taught, "--replace", "red dog", [("<my-cat>", 1.0)]), "a red dog") == [[A, 49408, 49409]]
    back = with_swap(taught, "--replace", "<my-cat>", [("red dog", 1.0)])
    assert rows(back, "a <my-cat>") == rows(words, "a red dog")
    mixed = with_swap(taught, "--mix", "<my-cat>", [("<my-cat>", 0.5), ("red dog", 0.5)])
    assert rows(mixed, "<my-cat>") == [[49410, 49411]]


@pytest.mark.parametrize(
    ("word", "terms", "said"),
    [
        ("puppy", [("hot dog", 1.0)], "--x: puppy is 1 token, hot dog is 2 tokens; words can be swapped"),
        ("hot dog", [("hot dog", 0.5), ("cat", 0.5)], "--x: hot dog is 2 tokens, cat is 1 token"),
        ("puppy", [(" ", 1.0)], "--x: puppy is 1 token,   is 0 tokens"),
        (" ", [(" ", 1.0)], "--x:   is 0 tokens"),
        ("cat", [("dog", 1.0)], "--x: cat is swapped already"),
    ],
)
def test_words_that_cannot_be_swapped_are_refused(
    words: Vocabulary, word: str, terms: list[tuple[str, float]], said: str
) -> None:
    swapped = with_swap(words, "--first", "cat", [("puppy", 1.0)])
    with pytest.raises(UsageError) as caught:
        with_swap(swapped, "--x", word, terms)
    assert said in str(caught.value)


def test_a_word_that_the_prompt_lacks_is_warned_of(words: Vocabulary) -> None:
    swapped = with_swap(words, "--replace cat=dog", "cat", [("dog", 1.0)])
    vocabulary.warn_of_unused(swapped.swaps, read(swapped, "a cat"))
    with pytest.warns(SdcliWarning, match="--replace cat=dog: the prompt does not have the word, so it changes noth"):
        vocabulary.warn_of_unused(swapped.swaps, read(swapped, "a puppy"))


# Where it comes from.


@pytest.mark.parametrize(
    ("key", "value"), [("max_position_embeddings", 2), ("max_position_embeddings", "77"), ("vocab_size", -1)]
)
def test_a_config_that_makes_no_sense_is_refused(model: Path, key: str, value: object) -> None:
    models.edit_json(model / "text_encoder" / "config.json", **{key: value})
    with pytest.raises(InputError, match=f"text_encoder: {key} is {value!r}"):
        load_vocabulary(model)


def test_a_config_that_makes_no_sense_is_shown_in_part(model: Path) -> None:
    models.edit_json(model / "text_encoder" / "config.json", vocab_size=[1] * 5000)
    with pytest.raises(InputError, match=r"vocab_size is \[1, 1, 1, 1, 1, 1, \.\.\.\];"):
        load_vocabulary(model)


def test_a_tokenizer_with_more_pieces_than_the_table_has_rows_is_refused(model: Path) -> None:
    models.edit_json(model / "text_encoder" / "config.json", vocab_size=1000)
    with pytest.raises(InputError, match=r"has 49,408 pieces, the text encoder knows 1,000"):
        load_vocabulary(model)


def test_reading_a_prompt_imports_no_torch() -> None:
    code = "import sys; from sdcli.pipeline import vocabulary as v; from pathlib import Path\n"
    code += "found = v.read(v.load_vocabulary(Path(sys.argv[1])), 'a (puppy:1.2)')\n"
    code += "sys.exit('torch' in sys.modules or found.counts() != {'kept': 2, 'cut': 0, 'chunks': 1})"
    done = subprocess.run([sys.executable, "-c", code, store.BUILTIN_FOLDER], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
