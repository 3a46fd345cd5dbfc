"""Wildcards: what they are, that a seed draws the same of them everywhere, and that every string is a prompt."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.errors import UsageError
from sdcli.pipeline import wildcards
from sdcli.pipeline.prompt import parse
from sdcli.pipeline.wildcards import template

SEEDS = range(200)
HOSTILE = st.text(st.sampled_from("{}|\\()[]:1.ab \n") | st.characters(), max_size=60)


def drawn(text: str) -> set[str]:
    """All that some seeds draw of a prompt."""
    return {template(text).drawn(seed, "prompt") for seed in SEEDS}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{a|b|c}", {"a", "b", "c"}),
        ("a {red|blue} apple", {"a red apple", "a blue apple"}),
        ("{a|}", {"a", ""}),
        ("{|}x{||}", {"x"}),
        ("{ a | b}", {" a ", " b"}),
        ("{a {b|c}|d}", {"a b", "a c", "d"}),
        ("{{{a|b}|c}|d}", {"a", "b", "c", "d"}),
        ("{(red:1.2)|blue}", {"(red:1.2)", "blue"}),
        ("({red|blue}:1.3)", {"(red:1.3)", "(blue:1.3)"}),
        ("{a[|]b}", {"a[", "]b"}),
        (r"{a\|b|c}", {r"a\|b", "c"}),
        (r"{\{|\}}", {r"\{", r"\}"}),
        (r"{a\\|b}", {r"a\\", "b"}),
        ("{a\nb|c}", {"a\nb", "c"}),
        # Braces without a bar of their own hold those that have one.
        ("{a {b|c}}", {"{a b}", "{a c}"}),
        ("{a|b} | {c}", {"a | {c}", "b | {c}"}),
        ("{ {a|b}", {"{ a", "{ b"}),
        ("{a|b}}|", {"a}|", "b}|"}),
    ],
)
def test_one_of_the_choices_is_drawn(text: str, expected: set[str]) -> None:
    assert drawn(text) == expected


@pytest.mark.parametrize(
    "text", ["", "{", "}", "|", "{}", "{a}", "a|b", "{a|b", "a|b}", "}a|b{", "{a}|{b}", r"\{a|b\}", r"{a\|b}", "{{a}}"]
)
def test_what_is_no_wildcard_stays_as_it_is(text: str) -> None:
    assert drawn(text) == {text}
    assert not template(text).has_wildcards


def test_every_choice_is_as_likely_as_the_others() -> None:
    counts = Counter(template("{a|b|b|c}").drawn(seed, "prompt") for seed in range(4000))
    assert {choice: round(count / 1000) for choice, count in counts.items()} == {"a": 1, "b": 2, "c": 1}


def test_wildcards_are_drawn_apart_from_each_other_and_of_prompt_and_negative() -> None:
    pairs = Counter(template("{0|1} {0|1} {{0|1}|{0|1}}").drawn(seed, "prompt") for seed in range(4000))
    assert {round(count / 500) for count in pairs.values()} == {1} and len(pairs) == 8
    both = Counter((p.prompt, p.negative) for p in (_drawn_both("{0|1}", seed) for seed in range(4000)))
    assert {round(count / 1000) for count in both.values()} == {1} and len(both) == 4


def test_what_a_seed_draws_is_for_ever() -> None:
    """Records of pictures depend on it, on every machine; worked out by sha256sum in a shell."""
    text = "{a|b|c|d|e|f|g|h} {a|b|c|d|e|f|g|h}"
    assert [template(text).drawn(seed, "prompt") for seed in (0, 1, 2**64 - 1)] == ["a f", "b d", "c d"]
    assert template(text).drawn(0, "negative") == "h a"


def test_the_text_around_a_wildcard_changes_nothing_of_what_it_draws() -> None:
    for seed in SEEDS:
        alone = template("{a|b|c}").drawn(seed, "prompt")
        assert template("{xyz} | an {a|b|c}, {d|e}").drawn(seed, "prompt")[11] == alone


def test_the_templates_are_told_only_where_there_was_something_to_draw() -> None:
    assert _drawn_both("a dog", 3).facts() == {"prompt": "a dog", "negative": "a dog"}
    found = wildcards.prompts(template("a {b|b}"), template("{c|c}"), 3)
    texts = {"prompt_template": "a {b|b}", "negative_template": "{c|c}"}
    assert found.facts() == {"prompt": "a b", "negative": "c", **texts}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", True), (" {|a} ", True), ("{a|b}", False), ("{a|{b| }}", True), ("{|}{a|b}", False), ("{a|}{|b}", True)],
)
def test_a_prompt_that_may_become_blank_is_known(text: str, expected: bool) -> None:
    assert template(text).may_be_blank is expected
    assert any(not one.strip() for one in drawn(text)) is expected


@given(HOSTILE, st.integers(0, 2**64 - 1))
def test_every_string_is_a_prompt_and_what_is_drawn_is_drawn_as_itself(text: str, seed: int) -> None:
    one = template(text)
    found = one.drawn(seed, "prompt")
    assert template(found).drawn(seed, "prompt") == found and not template(found).has_wildcards
    assert len(found) <= len(text) and (one.has_wildcards or found == text)
    assert one.may_be_blank or found.strip()
    for prompt in (found, one.choices):
        with suppress(UsageError):  # a weight out of range
            parse(prompt)


@given(st.lists(HOSTILE.filter(lambda text: not set(text) & set("{}|\\")), min_size=2, max_size=5), st.integers(0))
def test_of_choices_without_syntax_exactly_one_is_drawn(choices: list[str], seed: int) -> None:
    assert template(f"<{{{'|'.join(choices)}}}>").drawn(seed, "prompt")[1:-1] in choices


@pytest.mark.parametrize("text", ["{", "}", "|", "{|", "{|}", "{a|", "\\", "\\{", "{|{", "}{|"])
def test_no_prompt_takes_long(text: str) -> None:
    half = 60_000 // len(text)
    began = time.process_time()
    for long in (text * half, text * half + "}" * half):
        one = template(long)
        one.drawn(7, "prompt")
        assert one.may_be_blank in (True, False) and one.choices
    assert time.process_time() - began < 2


def _drawn_both(text: str, seed: int) -> wildcards.Prompts:
    return wildcards.prompts(template(text), template(text), seed)
