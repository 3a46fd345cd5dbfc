"""The noise schedule of training, against diffusers' DDPMScheduler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sdcli.errors import InputError
from sdcli.pipeline.noise import (
    alpha_bars,
    betas,
    learned_logvar,
    min_snr_weight,
    posterior,
    q_posterior,
    q_sample,
    target,
    variational_bound,
    x_0_of,
)

CONFIGS: list[dict[str, object]] = [
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "num_train_timesteps": 50, "beta_start": 0.01, "beta_end": 0.3},
    {"beta_schedule": "linear", "num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 0.5]},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
]
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(str(v) for v in c.values()))


def drawn(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn((2, 5, 4, 3, 2), generator=generator)
    return x_0, eps, torch.linspace(0, count - 1, 5).long()


@EVERY_CONFIG
def test_alpha_bars_are_those_of_diffusers_in_float64(config: dict[str, object]) -> None:
    ours, theirs = alpha_bars(config), DDPMScheduler.from_config(config).alphas_cumprod
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-7)  # theirs is a float32 product of 1000


@EVERY_CONFIG
def test_q_sample_is_diffusers_add_noise(config: dict[str, object]) -> None:
    theirs = DDPMScheduler.from_config(config)
    x_0, eps, t = drawn(len(theirs.alphas_cumprod))
    x_t = q_sample(x_0, t, eps, alpha_bars(config))
    torch.testing.assert_close(x_t, theirs.add_noise(x_0, eps, t), rtol=1e-4, atol=1e-5)


@EVERY_CONFIG
def test_the_target_of_v_prediction_is_diffusers_velocity(config: dict[str, object]) -> None:
    theirs = DDPMScheduler.from_config(config)
    x_0, eps, t = drawn(len(theirs.alphas_cumprod))
    v = target(x_0, t, eps, alpha_bars(config), prediction_type="v_prediction")
    torch.testing.assert_close(v, theirs.get_velocity(x_0, eps, t), rtol=1e-4, atol=1e-5)


def test_x_0_and_eps_are_a_rotation_of_x_t_and_v() -> None:
    alpha_bar = alpha_bars(CONFIGS[1])
    x_0, eps, t = (value.double() if value.is_floating_point() else value for value in drawn(1000))
    x_t = q_sample(x_0, t, eps, alpha_bar)
    v = target(x_0, t, eps, alpha_bar, prediction_type="v_prediction")
    a = alpha_bar[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(a.sqrt() * x_t - (1 - a).sqrt() * v, x_0)
    torch.testing.assert_close((1 - a).sqrt() * x_t + a.sqrt() * v, eps)


def test_the_target_of_epsilon_is_the_noise_itself() -> None:
    x_0, eps, t = drawn(1000)
    assert target(x_0, t, eps, alpha_bars({}), prediction_type="epsilon") is eps


def test_every_sample_of_a_batch_is_noised_by_its_own_timestep() -> None:
    alpha_bar = alpha_bars({})
    x_0, eps, t = drawn(1000)
    together = q_sample(x_0, t, eps, alpha_bar)
    alone = [q_sample(x_0[i : i + 1], t[i : i + 1], eps[i : i + 1], alpha_bar) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_an_empty_config_means_the_defaults_of_diffusers() -> None:
    torch.testing.assert_close(alpha_bars({}).float(), DDPMScheduler().alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_an_unknown_beta_schedule_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="beta_schedule: 'sigmoid' is unknown"):
        alpha_bars({"beta_schedule": "sigmoid"})


def test_an_unknown_prediction_type_is_refused_by_name() -> None:
    x_0, eps, t = drawn(1000)
    with pytest.raises(InputError, match="prediction_type: 'score' is unknown"):
        target(x_0, t, eps, alpha_bars({}), prediction_type="score")
    with pytest.raises(InputError, match="prediction_type: 'score' is unknown"):
        x_0_of(eps, x_0, t, alpha_bars({}), prediction_type="score")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_from_a_right_prediction_of_any_type_x_0_comes_back(kind: str) -> None:
    alpha_bar = alpha_bars(CONFIGS[1])
    x_0, eps, t = (value.double() if value.is_floating_point() else value for value in drawn(1000))
    x_t = q_sample(x_0, t, eps, alpha_bar)
    wanted = target(x_0, t, eps, alpha_bar, prediction_type=kind)
    torch.testing.assert_close(x_0_of(wanted, x_t, t, alpha_bar, prediction_type=kind), x_0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_every_prediction_as_the_capped_snr_weighs_that_of_x_0(kind: str) -> None:
    alpha_bar = alpha_bars(CONFIGS[1])
    x_0, eps, t = (value.double() if value.is_floating_point() else value for value in drawn(1000))
    x_t = q_sample(x_0, t, eps, alpha_bar)
    wanted = target(x_0, t, eps, alpha_bar, prediction_type=kind)
    guess = wanted + 0.1 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).double()
    loss = min_snr_weight(t, alpha_bar, gamma=5.0, prediction_type=kind) * (guess - wanted).square().mean((1, 2, 3))
    error = (x_0_of(guess, x_t, t, alpha_bar, prediction_type=kind) - x_0).square().mean((1, 2, 3))
    a = alpha_bar[t]
    torch.testing.assert_close(loss, (a / (1 - a)).clamp(max=5.0) * error)


SAMPLES = 1_000_000


def test_noise_added_step_by_step_has_the_mean_and_variance_of_the_closed_form() -> None:
    alpha_bar = alpha_bars({"num_train_timesteps": 8, "beta_start": 0.02, "beta_end": 0.6})
    source, x_0 = torch.Generator().manual_seed(0), 1.5
    x = torch.full((SAMPLES,), x_0, dtype=torch.float64)
    for t, beta in enumerate(betas(alpha_bar)):
        eps = torch.randn(SAMPLES, generator=source, dtype=torch.float64)
        x = (1 - beta).sqrt() * x + beta.sqrt() * eps  # q(x_t | x_{t-1}), DDPM eq. 2
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        mean = float(q_sample(x_0 * one, torch.tensor([t]), 0 * one, alpha_bar))
        variance = float(q_sample(0 * one, torch.tensor([t]), one, alpha_bar)) ** 2
        assert abs(float(x.mean()) - mean) < 3 * math.sqrt(variance / SAMPLES)
        assert abs(float(x.var()) - variance) < 3 * variance * math.sqrt(2 / SAMPLES)
    assert float(alpha_bar[-1]) < 0.1  # most of x_0 is gone by then: the chain has been somewhere


def test_the_betas_are_those_of_the_config() -> None:
    found = betas(alpha_bars({"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 0.5]}))
    torch.testing.assert_close(found, torch.tensor([0.1, 0.2, 0.3, 0.5], dtype=torch.float64))
    rescaled = betas(alpha_bars(CONFIGS[5]))
    assert float(rescaled[-1]) == 1.0 and float(rescaled[0]) == pytest.approx(0.00085)


# The posterior, and a learned variance


def test_the_posterior_coefficients_are_those_of_guided_diffusion() -> None:
    # Its formulas, written out again: everything from the betas, in float64.
    beta = np.linspace(0.0001, 0.02, 1000)
    alpha_bar = np.cumprod(1.0 - beta)
    before = np.append(1.0, alpha_bar[:-1])
    variance = beta * (1.0 - before) / (1.0 - alpha_bar)
    found = posterior(alpha_bars({"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}))
    np.testing.assert_allclose(found.of_x_0, beta * np.sqrt(before) / (1.0 - alpha_bar), rtol=1e-9)
    np.testing.assert_allclose(found.of_x_t, (1.0 - before) * np.sqrt(1.0 - beta) / (1.0 - alpha_bar), rtol=1e-9)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-9)
    np.testing.assert_allclose(found.log_variance, np.log(np.append(variance[1], variance[1:])), rtol=1e-9)


@EVERY_CONFIG
def test_at_the_first_timestep_the_posterior_is_x_0_for_certain(config: dict[str, object]) -> None:
    found = posterior(alpha_bars(config))
    assert (float(found.of_x_0[0]), float(found.of_x_t[0]), float(found.variance[0])) == (1.0, 0.0, 0.0)
    assert bool(found.log_variance.isfinite().all()) and float(found.log_variance[0]) == float(found.log_variance[1])


def test_where_nothing_of_x_0_is_left_the_posterior_is_that_of_x_0_alone() -> None:
    found = posterior(alpha_bars(CONFIGS[5]))  # zero terminal SNR: x_T is pure noise and says nothing of x_{T-1}
    assert float(found.of_x_t[-1]) == 0.0
    torch.testing.assert_close(found.of_x_0[-1], alpha_bars(CONFIGS[5])[-2].sqrt())


def gaussians(config: dict[str, object]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alpha_bar = alpha_bars(config)
    x_0, eps, t = (value.double() if value.is_floating_point() else value for value in drawn(len(alpha_bar)))
    return x_0, q_sample(x_0, t, eps, alpha_bar), t, alpha_bar


@EVERY_CONFIG
def test_the_posterior_is_the_product_of_its_two_gaussians(config: dict[str, object]) -> None:
    x_0, x_t, t, alpha_bar = gaussians(config)
    t = t.clamp(min=1)  # before t = 0 there is no noise, so no density
    now, before = (alpha_bar[index].view(-1, 1, 1, 1) for index in (t, t - 1))
    alpha = now / before
    # q(x_t | x_{t-1}) as a function of x_{t-1} has precision alpha / (1 - alpha); q(x_{t-1} | x_0) 1 / (1 - before)
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    mean = (alpha.sqrt() / (1 - alpha) * x_t + before.sqrt() / (1 - before) * x_0) / precision
    found_mean, found_logvar = q_posterior(x_0, x_t, t, alpha_bar)
    torch.testing.assert_close(found_mean, mean)
    torch.testing.assert_close(found_logvar, -precision.log())


def test_the_posterior_of_the_first_timestep_is_x_0_with_the_variance_of_the_next() -> None:
    x_0, x_t, _, alpha_bar = gaussians(CONFIGS[1])
    mean, logvar = q_posterior(x_0, x_t, torch.zeros(5).long(), alpha_bar)
    torch.testing.assert_close(mean, x_0)
    assert torch.equal(logvar, q_posterior(x_0, x_t, torch.ones(5).long(), alpha_bar)[1])


def test_a_learned_variance_is_the_one_diffusers_samples_with() -> None:
    theirs = DDPMScheduler.from_config({**CONFIGS[1], "variance_type": "learned_range"})
    theirs.set_timesteps(1000)
    v = torch.linspace(-1, 1, 12).view(1, 4, 3, 1)
    for t in (1, 7, 500, 999):
        found = learned_logvar(v, torch.tensor([t]), alpha_bars(CONFIGS[1]))
        torch.testing.assert_close(found, theirs._get_variance(t, predicted_variance=v), rtol=1e-3, atol=1e-3)


def test_the_bound_is_the_kl_divergence_from_the_posterior_and_0_for_the_posterior_itself() -> None:
    x_0, x_t, t, alpha_bar = gaussians(CONFIGS[1])
    t = t.clamp(min=1)
    mean, logvar = q_posterior(x_0, x_t, t, alpha_bar)
    assert float(variational_bound(x_0, x_t, t, mean, logvar.expand_as(mean), alpha_bar).abs().max()) < 1e-12
    other_mean, other_logvar = mean + 0.01, logvar.expand_as(mean) + 0.3
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(other_mean, (0.5 * other_logvar).exp()))
    found = variational_bound(x_0, x_t, t, other_mean, other_logvar, alpha_bar)
    torch.testing.assert_close(found, expected.mean((1, 2, 3)) / math.log(2))


def test_at_the_first_timestep_the_bound_is_the_negative_log_density_of_x_0() -> None:
    x_0, x_t, _, alpha_bar = gaussians(CONFIGS[1])
    mean, logvar = x_0 + 0.02, torch.full_like(x_0, -6.0)
    found = variational_bound(x_0, x_t, torch.zeros(5).long(), mean, logvar, alpha_bar)
    expected = -Normal(mean, math.exp(-3.0)).log_prob(x_0).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(found, expected)
