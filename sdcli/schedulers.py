"""The scheduler registry: names, aliases, evaluations per step, limits; `create` makes the sampler itself.

Packages of others may add schedulers in the entry-point group `sdcli.schedulers.v1`. The entry point's name is the name
the user types; what it loads is a `Scheduler` whose `module` and `class_name` lead to a class that behaves like one of
diffusers:

    [project.entry-points."sdcli.schedulers.v1"]
    gentle = "gentle_sampler:SCHEDULER"

Nothing of such a package is imported before its name is asked for or the list is printed, and one that does not load
costs a warning there and an error under its own name; names and aliases of the table below win over it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from sdcli.errors import UsageError
from sdcli.scheduler_config import (
    PREDICTIONS,
    SPACINGS,
    check_config,
    has_learned_variance,
    has_zero_terminal_snr,
    prediction_type,
)
from sdcli.scheduler_steps import check_count, step_limits

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import torch
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

PLUGIN_GROUP = "sdcli.schedulers.v1"
STEP_COUNTS = (5, 10, 25, 50)  # what the list shows

# Latents are not bounded by [-1, 1] as pixels are: a config that is silent must not cut them.
LATENT_DEFAULTS: Mapping[str, object] = {"clip_sample": False}


@dataclass(frozen=True)
class Scheduler:
    """A way to walk from noise to a picture: how it is called, where its class lives, what it costs and what it can do.

    evaluations: calls of the UNet made for a number of steps.
    order: of convergence on the probability-flow ODE once the history is there; 1 for those that draw fresh noise.
    overrides: arguments that win over the model's own scheduler config.
    predictions, zero_snr_predictions: what the UNet may predict, in general and when the last timestep is pure noise.
    default_spacing: of the class, where the config names none.
    has_spare_interval: splits the timesteps into steps + 1 intervals, so that the last one ends before timestep 0.
    uses_learned_variance: draws its noise with the variances that a UNet of twice the channels predicts.
    has_fixed_stride: steps by a whole number of timesteps, whatever the spacing says.
    """

    name: str
    summary: str
    source: str
    module: str
    class_name: str
    evaluations: Callable[[int], int]
    order: int
    aliases: tuple[str, ...] = ()
    is_stochastic: bool = False
    overrides: Mapping[str, object] = field(default_factory=dict)
    predictions: tuple[str, ...] = PREDICTIONS
    zero_snr_predictions: tuple[str, ...] = PREDICTIONS
    default_spacing: str = "linspace"
    has_spare_interval: bool = False
    uses_learned_variance: bool = False
    has_fixed_stride: bool = False


@dataclass(frozen=True)
class Listing:
    """All schedulers there are, and one sentence for each plug-in that does not load."""

    schedulers: tuple[Scheduler, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """One row of `sdcli schedulers`.

    target: the class behind the name.
    limits: for each spacing, the fewest and the most steps, with SD 1.5's 1000 timesteps and offset 1.
    """

    name: str
    aliases: tuple[str, ...]
    summary: str
    source: str
    target: str
    order: int
    is_stochastic: bool
    predictions: tuple[str, ...]
    zero_snr_predictions: tuple[str, ...]
    overrides: dict[str, object]
    evaluations: dict[int, int]
    limits: dict[str, tuple[int, int]]


def _one_per_step(steps: int) -> int:
    return steps


def _plms_evaluations(steps: int) -> int:
    return steps if steps == 1 else steps + 1  # the first step is taken twice, where there is a second timestep


def _heun_evaluations(steps: int) -> int:
    return 2 * steps - 1  # the last step, to sigma 0, is an Euler step


BUILT_IN: tuple[Scheduler, ...] = (
    Scheduler(
        name="ddim",
        summary="first order, deterministic; robust at any guidance",
        source="Song et al. 2021, arXiv:2010.02502",
        module="diffusers.schedulers.scheduling_ddim",
        class_name="DDIMScheduler",
        evaluations=_one_per_step,
        order=1,
        zero_snr_predictions=("v_prediction", "sample"),
        default_spacing="leading",
        has_fixed_stride=True,
    ),
    Scheduler(
        name="pndm",
        summary="linear multistep of order 4 in the noise (PLMS), Stable Diffusion's first default",
        source="Liu et al. 2022, arXiv:2202.09778",
        module="diffusers.schedulers.scheduling_pndm",
        class_name="PNDMScheduler",
        evaluations=_plms_evaluations,
        order=4,
        aliases=("plms",),
        overrides={"skip_prk_steps": True},
        predictions=("epsilon", "v_prediction"),
        zero_snr_predictions=(),
        default_spacing="leading",
        has_fixed_stride=True,
    ),
    Scheduler(
        name="lms",
        summary="linear multistep of order 4 in sigma",
        source="Crowson 2022, k-diffusion",
        module="diffusers.schedulers.scheduling_lms_discrete",
        class_name="LMSDiscreteScheduler",
        evaluations=_one_per_step,
        order=4,
        aliases=("k-lms",),
        zero_snr_predictions=(),
    ),
    Scheduler(
        name="heun",
        summary="second order, two evaluations a step",
        source="Karras et al. 2022, arXiv:2206.00364, algorithm 1",
        module="diffusers.schedulers.scheduling_heun_discrete",
        class_name="HeunDiscreteScheduler",
        evaluations=_heun_evaluations,
        order=2,
        aliases=("k-heun",),
        zero_snr_predictions=(),
    ),
    Scheduler(
        name="dpm",
        summary="DPM-Solver++ 2M: second order at one evaluation a step; the default",
        source="Lu et al. 2022, arXiv:2211.01095",
        module="diffusers.schedulers.scheduling_dpmsolver_multistep",
        class_name="DPMSolverMultistepScheduler",
        evaluations=_one_per_step,
        order=2,
        aliases=("dpm++2m", "dpm++-2m", "dpmpp-2m", "dpmsolver++", "dpm-solver++"),
        overrides={
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
        },
        has_spare_interval=True,
    ),
    Scheduler(
        name="ddpm",
        summary="the model's own reverse process: fresh noise at every step, many steps needed",
        source="Ho et al. 2020, arXiv:2006.11239",
        module="diffusers.schedulers.scheduling_ddpm",
        class_name="DDPMScheduler",
        evaluations=_one_per_step,
        order=1,
        is_stochastic=True,
        zero_snr_predictions=("v_prediction", "sample"),
        default_spacing="leading",
        uses_learned_variance=True,
    ),
    Scheduler(
        name="euler",
        summary="first order in sigma, deterministic",
        source="Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn",
        module="diffusers.schedulers.scheduling_euler_discrete",
        class_name="EulerDiscreteScheduler",
        evaluations=_one_per_step,
        order=1,
        aliases=("k-euler",),
    ),
    Scheduler(
        name="euler-a",
        summary="Euler with fresh noise at every step (ancestral): never settles as the steps grow",
        source="Crowson 2022, k-diffusion",
        module="diffusers.schedulers.scheduling_euler_ancestral_discrete",
        class_name="EulerAncestralDiscreteScheduler",
        evaluations=_one_per_step,
        order=1,
        aliases=("euler-ancestral", "k-euler-a", "k-euler-ancestral"),
        is_stochastic=True,
        predictions=("epsilon", "v_prediction"),
        zero_snr_predictions=("epsilon", "v_prediction"),
    ),
    Scheduler(
        name="unipc",
        summary="predictor of order 2 with a corrector, at one evaluation a step; good at few steps",
        source="Zhao et al. 2023, arXiv:2302.04867",
        module="diffusers.schedulers.scheduling_unipc_multistep",
        class_name="UniPCMultistepScheduler",
        evaluations=_one_per_step,
        order=3,
        aliases=("uni-pc",),
        has_spare_interval=True,
    ),
)


def find(name: str) -> Scheduler:
    """The scheduler of this name or alias; upper and lower case, '_', '-' and ' ' are the same.

    Raises UsageError, with the closest names, when there is none or its plug-in does not load.
    """
    key = _normalized(name)
    for scheduler in BUILT_IN:
        if key == scheduler.name or key in scheduler.aliases:
            return scheduler
    plugins = _plugins()
    if key in plugins:
        return _load(plugins[key])
    known = [*_built_in_keys(), *plugins]
    close = difflib.get_close_matches(key, known, n=3)
    advice = f"did you mean {' or '.join(close)}? " if close else ""
    raise UsageError(f"scheduler {reprlib.repr(name)} is unknown", f"{advice}`sdcli schedulers` lists all")


def names() -> tuple[str, ...]:
    """Every name there is, without aliases, the built-in ones first; imports no plug-in."""
    return (*(scheduler.name for scheduler in BUILT_IN), *_plugins())


def listing() -> Listing:
    """All schedulers, the built-in ones first; plug-ins are loaded here, and a broken one becomes a warning."""
    found, warnings = list(BUILT_IN), []
    for entry_point in _plugins().values():
        try:
            found.append(_load(entry_point))
        except UsageError as error:
            warnings.append(str(error))
    return Listing(tuple(found), tuple(warnings))


def describe(scheduler: Scheduler, step_counts: tuple[int, ...] = STEP_COUNTS) -> Description:
    """What `sdcli schedulers` shows of one scheduler; needs no tensor."""
    configs = {spacing: {"timestep_spacing": spacing, "steps_offset": 1} for spacing in SPACINGS}
    return Description(
        name=scheduler.name,
        aliases=scheduler.aliases,
        summary=scheduler.summary,
        source=scheduler.source,
        target=f"{scheduler.module}.{scheduler.class_name}",
        order=scheduler.order,
        is_stochastic=scheduler.is_stochastic,
        predictions=scheduler.predictions,
        zero_snr_predictions=scheduler.zero_snr_predictions,
        overrides=dict(scheduler.overrides),
        evaluations={steps: scheduler.evaluations(steps) for steps in step_counts},
        limits={spacing: step_limits(scheduler, config) for spacing, config in configs.items()},
    )


def check_steps(scheduler: Scheduler, steps: int, config: Mapping[str, object]) -> None:
    """Refuse, before a model is loaded, what this scheduler cannot do with this model's scheduler config.

    Raises InputError for a config out of range, UsageError for a prediction type or a number of steps it cannot sample.
    """
    check_config(config)
    _check_prediction(scheduler, config)
    check_count(scheduler, steps, config)


def create(
    scheduler: Scheduler, config: Mapping[str, object], steps: int, device: str | torch.device = "cpu"
) -> SchedulerMixin:
    """A fresh diffusers scheduler with its timesteps set, equal to that of `from_config(config, **overrides)`.

    config: the model's scheduler_config.json; what the class does not know is left out, and a learned `variance_type`
    where the scheduler does not draw with it.
    It starts at its first timestep; image to image must call `set_begin_index` before `add_noise`, as diffusers does.
    Multistep solvers carry history: one for each micro-batch, never shared.
    Raises as `check_steps`.
    """
    check_steps(scheduler, steps, config)
    make = _sampler_class(scheduler)
    arguments = {**LATENT_DEFAULTS, **config, **scheduler.overrides}
    if has_learned_variance(config) and not scheduler.uses_learned_variance:
        del arguments["variance_type"]  # by it DPM-Solver would cut every prediction to the 3 channels of a picture
    accepted = inspect.signature(make).parameters
    sampler = make(**{key: value for key, value in arguments.items() if key in accepted})
    sampler.set_timesteps(steps, device=device)
    # Some sigma tables repeat a rounded timestep; looking the first one up by value would then skip a step.
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(0)
    return cast("SchedulerMixin", sampler)


def _sampler_class(scheduler: Scheduler) -> Callable[..., Any]:
    try:
        # Imported here because it brings torch; the name is of our table or an installed plug-in, never from a file.
        found: Callable[..., Any] = getattr(importlib.import_module(scheduler.module), scheduler.class_name)
    except (ImportError, AttributeError) as error:
        target = f"{scheduler.module}.{scheduler.class_name}"
        raise UsageError(
            f"scheduler {scheduler.name}: {target} cannot be imported: {error}", "reinstall its package"
        ) from error
    return found


def _check_prediction(scheduler: Scheduler, config: Mapping[str, object]) -> None:
    prediction, has_zero_snr = prediction_type(config), has_zero_terminal_snr(config)
    if prediction in _predictions(scheduler, has_zero_snr):
        return
    able = [other.name for other in BUILT_IN if prediction in _predictions(other, has_zero_snr)]
    model = f"{prediction} at zero terminal SNR" if has_zero_snr else prediction
    raise UsageError(
        f"scheduler {scheduler.name} cannot sample this model, which predicts {model}",
        f"name one of {', '.join(able)} with --scheduler",
    )


def _predictions(scheduler: Scheduler, has_zero_snr: bool) -> tuple[str, ...]:
    return scheduler.zero_snr_predictions if has_zero_snr else scheduler.predictions


def _normalized(name: str) -> str:
    return name.strip().casefold().replace("_", "-").replace(" ", "-")


def _built_in_keys() -> list[str]:
    return [key for scheduler in BUILT_IN for key in (scheduler.name, *scheduler.aliases)]


def _plugins() -> dict[str, EntryPoint]:
    """Entry points of other packages by name, those left out that a built-in scheduler shadows."""
    from importlib.metadata import entry_points  # 20 ms, wanted only when a name is unknown or all are listed

    taken = set(_built_in_keys())
    found = {_normalized(entry_point.name): entry_point for entry_point in entry_points(group=PLUGIN_GROUP)}
    return {key: found[key] for key in sorted(found) if key not in taken}


def _load(entry_point: EntryPoint) -> Scheduler:
    package = entry_point.dist.name if entry_point.dist is not None else entry_point.value
    hint = f"update or remove the package {package}"
    try:
        scheduler = entry_point.load()
    except Exception as error:  # whatever a package of others raises
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"scheduler {entry_point.name}: its plug-in does not load: {what}", hint) from error
    if not isinstance(scheduler, Scheduler):
        raise UsageError(f"scheduler {entry_point.name}: its plug-in is no sdcli.schedulers.Scheduler", hint)
    return replace(scheduler, name=_normalized(entry_point.name))
