"""Noise -> latents: the initial noise, the guided prediction and the denoising loop. No VAE, no text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from sdcli.errors import NumericalError
from sdcli.pipeline.context import Context, joined
from sdcli.pipeline.start import Start, first_latents, with_known

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


WHOLE = (0.0, 1.0)  # of the way from noise to latents
LEARNED_VARIANCES = ("learned", "learned_range")  # of a solver's own `variance_type`


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
    context: Context,
    *,
    negative: Context | None,
    guidance: float,
    sources: Sequence[torch.Generator],
    interval: tuple[float, float] = WHOLE,
    rescale: float = 0.0,
    step_arguments: Mapping[str, float] | None = None,
    start: Start | None = None,
) -> Iterator[Step]:
    """Integrate from noise to latents, yielding after every call of the UNet.

    noise: (B, C, h, w) standard normal; context: of B images; negative: the same for the unconditional half, or None
    for one pass without guidance. scheduler: fresh, its timesteps set: it carries history.
    sources: the images' generators, from which a stochastic scheduler draws on.
    interval: the share of the steps that are guided, from first to before last; the others take one pass (Kynkaanniemi
    et al. 2024, arXiv:2404.07724). rescale: as in `guided_prediction`. step_arguments: for every call of its `step`.
    start: the picture, or the part of one, from which it goes on; None: from noise alone.
    A solver whose config says that it draws with learned variances is given those of the UNet; others never see them.
    Raises NumericalError as soon as the latents are not finite.
    Source: Ho and Salimans 2022, arXiv:2207.12598 (classifier-free guidance).
    """
    solver: Any = scheduler  # diffusers types its schedulers loosely
    # Which schedulers take a generator is theirs to say: the deterministic ones have no such parameter.
    takes_generator = "generator" in inspect.signature(solver.step).parameters
    extra: dict[str, Any] = {"generator": list(sources)} if takes_generator else {}
    extra |= step_arguments if step_arguments is not None else {}
    takes_variances = solver.config.get("variance_type") in LEARNED_VARIANCES
    both = joined([negative, context]) if negative is not None else context  # of 2B images, negative first
    noise = noise.to(context.hidden.device)
    start = start if start is not None else Start(solver.timesteps, solver.num_inference_steps)
    x = first_latents(solver, start, noise)
    total, begun = len(start.timesteps), _shares_begun(solver, start)
    for index, t in enumerate(start.timesteps, start=1):
        given = both if interval[0] <= begun[index - 1] < interval[1] else context
        scaled = solver.scale_model_input(x, t)
        prediction = guided_prediction(unet, scaled, t, given, guidance=guidance, rescale=rescale, beside=start.beside)
        if not takes_variances:
            prediction = prediction[:, : x.shape[1]]  # (B, C, h, w)
        stepped = solver.step(prediction, t, x, return_dict=False, **extra)
        # The last step draws nothing, its result is the mean, x_0 (DDPM, arXiv:2006.11239, algorithm 2): diffusers
        # adds noise of the learned variance there, which nothing takes away again.
        x = stepped[1] if takes_variances and index == total else stepped[0]
        x = with_known(solver, start, x, noise, calls=index)
        if not x.isfinite().all():
            raise NumericalError(
                f"the latents are not finite after step {index} of {total}", "try --dtype float32 or another scheduler"
            )
        yield Step(index, total, float(t), x)


def guided_prediction(
    unet: UNet2DConditionModel,
    x: Tensor,
    t: Tensor,
    context: Context,
    *,
    guidance: float,
    rescale: float = 0.0,
    beside: Tensor | None = None,
) -> Tensor:
    """One call of the UNet; with twice as many contexts as images, both halves in one batch and guidance between.

    x: (B, C, h, w) as the scheduler scaled it; context: of B or 2B. Returns (B, C, h, w) float32, of a float64
    context float64, or (B, 2C, h, w) where the UNet predicts variances too: those given the context, which guidance
    does not touch.
    rescale: how far, from 0 to 1, an image's guided prediction gets back the standard deviation that it has without
    guidance; it keeps high guidance from overexposing (Lin et al. 2023, arXiv:2305.08891, eq. 14-16).
    beside: (B, D, h, w) what the UNet reads in channels after those of x.
    """
    is_guided = len(context) == 2 * len(x)
    read = torch.cat([x, beside], dim=1) if beside is not None else x  # (B, C + D, h, w)
    batch = torch.cat([read, read]) if is_guided else read
    prediction: Tensor = unet(batch.to(context.hidden.dtype), t, return_dict=False, **context.arguments())[0]
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    if not is_guided:
        return prediction
    channels = x.shape[1]
    variances = prediction[len(x) :, channels:]  # (B, 0 or C, h, w)
    unconditional, conditional = prediction[:, :channels].chunk(2)  # 2 x (B, C, h, w)
    guided = unconditional + guidance * (conditional - unconditional)  # arXiv:2207.12598 eq. 6, its w: guidance - 1
    if rescale > 0:
        dims = (1, 2, 3)
        same_spread = guided * (conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))  # eq. 15
        guided = rescale * same_spread + (1 - rescale) * guided  # eq. 16
    return torch.cat([guided, variances], dim=1)


def by_rows(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """What is called as a UNet is, and has it work on one row of the batch after the other, in the memory of one."""

    def call(x: Tensor, t: Tensor, *, return_dict: bool = False, **told: Any) -> tuple[Tensor]:
        rows = [unet(x[i : i + 1], t, return_dict=return_dict, **_row(told, i))[0] for i in range(len(x))]
        return (torch.cat(rows),)

    return cast("UNet2DConditionModel", call)


def _row(told: Any, i: int) -> Any:
    """The i-th row of tensors, in dictionaries, too."""
    return {name: _row(one, i) for name, one in told.items()} if isinstance(told, dict) else told[i : i + 1]


def _shares_begun(solver: Any, start: Start) -> list[float]:
    """For every call of the UNet the share of the steps before the one it belongs to, alike for all calls of a step."""
    total, steps = len(start.timesteps), start.steps
    even = [call * steps // total for call in range(total)]  # diffusers' take one call, or two and in the last step one
    return [step / steps for step in getattr(solver, "steps_of_calls", even)]
