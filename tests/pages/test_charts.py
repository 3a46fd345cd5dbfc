"""Curves that stay small, and charts whose lines and ticks stand where they belong."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.pages import charts, curves
from sdcli.pages.charts import Chart, Line, draw, number
from sdcli.pages.curves import Curve


def curve(values: list[float], first: int = 1) -> Curve:
    found = Curve()
    for step, value in enumerate(values, first):
        found.add(step, value)
    return found


def chart(values: list[float], *, last_step: int | None = None, is_dotted: bool = False) -> Chart:
    line = Line("a", curve(values, 0), 0, is_dotted=is_dotted)
    return draw("A", [line], last_step=last_step if last_step is not None else max(1, len(values) - 1))


def places(path: str) -> list[tuple[int, int]]:
    """The points of SVG path data that is made of one line."""
    numbers = [int(text) for text in re.findall(r"-?\d+", path.removesuffix("h0"))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_lines_stand_where_their_values_say() -> None:
    found = chart([0.0, 1.0, 2.0, 4.0])
    assert [tick.label for tick in found.y_ticks] == ["0", "1", "2", "3", "4"]
    assert [tick.place for tick in found.y_ticks] == [100.0, 75.0, 50.0, 25.0, 0.0]
    assert [(tick.place, tick.label) for tick in found.x_ticks] == [
        (0.0, "0"),
        (33.33, "1"),
        (66.67, "2"),
        (100.0, "3"),
    ]
    assert places(found.series[0].raw) == [(0, 1000), (667, 750), (1333, 500), (2000, 0)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.12, 0.48], "0 | 0.1 | 0.2 | 0.3 | 0.4 | 0.5"),
        ([0.81, 0.99], "0.8 | 0.85 | 0.9 | 0.95 | 1"),
        ([-0.3, 0.9], "−0.5 | 0 | 0.5 | 1"),
        ([6e-4, 0.0], "0 | 2×10⁻⁴ | 4×10⁻⁴ | 6×10⁻⁴"),
        ([1e-5, 1e-5], "4×10⁻⁶ | 6×10⁻⁶ | 8×10⁻⁶ | 10×10⁻⁶ | 12×10⁻⁶ | 14×10⁻⁶ | 16×10⁻⁶"),
        ([1000.1, 1000.3], "1,000.1 | 1,000.15 | 1,000.2 | 1,000.25 | 1,000.3"),
        ([0.0, 0.0], "−1 | −0.5 | 0 | 0.5 | 1"),
        ([0.3, 40.0], "0.5 | 1 | 2 | 5 | 10 | 20"),
        ([2e-5, 3.0], "0.0001 | 0.001 | 0.01 | 0.1 | 1"),
    ],
)
def test_ticks_are_round_numbers(values: list[float], expected: str) -> None:
    line = Line("a", curve(values), 0)
    found = draw("A", [line], last_step=10, may_be_log=0.0 not in values)
    assert " | ".join(tick.label for tick in found.y_ticks) == expected


@pytest.mark.parametrize(
    ("values", "is_log"),
    [([1.0, 9.0], False), ([1.0, 11.0], True), ([0.0, 1.0, 11.0], True), ([-1.0, 1.0, 11.0], False)],
)
def test_the_axis_is_logarithmic_where_values_span_more_than_a_decade(values: list[float], is_log: bool) -> None:
    assert ("log scale" in chart(values).notes) == is_log


def test_equal_factors_are_equally_far_apart_on_a_logarithmic_axis() -> None:
    heights = [y for _, y in places(chart([1.0, 10.0, 100.0, 1000.0]).series[0].raw)]
    gaps = [a - b for a, b in itertools.pairwise(heights)]
    assert max(gaps) - min(gaps) <= 1 and min(gaps) > 300


def test_zero_lies_at_the_foot_of_a_logarithmic_axis() -> None:
    assert places(chart([0.0, 1.0, 1000.0]).series[0].raw)[0] == (0, 1000)


def test_a_schedule_can_be_kept_from_a_logarithmic_axis_and_from_smoothing() -> None:
    falling = curve([1.0 - step / 1000 for step in range(1000)])
    found = draw("Rate", [Line("lr", falling, 0, is_exact=True)], last_step=1000, may_be_log=False)
    assert found.notes == []
    assert (found.series[0].smooth, found.series[0].last) == ("", "0.001")


def test_a_single_value_is_a_dot() -> None:
    assert chart([0.5], last_step=0).series[0].raw.endswith("h0")


def test_few_measurements_have_a_dot_each_and_many_have_none() -> None:
    assert chart([1.0, 2.0, 3.0], is_dotted=True).series[0].dots.count("h0") == 3
    assert chart([1.0, 2.0] * 50, is_dotted=True).series[0].dots == ""


def test_what_is_read_off_has_a_value_a_step() -> None:
    series = chart([1.0 + step % 3 for step in range(5000)]).series[0]
    assert len(series.steps.split(" ")) == len(series.values.split(" ")) > 200


finite = st.floats(-curves.MAX_VALUE, curves.MAX_VALUE).map(
    lambda value: value if abs(value) >= curves.MIN_VALUE else 0.0
)


@given(st.lists(finite, min_size=1, max_size=40))
def test_whatever_the_values_everything_is_drawn_inside_the_plot(values: list[float]) -> None:
    found = chart(values)
    assert all(0 <= x <= charts.PLOT_WIDTH and 0 <= y <= charts.PLOT_HEIGHT for x, y in places(found.series[0].raw))
    assert all(0 <= tick.place <= 100 for tick in (*found.x_ticks, *found.y_ticks))
    assert 0 < len(found.y_ticks) <= 20 and len(found.x_ticks) <= 12


# number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (4000, "4,000"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (-0.5, "−0.5"),
        (23456.7, "23,457"),
        (0.00001, "10⁻⁵"),
        (1.2346e-7, "1.235×10⁻⁷"),
        (2e100, "2×10¹⁰⁰"),
    ],
)
def test_numbers_are_written_for_people(value: float, text: str) -> None:
    assert number(value) == text
