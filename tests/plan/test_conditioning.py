"""A class is meant by its name or its index, and no model is asked for what it does not draw."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.errors import ExitCode, UsageError
from sdcli.plan.conditioning import Label, asked_label, find_class
from sdcli.specs import GenerateSpec

NAMES = ("cat", "dog", "0", "sea urchin, echinoid", "Cat", "3")
MANY = tuple(f"class {i}" for i in range(1000))


@pytest.mark.parametrize(
    ("asked", "index"),
    [("cat", 0), ("Cat", 4), ("sea urchin, echinoid", 3), ("1", 1), ("005", 5), ("0", 2), ("3", 5), ("4", 4)],
)
def test_a_name_goes_before_an_index(asked: str, index: int) -> None:
    assert find_class(asked, NAMES) == Label(index, NAMES[index])


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ("CAT", "has no such class; did you mean (cat|Cat)"),
        ("dgo", "has no such class; did you mean dog"),
        ("sea urchin", "did you mean sea urchin, echinoid"),
        ("zebra", r"'zebra': this model has no such class; there are cat, dog, .*, Cat, ... \(6 in all\)$"),
        (" cat", "did you mean"),
        ("", "has no such class"),
        ("-1", "has no such class"),
        ("1.0", "has no such class"),
        ("\u0661", "has no such class"),  # a digit, but none of ours
        ("6", r"out of range; the indices go from 0 to 5: cat, dog"),
        ("9" * 5000, "out of range"),
        ("0000000001", "out of range"),
    ],
)
def test_an_unknown_class_is_refused_with_the_closest_names(asked: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        find_class(asked, NAMES)
    assert len(str(caught.value)) < 200


@given(st.text(max_size=12))
def test_every_text_is_a_class_or_refused(asked: str) -> None:
    try:
        label = find_class(asked, NAMES)
    except UsageError:
        return
    assert label.name == NAMES[label.index]
    assert asked == label.name or (asked not in NAMES and int(asked) == label.index)


@pytest.mark.parametrize(
    ("values", "names", "label"),
    [
        ({"prompt": "a dog", "negative": "a cat"}, None, None),
        ({"class_name": "dog"}, NAMES, Label(1, "dog")),
        ({"class_name": "999", "guidance": 3.0}, MANY, Label(999, "class 999")),
        ({}, (), None),
        ({"prompt": " ", "guidance": 1.0}, (), None),
    ],
)
def test_what_a_model_draws_can_be_asked_of_it(
    values: dict[str, Any], names: tuple[str, ...] | None, label: Label | None
) -> None:
    assert asked_label(GenerateSpec(**values), names) == label


@pytest.mark.parametrize(
    ("values", "names", "what"),
    [
        ({}, None, "the prompt is empty; say what to draw"),
        ({"class_name": "dog"}, None, "--class 'dog': this model draws from a prompt; say in words"),
        ({}, NAMES, "this model draws classes, and none is named; name one with --class: cat, dog, 0"),
        ({}, MANY, r"with --class: class 0, .*, class 4, ... \(1000 in all\)"),
        ({"prompt": "a dog"}, NAMES, "the prompt 'a dog': this model reads no text; .* --class: cat, dog"),
        ({"class_name": "dog", "negative": "x"}, NAMES, "--negative 'x': this model reads no text; leave it out"),
        ({"prompt": "a dog"}, (), "the prompt 'a dog': this model reads no text; leave it out$"),
        ({"negative": "a dog"}, (), "--negative 'a dog': this model reads no text; leave it out$"),
        ({"class_name": "0"}, (), "--class '0': this model has no classes; leave it out"),
        ({"guidance": 3.0}, (), "--guidance 3: this model is unconditional, there is nothing to guide it to"),
    ],
)
def test_what_a_model_does_not_draw_is_a_usage_error(
    values: dict[str, Any], names: tuple[str, ...] | None, what: str
) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        asked_label(GenerateSpec(**values), names)
    assert caught.value.exit_code == ExitCode.USAGE
