"""Where a denoising starts: from noise alone, or from a picture at a later timestep, of which a mask keeps a part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sdcli.errors import UsageError

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


@dataclass(frozen=True)
class Start:
    """Where a denoising starts.

    timesteps: those to walk; steps: of how many steps they are.
    picture: (B, C, h, w) latents from which it starts, at the level of the first timestep; None: from noise alone.
    is_all_noise: from noise alone all the same, where the picture is but what the mask keeps.
    mask: (1, 1, h, w) 1 where it is repainted; elsewhere the picture is put back after every call. None: nowhere.
    beside: (B, C + 1, h, w) what an inpainting UNet reads beside the latents: mask, and picture without what it covers.
    """

    timesteps: Tensor
    steps: int
    picture: Tensor | None = None
    is_all_noise: bool = False
    mask: Tensor | None = None
    beside: Tensor | None = None


def start_at(sampler: SchedulerMixin, step: int) -> Tensor:
    """Let a fresh sampler start at a step, counted from 0, on a picture noised to its level.

    Returns the timesteps left; `add_noise` comes after it.
    Most samplers are told the index, as by diffusers' image to image. Ours begin there as at the first step. LMS, told
    the index alone, weighs slopes of steps it never took: it is given the schedule of the steps left instead.
    Raises UsageError for a sampler of others that can add no noise.
    """
    solver: Any = sampler  # diffusers types its schedulers loosely
    if not hasattr(solver, "add_noise"):
        what = f"the scheduler {type(solver).__name__} cannot start from a picture: it can add no noise"
        raise UsageError(what, "name another with --scheduler")
    if hasattr(solver, "start_at"):  # of ours
        solver.start_at(step)
    elif hasattr(solver, "get_lms_coefficient"):
        solver.timesteps, solver.sigmas = solver.timesteps[step:], solver.sigmas[step:]
    else:
        first = step * getattr(solver, "order", 1)
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(first)
        remaining: Tensor = solver.timesteps[first:]
        return remaining
    timesteps: Tensor = solver.timesteps
    return timesteps


def first_latents(solver: Any, start: Start, noise: Tensor) -> Tensor:
    """The latents (B, C, h, w) at the first timestep: the noise at the solver's own scale, or the picture noised."""
    if start.picture is None or start.is_all_noise:
        scaled: Tensor = noise * solver.init_noise_sigma
        return scaled
    return _noised(solver, start.picture, noise, start.timesteps[:1])


def with_known(solver: Any, start: Start, x: Tensor, noise: Tensor, *, calls: int) -> Tensor:
    """The latents after so many calls, those the mask keeps as the picture has them at the level that comes next."""
    if start.mask is None or start.picture is None:
        return x
    following = start.timesteps[calls : calls + 1]
    known = _noised(solver, start.picture, noise, following) if len(following) else start.picture
    return start.mask * x + (1 - start.mask) * known


def _noised(solver: Any, picture: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    noised: Tensor = solver.add_noise(picture, noise, t)
    return noised
