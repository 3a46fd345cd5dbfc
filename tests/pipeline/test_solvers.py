"""S-PNDM and F-PNDM against the formulas of their paper, worked out by hand, and against diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from torch import Tensor

from sdcli.errors import NumericalError
from sdcli.pipeline.solvers import FPNDM, PNDM, transfer
from sdcli.schedulers import create, find
from tests import models

CONFIG: dict[str, object] = {**models.BETAS, "steps_offset": 1, "set_alpha_to_one": False}
SHAPE = (2, 4, 6, 6)


def noise(x: Tensor, t: float) -> Tensor:
    """A network that is no straight line in x nor in t."""
    return torch.tanh(1.3 * x + math.cos(t / 90)) + 0.2 * x


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def walk(sampler: Any, predict: Callable[[Tensor, float], Tensor] = noise) -> list[Tensor]:
    """The latents after every call of the network."""
    x, seen = start(), []
    for t in sampler.timesteps:
        x = sampler.step(predict(x, float(t)), t, x, return_dict=False)[0]
        seen.append(x)
    return seen


def ours(order: int, steps: int, **how: Any) -> PNDM:
    sampler = PNDM(**{**CONFIG, "solver_order": order, **how})  # type: ignore[arg-type]
    sampler.set_timesteps(steps)
    return sampler


def phi(sampler: Any) -> Callable[[Tensor, Tensor, int, int], Tensor]:
    """The transfer part of eq. 9 as the paper writes it, between two timesteps of the schedule."""
    alpha_bar = [float(a) for a in torch.cumprod(1 - betas(), dim=0)]

    def step(x: Tensor, e: Tensor, t: int, s: int) -> Tensor:
        a, b = alpha_bar[t], alpha_bar[max(s, 0)]
        of_x = math.sqrt(a) * (math.sqrt(b) + math.sqrt(a))
        of_e = math.sqrt(a) * (math.sqrt((1 - b) * a) + math.sqrt((1 - a) * b))
        return x + (b - a) * (x / of_x - e / of_e)

    return step


def betas() -> Tensor:
    ends = [float(str(CONFIG[key])) ** 0.5 for key in ("beta_start", "beta_end")]
    return torch.linspace(ends[0], ends[1], 1000, dtype=torch.float64) ** 2


def test_the_transfer_part_is_exact_for_the_true_noise() -> None:
    x_0, e, a, b = start(), torch.randn(SHAPE, dtype=torch.float64), 0.2, 0.7
    x_t = math.sqrt(a) * x_0 + math.sqrt(1 - a) * e
    expected = math.sqrt(b) * x_0 + math.sqrt(1 - b) * e
    assert torch.allclose(transfer(x_t, e, a, b), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_of_order_1_it_is_ddim(spacing: str, prediction_type: str) -> None:
    steps = 10 if spacing != "linspace" else 1000  # diffusers' DDIM steps by a fixed stride
    config = {**CONFIG, "timestep_spacing": spacing, "prediction_type": prediction_type}
    ddim = DDIMScheduler(**config, clip_sample=False)
    ddim.set_timesteps(steps)
    sampler = ours(1, steps, timestep_spacing=spacing, prediction_type=prediction_type)
    assert torch.equal(sampler.timesteps, ddim.timesteps)
    for mine, other in zip(walk(sampler), walk(ddim), strict=True):
        # diffusers keeps alpha_bar in float32
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-5 if steps == 10 else 1e-4)


def test_of_order_2_it_is_the_papers_s_pndm() -> None:
    """A pseudo improved Euler step, then (3 e_t - e_{t+delta}) / 2, each through the transfer part."""
    sampler = create(find("s-pndm"), CONFIG, 5)
    step = phi(sampler)
    t = [801, 601, 401, 201, 1]
    assert sampler.timesteps.tolist() == [801, 601, 601, 401, 201, 1]
    x_0 = start()
    e_0 = noise(x_0, t[0])
    first = step(x_0, e_0, t[0], t[1])
    x_1 = step(x_0, (e_0 + noise(first, t[1])) / 2, t[0], t[1])
    expected, x, before = [first, x_1], x_1, e_0
    for now, then in ((601, 401), (401, 201), (201, 1), (1, -199)):
        e = noise(x, now)
        x = step(x, (3 * e - before) / 2, now, then)
        expected.append(x)
        before = e
    for mine, other in zip(walk(sampler), expected, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-10)


def test_f_pndm_is_the_papers() -> None:
    """Three pseudo Runge-Kutta steps (eq. 13), then pseudo linear multistep steps of order 4 (eq. 12)."""
    sampler = create(find("f-pndm"), CONFIG, 5)
    step = phi(sampler)
    t = [801, 601, 401, 201, 1]
    x, slopes = start(), []
    expected: list[Tensor] = []
    for now, then in ((801, 601), (601, 401), (401, 201)):
        middle = now - 100
        e_1 = noise(x, now)
        x_1 = step(x, e_1, now, middle)
        e_2 = noise(x_1, middle)
        x_2 = step(x, e_2, now, middle)
        e_3 = noise(x_2, middle)
        x_3 = step(x, e_3, now, then)
        e_4 = noise(x_3, then)
        x = step(x, (e_1 + 2 * e_2 + 2 * e_3 + e_4) / 6, now, then)
        expected += [x_1, x_2, x_3, x]
        slopes.append(e_1)
    for now, then in zip(t[3:], [1, -199], strict=True):
        slopes.append(noise(x, now))
        x = step(x, (55 * slopes[-1] - 59 * slopes[-2] + 37 * slopes[-3] - 9 * slopes[-4]) / 24, now, then)
        expected.append(x)
    seen = walk(sampler)
    assert len(seen) == len(expected) == find("f-pndm").evaluations(5)
    for mine, other in zip(seen, expected, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [4, 5, 20, 25])  # of even strides: the middles of others are half a timestep apart
def test_f_pndm_is_that_of_diffusers_for_a_network_that_predicts_noise(steps: int) -> None:
    pndm = PNDMScheduler(**CONFIG, skip_prk_steps=False)
    pndm.set_timesteps(steps)
    sampler: Any = create(find("f-pndm"), CONFIG, steps)
    assert torch.equal(sampler.timesteps, pndm.timesteps)
    for mine, other in zip(walk(sampler), walk(pndm), strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-5)  # diffusers keeps alpha_bar in float32


@pytest.mark.parametrize("steps", [2, 3, 5, 20])
def test_of_order_4_it_is_diffusers_pndm(steps: int) -> None:
    pndm = PNDMScheduler(**CONFIG, skip_prk_steps=True)
    pndm.set_timesteps(steps)
    sampler = ours(4, steps)
    assert torch.equal(sampler.timesteps, pndm.timesteps)
    for mine, other in zip(walk(sampler), walk(pndm), strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [PNDM, FPNDM])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_what_the_network_predicts_does_not_matter(solver: type[PNDM], prediction_type: str) -> None:
    """The history holds the noise itself, so a network that says the same in other words draws the same."""
    sampler, plain = (solver(**{**CONFIG, "prediction_type": one}) for one in (prediction_type, "epsilon"))  # type: ignore[arg-type]
    sampler.set_timesteps(7)
    plain.set_timesteps(7)

    def predict(x: Tensor, t: float) -> Tensor:
        a = float(sampler.alphas_cumprod[int(t)])
        x_0 = (x - math.sqrt(1 - a) * noise(x, t)) / math.sqrt(a)
        return x_0 if prediction_type == "sample" else (math.sqrt(a) * x - x_0) / math.sqrt(1 - a)

    assert torch.allclose(walk(sampler, predict)[-1], walk(plain)[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_steps_go_from_each_timestep_to_the_next_where_these_are_unevenly_spaced(order: int) -> None:
    sampler = ours(order, 27, timestep_spacing="trailing", set_alpha_to_one=True)
    assert len(set(sampler.timesteps.diff().abs().tolist())) > 1
    x_0 = torch.full(SHAPE, 0.7, dtype=torch.float64)

    def predict(x: Tensor, t: float) -> Tensor:
        a = float(sampler.alphas_cumprod[int(t)])
        return (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)

    assert torch.allclose(walk(sampler, predict)[-1], x_0, rtol=0, atol=1e-9)


def test_one_step_is_taken_once() -> None:
    sampler = ours(2, 1, timestep_spacing="trailing")
    assert sampler.timesteps.tolist() == [999]
    assert len(walk(sampler)) == 1


def test_a_sampler_that_is_at_its_end_says_so() -> None:
    sampler = ours(2, 3)
    walk(sampler)
    with pytest.raises(NumericalError, match="taken all its steps"):
        sampler.step(start(), sampler.timesteps[-1], start())
    sampler.set_timesteps(3)
    assert len(walk(sampler)) == 4
