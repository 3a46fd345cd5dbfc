"""The noise schedule of training, against diffusers' DDPMScheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from sdcli.errors import InputError
from sdcli.pipeline.noise import alpha_bars, q_sample, target

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


def test_a_prediction_type_that_cannot_be_trained_is_refused_by_name() -> None:
    x_0, eps, t = drawn(1000)
    with pytest.raises(InputError, match="prediction_type: 'sample' cannot be trained"):
        target(x_0, t, eps, alpha_bars({}), prediction_type="sample")
