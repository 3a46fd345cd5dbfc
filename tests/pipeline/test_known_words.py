"""Words that a model saw, and those of a prompt that it did not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdcli.errors import InputError, SdcliWarning
from sdcli.pipeline import known_words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a puppy", ["a", "puppy"]),
        ("A Puppy, a PUPPY!", ["a", "puppy"]),
        ("long-necked dinosaur", ["long", "necked", "dinosaur"]),
        ("baby's bottle, baby\u2019s bottle", ["baby's", "bottle"]),
        ("a caf\u00e9 at 7_8", ["a", "caf\u00e9", "at", "7", "8"]),
        ("\u72ac", ["\u72ac"]),
        (" .,!'' ", []),
    ],
)
def test_words_are_what_is_written_between_other_signs(text: str, expected: list[str]) -> None:
    assert known_words.words(text) == expected


def test_what_is_written_is_read(tmp_path: Path) -> None:
    known_words.write(tmp_path, ["puppy", "a", "caf\u00e9", "a"])
    assert (tmp_path / "words.txt").read_text("utf-8") == "a\ncaf\u00e9\npuppy\n"
    assert known_words.read(tmp_path) == {"a", "caf\u00e9", "puppy"}


def test_a_list_that_changed_is_read_again(tmp_path: Path) -> None:
    known_words.write(tmp_path, ["puppy"])
    assert known_words.read(tmp_path) == {"puppy"}
    known_words.write(tmp_path, ["kitty"])  # as long: the time alone tells
    os.utime(tmp_path / "words.txt", ns=(1, 1))
    assert known_words.read(tmp_path) == {"kitty"}


def test_a_folder_without_a_list_and_a_file_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert known_words.read(tmp_path) is None
    assert known_words.read(tmp_path / "model.safetensors") is None


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes(b"a\xff\n")
    with pytest.raises(InputError, match=r"words\.txt: is not UTF-8"):
        known_words.read(tmp_path)


def test_a_list_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_text("puppy\n")
    (tmp_path / "model" / "words.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"words\.txt"):
        known_words.read(tmp_path / "model")


def test_a_list_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_words, "MAX_BYTES", 4)
    (tmp_path / "words.txt").write_text("puppy\n")
    with pytest.raises(InputError, match=r"words\.txt"):
        known_words.read(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a puppy", ()),
        ("a zyzzyva and a quokka, zyzzyva", ("zyzzyva", "and", "quokka")),
        ("a (puppy:1.3) [on] a BREAK puppy", ("on",)),
        ("a <My-Cat>", ()),
    ],
)
def test_unknown_are_the_words_that_are_not_in_the_list(prompt: str, expected: tuple[str, ...]) -> None:
    assert known_words.unknown(frozenset({"a", "puppy"}), prompt, ["<my-cat>"]) == expected


@pytest.mark.parametrize(
    ("token", "expected"), [("cat", ("zyzzyva",)), ("zyzzyva", ()), ("zyz", ("zyzzyva",)), ("<zyz", ("zyzzyva",))]
)
def test_a_learned_token_in_a_word_leaves_the_word_whole(token: str, expected: tuple[str, ...]) -> None:
    assert known_words.unknown(frozenset({"a", "catalog"}), "a catalog, ZYZZYVA <zyz", [token, "<zyz"]) == expected


def test_of_a_model_that_does_not_say_nothing_is_unknown() -> None:
    assert known_words.unknown(None, "a zyzzyva") == ()


def test_the_warning_names_the_first_five_words(recwarn: pytest.WarningsRecorder) -> None:
    known_words.warn_of_unknown(("one", "two"), "prompt")
    known_words.warn_of_unknown(tuple("abcdefg"), "negative prompt")
    known_words.warn_of_unknown((), "prompt")
    assert [str(one.message) for one in recwarn if one.category is SdcliWarning] == [
        "the prompt has words that this model never saw while it learned: one, two",
        "the negative prompt has words that this model never saw while it learned: a, b, c, d, e and 2 more",
    ]
