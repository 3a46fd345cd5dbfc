"""Line charts of curves over the steps of a run: axes, ticks, SVG paths, legends.

Lengths are left to the page: a place in a plot is a share of its width or height, in percent for what HTML labels and
in units of a PLOT_WIDTH x PLOT_HEIGHT box for paths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sdcli.pages.curves import Curve, Point

MIN_SMOOTHED = 20  # points that a curve needs before smoothing says more than the points
MAX_DOTS = 60  # more of them would touch
LOG_FROM = 10.0  # span, the highest over the lowest positive value, above which an axis is logarithmic
LOG_SPAN = 1e10  # highest over lowest value of such an axis at most
ZERO_BASE = 0.4  # lowest over highest value up to which an axis begins at 0
PLOT_WIDTH, PLOT_HEIGHT = 2000, 1000
MAX_TICKS = 6
DIGITS = 4  # significant ones of a value that is read
TICK_DIGITS = 6  # and of a round one, which has few of its own
PLAIN_FROM, PLAIN_BELOW = 1e-3, 1e7  # between them an axis is labelled without powers of ten
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in percent of its length from the left or the top."""

    place: float
    label: str


@dataclass(frozen=True)
class Series:
    """One curve as it is drawn: SVG paths, the figures of its legend, and what is read off it under the pointer."""

    name: str
    colour: int
    is_dotted: bool
    raw: str  # path of the points; beneath the smoothed line where there is one
    smooth: str
    dots: str  # path of a dot at every point of a dotted series; empty where they are many
    last: str
    lowest: str
    highest: str
    steps: str  # of the values that can be read off, separated by spaces
    values: str


@dataclass(frozen=True)
class Chart:
    """A plot of several series over the same steps."""

    title: str
    notes: list[str]
    is_wide: bool
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Tick]  # steps at which something was not finite
    series: list[Series]
    width: int = PLOT_WIDTH
    height: int = PLOT_HEIGHT


@dataclass(frozen=True)
class Line:
    """What a chart is to draw: a curve by its name, in a colour by number.

    is_exact: without smoothing, as for a schedule. is_dotted: each point shown, as for measurements now and then.
    """

    name: str
    curve: Curve
    colour: int
    is_exact: bool = False
    is_dotted: bool = False


def draw(
    title: str,
    lines: Sequence[Line],
    *,
    last_step: int,
    note: str = "",
    is_wide: bool = False,
    may_be_log: bool = True,
    marks: Sequence[int] = (),
) -> Chart:
    """Lay out a chart of at least one line over the steps 0 to last_step.

    Its values are on a logarithmic axis when `may_be_log`, none is negative and they span more than LOG_FROM.
    marks: steps at which something was not finite.
    """
    steps = _step_axis(last_step)
    values = _value_axis([line.curve for line in lines], may_be_log)
    return Chart(
        title=title,
        notes=[
            text
            for text in ("log scale" if values.tick is None else "", note, "red: not finite" if marks else "")
            if text
        ],
        is_wide=is_wide,
        x_ticks=[Tick(_percent(steps.share(at)), steps.label(at)) for at in steps.ticks()],
        y_ticks=[Tick(_percent(1.0 - values.share(at)), values.label(at)) for at in values.ticks()],
        marks=[Tick(_percent(steps.share(at)), number(at)) for at in marks],
        series=[_series(line, steps, values) for line in lines],
    )


def number(value: float, digits: int = DIGITS) -> str:
    """A value for people: thousands apart, powers of ten for the very small and the very large."""
    whole = abs(value) < PLAIN_BELOW and (value == int(value) or abs(value) >= 10 ** (digits - 1))
    mantissa, _, exponent = (f"{value:,.0f}" if whole else f"{value:,.{digits}g}").partition("e")
    return _with_power(mantissa, int(exponent) if exponent else 0)


def _with_power(mantissa: str, exponent: int) -> str:
    if exponent:
        power = "10" + str(exponent).translate(SUPERSCRIPTS)
        mantissa = power if mantissa == "1" else f"{mantissa}×{power}"
    return mantissa.replace("-", "−")


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    tick: float | None  # distance of ticks; None on a logarithmic axis

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1; on a logarithmic axis 0 and all below it lie at the low end."""
        if self.tick is not None:
            return (value - self.low) / (self.high - self.low)
        low, high = math.log(self.low), math.log(self.high)
        return max(0.0, (math.log(value) - low) / (high - low)) if value > 0 else 0.0

    def ticks(self) -> list[float]:
        """Round values between the ends, at most about MAX_TICKS on a linear axis."""
        if self.tick is None:
            return list(_log_ticks(self.low, self.high))
        first, last = math.ceil(self.low / self.tick - 1e-9), math.floor(self.high / self.tick + 1e-9)
        return [i * self.tick for i in range(first, last + 1)]

    def label(self, tick: float) -> str:
        """A tick's value; the ticks of a linear axis have one power of ten."""
        if self.tick is None or tick == 0 or PLAIN_FROM <= max(abs(self.low), abs(self.high)) < PLAIN_BELOW:
            return number(tick, TICK_DIGITS)
        exponent = math.floor(math.log10(self.tick) + 1e-9)
        return _with_power(f"{tick / 10.0**exponent:.0f}", exponent)


def _step_axis(last_step: int) -> _Axis:
    high = float(max(1, last_step))
    return _Axis(0.0, high, max(1.0, _tick_size(high)))


def _value_axis(curves: Sequence[Curve], may_be_log: bool) -> _Axis:
    low, high = min(c.lowest[1] for c in curves), max(c.highest[1] for c in curves)
    positive = min(c.lowest_positive for c in curves)
    if may_be_log and low >= 0 and high / positive > LOG_FROM:
        bottom = max(positive, high / LOG_SPAN)
        pad = (high / bottom) ** 0.04
        return _Axis(bottom / pad, high * pad, None)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # constant
        room = 0.5 * abs(high) or 1.0
        low, high = low - room, high + room
    elif 0 < low <= ZERO_BASE * high:
        low = 0.0
    tick = _tick_size(high - low)
    return _Axis(math.floor(low / tick + 1e-9) * tick, math.ceil(high / tick - 1e-9) * tick, tick)


def _tick_size(span: float) -> float:
    """1, 2 or 5 times a power of ten, such that about five fit into the span."""
    rough = span / (MAX_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _log_ticks(low: float, high: float) -> Iterator[float]:
    """Powers of ten, some left out where there are many, 2 and 5 times them in between where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = math.ceil((last - first) / MAX_TICKS)
    for exponent in range(first, last + 1):
        for factor in (1, 2, 5) if last - first <= 3 else (1,):
            value = float(f"{factor}e{exponent}")
            if exponent % every == 0 and low <= value <= high:
                yield value


def _series(line: Line, steps: _Axis, values: _Axis) -> Series:
    curve, points = line.curve, line.curve.points()
    is_smooth = not line.is_exact and not line.is_dotted and len(points) >= MIN_SMOOTHED
    smooth = curve.smoothed() if is_smooth else []
    has_dots = line.is_dotted and len(points) <= MAX_DOTS
    read = smooth or points
    return Series(
        name=line.name,
        colour=line.colour,
        is_dotted=line.is_dotted,
        raw=_path(points, steps, values),
        smooth=_path(smooth, steps, values),
        dots="".join(_path([point], steps, values) for point in points) if has_dots else "",
        last=number(smooth[-1][1] if smooth else curve.last),
        lowest=number(curve.lowest[1]),
        highest=number(curve.highest[1]),
        steps=" ".join(f"{step:.0f}" for step, _ in read),
        values=" ".join(number(value) for _, value in read),
    )


def _path(points: Sequence[Point], steps: _Axis, values: _Axis) -> str:
    """SVG path data; a single point is a line of no length, which round caps make a dot."""
    if not points:
        return ""
    places = [(steps.share(x) * PLOT_WIDTH, (1.0 - values.share(y)) * PLOT_HEIGHT) for x, y in points]
    return "M" + " ".join(f"{x:.0f} {y:.0f}" for x, y in places) + ("h0" if len(places) == 1 else "")


def _percent(share: float) -> float:
    return round(100.0 * share, 2)
