"""Latents -> the noise that draws them: DDIM's deterministic way, walked backwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdcli.errors import NumericalError
from sdcli.pipeline.context import Context, joined
from sdcli.pipeline.sampling import Step, guided_prediction

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


@torch.no_grad()
def invert(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    latents: Tensor,
    context: Context,
    *,
    negative: Context | None,
    guidance: float,
) -> Iterator[Step]:
    """Undo DDIM's steps from the last to the first, yielding after every call of the UNet; the last state is the noise.

    latents: (B, C, h, w); context: of B images; negative and guidance as in `sampling.denoise`.
    scheduler: a fresh DDIM with its timesteps set: those that `denoise` will walk forwards again.
    A step from x_t to x_s needs the UNet's answer at x_t; on the way back only x_s is known, so its answer there, asked
    for t, stands in: an error that falls as the steps grow and x_s and x_t come closer.
    Raises NumericalError as soon as the latents are not finite.
    Source: Song et al. 2021, arXiv:2010.02502, section 4.3; Dhariwal and Nichol 2021, arXiv:2105.05233, appendix F.
    """
    solver: Any = scheduler  # diffusers types its schedulers loosely
    both = joined([negative, context]) if negative is not None else context  # of 2B images, negative first
    timesteps = list(reversed(solver.timesteps))
    x = latents.to(context.hidden.device, torch.float32)
    for index, t in enumerate(timesteps, start=1):
        answer = guided_prediction(unet, x, t, both, guidance=guidance)[:, : x.shape[1]]  # (B, C, h, w)
        a, a_before = _levels(solver, int(t))
        x = step_back(x, answer, a, a_before, prediction_type=solver.config.prediction_type)
        if not x.isfinite().all():
            what = f"the latents are not finite after step {index} of {len(timesteps)} of the inversion"
            raise NumericalError(what, "try --dtype float32, more steps or a lower guidance")
        yield Step(index, len(timesteps), float(t), x)


def step_back(x: Tensor, answer: Tensor, a: float, a_before: float, *, prediction_type: str) -> Tensor:
    """x_t from the x_s that a DDIM step made of it, given the UNet's answer at x_t: arXiv:2010.02502, eq. 12 backwards.

    x, answer: (B, C, h, w); a, a_before: alpha_bar at t and at s. Exact for epsilon and v; for a UNet that predicts
    x_0, of which eq. 12 may leave no trace of x_t, its answer is taken as the noise that it means at x.
    """
    root, noise, root_before, noise_before = a**0.5, (1 - a) ** 0.5, a_before**0.5, (1 - a_before) ** 0.5
    if prediction_type == "v_prediction":
        # x_s is x_t, rotated towards v by the angle between them (Salimans and Ho 2022, arXiv:2202.00512, appendix D).
        cosine = root_before * root + noise_before * noise
        sine = root_before * noise - noise_before * root
        rotated: Tensor = (x + sine * answer) / cosine
        return rotated
    eps = answer if prediction_type == "epsilon" else (x - root * answer) / noise
    x_t: Tensor = root / root_before * (x - noise_before * eps) + noise * eps
    return x_t


def _levels(solver: Any, t: int) -> tuple[float, float]:
    """alpha_bar at t, and where DDIM's step from t ends: a whole number of timesteps further, whatever the spacing."""
    before = t - solver.config.num_train_timesteps // solver.num_inference_steps
    end = solver.alphas_cumprod[before] if before >= 0 else solver.final_alpha_cumprod
    return float(solver.alphas_cumprod[t]), float(end)
