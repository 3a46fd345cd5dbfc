"""Orders of the solvers, against the exact solution for Gaussian data; how they are measured: `orders.py`."""

from __future__ import annotations

import pytest

from sdcli.schedulers import find, names
from tests.orders import KARRAS, LEADING, comparable_options, error_and_evaluations, measured_order, slope


@pytest.mark.parametrize(
    ("name", "options", "lowest", "highest"),
    [
        ("ddim", LEADING, 0.8, 1.1),
        ("euler", LEADING, 0.8, 1.1),
        ("euler", KARRAS, 0.9, 1.1),
        ("heun", LEADING, 1.8, 2.2),
        ("heun", KARRAS, 1.8, 2.3),
        ("dpm", KARRAS, 1.8, 2.3),
        ("unipc", KARRAS, 2.7, 3.4),  # the corrector adds an order to the predictor's two
        ("lms", LEADING, 2.3, 4.2),  # fourth order after three steps of lower orders
        ("pndm", LEADING, 1.2, 4.2),  # fourth order after a start of lower orders, on integer timesteps
        ("f-pndm", LEADING, 1.2, 4.2),  # the same; near timestep 0, sigma is no smooth function of t
        ("s-pndm", LEADING, 1.2, 2.2),
        ("dpm++3m", KARRAS, 2.3, 3.4),
        ("dpm-single", KARRAS, 1.7, 2.3),
        ("dpm2", KARRAS, 1.8, 2.3),
        ("deis", KARRAS, 1.8, 2.3),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_error_falls_with_the_order_of_the_solver(
    name: str, options: dict[str, object], lowest: float, highest: float
) -> None:
    assert lowest <= measured_order(name, options) <= highest


@pytest.mark.parametrize(
    ("name", "lowest", "highest"), [("ddim", 0.9, 1.1), ("s-pndm", 1.8, 2.2), ("f-pndm", 1.8, 2.6), ("pndm", 1.8, 2.6)]
)
def test_away_from_timestep_0_the_pseudo_numerical_methods_are_of_second_order(
    name: str, lowest: float, highest: float
) -> None:
    """As their paper claims of them (arXiv:2202.09778, section 3), whatever the order of their slopes."""
    step_counts = (50, 100, 200)
    errors = [error_and_evaluations(name, steps, LEADING, until=201)[0] for steps in step_counts]
    assert lowest <= slope(step_counts, errors) <= highest


def test_higher_orders_pay_at_equal_evaluations() -> None:
    heun, _ = error_and_evaluations("heun", 25, LEADING)
    euler, _ = error_and_evaluations("euler", 49, LEADING)
    assert heun < euler / 4


def test_every_deterministic_solver_has_a_setting_in_which_its_order_can_be_measured() -> None:
    deterministic = [name for name in names() if not find(name).is_stochastic]
    assert [name for name in deterministic if comparable_options(name) is None] == []
    assert comparable_options("ddim") == "leading"
    assert comparable_options("heun") == "karras"
