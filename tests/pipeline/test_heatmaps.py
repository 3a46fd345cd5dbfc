"""Heat maps show what the numbers are."""

from __future__ import annotations

import numpy as np
import torch

from sdcli.pipeline.heatmaps import FRAME, MARGIN, NEGATIVE, POSITIVE, Panel, full_colour, picture

LABELS = [["first", "second"]]


def colours(values: torch.Tensor) -> set[tuple[int, ...]]:
    """All colours in the picture of a matrix."""
    image = picture([[Panel("", values)]], [[""] * len(values)])
    return {tuple(colour) for _, colour in image.getcolors(1 << 20)} - {FRAME}


def test_red_is_above_zero_blue_below_and_white_nothing() -> None:
    found = picture([[Panel("", torch.tensor([[1.0, -1.0, 0.0]]))]], [[""]])
    pixels = np.asarray(found)
    row = pixels[-20]  # through the panel, above the margin
    seen = [tuple(colour) for colour in row[::5].tolist()]
    changes = [one for i, one in enumerate(seen) if i == 0 or one != seen[i - 1]]
    assert [one for one in changes if one not in ((255, 255, 255), FRAME)] == [POSITIVE, NEGATIVE]


def test_half_the_full_colour_is_halfway_to_white() -> None:
    halfway = tuple(round(255 + 0.5 * (end - 255)) for end in POSITIVE)
    assert halfway in colours(torch.tensor([[1.0] * 99 + [0.5]]))


def test_full_colour_leaves_out_a_few_large_numbers_and_is_never_zero() -> None:
    values = torch.ones(1000)
    values[0] = 1e30
    assert full_colour(values) == 1.0
    assert full_colour(torch.zeros(3, 3)) == 1.0
    assert full_colour(torch.full((2, 2), -3.0)) == 3.0


def test_a_masks_least_number_is_a_colour_like_others() -> None:
    least = torch.finfo(torch.float32).min
    assert NEGATIVE in colours(torch.full((4, 4), least).triu(1))


def test_labels_of_any_letters_and_length_are_drawn() -> None:
    image = picture([[Panel("t", torch.ones(2, 3))]], [["小狗 🐶" * 10, "x" * 1000]])
    assert image.size == picture([[Panel("t", torch.ones(2, 3))]], LABELS).size


def test_groups_stand_below_one_another() -> None:
    panel = Panel("t", torch.ones(2, 3))
    one, two = picture([[panel]], LABELS), picture([[panel], [panel]], LABELS * 2)
    assert (two.width, two.height) == (one.width, 2 * one.height - MARGIN)
