"""Orders of the solvers, against the exact solution for Gaussian data.

For x_0 ~ N(MU, SPREAD^2) the optimal denoiser is known, and so is the solution of the probability-flow ODE (Karras et
al. 2022, arXiv:2206.00364, eq. 1): with x = x_t / alpha_t = x_0 + sigma eps,
    dx/dsigma = eps(x, sigma) = (x - MU) sigma / (SPREAD^2 + sigma^2), hence x - MU grows as (SPREAD^2 + sigma^2)^(1/2).
A solver starts on that trajectory at its own first sigma and is compared with it at its own last nonzero sigma. Samples
are float64 (euler and dpm step in float32); the denoiser is given the solver's sigma, not the rounded timestep.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sdcli.schedulers import create, find

MU, SPREAD = 0.7, 0.5
STEPS = (10, 20, 25, 40, 50, 100, 125, 200)  # divisors of 1000: leading spacing then ends at the same sigma for all
STARTS = torch.tensor([-1.3, -0.4, 0.3, 1.7], dtype=torch.float64).reshape(1, 1, 2, 2)  # in standard deviations
SIGMA_SPACE = ("lms", "heun", "euler")  # these carry x_t / alpha_t, the others x_t
CONFIG: dict[str, object] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
LEADING: dict[str, object] = {"timestep_spacing": "leading"}
# Between the same two sigmas for any number of steps, as leading spacing cannot be for a solver with a spare interval.
KARRAS: dict[str, object] = {"use_karras_sigmas": True}


def exact(sigma: float) -> torch.Tensor:
    return MU + STARTS * math.sqrt(SPREAD**2 + sigma**2)


def sigma_of(sampler: Any, index: int) -> float:
    if hasattr(sampler, "sigmas"):
        return float(sampler.sigmas[index])
    alpha_bar = float(sampler.alphas_cumprod[int(sampler.timesteps[index])])
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def error_and_evaluations(name: str, steps: int, options: dict[str, object]) -> tuple[float, int]:
    """The largest error at the last nonzero sigma, and the denoiser's calls including the last step's."""
    sampler: Any = create(find(name), {**CONFIG, **options}, steps)
    last = len(sampler.timesteps) - 1
    x = exact(sigma_of(sampler, 0))
    x = x if name in SIGMA_SPACE else x / math.sqrt(1 + sigma_of(sampler, 0) ** 2)
    evaluations, error = 0, math.nan
    for index, t in enumerate(sampler.timesteps):
        sigma = sigma_of(sampler, index)
        unscaled = sampler.scale_model_input(x, t) * math.sqrt(1 + sigma**2)
        if index == last:
            error = float((unscaled - exact(sigma)).abs().max())
        eps = (unscaled - MU) * sigma / (SPREAD**2 + sigma**2)
        evaluations += 1
        x = sampler.step(eps, t, x, return_dict=False)[0]
    return error, evaluations


def measured_order(name: str, options: dict[str, object]) -> float:
    """The negative slope of log error over log steps, by least squares."""
    runs = [error_and_evaluations(name, steps, options) for steps in STEPS]
    assert [evaluations for _, evaluations in runs] == [find(name).evaluations(steps) for steps in STEPS]
    log_steps = [math.log(steps) for steps in STEPS]
    log_errors = [math.log(error) for error, _ in runs]
    mean_steps, mean_errors = sum(log_steps) / len(STEPS), sum(log_errors) / len(STEPS)
    covariance = sum((s - mean_steps) * (e - mean_errors) for s, e in zip(log_steps, log_errors, strict=True))
    return -covariance / sum((s - mean_steps) ** 2 for s in log_steps)


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
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_error_falls_with_the_order_of_the_solver(
    name: str, options: dict[str, object], lowest: float, highest: float
) -> None:
    assert lowest <= measured_order(name, options) <= highest


def test_higher_orders_pay_at_equal_evaluations() -> None:
    heun, _ = error_and_evaluations("heun", 25, LEADING)
    euler, _ = error_and_evaluations("euler", 49, LEADING)
    assert heun < euler / 4
