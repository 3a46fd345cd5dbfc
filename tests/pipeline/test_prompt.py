"""Prompt syntax: what counts how much, what begins a chunk, and that nothing anybody types takes long."""

from __future__ import annotations

import math
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.errors import UsageError
from sdcli.pipeline.prompt import MAX_CHUNKS, Chunks, Piece, check, chunked, parse


def spans(prompt: str) -> list[tuple[str, float]]:
    """The spans of a prompt that has no BREAK."""
    (section,) = parse(prompt)
    return [(span.text, pytest.approx(span.weight)) for span in section]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a dog", [("a dog", 1)]),
        ("a (red:1.4) apple", [("a ", 1), ("red", 1.4), (" apple", 1)]),
        ("(a)", [("a", 1.1)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("((a)) [[b]]", [("a", 1.21), (" ", 1), ("b", 1 / 1.21)]),
        ("(a (b:2) c:1.5)", [("a ", 1.5), ("b", 3), (" c", 1.5)]),
        ("[(a)]", [("a", 1)]),
        ("((a):1.3)", [("a", 1.43)]),
        ("(a: 1.2 )(b:.5)(c:2.)(d:+1.2)(e:0)", [("a", 1.2), ("b", 0.5), ("c", 2), ("d", 1.2), ("e", 0)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1_0)", [("a:1_0", 1.1)]),
        ("(from here to: infinity)(b:nan)(c:-inf)", [("from here to: infinityb:nanc:-inf", 1.1)]),
        ("(a:1e1)(b:\u0661.\u0665)", [("a", 10), ("b", 1.5)]),
        ("[a:1.2]", [("a:1.2", 1 / 1.1)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("()[](:1.2)", []),
        ("(a\n\tb:1.2)", [("a\n\tb", 1.2)]),
    ],
)
def test_brackets_weigh_what_is_in_them(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert spans(prompt) == expected


@pytest.mark.parametrize(
    "prompt",
    ["(", ")", "]", "[", "a :) b", "a ( b", ")(", "][", "(a", "a]", "((", "(a]", "1.2)", ":1.2)", "\\", "a\\b"],
)
def test_what_is_no_syntax_is_one_span_of_just_its_text(prompt: str) -> None:
    assert spans(prompt) == [(prompt, 1)]


@given(st.text().filter(lambda text: not set(text) & set("()[]\\") and "BREAK" not in text))
def test_a_prompt_without_brackets_is_its_own_text(prompt: str) -> None:
    assert spans(prompt) == ([(prompt, 1)] if prompt else [])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (r"\(a\)", [("(a)", 1)]),
        (r"\[a\]", [("[a]", 1)]),
        (r"(\(a\):1.2)", [("(a)", 1.2)]),
        (r"(a\:1.2)", [("a\\", 1.2)]),
        (r"(a\)", [("(a)", 1)]),
        (r"\\(a)", [("\\", 1), ("a", 1.1)]),
        (r"\\\(a)", [("\\(a)", 1)]),
        (r"a\n", [("a\\n", 1)]),
        (r"\{a\|b\}", [("{a|b}", 1)]),
        (r"{a|b}(\|:1.2)\\{", [("{a|b}", 1), ("|", 1.2), ("\\{", 1)]),
    ],
)
def test_a_backslash_makes_a_bracket_or_a_brace_plain(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert spans(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("(a (b)", [("(a ", 1), ("b", 1.1)]),
        ("(a) b)", [("a", 1.1), (" b)", 1)]),
        ("(a [b) c]", [("a [b", 1.1), (" c]", 1)]),
        ("[(a])", [("(a", 1 / 1.1), (")", 1)]),
    ],
)
def test_a_bracket_without_its_partner_is_plain_text(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert spans(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a BREAK b", [["a "], [" b"]]),
        ("BREAK", [[], []]),
        ("a BREAK BREAK b", [["a "], [" "], [" b"]]),
        ("a,BREAK,b", [["a,"], [",b"]]),
        ("BREAKFAST a_BREAK break", [["BREAKFAST a_BREAK break"]]),
        ("a (BREAK b)", [["a "], [" b"]]),
    ],
)
def test_break_in_capitals_as_a_word_begins_a_section(prompt: str, texts: list[list[str]]) -> None:
    assert [[span.text for span in section] for section in parse(prompt)] == texts


def test_a_weight_holds_across_a_break() -> None:
    assert [[span.weight for span in section] for section in parse("(a BREAK b:1.3)")] == [[1.3], [1.3]]


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("(a:10.1)", "the weight 10.1 in the prompt: out of range; it must lie in 0..10"),
        ("(a:-1)", "the weight -1 "),
        ("(a:1e400)", "the weight 1e400 "),
        ("((a:5):5)", "the weight 25 of 'a' "),
        ("(" * 25 + "a" + ")" * 25, "the weight 10.8347 of 'a' "),
        ("(a:" + "9" * 100_000 + ")", "the weight 9999"),
        ("(" * 100_000 + "a" + ")" * 100_000, "the weight inf of 'a' "),
    ],
)
def test_a_weight_out_of_range_is_refused(prompt: str, named: str) -> None:
    for refuse in (parse, check):
        with pytest.raises(UsageError) as caught:
            refuse(prompt)
        assert named in str(caught.value)
        assert len(str(caught.value)) < 200


@given(st.text(alphabet="()[]\\:.19 aBREAK\n", max_size=60))
def test_every_string_parses_or_is_refused_for_its_weight(prompt: str) -> None:
    try:
        sections = parse(prompt)
    except UsageError:
        with pytest.raises(UsageError):
            check(prompt)
        return
    check(prompt)
    whole = "".join(span.text for section in sections for span in section)
    assert len(whole) <= len(prompt)
    assert all(math.isfinite(span.weight) for section in sections for span in section)
    # What is left out is syntax alone.
    assert sorted(set(whole) - set("()[]\\:.19+ BREAK\n")) == sorted(set(prompt) & {"a"})


@pytest.mark.parametrize(
    "unit",
    ["(", ")", "[", "()", "(a)", "(a:1.2)", "([", "((]", ":", " ", "\\", "\\(", "BREAK ", "(:", ":1)", "1", "a" * 10],
)
def test_the_cost_is_linear_in_the_length(unit: str) -> None:
    """20,000 of anything are parsed within a second, where a quadratic parser takes a minute."""
    for prompt in (unit * 20_000, "(x:" + unit * 20_000 + "y)"):
        began = time.process_time()
        with suppress(UsageError):
            parse(prompt)
        assert time.process_time() - began < 1


# Chunks.


def plain(count: int, *, first: int = 0) -> list[Piece]:
    return [Piece(i, (i,)) for i in range(first, first + count)]


def ids(found: Chunks) -> list[list[int]]:
    return [[row for piece in chunk for row in piece.rows] for chunk in found.chunks]


@pytest.mark.parametrize(("count", "chunks"), [(0, 1), (1, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
def test_pieces_go_on_in_further_chunks(count: int, chunks: int) -> None:
    found = chunked([plain(count)], 5)
    assert found.counts() == {"kept": count, "cut": 0, "chunks": chunks}
    assert [row for chunk in ids(found) for row in chunk] == list(range(count))
    assert all(len(chunk) == 5 for chunk in ids(found)[:-1])


def test_a_section_begins_a_chunk_of_its_own() -> None:
    assert ids(chunked([plain(2), plain(1, first=2)], 5)) == [[0, 1], [2]]
    assert ids(chunked([plain(5), plain(1, first=5)], 5)) == [[0, 1, 2, 3, 4], [5]]


def test_a_break_where_nothing_stands_leaves_an_empty_chunk_but_none_at_the_end() -> None:
    assert ids(chunked([plain(1), [], plain(1)], 5)) == [[0], [], [0]]
    assert ids(chunked([[], plain(1)], 5)) == [[], [0]]
    assert ids(chunked([plain(1), []], 5)) == [[0]]
    assert ids(chunked([[], []], 5)) == [[]]


def test_what_comes_after_the_last_chunk_is_cut() -> None:
    found = chunked([plain(5 * MAX_CHUNKS + 3)], 5)
    assert found.counts() == {"kept": 5 * MAX_CHUNKS, "cut": 3, "chunks": MAX_CHUNKS}
    assert [piece.id for piece in found.rest] == [5 * MAX_CHUNKS + i for i in range(3)]


def test_the_rows_of_a_piece_stay_together_where_they_fit() -> None:
    token = Piece(99, (90, 91, 92), 1.2)
    assert ids(chunked([[*plain(2), token]], 5)) == [[0, 1, 90, 91, 92]]
    assert ids(chunked([[*plain(3), token, *plain(1)]], 5)) == [[0, 1, 2], [90, 91, 92, 0]]


def test_a_piece_too_long_for_any_chunk_is_torn() -> None:
    found = chunked([[*plain(1), Piece(99, tuple(range(90, 97)), 1.2)]], 5)
    assert ids(found) == [[0, 90, 91, 92, 93], [94, 95, 96]]
    assert [piece.weight for chunk in found.chunks for piece in chunk] == [1, 1.2, 1.2]


def test_empty_chunks_are_added_up_to_a_count() -> None:
    found = chunked([plain(6)], 5)
    assert ids(found.padded(4)) == [*ids(found), [], []]
    assert found.padded(2) == found
