"""Which numbers of steps a scheduler can do, from where diffusers' set_timesteps would place its timesteps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sdcli.errors import UsageError
from sdcli.schedulers.config import steps_offset, train_timesteps

if TYPE_CHECKING:
    from sdcli.schedulers.table import Scheduler

LARGEST_SHARE_LEFT_OUT = 0.1  # of the timesteps; measured: more leaves noise of std 0.1 and above in the result
DISTILLED_STEPS = 50  # of LCM and TCD where the config is silent, as in diffusers
SMALLEST_FIRST_TIMESTEP = 0.25  # of all; a start below it takes pure noise for a nearly finished picture


def check_count(scheduler: Scheduler, steps: int, config: Mapping[str, object]) -> None:
    """Raise UsageError, naming the nearest that it can do, for a number of steps that gives a wrong result or none."""
    problem = _step_problem(scheduler, steps, config)
    if not problem:
        return
    lowest, highest = step_limits(scheduler, config)
    if lowest <= steps <= highest:
        below = next(n for n in range(steps - 1, 0, -1) if not _step_problem(scheduler, n, config))
        above = next(n for n in range(steps + 1, highest + 1) if not _step_problem(scheduler, n, config))
        advice = f"the nearest it can do are {below} and {above}"
    else:
        advice = f"it can do {lowest} to {highest}"
    raise UsageError(
        f"scheduler {scheduler.name} cannot do {_steps(steps)}{_spaced(scheduler, config)}: {problem}", advice
    )


def step_limits(scheduler: Scheduler, config: Mapping[str, object]) -> tuple[int, int]:
    """The fewest and the most steps it can do with this config; not every number between them need be possible.

    Raises UsageError when there is none.
    """
    counts = range(1, train_timesteps(config) + 1)
    lowest = next((n for n in counts if not _step_problem(scheduler, n, config)), None)
    if lowest is None:
        raise UsageError(
            f"scheduler {scheduler.name} cannot do any number of steps with this model's timesteps",
            "name another with --scheduler",
        )
    return lowest, next(n for n in reversed(counts) if not _step_problem(scheduler, n, config))


def _step_problem(scheduler: Scheduler, steps: int, config: Mapping[str, object]) -> str:
    """Why this number of steps gives a wrong result or none, found by running each; empty when it works."""
    total = train_timesteps(config)
    if steps < 1:
        return "one is the least"
    if steps < scheduler.least_steps:
        return f"its start takes {scheduler.least_steps}"
    if steps > total:
        return f"the model has {total} timesteps"
    first, last, problem = _timestep_range(scheduler, steps, config)
    if problem:
        return problem
    if first >= total:
        return f"its first timestep would be {first}, past the last trained one, {total - 1}"
    if first < SMALLEST_FIRST_TIMESTEP * (total - 1):
        return f"it would start from pure noise at timestep {first} of {total}, where a picture is nearly finished"
    if scheduler.has_fixed_stride and first > last:
        left_out = 1 - (steps - 1) * (total // steps) / (first - last)
        if left_out > LARGEST_SHARE_LEFT_OUT:
            return f"its stride of {total // steps} timesteps leaves {left_out:.0%} of the noise levels out"
    return ""


def _timestep_range(scheduler: Scheduler, steps: int, config: Mapping[str, object]) -> tuple[int, int, str]:
    """First and last timestep as diffusers' set_timesteps places them, and what is wrong with those between."""
    total = train_timesteps(config)
    if not scheduler.spacings:
        return _distilled_range(steps, config)
    spacing = _spacing(scheduler, config)
    points = steps + 1 if scheduler.has_spare_interval else steps
    repeated = "some of its timesteps would be the same"
    if spacing == "leading":
        stride, offset = total // points, steps_offset(config)
        first, last = stride * (points - 1) + offset, stride * (points - steps) + offset
        return first, last, "" if stride > 0 else repeated
    if spacing == "linspace":
        if points == 1:
            return 0, 0, ""
        gap = (total - 1) / (points - 1)
        return total - 1, round(gap * (points - steps)), "" if gap >= 1 else repeated
    gap = total / steps
    # numpy.arange(total, 0, -gap) has this many values: rounding adds one for some counts, and timestep -1 with it.
    is_exact = math.ceil(total / gap) == steps
    return total - 1, round(gap) - 1, "" if is_exact else "rounding would add a timestep below 0"


def _distilled_range(steps: int, config: Mapping[str, object]) -> tuple[int, int, str]:
    """The same on the ladder of timesteps that a consistency model was distilled on: some of its rungs."""
    total, rungs = train_timesteps(config), int(str(config.get("original_inference_steps", DISTILLED_STEPS)))
    if steps > rungs or rungs > total:
        return 0, 0, f"a model for it was distilled on {rungs} timesteps"
    stride, skipped = total // rungs, (steps - 1) * rungs // steps
    return stride * rungs - 1, stride * (rungs - skipped) - 1, ""


def _spacing(scheduler: Scheduler, config: Mapping[str, object]) -> str:
    """How the timesteps lie: as the config says, where the class listens to it."""
    asked = str(config.get("timestep_spacing", scheduler.default_spacing))
    return asked if asked in scheduler.spacings else scheduler.default_spacing


def _spaced(scheduler: Scheduler, config: Mapping[str, object]) -> str:
    return f" with {_spacing(scheduler, config)} spacing" if scheduler.spacings else ""


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
