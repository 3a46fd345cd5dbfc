"""DDIM backwards: undone exactly where the UNet's answer is known, and ever closer with more steps where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, UNet2DConditionModel
from torch import Tensor

from sdcli import schedulers
from sdcli.errors import NumericalError
from sdcli.pipeline.context import Context
from sdcli.pipeline.inversion import invert, step_back
from sdcli.pipeline.noise import alpha_bars, target
from sdcli.pipeline.sampling import denoise, generators
from tests import models

SHAPE = (4, 8, 8)
KINDS = ("epsilon", "v_prediction", "sample")
SPREAD = 0.5  # standard deviation of the Gaussian data below
NOTHING = torch.zeros(1, 77, models.CONTEXT)
CONTEXT = Context(NOTHING)


class Answers(torch.nn.Module):
    """A UNet whose answer is a formula of x and t; it notes the timesteps it was asked for."""

    def __init__(self, formula: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.formula, self.asked = formula, list[int]()

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.asked.append(int(t))
        return (self.formula(x, int(t)),)


def ddim(steps: int, **config: Any) -> Any:
    base = {**models.BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return schedulers.create(schedulers.find("ddim"), base | config, steps)


def drawn(seed: int = 0) -> Tensor:
    return SPREAD * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed))


def there_and_back(unet: Any, z: Tensor, steps: int, **config: Any) -> tuple[Tensor, Tensor]:
    """The noise of latents, and the latents that it draws."""
    unguided: dict[str, Any] = {"negative": None, "guidance": 1.0}
    noise = list(invert(unet, ddim(steps, **config), z, CONTEXT, **unguided))[-1].latents
    back = list(denoise(unet, ddim(steps, **config), noise, CONTEXT, sources=generators([0]), **unguided))[-1].latents
    return noise, back


def gaussian(kind: str, **config: Any) -> Answers:
    """The exact denoiser of latents that are normal with deviation SPREAD: linear in x."""
    bar = alpha_bars(models.BETAS | config)

    def formula(x: Tensor, t: int) -> Tensor:
        a = bar[t]
        x_0 = x.double() * a.sqrt() * SPREAD**2 / (a * SPREAD**2 + 1 - a)  # E[x_0 | x_t]
        eps = (x.double() - a.sqrt() * x_0) / (1 - a).sqrt()
        return target(x_0, torch.tensor([t]), eps, bar, prediction_type=kind).float()

    return Answers(formula)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("is_one", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_an_answer_that_does_not_change_is_undone_exactly(kind: str, spacing: str, is_one: bool) -> None:
    fixed = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    config = {"prediction_type": kind, "timestep_spacing": spacing, "set_alpha_to_one": is_one}
    z = drawn()
    for steps in (10, 11, 30):  # 1000 has no 11 and no 30 whole parts: diffusers' strides are then no timesteps apart
        _, back = there_and_back(Answers(lambda x, t: fixed), z, steps, **config)
        torch.testing.assert_close(back, z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("is_one", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_the_way_there_and_back_falls_with_the_steps(kind: str, spacing: str, is_one: bool) -> None:
    config = {"prediction_type": kind, "timestep_spacing": spacing, "set_alpha_to_one": is_one}
    unet, z = gaussian(kind, **config), drawn()
    errors = [rms(there_and_back(unet, z, steps, **config)[1] - z) / SPREAD for steps in (10, 20, 50, 100, 500)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 and errors[-1] < errors[0] / 5


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_the_data_become_standard_normal_noise(kind: str) -> None:
    unet, z = gaussian(kind), drawn()
    noise, _ = there_and_back(unet, z, 500, prediction_type=kind)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.1)
    assert float(torch.corrcoef(torch.stack([noise.flatten(), z.flatten()]))[0, 1]) > 0.999  # the ODE only scales here


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_timesteps_are_those_of_ddim_backwards_and_one_call_each(spacing: str) -> None:
    unet = Answers(lambda x, t: 0.1 * x)
    steps = list(invert(unet, ddim(11, timestep_spacing=spacing), drawn(), CONTEXT, negative=None, guidance=1.0))
    forwards = ddim(11, timestep_spacing=spacing).timesteps.tolist()
    assert unet.asked == [int(step.t) for step in steps] == forwards[::-1]
    assert [(step.index, step.total) for step in steps] == [(i, 11) for i in range(1, 12)]


@pytest.mark.parametrize("steps", [10, 25])
def test_with_epsilon_every_step_is_that_of_diffusers(sd1: Any, steps: int) -> None:
    unet = UNet2DConditionModel.from_pretrained(sd1 / "unet", local_files_only=True).requires_grad_(False)
    theirs = DDIMInverseScheduler(**models.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    theirs.set_timesteps(steps)
    context = Context(torch.randn(1, 77, models.CONTEXT, generator=torch.Generator().manual_seed(2)))
    x = z = drawn()
    ours = list(invert(unet, ddim(steps, timestep_spacing="leading"), z, context, negative=None, guidance=1.0))
    for step, t in zip(ours, theirs.timesteps, strict=True):
        x = theirs.step(unet(x, t, **context.arguments()).sample, t, x).prev_sample
        assert step.t == float(t)
        torch.testing.assert_close(step.latents, x, rtol=1e-4, atol=1e-4)


def test_guidance_goes_from_the_negative_through_the_context() -> None:
    class Hearing(Answers):
        def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (encoder_hidden_states.mean(dim=(1, 2)).view(-1, 1, 1, 1).expand_as(x),)

    unet, z = Hearing(lambda x, t: x), drawn()
    both: dict[str, Any] = {"negative": Context(NOTHING + 0.2), "guidance": 3.0}
    guided = list(invert(unet, ddim(5), z, Context(NOTHING + 0.3), **both))[-1].latents
    alone = list(invert(unet, ddim(5), z, Context(NOTHING + 0.5), negative=None, guidance=1.0))[-1].latents
    torch.testing.assert_close(guided, alone)  # 0.2 + 3 (0.3 - 0.2)


def test_variances_that_a_unet_predicts_too_are_left_out() -> None:
    z = drawn()
    with_variances = Answers(lambda x, t: torch.cat([0.1 * x, 9.0 * torch.ones_like(x)], dim=1))
    assert torch.equal(there_and_back(with_variances, z, 5)[0], there_and_back(Answers(lambda x, t: 0.1 * x), z, 5)[0])


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_at_zero_terminal_snr_the_noise_is_all_there_is(kind: str) -> None:
    unet = gaussian(kind, rescale_betas_zero_snr=True)
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": kind}
    errors = [rms(there_and_back(unet, drawn(), steps, **config)[1] - drawn()) for steps in (10, 100, 500)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_step_back_is_a_step_of_ddim_undone(kind: str) -> None:
    solver = ddim(10, prediction_type=kind)
    x, answer = drawn(1), drawn(2)
    for t in solver.timesteps[:-1]:
        stepped = solver.step(answer, t, x, return_dict=False)[0]
        a, a_before = (float(solver.alphas_cumprod[int(t) - back]) for back in (0, 100))
        torch.testing.assert_close(step_back(stepped, answer, a, a_before, prediction_type=kind), x, atol=1e-4, rtol=0)


def test_values_that_are_not_finite_stop_it_at_once() -> None:
    unet = Answers(lambda x, t: torch.where(torch.tensor(t > 300), torch.inf, x))
    with pytest.raises(NumericalError, match="after step 2 of 4 of the inversion"):
        list(invert(unet, ddim(4, timestep_spacing="trailing"), drawn(), CONTEXT, negative=None, guidance=1.0))
    assert unet.asked == [249, 499]
