"""Numbers become a figure that everybody can read."""

from __future__ import annotations

import io
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from sdcli.lab import plots
from sdcli.lab.plots import Curve, line_chart

STEPS = [5, 10, 20, 50]
FALLING = Curve("ddim", STEPS, [0.5, 0.25, 0.12, 0.05])


def chart(*curves: Curve, **kind: Any) -> bytes:
    return line_chart(curves, **{"title": "Distance", "x_label": "steps", "y_label": "RMSE"} | kind)


def picture(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def colour_share(png: bytes, colour: str) -> float:
    """The share of pixels in exactly this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((picture(png) == wanted).all(axis=2).mean())


def test_a_chart_is_a_png_of_a_stated_size() -> None:
    assert picture(chart(FALLING)).shape == (750, 1200, 3)


def test_many_names_make_it_higher_and_none_is_cut_off() -> None:
    tall = picture(chart(*[Curve(f"{n}", STEPS, [n + 1.0] * 4) for n in range(40)]))
    assert tall.shape[0] > 1200
    assert not (tall[-10:, 900:] != 255).any()


def test_the_same_numbers_give_the_same_bytes_without_date_or_program() -> None:
    png = chart(FALLING)
    assert png == chart(FALLING)
    assert set(Image.open(io.BytesIO(png)).info) == {"dpi"}


def test_every_curve_is_drawn_in_its_colour() -> None:
    curves = [Curve(f"{n}", STEPS, [n + 1.0] * 4) for n in range(len(plots.COLOURS))]
    png = chart(*curves)
    assert all(colour_share(png, colour) > 1e-3 for colour in plots.COLOURS)
    assert colour_share(chart(curves[0]), plots.COLOURS[1]) == 0


def test_no_two_of_forty_curves_look_alike_and_neighbours_do_not_without_colour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Line2D, "draw", remember(looks))
    chart(*[Curve(f"{n}", STEPS, [n + 1.0] * 4) for n in range(40)])
    looks = looks[:40]  # the layout draws them once more
    assert len(set(looks)) == 40
    assert all(a[1:] != b[1:] for a, b in itertools.combinations(looks[:36], 2))  # marker and dash alone


def remember(looks: list[tuple[Any, ...]]) -> Any:
    drawn = Line2D.draw

    def draw(line: Line2D, renderer: Any) -> None:
        if line.get_marker() in plots.MARKERS and len(np.asarray(line.get_xdata())) == len(STEPS):
            looks.append((line.get_color(), line.get_marker(), line.get_linestyle()))
        drawn(line, renderer)

    return draw


def test_a_single_curve_needs_no_legend_and_two_have_one() -> None:
    one, two = picture(chart(FALLING)), picture(chart(FALLING, Curve("heun", STEPS, [0.4, 0.1, 0.02, 0.01])))
    right = slice(1150, 1200)
    assert (one[:, right] != 255).any() and not (two[200:, right] != 255).any()  # the plot ends where names begin


@pytest.mark.parametrize("name", ["$x^$", "_hidden", "\\frac", "a\nb\0", "\udcff", "", "日本"])
def test_whatever_a_curve_is_called_it_is_drawn(name: str) -> None:
    assert chart(Curve(name, STEPS, [1.0] * 4), FALLING, title=name) != chart(Curve("a", STEPS, [1.0] * 4), FALLING)


def test_a_logarithmic_axis_makes_equal_factors_equally_far_apart() -> None:
    curve = Curve("powers", [1, 2, 3], [1.0, 10.0, 100.0])
    heights = marker_rows(chart(curve, log_y=True))
    assert abs((heights[0] - heights[1]) - (heights[1] - heights[2])) <= 1
    straight = marker_rows(chart(curve))
    assert straight[0] - straight[1] < 0.2 * (straight[1] - straight[2])


def marker_rows(png: bytes) -> list[float]:
    """The heights of the markers of the first curve, three columns apart that are as far as they can be."""
    blue = (picture(png) == [0x00, 0x72, 0xB2]).all(axis=2)
    columns = np.flatnonzero(blue.any(axis=0))
    first, last = int(columns[0]) + 5, int(columns[-1]) - 5
    return [float(np.flatnonzero(blue[:, x]).mean()) for x in (first, (first + last) // 2, last)]


@pytest.mark.parametrize(
    "ys", [[math.inf, 1.0, math.nan, 2.0], [0.0, -1.0, 0.0, 0.0], [math.nan] * 4, [1e-300, 1e300, 1.0, 0.0]]
)
@pytest.mark.parametrize("is_log", [False, True])
def test_values_that_cannot_be_drawn_leave_a_gap(ys: list[float], is_log: bool) -> None:
    assert picture(chart(Curve("a", STEPS, ys), FALLING, log_x=is_log, log_y=is_log)).shape == (750, 1200, 3)
    assert chart(Curve("a", STEPS, ys), log_x=is_log, log_y=is_log)


def test_whole_numbers_are_counted_in_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[list[float]] = []
    savefig = Figure.savefig

    def remember(figure: Figure, *args: Any, **kwargs: Any) -> None:
        savefig(figure, *args, **kwargs)
        ticks.append([float(x) for x in figure.axes[0].get_xticks()])

    monkeypatch.setattr(Figure, "savefig", remember)
    chart(Curve("a", range(1, 20), [float(n) for n in range(19)]))
    chart(Curve("a", [0.25, 19.0], [0.0, 1.0]))
    assert all(x.is_integer() for x in ticks[0]) and not all(x.is_integer() for x in ticks[1])


def test_the_settings_of_the_user_and_the_process_change_nothing_and_stay_as_they_are() -> None:
    png = chart(FALLING)
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        assert chart(FALLING) == png
        assert dict(matplotlib.rcParams) == before


def test_it_needs_no_home_and_no_display_and_says_nothing_about_that(tmp_path: Path) -> None:
    code = "from sdcli.lab.plots import *; print(len(line_chart([], title='', x_label='', y_label='')) > 0)\n"
    code += "import sys; print('matplotlib.pyplot' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | {
        "MPLCONFIGDIR": "/dev/null",
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (done.stdout, done.stderr) == ("True\nFalse\n", "")
