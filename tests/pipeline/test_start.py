"""Where a picture is taken up in the middle of a schedule, against the exact solution for Gaussian data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LMSDiscreteScheduler, PNDMScheduler
from torch import Tensor

from sdcli.errors import UsageError
from sdcli.pipeline.start import Start, first_latents, start_at, with_known
from sdcli.schedulers import create, find
from sdcli.schedulers.table import BUILT_IN
from tests import models
from tests.orders import CONFIG, LEADING, eps_of, exact

NAMES = [scheduler.name for scheduler in BUILT_IN]
STEPS = 20
SHAPE = (1, 4, 6, 6)


def sampler_of(name: str, steps: int = STEPS) -> Any:
    return create(find(name), {**CONFIG, **LEADING}, steps)


def sigma(sampler: Any, t: Tensor) -> float:
    alpha_bar = float(sampler.alphas_cumprod[int(t)])
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def error(sampler: Any, timesteps: Tensor) -> float:
    """How far from the exact trajectory it stands at the last timestep, started on it at the first."""
    carries_ratio = float(sampler.init_noise_sigma) > 1
    first, last = (sigma(sampler, timesteps[i]) for i in (0, -1))
    x = exact(first) if carries_ratio else exact(first) / math.sqrt(1 + first**2)
    for t in timesteps[:-1]:
        here = sigma(sampler, t)
        unscaled = sampler.scale_model_input(x, t) * math.sqrt(1 + here**2)
        x = sampler.step(eps_of(unscaled, here), t, x, return_dict=False)[0]
    return float(((x if carries_ratio else x * math.sqrt(1 + last**2)) - exact(last)).abs().max())


@pytest.mark.parametrize("first", [1, 2, 5, 10, 15])
@pytest.mark.parametrize(("name", "most"), [("pndm", 0.021), ("lms", 0.006), ("s-pndm", 0.035), ("f-pndm", 0.019)])
def test_a_method_with_a_history_starts_in_the_middle_as_it_does_at_the_first_step(
    name: str, most: float, first: int
) -> None:
    sampler = sampler_of(name)
    assert error(sampler, start_at(sampler, first)) < most


@pytest.mark.parametrize(
    ("name", "other", "times"), [("pndm", PNDMScheduler, 2.0), ("lms", LMSDiscreteScheduler, 15.0)]
)
def test_told_where_to_start_as_by_diffusers_pndm_and_lms_would_end_far_from_it(
    name: str, other: Any, times: float
) -> None:
    """There is then no history, but no start either: PNDM takes the next timestep for the one that comes twice."""
    ours, theirs = sampler_of(name), other.from_config({**CONFIG, **LEADING, "skip_prk_steps": True})
    theirs.set_timesteps(STEPS)
    if name == "lms":
        theirs.set_begin_index(15)
    assert error(theirs, theirs.timesteps[15:]) > times * error(ours, start_at(ours, 15))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "first"), [(STEPS, 0), (STEPS, 7), (STEPS, 16), (4, 0)])
def test_the_timesteps_left_are_as_many_as_the_evaluations_of_the_steps_left(name: str, steps: int, first: int) -> None:
    sampler = sampler_of(name, steps)
    assert len(start_at(sampler, first)) == find(name).evaluations(steps - first)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [0, 1, 9, 16])
def test_a_picture_is_noised_to_the_level_at_which_the_first_call_is_made(name: str, first: int) -> None:
    sampler = sampler_of(name)
    timesteps = start_at(sampler, first)
    x_0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    x = sampler.scale_model_input(first_latents(sampler, Start(timesteps, STEPS - first, x_0), noise), timesteps[0])
    alpha_bar = sampler.alphas_cumprod[int(timesteps[0])].float()
    assert torch.allclose(x, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_true_prediction_leads_back_to_the_picture(name: str) -> None:
    """The UNet that knows x_0 answers with the noise in what it is shown, whatever the solver made of it."""
    sampler, scheduler = sampler_of(name), find(name)
    timesteps = start_at(sampler, 12)
    x_0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    x = first_latents(sampler, Start(timesteps, 8, x_0), noise)
    extra = {"generator": torch.Generator().manual_seed(0)} if scheduler.is_stochastic else {}
    for t in timesteps:
        alpha_bar = sampler.alphas_cumprod[int(t)].float()
        eps = (sampler.scale_model_input(x, t) - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        x = sampler.step(eps, t, x, return_dict=False, **extra)[0]
    left = (1 - float(sampler.alphas_cumprod[0])) ** 0.5  # where the last step ends, unless at no noise at all
    assert float((x - x_0).abs().max()) < 5 * left


@pytest.mark.parametrize("name", NAMES)
def test_what_the_mask_keeps_is_at_every_call_the_picture_at_its_level(name: str) -> None:
    sampler, scheduler = sampler_of(name), find(name)
    timesteps = start_at(sampler, 10)
    x_0, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 3:] = 1
    start = Start(timesteps, 10, x_0, mask=mask)
    x = first_latents(sampler, start, noise)
    extra = {"generator": torch.Generator().manual_seed(0)} if scheduler.is_stochastic else {}
    for calls, t in enumerate(timesteps, start=1):
        alpha_bar = sampler.alphas_cumprod[int(t)].float()
        shown = sampler.scale_model_input(x, t)
        known = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
        is_half_way = name == "dpm2" and calls % 2 == 0  # there diffusers noises to where the step ends, as we do
        assert is_half_way or torch.allclose(shown[..., :3], known[..., :3], atol=0.02), calls
        x = sampler.step(torch.zeros_like(x), t, x, return_dict=False, **extra)[0]
        x = with_known(sampler, start, x, noise, calls=calls)
    assert torch.equal(x[..., :3], x_0[..., :3])
    assert not torch.allclose(x[..., 3:], x_0[..., 3:], atol=0.1)


def test_all_noise_is_at_the_solvers_own_scale() -> None:
    sampler = sampler_of("euler")
    noise = torch.randn(SHAPE)
    start = Start(start_at(sampler, 0), STEPS, torch.randn(SHAPE), is_all_noise=True)
    assert torch.equal(first_latents(sampler, start, noise), noise * sampler.init_noise_sigma)


def test_a_sampler_of_others_that_can_add_no_noise_is_refused_by_name() -> None:
    class Silent(DDIMScheduler):
        add_noise = property()  # type: ignore[assignment]

    with pytest.raises(UsageError, match="Silent cannot start from a picture"):
        start_at(Silent(**models.BETAS), 1)
