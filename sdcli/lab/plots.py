"""Numbers -> a figure as PNG bytes, by matplotlib. The pages' own charts are HTML; see `sdcli.pages.charts`."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WIDTH, HEIGHT = 8.0, 5.0  # inches
NAME_HEIGHT = 0.235  # inches, of a line of the legend
DPI = 150  # so 1200 x 750 px
# Okabe and Ito 2008, "Color universal design", without yellow, which white paper swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
# Lengths that have no common factor: a colour, a marker and a dash meet again after 7 * 9 * 4 curves only.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", "-.", ":")
MARKED_POINTS = 12  # markers of a curve, if it has so many points
MAX_OWN_TICKS = 12  # values of x that a logarithmic axis can name one by one
GREY = "#595959"


@dataclass(frozen=True)
class Curve:
    """A named line through the points (x, y); a value that is not finite leaves a gap."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def line_chart(
    curves: Sequence[Curve], *, title: str, x_label: str, y_label: str, log_x: bool = False, log_y: bool = False
) -> bytes:
    """A PNG of curves over one pair of axes, 1200 x 750 px, or higher where more than 20 names ask for it.

    Curves differ in colour, marker and dash, so that they can be told apart in print and by everybody. The
    same numbers give the same bytes.
    log_x, log_y: logarithmic axes, on which values of 0 and below are left out. No text is read as formulas.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its list of fonts is nobody's concern
    import matplotlib.style  # deferred, here and below: 0.3 s that only a plot needs
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.style.context("default", after_reset=True):  # whatever a matplotlibrc of the user says
        height = max(HEIGHT, NAME_HEIGHT * (len(curves) + 1))
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        _dress(axes, title, x_label, y_label)
        if log_x:
            _scale_x(axes, curves)
        elif all(float(x).is_integer() for curve in curves for x in curve.xs):
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
        if log_y and any(y > 0 and math.isfinite(y) for curve in curves for y in curve.ys):
            axes.set_yscale("log", nonpositive="mask")
        lines = [_draw(axes, curve, place, len(curves)) for place, curve in enumerate(curves)]
        if len(curves) > 1:
            _name(figure, lines, curves)
        stream = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a letter that the font lacks is drawn as a box
            figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(_printable(title), loc="left", fontsize=13, fontweight="bold", pad=12, parse_math=False)
    axes.set_xlabel(_printable(x_label), parse_math=False)
    axes.set_ylabel(_printable(y_label), parse_math=False)
    axes.grid(True, which="both", color="#e2e2e2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", color=GREY, labelcolor="#262626")
    axes.margins(x=0.02)


def _scale_x(axes: Axes, curves: Sequence[Curve]) -> None:
    """A logarithmic axis; where there are few values of x, each is a tick, as of 5, 10, 20 and 50 steps."""
    from matplotlib.ticker import NullLocator, ScalarFormatter

    values = sorted({x for curve in curves for x in curve.xs if x > 0 and math.isfinite(x)})
    if not values:
        return
    axes.set_xscale("log", nonpositive="mask")
    if len(values) <= MAX_OWN_TICKS:
        axes.set_xticks(values)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())


def _draw(axes: Axes, curve: Curve, place: int, count: int) -> Line2D:
    every = max(1, len(curve.xs) // MARKED_POINTS)
    (line,) = axes.plot(
        curve.xs,
        curve.ys,
        color=COLOURS[place % len(COLOURS)],
        linestyle=DASHES[place % len(DASHES)],
        linewidth=1.8,
        marker=MARKERS[place % len(MARKERS)],
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        # Each curve's markers a little further on, so that curves that lie upon each other show both.
        markevery=(place * every // count, every),
    )
    return line


def _name(figure: Figure, lines: Sequence[Line2D], curves: Sequence[Curve]) -> None:
    # matplotlib leaves out what begins with an underscore; the names are put in afterwards, as they are.
    legend = figure.legend(
        lines, [str(n) for n in range(len(lines))], loc="outside right upper", frameon=False, handlelength=3.2
    )
    for text, curve in zip(legend.get_texts(), curves, strict=True):
        text.set_parse_math(False)
        text.set_text(_printable(curve.name))


def _printable(text: str) -> str:
    """Text of a file name or a plug-in without what no font can draw."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
