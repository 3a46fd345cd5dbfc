"""Curves: few points however long the run, and every spike; metrics.jsonl as it is found after a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdcli.pages import curves
from sdcli.pages.curves import Curve, Metrics, read_metrics


def curve(values: list[float], first: int = 1) -> Curve:
    found = Curve()
    for step, value in enumerate(values, first):
        found.add(step, value)
    return found


def read(path: Path, rows: list[dict[str, Any]], tail: bytes = b"") -> Metrics:
    """What is read of these rows and a tail that is no line."""
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + tail)
    return read_metrics(path)


def test_a_short_curve_keeps_every_point() -> None:
    values = [3.0, 1.0, 2.0] * 100
    assert curve(values).points() == [(float(step), value) for step, value in enumerate(values, 1)]


def test_a_long_curve_keeps_few_points_and_every_spike() -> None:
    values = [1.0 + 0.01 * (step % 7) for step in range(100_000)]
    spikes = {12_345: 50.0, 54_321: -3.0, 99_998: 20.0}
    for step, value in spikes.items():
        values[step] = value
    found = curve(values, 0)
    assert len(found.points()) <= 2 * curves.MAX_BUCKETS
    assert {(float(step), value) for step, value in spikes.items()} <= set(found.points())
    assert (found.lowest, found.highest) == ((54_321, -3.0), (12_345, 50.0))


def test_the_points_of_a_long_curve_are_values_of_it_in_the_order_of_their_steps() -> None:
    values = [float((step * 7919) % 1009) for step in range(30_000)]
    points = curve(values, 0).points()
    assert all(values[int(step)] == value for step, value in points)
    assert [step for step, _ in points] == sorted(step for step, _ in points)


def test_smoothing_leaves_a_constant_as_it_is() -> None:
    assert {value for _, value in curve([0.25] * 5000).smoothed()} == {0.25}


def test_smoothing_neither_lags_nor_leads() -> None:
    middle = curve([float(step) for step in range(1, 2001)]).smoothed()[100:-100]  # a straight line stays where it is
    assert max(abs(step - value) for step, value in middle) < 1.0


def test_smoothing_quietens_noise() -> None:
    smoothed = [value for _, value in curve([step % 2 for step in range(5000)]).smoothed()]
    assert max(abs(value - 0.5) for value in smoothed) < 0.05


def test_the_half_line_of_a_killed_process_is_passed_over_and_counted(tmp_path: Path) -> None:
    metrics = read(tmp_path / "m", [{"step": 1, "loss": 0.5}], b'{"step": 2, "lo')
    assert (metrics.last_step, metrics.unread, metrics.curves["loss"].points()) == (1, 1, [(1.0, 0.5)])


def test_lines_that_are_no_steps_are_passed_over(tmp_path: Path) -> None:
    bad = [b"[1, 2]", b'{"loss": 1}', b'{"step": -1}', b'{"step": true}', b'{"step": 1.5}', b"\xff", b"[" * 5000, b""]
    bad += [b'{"step": ' + b"9" * 5000]
    metrics = read(tmp_path / "m", [{"step": 7, "loss": 0.5}], b"\n".join(bad))
    assert (metrics.last_step, metrics.unread, set(metrics.curves)) == (7, len(bad), {"loss"})


def test_values_that_are_no_finite_numbers_are_no_points(tmp_path: Path) -> None:
    values = [0.5, None, float("nan"), float("inf"), "0.1", True, [1], 10**400, 1e300, 1e-300, 0.25]
    metrics = read(tmp_path / "m", [{"step": step, "l1": value} for step, value in enumerate(values, 1)])
    assert metrics.curves["l1"].points() == [(1.0, 0.5), (10.0, 0.0), (11.0, 0.25)]


def test_a_nested_object_is_curves_of_their_own(tmp_path: Path) -> None:
    metrics = read(tmp_path / "m", [{"step": 1, "loss": 0.5}, {"step": 1, "validation": {"loss": 0.6, "psnr": 20}}])
    assert {name: curve.last for name, curve in metrics.curves.items()} == {
        "loss": 0.5,
        "validation loss": 0.6,
        "validation psnr": 20.0,
    }


def test_a_step_is_bad_whose_loss_or_gradient_is_not_finite(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 0.5, "loss_t0": None, "grad_norm": 1.0}, {"step": 2, "loss": None, "grad_norm": None}]
    assert read(tmp_path / "m", [*rows, {"step": 3, "loss": 0.5, "grad_norm": float("nan")}]).bad_steps == [2, 3]


def test_terms_beyond_the_most_that_are_drawn_are_counted(tmp_path: Path) -> None:
    metrics = read(tmp_path / "m", [{"step": step, **{f"term{i}": 1.0 for i in range(70)}} for step in (1, 2)])
    assert (len(metrics.curves), metrics.undrawn) == (curves.MAX_CURVES, 70 - curves.MAX_CURVES)


def test_no_file_is_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == Metrics({}, 0, [], 0, 0)
