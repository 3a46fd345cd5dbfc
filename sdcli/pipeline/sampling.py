"""Noise -> latents: the initial noise, the guided prediction and the denoising loop. No VAE, no text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdcli.errors import NumericalError

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


@dataclass(frozen=True)
class Step:
    """The state after one call of the UNet."""

    index: int  # from 1
    total: int
    t: float
    latents: Tensor  # (B, C, h, w) float32


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator an image, so that no image depends on its neighbours."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def initial_noise(shape: tuple[int, int, int], sources: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise (B, C, h, w), float32, on the CPU; image i draws from its own generator alone.

    shape: (C, h, w) of one image's latents.
    """
    return torch.stack([torch.randn(shape, generator=source) for source in sources])


@torch.no_grad()
def denoise(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    noise: Tensor,
    context: Tensor,
    *,
    negative: Tensor | None,
    guidance: float,
    sources: Sequence[torch.Generator],
) -> Iterator[Step]:
    """Integrate from noise to latents, yielding after every call of the UNet.

    noise: (B, C, h, w) standard normal; context: (B, 77, D); negative: the same for the unconditional half, or None
    for one pass without guidance. scheduler: fresh, its timesteps set: it carries history.
    sources: the images' generators, from which a stochastic scheduler draws on.
    Raises NumericalError as soon as the latents are not finite.
    Source: Ho and Salimans 2022, arXiv:2207.12598 (classifier-free guidance).
    """
    solver: Any = scheduler  # diffusers types its schedulers loosely
    # Which schedulers take a generator is theirs to say: the deterministic ones have no such parameter.
    takes_generator = "generator" in inspect.signature(solver.step).parameters
    chance = {"generator": list(sources)} if takes_generator else {}
    if negative is not None:
        context = torch.cat([negative, context])  # (2B, 77, D), negative first
    x = noise.to(context.device) * solver.init_noise_sigma
    total = len(solver.timesteps)
    for index, t in enumerate(solver.timesteps, start=1):
        prediction = guided_prediction(unet, solver.scale_model_input(x, t), t, context, guidance=guidance)
        x = solver.step(prediction, t, x, return_dict=False, **chance)[0]
        if not x.isfinite().all():
            raise NumericalError(
                f"the latents are not finite after step {index} of {total}", "try --dtype float32 or another scheduler"
            )
        yield Step(index, total, float(t), x)


def guided_prediction(unet: UNet2DConditionModel, x: Tensor, t: Tensor, context: Tensor, *, guidance: float) -> Tensor:
    """One call of the UNet; with twice as many contexts as images, both halves in one batch and guidance between.

    x: (B, C, h, w) as the scheduler scaled it; context: (B or 2B, 77, D). Returns (B, C, h, w) float32.
    """
    is_guided = context.shape[0] == 2 * x.shape[0]
    batch = torch.cat([x, x]) if is_guided else x
    prediction: Tensor = unet(batch.to(context.dtype), t, encoder_hidden_states=context, return_dict=False)[0].float()
    if not is_guided:
        return prediction
    unconditional, conditional = prediction.chunk(2)  # 2 x (B, C, h, w)
    return unconditional + guidance * (conditional - unconditional)  # arXiv:2207.12598 eq. 6, its w being guidance - 1
