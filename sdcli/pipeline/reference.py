"""The solution of the probability-flow ODE that samplers approximate: many Heun steps, the state in float64.

Every deterministic sampler of a model integrates one ODE: with x = x_t / alpha_t and sigma = beta_t / alpha_t it reads
dx/dsigma = eps (Karras et al. 2022, arXiv:2206.00364, eq. 1 to 4). At zero terminal SNR, where sigma begins at infinite
values, it is taken in x_t and the angle phi = atan sigma: dx_t/dphi = v (Salimans and Ho 2022, arXiv:2202.00512,
appendix D). What is left between a sampler's result and this solution, from the same noise and under the same guidance,
is the sampler's own error.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sdcli.errors import InputError

RHO = 7.0  # how the sigmas crowd towards the end; arXiv:2206.00364, section 3
RHO_OF_ANGLES = 2.0  # likewise; of 1 to 7 it errs least on Gaussian data
PROBE_SEED = 0

Predict = Callable[[Tensor, float], Tensor]  # x_t (B, C, h, w) float64 and t -> the prediction, likewise


@dataclass(frozen=True)
class Stage:
    """The state after one step of the solution."""

    index: int  # from 1
    total: int
    latents: Tensor  # (B, C, h, w) float64 on the CPU: on the way x_t / alpha_t or x_t, at the end x_0


@dataclass(frozen=True)
class NoiseLevels:
    """sigma at every timestep of a model, rising; the last is infinite at zero terminal SNR.

    sigma is the noise on x_0 once x_t is scaled so that x_0 is whole: Karras et al. 2022, arXiv:2206.00364, table 1.
    """

    sigmas: tuple[float, ...]

    @classmethod
    def of(cls, alpha_bar: Tensor) -> NoiseLevels:
        """From the cumulative products of a noise schedule: (T,) float64, falling.

        Raises InputError where there are fewer than two, or two are the same: there is nothing between them to solve.
        """
        sigmas = tuple(math.sqrt((1.0 - a) / a) if a > 0 else math.inf for a in alpha_bar.tolist())
        if len(sigmas) < 2 or any(low >= high for low, high in pairwise(sigmas)):
            what = "scheduler_config.json: its timesteps are no two or more rising noise levels"
            raise InputError(what, "compare schedulers on a model with more timesteps, or with other betas")
        return cls(sigmas)

    @property
    def is_finite(self) -> bool:
        """Whether there is anything but noise at the last timestep."""
        return math.isfinite(self.sigmas[-1])

    def t(self, sigma: float) -> float:
        """The timestep of a level, whole or not: linear in log sigma between the trained ones, as samplers have it.

        Towards an infinite sigma it is linear in the angle.
        """
        i = min(max(bisect_right(self.sigmas, sigma) - 1, 0), len(self.sigmas) - 2)
        of = math.log if math.isfinite(self.sigmas[i + 1]) else math.atan
        low, high = of(self.sigmas[i]), of(self.sigmas[i + 1])
        return i + min(max((of(sigma) - low) / (high - low), 0.0), 1.0)

    def grid(self, steps: int) -> list[float]:
        """What `steps` steps stand at, from the last timestep to the first: sigmas, or angles where one is infinite.

        Source: arXiv:2206.00364, eq. 5, between the model's own ends.
        """
        ends, rho = (self.sigmas[-1], self.sigmas[0]), RHO
        if not self.is_finite:
            ends, rho = (math.atan(ends[0]), math.atan(ends[1])), RHO_OF_ANGLES
        high, low = (end ** (1 / rho) for end in ends)
        return [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)]


@torch.no_grad()
def solve(predict: Predict, noise: Tensor, levels: NoiseLevels, *, prediction_type: str, steps: int) -> Iterator[Stage]:
    """Integrate from noise to latents by Heun's method, yielding after every step; `steps` is at least 2.

    noise: (B, C, h, w), x_t at the last timestep. The last step, to sigma 0, is the prediction of x_0; all others
    evaluate twice: 2 steps - 1 evaluations. At zero terminal SNR the prediction must not be epsilon.
    """

    def slope(x: Tensor, at: float) -> Tensor:
        if levels.is_finite:
            alpha = 1.0 / math.sqrt(1.0 + at**2)
            return _eps(predict(alpha * x, levels.t(at)), alpha * x, alpha, at * alpha, prediction_type)
        prediction = predict(x, levels.t(math.tan(at) if at < math.pi / 2 else math.inf))
        return _v(prediction, x, math.cos(at), math.sin(at), prediction_type)

    grid = levels.grid(steps)
    x = noise.cpu().double()
    if levels.is_finite:
        x = x * math.sqrt(1.0 + grid[0] ** 2)  # x_t / alpha_t
    for index, (at, after) in enumerate(pairwise(grid), start=1):  # arXiv:2206.00364, algorithm 1
        d = slope(x, at)
        x = x + (after - at) * (d + slope(x + (after - at) * d, after)) / 2
        yield Stage(index, steps, x)
    last, d = grid[-1], slope(x, grid[-1])
    # x_0, of eps and of v
    yield Stage(steps, steps, x - last * d if levels.is_finite else math.cos(last) * x - math.sin(last) * d)


@torch.no_grad()
def missed(sampler: Any, *, prediction_type: str, step_arguments: Mapping[str, float] | None = None) -> float:
    """How far from sigma 0 a sampler's walk from the last timestep's noise ends: 0 when it spans the whole ODE.

    sampler: fresh, made for this prediction type, `epsilon` or `sample`; step_arguments: for its `step`. It walks under
    a model that always answers the same noise, or always x_0 = 0: along a straight line from x_0 = 0, which every
    solver follows exactly, so that what is left is the noise that its first or last sigma leaves, in its own units.
    """
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(PROBE_SEED))
    x = noise * first_scale(sampler) * sampler.init_noise_sigma
    if prediction_type == "epsilon":  # x_t = beta_t eps, not quite the eps that samplers start from
        x = x * float(1.0 - sampler.alphas_cumprod[-1]) ** 0.5
    answer = noise if prediction_type == "epsilon" else torch.zeros_like(noise)
    for t in sampler.timesteps:
        sampler.scale_model_input(x, t)
        x = sampler.step(answer, t, x, return_dict=False, **(step_arguments or {}))[0]
    return float((x / noise).abs().max())


def first_scale(sampler: Any) -> float:
    """By what to multiply noise so that a fresh sampler, which scales it in its own way, shows it to the UNet as it is.

    Some begin at sigma_max times the noise, others at (1 + sigma_max^2)^(1/2) times: not quite the same trajectory.
    """
    seen = sampler.scale_model_input(torch.ones(1, 1, 1, 1) * sampler.init_noise_sigma, sampler.timesteps[0])
    return 1.0 / float(seen)


def _eps(prediction: Tensor, x_t: Tensor, alpha: float, beta: float, prediction_type: str) -> Tensor:
    """The noise that a prediction at x_t = alpha x_0 + beta eps amounts to."""
    if prediction_type == "v_prediction":
        return alpha * prediction + beta * x_t
    return (x_t - alpha * prediction) / beta if prediction_type == "sample" else prediction


def _v(prediction: Tensor, x_t: Tensor, alpha: float, beta: float, prediction_type: str) -> Tensor:
    """The velocity alpha eps - beta x_0 that a prediction of v or x_0 amounts to."""
    return (alpha * x_t - prediction) / beta if prediction_type == "sample" else prediction
