"""metrics.jsonl of a run -> curves: the values of each term over the steps, kept small however long the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.files import open_regular

MAX_BUCKETS = 512  # of one curve; two points each, the lowest and the highest, so that no spike is lost
MAX_VALUE = 1e100  # a value beyond it has diverged like infinity, and sums of smaller ones cannot overflow
MIN_VALUE = 1e-100  # a value closer to 0 is 0
SMOOTHING = 0.01  # time constant of the smoothed line to either side, as a share of the curve
MAX_LINE_BYTES = 1 << 20
MAX_CURVES = 64
MAX_STEP = 10**12

Point = tuple[float, float]  # step, value


@dataclass(slots=True)
class _Bucket:
    """Neighbouring values of a curve: their sum, and the extremes with the steps they stand at."""

    first: int
    last: int
    count: int
    total: float
    low: float
    low_step: int
    high: float
    high_step: int


class Curve:
    """One term over the steps, taken in as it is read and kept in at most MAX_BUCKETS buckets."""

    def __init__(self) -> None:
        self.last = math.nan
        self._buckets: list[_Bucket] = []
        self._stride = 1  # values in a full bucket

    def add(self, step: int, value: float) -> None:
        """Append the value of a step; steps come in order, values are 0 or MIN_VALUE to MAX_VALUE in size."""
        self.last = value
        buckets = self._buckets
        if not buckets or buckets[-1].count == self._stride:
            if len(buckets) == MAX_BUCKETS:
                buckets[:] = [_joined(a, b) for a, b in zip(buckets[::2], buckets[1::2], strict=True)]
                self._stride *= 2
            buckets.append(_Bucket(step, step, 1, value, value, step, value, step))
            return
        bucket = buckets[-1]
        bucket.last = step
        bucket.count += 1
        bucket.total += value
        if value < bucket.low:
            bucket.low, bucket.low_step = value, step
        if value > bucket.high:
            bucket.high, bucket.high_step = value, step

    @property
    def lowest(self) -> tuple[int, float]:
        """The step and the value of the lowest point, exactly; the first of equals."""
        bucket = min(self._buckets, key=lambda b: b.low)
        return bucket.low_step, bucket.low

    @property
    def highest(self) -> tuple[int, float]:
        """The step and the value of the highest point, exactly; the first of equals."""
        bucket = max(self._buckets, key=lambda b: b.high)
        return bucket.high_step, bucket.high

    @property
    def lowest_positive(self) -> float:
        """The lowest value above 0 among the extremes kept; infinite where there is none."""
        return min((v for b in self._buckets for v in (b.low, b.high) if v > 0), default=math.inf)

    def points(self) -> list[Point]:
        """Lowest and highest point of every bucket, in order: all points where there are few."""
        return [
            point for b in self._buckets for point in sorted({(float(b.low_step), b.low), (float(b.high_step), b.high)})
        ]

    def smoothed(self) -> list[Point]:
        """Exponential moving average over the means of the buckets, of both sides: it neither lags nor leads."""
        kept = math.exp(-1.0 / max(1.0, SMOOTHING * len(self._buckets)))
        before, after = _decayed(self._buckets, kept), _decayed(self._buckets[::-1], kept)[::-1]
        return [
            # Both sides hold the bucket itself.
            (0.5 * (b.first + b.last), (t0 + t1 - b.total) / (w0 + w1 - b.count))
            for b, (t0, w0), (t1, w1) in zip(self._buckets, before, after, strict=True)
        ]


@dataclass(frozen=True)
class Metrics:
    """What metrics.jsonl says."""

    curves: dict[str, Curve]
    last_step: int
    bad_steps: list[int]  # where the loss or its gradient was not finite
    unread: int  # lines
    undrawn: int  # terms


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl as a stream: terms become curves, those of a nested object as `validation loss`.

    A line that is no object with a step, such as the half line of a process that was killed, is counted and passed
    over. A value that is null, not finite or no number is no point of its curve.
    """
    curves: dict[str, Curve] = {}
    undrawn: set[str] = set()
    bad_steps: list[int] = []
    last_step = unread = 0
    for row in _rows(path):
        if row is None:
            unread += 1
            continue
        step = row["step"]
        last_step = max(last_step, step)
        for name, value in _flat(row):
            number = measured(value)
            if number is None:
                if name in ("loss", "grad_norm") and bad_steps[-1:] != [step]:
                    bad_steps.append(step)
            elif name in curves or len(curves) < MAX_CURVES:
                curves.setdefault(name, Curve()).add(step, number)
            else:
                undrawn.add(name)
    return Metrics(curves, last_step, bad_steps, unread, len(undrawn))


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a file, a line each, that have a step; None for every other line. No file has no lines."""
    if not path.exists():
        return
    with open_regular(path) as stream:
        while line := stream.readline(MAX_LINE_BYTES):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield None
                continue
            step = row.get("step") if isinstance(row, dict) else None
            yield row if type(step) is int and 0 <= step <= MAX_STEP else None


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name} {inner}", v) for inner, v in value.items())
        elif name != "step":
            yield name, value


def measured(value: object) -> float | None:
    """A value as a curve takes it, None unless it is a finite number."""
    if type(value) not in (int, float):
        return None
    assert isinstance(value, int | float)
    if not abs(value) <= MAX_VALUE:
        return None
    return float(value) if abs(value) >= MIN_VALUE else 0.0


def _decayed(buckets: Sequence[_Bucket], kept: float) -> list[tuple[float, float]]:
    """For each bucket the sum of totals, and of counts, up to it, those before it decayed by `kept` a bucket."""
    total = weight = 0.0
    sums = []
    for bucket in buckets:
        total, weight = kept * total + bucket.total, kept * weight + bucket.count
        sums.append((total, weight))
    return sums


def _joined(a: _Bucket, b: _Bucket) -> _Bucket:
    low, high = (a if a.low <= b.low else b), (a if a.high >= b.high else b)
    return _Bucket(
        first=a.first,
        last=b.last,
        count=a.count + b.count,
        total=a.total + b.total,
        low=low.low,
        low_step=low.low_step,
        high=high.high,
        high_step=high.high_step,
    )
