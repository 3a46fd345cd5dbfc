"""The reference solution: exact for Gaussian data, whatever the UNet predicts; and which samplers span the same ODE."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdcli.pipeline.noise import alpha_bars
from sdcli.pipeline.reference import NoiseLevels, Predict, first_scale, missed, solve
from sdcli.schedulers import Scheduler, create, find, listing
from tests.orders import CONFIG, MU, SPREAD, slope

TRAILING: dict[str, object] = {
    **CONFIG,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "final_sigmas_type": "zero",
}
ZERO_SNR: dict[str, object] = {**TRAILING, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
NOISE = torch.tensor([-1.3, -0.4, 0.3, 1.7], dtype=torch.float64).reshape(1, 1, 2, 2)


def gaussian_denoiser(levels: NoiseLevels, prediction_type: str) -> Predict:
    """The optimal answer for x_0 ~ N(MU, SPREAD^2), also between the timesteps."""

    def predict(x: Tensor, t: float) -> Tensor:
        low = min(int(t), len(levels.sigmas) - 2)
        of, back = (math.log, math.exp) if math.isfinite(levels.sigmas[low + 1]) else (math.atan, math.tan)
        sigma = back((low + 1 - t) * of(levels.sigmas[low]) + (t - low) * of(levels.sigmas[low + 1]))
        alpha = 1 / math.sqrt(1 + sigma**2)
        beta = math.sqrt(1 - alpha**2)
        x_0 = MU + alpha * SPREAD**2 * (x - alpha * MU) / (alpha**2 * SPREAD**2 + beta**2)
        eps = (x - alpha * x_0) / beta
        return {"epsilon": eps, "sample": x_0, "v_prediction": alpha * eps - beta * x_0}[prediction_type]

    return predict


def solved(config: dict[str, object], prediction_type: str, steps: int) -> Tensor:
    levels = NoiseLevels.of(alpha_bars(config))
    predict = gaussian_denoiser(levels, prediction_type)
    *_, last = solve(predict, NOISE, levels, prediction_type=prediction_type, steps=steps)
    return last.latents


def exact(config: dict[str, object]) -> Tensor:
    """Where the ODE leads at the first timestep's sigma, and the denoiser's x_0 there."""
    levels = NoiseLevels.of(alpha_bars(config))
    first, last = levels.sigmas[-1], levels.sigmas[0]
    alpha = 1 / math.sqrt(1 + first**2)
    at_first = (NOISE - alpha * MU) / math.sqrt(alpha**2 * SPREAD**2 + 1 - alpha**2)  # in standard deviations
    x = MU + at_first * math.sqrt(SPREAD**2 + last**2)
    return MU + (x - MU) * SPREAD**2 / (SPREAD**2 + last**2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_reference_is_the_exact_solution_for_gaussian_data(prediction_type: str) -> None:
    error = (solved(TRAILING, prediction_type, 250) - exact(TRAILING)).abs().max()
    assert error < 1e-4


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_from_pure_noise_of_zero_terminal_snr_it_is_exact_too(prediction_type: str) -> None:
    config = {**ZERO_SNR, "prediction_type": prediction_type}
    error = (solved(config, prediction_type, 250) - exact(config)).abs().max()
    assert error < 2e-5


def test_its_error_falls_with_the_square_of_the_steps() -> None:
    counts = (32, 64, 128, 256)
    errors = [float((solved(TRAILING, "epsilon", n) - exact(TRAILING)).abs().max()) for n in counts]
    assert 1.9 < slope(counts, errors) < 2.2


def test_it_evaluates_twice_a_step_but_the_last_and_ends_at_the_first_timestep() -> None:
    asked: list[float] = []

    def predict(x: Tensor, t: float) -> Tensor:
        assert x.dtype == torch.float64
        asked.append(t)
        return torch.zeros_like(x)

    levels = NoiseLevels.of(alpha_bars(CONFIG))
    stages = list(solve(predict, NOISE.float(), levels, prediction_type="sample", steps=7))
    assert [stage.index for stage in stages] == [1, 2, 3, 4, 5, 6, 7]
    assert len(asked) == 13
    assert (asked[0], asked[-1]) == (999.0, pytest.approx(0.0, abs=1e-6))
    assert any(t != round(t) for t in asked)
    assert asked == sorted(asked, reverse=True)


def test_a_timestep_of_a_trained_level_is_whole() -> None:
    levels = NoiseLevels.of(alpha_bars(CONFIG))
    for t in (0, 1, 500, 998, 999):
        assert levels.t(levels.sigmas[t]) == pytest.approx(t, abs=1e-6)
    assert 500 < levels.t((levels.sigmas[500] + levels.sigmas[501]) / 2) < 501
    zero = NoiseLevels.of(alpha_bars(ZERO_SNR))
    assert zero.t(math.inf) == 999
    assert zero.t(math.tan((math.pi / 2 + math.atan(zero.sigmas[998])) / 2)) == pytest.approx(998.5)


DETERMINISTIC = [scheduler for scheduler in listing().schedulers if not scheduler.is_stochastic]


@pytest.mark.parametrize("scheduler", DETERMINISTIC, ids=lambda scheduler: scheduler.name)
def test_deterministic_samplers_span_the_whole_ode_with_trailing_timesteps(scheduler: Scheduler) -> None:
    for steps in (5, 10, 20, 50):
        assert float(create(scheduler, TRAILING, steps).timesteps[0]) == 999
        sampler = create(scheduler, TRAILING, steps)
        left = missed(sampler, prediction_type="epsilon", step_arguments=scheduler.step_arguments)
        if scheduler.name == "deis":  # diffusers' has no limit at sigma 0
            assert left == pytest.approx(0.029, abs=2e-3)
        else:
            assert left < 1e-3


def test_a_sampler_that_starts_or_ends_elsewhere_is_told_apart() -> None:
    leading = {**CONFIG, "timestep_spacing": "leading"}
    first_timestep = {**TRAILING, "set_alpha_to_one": False}
    assert missed(create(find("ddim"), leading, 10), prediction_type="epsilon") > 0.01
    assert missed(create(find("ddim"), first_timestep, 10), prediction_type="epsilon") == pytest.approx(0.029, abs=2e-3)
    ends_above_zero = {**TRAILING, "final_sigmas_type": "sigma_min"}
    assert missed(create(find("dpm"), ends_above_zero, 10), prediction_type="epsilon") > 0.01


@pytest.mark.parametrize("name", ["ddim", "dpm", "euler", "unipc"])
def test_samplers_of_zero_terminal_snr_end_at_sigma_0(name: str) -> None:
    config = {**ZERO_SNR, "prediction_type": "sample"}
    assert missed(create(find(name), config, 10), prediction_type="sample") < 1e-3


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "lms", "dpm"])
def test_the_unet_first_sees_the_noise_itself(name: str) -> None:
    sampler = create(find(name), TRAILING, 10)
    scale = first_scale(create(find(name), TRAILING, 10))
    x = NOISE.float() * scale * sampler.init_noise_sigma
    assert torch.allclose(sampler.scale_model_input(x, sampler.timesteps[0]), NOISE.float(), rtol=1e-6)
