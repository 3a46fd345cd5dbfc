"""Orders of solvers, measured against the exact solution for Gaussian data: what a test asserts and a benchmark prints.

For x_0 ~ N(MU, SPREAD^2) the optimal denoiser is known, and so is the solution of the probability-flow ODE (Karras et
al. 2022, arXiv:2206.00364, eq. 1): with x = x_t / alpha_t = x_0 + sigma eps,
    dx/dsigma = eps(x, sigma) = (x - MU) sigma / (SPREAD^2 + sigma^2), hence x - MU grows as (SPREAD^2 + sigma^2)^(1/2).
A solver starts on that trajectory at its own first sigma and is compared with it at its own last nonzero sigma. Samples
are float64 (euler and dpm step in float32); the denoiser is given the solver's sigma, not the rounded timestep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sdcli.schedulers import create, find

MU, SPREAD = 0.7, 0.5
STEPS = (10, 20, 25, 40, 50, 100, 125, 200)  # divisors of 1000: leading spacing then ends at the same sigma for all
STARTS = torch.tensor([-1.3, -0.4, 0.3, 1.7], dtype=torch.float64).reshape(1, 1, 2, 2)  # in standard deviations
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
OPTIONS = {"karras": KARRAS, "leading": LEADING}
LARGEST_DRIFT = 0.01  # of a sigma, relative, between numbers of steps that are to be compared


def exact(sigma: float) -> torch.Tensor:
    """The trajectories at a sigma, x_t / alpha_t."""
    return MU + STARTS * math.sqrt(SPREAD**2 + sigma**2)


def eps_of(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """What the optimal denoiser answers at x = x_t / alpha_t."""
    return (x - MU) * sigma / (SPREAD**2 + sigma**2)


def sigma_of(sampler: Any, index: int) -> float:
    """The noise level of the evaluation at an index of the sampler's timesteps."""
    if hasattr(sampler, "sigmas"):
        is_between = hasattr(sampler, "sigmas_interpol") and not sampler.state_in_first_order
        return float((sampler.sigmas_interpol if is_between else sampler.sigmas)[index])
    alpha_bar = float(sampler.alphas_cumprod[int(sampler.timesteps[index])])
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def error_and_evaluations(
    name: str, steps: int, options: dict[str, object], until: int | None = None
) -> tuple[float, int]:
    """The largest error at the last nonzero sigma, and the denoiser's calls including the last step's.

    until: the timestep to stop at instead, one of those the steps end at.
    """
    sampler: Any = create(find(name), {**CONFIG, **options}, steps)
    timesteps = [int(t) for t in sampler.timesteps]
    last = len(timesteps) - 1 if until is None else len(timesteps) - 1 - timesteps[::-1].index(until)
    x = exact(sigma_of(sampler, 0))
    # Some carry x_t / alpha_t, as their initial sigma tells, the others x_t.
    x = x if float(sampler.init_noise_sigma) > 1 else x / math.sqrt(1 + sigma_of(sampler, 0) ** 2)
    evaluations, error = 0, math.nan
    for index, t in enumerate(sampler.timesteps):
        sigma = sigma_of(sampler, index)
        unscaled = sampler.scale_model_input(x, t) * math.sqrt(1 + sigma**2)
        if index == last:
            error = float((unscaled - exact(sigma)).abs().max())
        evaluations += 1
        if until is not None and index == last:
            break
        x = sampler.step(eps_of(unscaled, sigma), t, x, return_dict=False)[0]
    return error, evaluations


def measured_order(name: str, options: dict[str, object], step_counts: Sequence[int] = STEPS) -> float:
    """The negative slope of log error over log steps, by least squares."""
    runs = [error_and_evaluations(name, steps, options) for steps in step_counts]
    assert [evaluations for _, evaluations in runs] == [find(name).evaluations(steps) for steps in step_counts]
    return slope(step_counts, [error for error, _ in runs])


def slope(step_counts: Sequence[int], errors: Sequence[float]) -> float:
    """The order that errors at several numbers of steps speak of."""
    log_steps, log_errors = [math.log(steps) for steps in step_counts], [math.log(error) for error in errors]
    mean_steps, mean_errors = sum(log_steps) / len(log_steps), sum(log_errors) / len(log_errors)
    covariance = sum((s - mean_steps) * (e - mean_errors) for s, e in zip(log_steps, log_errors, strict=True))
    return -covariance / sum((s - mean_steps) ** 2 for s in log_steps)


def comparable_options(name: str, step_counts: Sequence[int] = STEPS) -> str | None:
    """The key of OPTIONS by which all these numbers of steps end at one sigma; None where none does."""
    for key, options in OPTIONS.items():
        samplers: list[Any] = [create(find(name), {**CONFIG, **options}, steps) for steps in step_counts]
        ends = [sigma_of(sampler, len(sampler.timesteps) - 1) for sampler in samplers]
        if options.keys() <= samplers[0].config.keys() and all(
            math.isclose(end, ends[0], rel_tol=LARGEST_DRIFT) for end in ends
        ):
            return key
    return None
