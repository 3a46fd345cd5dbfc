"""Noise, guidance and the denoising loop, each against its definition; test_generate.py has whole pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from torch import Tensor

from sdcli import schedulers
from sdcli.errors import NumericalError
from sdcli.pipeline.context import Context, joined
from sdcli.pipeline.sampling import Step, denoise, generators, guided_prediction, initial_noise
from tests import models

SHAPE = (4, 8, 8)
CONTEXT = 16  # width of the tiny text encoder


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> UNet2DConditionModel:
    folder = models.write_sd1(tmp_path_factory.mktemp("sd1"))
    return UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).requires_grad_(False)


class Formula(torch.nn.Module):
    """A UNet whose prediction is a formula of x and t; it notes the batches it was given."""

    def __init__(self, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.formula, self.batches = formula, list[int]()

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.batches.append(len(x))
        return (self.formula(x, t, encoder_hidden_states),)


def context(*values: float) -> Context:
    """A context per image, all of whose entries are one value."""
    return Context(torch.tensor(values, dtype=torch.float32).view(-1, 1, 1).expand(-1, 77, CONTEXT))


def run(unet: Any, scheduler: Any, seeds: list[int], **how: Any) -> list[Step]:
    sources = generators(seeds)
    settings = {"context": context(*[0.5] * len(seeds)), "negative": None, "guidance": 1.0} | how
    return list(denoise(unet, scheduler, initial_noise(SHAPE, sources), sources=sources, **settings))


def ready(scheduler: Any, steps: int) -> Any:
    scheduler.set_timesteps(steps)
    return scheduler


def test_an_image_starts_from_the_noise_of_its_own_seed() -> None:
    noise = initial_noise(SHAPE, generators([7, 2**64 - 1]))
    for row, seed in zip(noise, (7, 2**64 - 1), strict=True):
        assert torch.equal(row, torch.randn(SHAPE, generator=torch.Generator("cpu").manual_seed(seed)))
    assert noise.dtype == torch.float32


def test_guidance_goes_from_the_unconditional_prediction_through_the_conditional() -> None:
    unet = Formula(lambda x, t, c: x + c.mean(dim=(1, 2)).view(-1, 1, 1, 1))
    x = torch.randn(2, *SHAPE)
    both = context(10, 20, 11, 23)  # negative first
    for guidance in (1.0, 7.5):
        prediction = guided_prediction(unet, x, torch.tensor(5), both, guidance=guidance)
        expected = x + torch.tensor([10 + guidance * 1, 20 + guidance * 3]).view(-1, 1, 1, 1)
        assert torch.allclose(prediction, expected, atol=1e-5)
    assert unet.batches == [4, 4]


def test_without_a_negative_there_is_one_pass_of_the_batch() -> None:
    unet = Formula(lambda x, t, c: x + c.mean(dim=(1, 2)).view(-1, 1, 1, 1))
    x = torch.randn(3, *SHAPE)
    prediction = guided_prediction(unet, x, torch.tensor(5), context(1, 2, 3), guidance=7.5)
    assert torch.allclose(prediction, x + torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1, 1))
    assert unet.batches == [3]


def test_guidance_1_with_a_negative_equals_none_at_all(unet: UNet2DConditionModel) -> None:
    x, cond = torch.randn(2, *SHAPE), Context(torch.randn(2, 77, CONTEXT))
    alone = guided_prediction(unet, x, torch.tensor(500), cond, guidance=1.0)
    both = guided_prediction(
        unet, x, torch.tensor(500), joined([Context(torch.randn(2, 77, CONTEXT)), cond]), guidance=1.0
    )
    assert torch.allclose(alone, both, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "steps", "interval", "guided"),
    [
        ("ddim", 10, (0.0, 1.0), [*range(10)]),
        ("ddim", 10, (0.2, 0.5), [2, 3, 4]),
        ("ddim", 10, (0.0, 0.05), [0]),
        ("heun", 5, (0.2, 0.4), [2, 3]),  # both evaluations of the second step
        ("heun", 5, (0.8, 1.0), [8]),  # the last step takes one
        ("pndm", 5, (0.0, 0.2), [0, 1]),  # the first step is taken twice
        ("f-pndm", 4, (0.0, 0.5), [*range(8)]),  # of four calls each in the first three
        ("f-pndm", 4, (0.5, 1.0), [*range(8, 13)]),
        ("dpm2", 5, (0.2, 0.4), [2, 3]),
    ],
)
def test_outside_the_interval_there_is_one_pass_without_the_negative(
    scheduler: str, steps: int, interval: tuple[float, float], guided: list[int]
) -> None:
    unet = Formula(lambda x, t, c: x * 0.1 + c.mean(dim=(1, 2)).view(-1, 1, 1, 1))
    sampler = schedulers.create(schedulers.find(scheduler), {**models.BETAS, "steps_offset": 1}, steps)
    run(unet, sampler, [7], negative=context(0.1), guidance=5.0, interval=interval)
    assert [index for index, size in enumerate(unet.batches) if size == 2] == guided
    assert len(unet.batches) == schedulers.find(scheduler).evaluations(steps)


def test_rescaled_guidance_has_the_spread_of_the_conditional_prediction() -> None:
    x = torch.randn(2, *SHAPE)
    unet = Formula(lambda x, t, c: x * (1 + c.mean(dim=(1, 2)).view(-1, 1, 1, 1)))
    both = context(0, 0, 1, 2)
    t = torch.tensor(5)
    plain = guided_prediction(unet, x, t, both, guidance=7.5)
    whole = guided_prediction(unet, x, t, both, guidance=7.5, rescale=1.0)
    conditional = torch.stack([x[0] * 2, x[1] * 3])
    assert torch.allclose(whole.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)), rtol=1e-5)
    half = guided_prediction(unet, x, t, both, guidance=7.5, rescale=0.5)
    assert torch.allclose(half, (plain + whole) / 2, atol=1e-5)
    alone = guided_prediction(unet, x, t, context(1, 2), guidance=7.5, rescale=1.0)
    assert torch.allclose(alone, conditional)


def test_every_step_is_given_the_step_arguments() -> None:
    x_0 = Formula(lambda x, t, c: x * 0.3)
    plain = run(x_0, ready(DDIMScheduler(**models.BETAS, clip_sample=False), 5), [7])
    noisy = run(x_0, ready(DDIMScheduler(**models.BETAS, clip_sample=False), 5), [7], step_arguments={"eta": 1.0})
    assert not torch.allclose(plain[0].latents, noisy[0].latents, atol=0.01)
    again = run(x_0, ready(DDIMScheduler(**models.BETAS, clip_sample=False), 5), [7], step_arguments={"eta": 1.0})
    assert torch.equal(noisy[-1].latents, again[-1].latents)


def test_half_precision_predictions_come_back_in_float32(unet: UNet2DConditionModel) -> None:
    half = UNet2DConditionModel.from_config(unet.config).to(torch.bfloat16)
    cond = Context(torch.randn(1, 77, CONTEXT, dtype=torch.bfloat16))
    assert guided_prediction(half, torch.randn(1, *SHAPE), torch.tensor(3), cond, guidance=1.0).dtype == torch.float32


def test_a_perfect_prediction_leads_back_to_the_image() -> None:
    """DDIM with the true noise of x_t = sqrt(a) x_0 + sqrt(1 - a) eps returns x_0 (Song et al. 2021, eq. 12)."""
    scheduler = ready(DDIMScheduler(**models.BETAS, clip_sample=False), 10)
    x_0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    bar = scheduler.alphas_cumprod
    unet = Formula(lambda x, t, c: (x - bar[t].sqrt() * x_0) / (1 - bar[t]).sqrt())
    assert torch.allclose(run(unet, scheduler, [7])[-1].latents[0], x_0, atol=1e-4)


def test_the_first_latents_are_the_noise_at_the_schedulers_first_sigma() -> None:
    seen: list[Tensor] = []
    scheduler = ready(EulerDiscreteScheduler(**models.BETAS), 4)
    run(Formula(lambda x, t, c: (seen.append(x), torch.zeros_like(x))[1]), scheduler, [7])
    sigma = float(((1 - scheduler.alphas_cumprod[-1]) / scheduler.alphas_cumprod[-1]).sqrt())
    noise = initial_noise(SHAPE, generators([7]))
    assert torch.allclose(seen[0], noise * sigma / (sigma**2 + 1) ** 0.5, atol=1e-4)  # Karras et al. 2022, table 1


def test_every_call_of_the_unet_is_a_step_with_its_number_and_time() -> None:
    unet = Formula(lambda x, t, c: x)
    scheduler = ready(PNDMScheduler(**models.BETAS, skip_prk_steps=True, steps_offset=1), 4)
    steps = run(unet, scheduler, [7])
    assert [step.index for step in steps] == [1, 2, 3, 4, 5]
    assert {step.total for step in steps} == {5} == {len(unet.batches)}
    assert [step.t for step in steps] == [751, 501, 501, 251, 1]  # the second one twice: Liu et al. 2022, algorithm 2


def test_a_stochastic_scheduler_draws_on_from_each_images_own_generator() -> None:
    def last(seeds: list[int]) -> Tensor:
        return run(Formula(lambda x, t, c: 0.1 * x), ready(DDPMScheduler(**models.BETAS, clip_sample=False), 6), seeds)[
            -1
        ].latents

    together, alone = last([5, 6, 7]), last([7])
    assert torch.allclose(together[2], alone[0], atol=1e-6)
    assert not torch.allclose(together[1], alone[0], atol=0.1)
    assert torch.equal(last([7]), alone)


# A UNet that predicts variances, too.


def test_guidance_leaves_the_variances_as_the_context_gives_them() -> None:
    def both(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        mean = c.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return torch.cat([x + mean, x - mean], dim=1)

    x = torch.randn(2, *SHAPE)
    prediction = guided_prediction(Formula(both), x, torch.tensor(5), context(10, 20, 11, 23), guidance=7.5)
    given = torch.tensor([11.0, 23.0]).view(-1, 1, 1, 1)
    assert torch.equal(prediction[:, 4:], x - given)
    assert torch.allclose(prediction[:, :4], x + torch.tensor([10 + 7.5 * 1, 20 + 7.5 * 3]).view(-1, 1, 1, 1))


def by_hand(formula: Callable[[Tensor, Tensor], Tensor], alpha_bar: Tensor, timesteps: list[int], seed: int) -> Tensor:
    """DDPM with learned variances on some of the timesteps, as Nichol and Dhariwal 2021 (arXiv:2102.09672) write it."""
    (source,) = generators([seed])
    x = initial_noise(SHAPE, [source]).double()
    for t, before in zip(timesteps, [*timesteps[1:], None], strict=True):
        bar = alpha_bar[t]
        bar_before = alpha_bar[before] if before is not None else torch.ones(())
        beta = 1 - bar / bar_before  # eq. 19
        beta_tilde = (1 - bar_before) / (1 - bar) * beta  # eq. 19
        eps, raw = formula(x, torch.tensor(t)).chunk(2, dim=1)
        x_0 = (x - (1 - bar).sqrt() * eps) / bar.sqrt()  # eq. 8
        mean = bar_before.sqrt() * beta / (1 - bar) * x_0  # eq. 11, as the next line
        mean += (bar / bar_before).sqrt() * (1 - bar_before) / (1 - bar) * x
        if before is None:
            return mean
        v = (raw + 1) / 2  # in the released code the network answers in -1..1
        variance = (v * beta.log() + (1 - v) * beta_tilde.log()).exp()  # eq. 15
        x = mean + variance.sqrt() * torch.randn((1, *SHAPE), generator=source).double()
    raise AssertionError("no timesteps")


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddpm_draws_with_the_learned_variances_of_the_paper(spacing: str, guidance: float) -> None:
    def formula(x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        eps = 0.8 * x.sin() + guidance * shift  # what guidance makes of shift and of 0
        return torch.cat([eps, 0.9 * x.cos() + 0.1 * shift], dim=1)

    def unet(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        shift = c[:, :1, :1, None]
        return torch.cat([0.8 * x.sin() + shift, 0.9 * x.cos() + 0.1 * shift], dim=1)

    config = models.LEARNED_SCHEDULER | {"timestep_spacing": spacing}
    scheduler = schedulers.create(schedulers.find("ddpm"), config, 8)
    negative = context(0.0) if guidance > 1 else None
    drawn = run(Formula(unet), scheduler, [7], context=context(0.5), negative=negative, guidance=guidance)
    alpha_bar, timesteps = scheduler.alphas_cumprod.double(), scheduler.timesteps.tolist()
    expected = by_hand(lambda x, t: formula(x, t, 0.5), alpha_bar, timesteps, 7)
    torch.testing.assert_close(drawn[-1].latents.double(), expected, rtol=1e-4, atol=1e-4)
    fixed = schedulers.create(schedulers.find("ddpm"), config | {"variance_type": "fixed_small"}, 8)
    other = run(Formula(unet), fixed, [7], context=context(0.5), negative=negative, guidance=guidance)
    assert (other[-1].latents - drawn[-1].latents).abs().max() > 0.1


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize(
    "scheduler", [s for s in schedulers.BUILT_IN if not s.uses_learned_variance], ids=lambda s: s.name
)
def test_other_solvers_draw_as_if_the_unet_had_no_variances(
    learned: Path, scheduler: schedulers.Scheduler, guidance: float
) -> None:
    whole = UNet2DConditionModel.from_pretrained(learned / "unet", local_files_only=True).requires_grad_(False)
    cut = Formula(lambda x, t, c: whole(x, t, encoder_hidden_states=c).sample[:, :4])
    negative = context(0.1, 0.1) if guidance > 1 else None

    def drawn(unet: Any, config: dict[str, Any]) -> list[Tensor]:
        solver = schedulers.create(scheduler, config, 4)
        return [step.latents for step in run(unet, solver, [7, 8], negative=negative, guidance=guidance)]

    ours = drawn(whole, models.LEARNED_SCHEDULER)
    theirs = drawn(cut, {k: v for k, v in models.LEARNED_SCHEDULER.items() if k != "variance_type"})
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_random_unet_gives_an_image_the_same_alone_and_in_a_batch(unet: UNet2DConditionModel) -> None:
    def last(seeds: list[int]) -> Tensor:
        scheduler = ready(EulerDiscreteScheduler(**models.BETAS), 5)
        negative = context(*[0.1] * len(seeds))
        return run(unet, scheduler, seeds, negative=negative, guidance=7.5)[-1].latents

    assert torch.allclose(last([5, 6, 7, 8])[2], last([7])[0], atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stop_it_at_once(bad: float) -> None:
    unet = Formula(lambda x, t, c: torch.where(t < 700, bad, x))
    scheduler = ready(DDIMScheduler(**models.BETAS, clip_sample=False), 4)  # timesteps 750, 500, 250, 0
    with pytest.raises(NumericalError, match="after step 2 of 4"):
        run(unet, scheduler, [7])
    assert unet.batches == [1, 1]


def test_no_gradient_is_kept(unet: UNet2DConditionModel) -> None:
    trained = UNet2DConditionModel.from_config(unet.config)
    steps = run(trained, ready(DDIMScheduler(**models.BETAS, clip_sample=False), 2), [7])
    assert not any(step.latents.requires_grad for step in steps)


def test_steps_are_yielded_as_they_are_made() -> None:
    unet = Formula(lambda x, t, c: x)
    sources = generators([7])
    scheduler = ready(DDIMScheduler(**models.BETAS, clip_sample=False), 50)
    stream = denoise(
        unet, scheduler, initial_noise(SHAPE, sources), context(0.5), negative=None, guidance=1.0, sources=sources
    )
    next(stream)
    assert len(unet.batches) == 1
