"""The noise schedule of training: betas, q(x_t | x_0) and what the network is asked to predict.

Letters as in Ho et al. 2020 (DDPM, arXiv:2006.11239). Samplers have their own schedules; see `sdcli.schedulers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdcli.errors import InputError

COSINE_OFFSET = 0.008  # s of Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17
MAX_BETA = 0.999  # same paper, section 3.2


def alpha_bars(config: Mapping[str, object]) -> Tensor:
    """Cumulative products of 1 - beta for a diffusers scheduler config.

    Returns (num_train_timesteps,) float64, falling from about 1 towards 0, and to 0 with `rescale_betas_zero_snr`.
    Raises InputError when the config names an unknown `beta_schedule`, or betas so small that no noise is left of the
    first: float64 then has 1 for its alpha_bar, and its sigma and its signal-to-noise ratio are no numbers.
    """
    alpha_bar = torch.cumprod(1.0 - _configured_betas(config), dim=0)
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2023, arXiv:2305.08891, algorithm 1
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    if not alpha_bar[0] < 1:
        raise InputError("scheduler_config.json: there is no noise at the first timestep", "raise its beta_start")
    return alpha_bar


def betas(alpha_bar: Tensor) -> Tensor:
    """The variances of the steps q(x_t | x_{t-1}), DDPM eq. 2, (T,): what is left of a config's after any rescaling."""
    return 1.0 - alpha_bar / _previous(alpha_bar)


def q_sample(x_0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_0) with the noise given: DDPM eq. 4.

    x_0, eps: (B, C, h, w); t: (B,) int64; alpha_bar: (T,) from `alpha_bars`. Returns (B, C, h, w).
    """
    return _at(alpha_bar.sqrt(), t, x_0) * x_0 + _at((1.0 - alpha_bar).sqrt(), t, x_0) * eps


def target(x_0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor, *, prediction_type: str) -> Tensor:
    """What the network should answer at x_t: the noise (`epsilon`), the velocity (`v_prediction`) or x_0 (`sample`).

    Shapes as in `q_sample`. Raises InputError for another prediction type.
    Source of v: Salimans and Ho 2022, arXiv:2202.00512, appendix D.
    """
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x_0
    if prediction_type == "v_prediction":
        return _at(alpha_bar.sqrt(), t, x_0) * eps - _at((1.0 - alpha_bar).sqrt(), t, x_0) * x_0
    raise InputError(f"prediction_type: {prediction_type!r} is unknown", "use epsilon, v_prediction or sample")


def x_0_of(prediction: Tensor, x_t: Tensor, t: Tensor, alpha_bar: Tensor, *, prediction_type: str) -> Tensor:
    """The x_0 that a prediction at x_t amounts to: the inverse of `target`. Shapes as in `q_sample`.

    Raises InputError for an unknown prediction type. From epsilon it is not defined where alpha_bar is 0.
    """
    a = _at(alpha_bar, t, x_t)
    if prediction_type == "epsilon":
        return (x_t - (1.0 - a).sqrt() * prediction) / a.sqrt()
    if prediction_type == "sample":
        return prediction
    if prediction_type == "v_prediction":
        return a.sqrt() * x_t - (1.0 - a).sqrt() * prediction
    raise InputError(f"prediction_type: {prediction_type!r} is unknown", "use epsilon, v_prediction or sample")


def snr(t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) at t (B,). Returns (B,), in alpha_bar's dtype, where it is."""
    a = alpha_bar[t.to(alpha_bar.device)]
    return a / (1.0 - a)


def min_snr_weight(t: Tensor, alpha_bar: Tensor, *, gamma: float, prediction_type: str) -> Tensor:
    """The weight of a sample's loss that caps what easy timesteps count for. t: (B,). Returns (B,).

    Source: Hang et al. 2023, arXiv:2303.09556, section 3.4 and appendix: min(SNR, gamma) on the loss of x_0.
    """
    ratio = snr(t, alpha_bar)
    capped = ratio.clamp(max=gamma)
    if prediction_type == "epsilon":
        return capped / ratio
    return capped / (ratio + 1.0) if prediction_type == "v_prediction" else capped


class Posterior(NamedTuple):
    """The coefficients of q(x_{t-1} | x_t, x_0) for every t, each (T,) in float64."""

    of_x_0: Tensor  # mean = of_x_0 * x_0 + of_x_t * x_t
    of_x_t: Tensor
    variance: Tensor  # beta~_t, 0 at t = 0
    log_variance: Tensor  # at t = 0, where it is minus infinity, that of t = 1, as in arXiv:2102.09672


def posterior(alpha_bar: Tensor) -> Posterior:
    """What the reverse step is made of when x_0 is known: DDPM eq. 7.

    alpha_bar: (T,) from `alpha_bars`. At t = 0, with x_{-1} = x_0, the mean is x_0 itself.
    """
    before, beta = _previous(alpha_bar), betas(alpha_bar)
    variance = (1.0 - before) / (1.0 - alpha_bar) * beta
    return Posterior(
        of_x_0=before.sqrt() * beta / (1.0 - alpha_bar),
        of_x_t=(1.0 - beta).sqrt() * (1.0 - before) / (1.0 - alpha_bar),
        variance=variance,
        log_variance=torch.cat([variance[1:2], variance[1:]]).log(),
    )


def q_posterior(x_0: Tensor, x_t: Tensor, t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of q(x_{t-1} | x_t, x_0): DDPM eq. 6 and 7.

    Shapes as in `q_sample`; the log-variance is (B, 1, 1, 1), at t = 0, where the variance is 0, that of t = 1.
    """
    at = posterior(alpha_bar)
    mean = _at(at.of_x_0, t, x_0) * x_0 + _at(at.of_x_t, t, x_t) * x_t
    return mean, _at(at.log_variance, t, x_0)


def learned_logvar(v: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The log-variance that the second half v of a UNet's channels stands for: between beta~_t and beta_t.

    v: (B, C, h, w), where -1 means beta~_t and 1 means beta_t. Returns its shape.
    Source: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15.
    """
    low = _at(posterior(alpha_bar).log_variance, t, v)
    high = _at(betas(alpha_bar).log(), t, v)
    share = (v + 1.0) / 2.0
    return share * high + (1.0 - share) * low


def variational_bound(x_0: Tensor, x_t: Tensor, t: Tensor, mean: Tensor, logvar: Tensor, alpha_bar: Tensor) -> Tensor:
    """The term L_t of the variational bound for a model of q(x_{t-1} | x_t) with `mean` and `logvar`, in bits a value.

    For t > 0 the KL divergence from the posterior, DDPM eq. 5; at t = 0 the negative log-likelihood of x_0, as a
    density, since latents are not discrete as the pixels of that paper are. Returns (B,).
    """
    true_mean, true_logvar = q_posterior(x_0, x_t, t, alpha_bar)
    apart = (true_mean - mean).square() * (-logvar).exp()
    kl = 0.5 * (logvar - true_logvar + (true_logvar - logvar).exp() + apart - 1.0)
    nll = 0.5 * (math.log(2.0 * math.pi) + logvar + (x_0 - mean).square() * (-logvar).exp())
    bits = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl) / math.log(2.0)
    return bits.mean(dim=(1, 2, 3))


def _configured_betas(config: Mapping[str, object]) -> Tensor:
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


def _previous(alpha_bar: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    # Picked and cast where the table is: not every device has float64.
    return table[t.to(table.device)].to(like.dtype).to(like.device).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
