"""The noise schedule of training: betas, q(x_t | x_0) and what the network is asked to predict.

Letters as in Ho et al. 2020 (DDPM, arXiv:2006.11239). Samplers have their own schedules; see `sdcli.schedulers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sdcli.errors import InputError

COSINE_OFFSET = 0.008  # s of Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17
MAX_BETA = 0.999  # same paper, section 3.2


def alpha_bars(config: Mapping[str, object]) -> Tensor:
    """Cumulative products of 1 - beta for a diffusers scheduler config.

    Returns (num_train_timesteps,) float64, falling from about 1 towards 0, and to 0 with `rescale_betas_zero_snr`.
    Raises InputError when the config names an unknown `beta_schedule`.
    """
    alpha_bar = torch.cumprod(1.0 - _betas(config), dim=0)
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2023, arXiv:2305.08891, algorithm 1
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alpha_bar


def q_sample(x_0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_0) with the noise given: DDPM eq. 4.

    x_0, eps: (B, C, h, w); t: (B,) int64; alpha_bar: (T,) from `alpha_bars`. Returns (B, C, h, w).
    """
    a = _at(alpha_bar, t, x_0)
    return a.sqrt() * x_0 + (1.0 - a).sqrt() * eps


def target(x_0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor, *, prediction_type: str) -> Tensor:
    """What the network should answer at x_t: the noise (`epsilon`) or the velocity (`v_prediction`).

    Shapes as in `q_sample`. Raises InputError for another prediction type.
    Source of v: Salimans and Ho 2022, arXiv:2202.00512, appendix D.
    """
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        a = _at(alpha_bar, t, x_0)
        return a.sqrt() * eps - (1.0 - a).sqrt() * x_0
    raise InputError(f"prediction_type: {prediction_type!r} cannot be trained", "use epsilon or v_prediction")


def _betas(config: Mapping[str, object]) -> Tensor:
    trained = config.get("trained_betas")
    if isinstance(trained, Sequence):
        return torch.tensor(trained, dtype=torch.float64)
    count = int(str(config.get("num_train_timesteps", 1000)))
    start = float(str(config.get("beta_start", 0.0001)))
    end = float(str(config.get("beta_end", 0.02)))
    kind = config.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        return _cosine_betas(count)
    raise InputError(f"beta_schedule: {kind!r} is unknown", "use linear, scaled_linear or squaredcos_cap_v2")


def _cosine_betas(count: int) -> Tensor:
    def f(u: float) -> float:  # arXiv:2102.09672, eq. 17
        return math.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

    betas = [min(1 - f((i + 1) / count) / f(i / count), MAX_BETA) for i in range(count)]
    return torch.tensor(betas, dtype=torch.float64)


def _at(alpha_bar: Tensor, t: Tensor, like: Tensor) -> Tensor:
    # Picked and cast where alpha_bar is: not every device has float64.
    return alpha_bar[t.to(alpha_bar.device)].to(like.dtype).to(like.device).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
