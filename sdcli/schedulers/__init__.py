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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from sdcli.errors import UsageError
from sdcli.schedulers.config import (
    LEARNED_VARIANCES,
    SIGMA_KEYS,
    check_config,
    has_learned_variance,
    has_zero_terminal_snr,
    prediction_type,
)
from sdcli.schedulers.steps import check_count, step_limits
from sdcli.schedulers.table import BUILT_IN, ENDINGS, ORDERED, SIGMAS, VARIANCES
from sdcli.schedulers.table import Scheduler as Scheduler  # packages of others name it from here

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    import torch
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

PLUGIN_GROUP = "sdcli.schedulers.v1"
STEP_COUNTS = (5, 10, 25, 50)  # what the list shows

# Latents are not bounded by [-1, 1] as pixels are: a config that is silent must not cut them.
LATENT_DEFAULTS: Mapping[str, object] = {"clip_sample": False}


@dataclass(frozen=True)
class Listing:
    """All schedulers there are, and one sentence for each plug-in that does not load."""

    schedulers: tuple[Scheduler, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Description:
    """One row of `sdcli schedulers`.

    target: the class behind the name.
    sigmas, orders, eta, timestep_spacings, variances: what the options of these names may be; none where it takes none.
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
    sigmas: tuple[str, ...]
    orders: tuple[int, ...]
    eta: tuple[float, float] | None
    timestep_spacings: tuple[str, ...]
    variances: tuple[str, ...]
    overrides: dict[str, object]
    choices: dict[str, object]
    evaluations: dict[int, int | None]
    limits: dict[str, tuple[int, int]]


def find(name: str) -> Scheduler:
    """The scheduler of this name or alias; case does not matter, nor '_', '-' or ' ', nor `++` or `pp`.

    Names of other programs may say more, as `DPM++ 2M Karras` and `dpmpp_3m_k` do: it is then chosen.
    Raises UsageError, with the closest names, when there is none or its plug-in does not load.
    """
    key = _normalized(name)
    scheduler = _named(key)
    if scheduler is not None:
        return scheduler
    for ending, (sigmas, spacing) in ENDINGS.items():
        scheduler = _named(key.removesuffix(ending)) if key.endswith(ending) else None
        if scheduler is not None:
            return choose(scheduler, sigmas=sigmas, timestep_spacing=spacing)
    plugins = _plugins()
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


def choose(
    scheduler: Scheduler,
    *,
    sigmas: str | None = None,
    order: int | None = None,
    eta: float | None = None,
    timestep_spacing: str | None = None,
    variance: str | None = None,
) -> Scheduler:
    """The scheduler with what the user chose in place of its own and the model's settings; None leaves one as it is.

    sigmas: where the noise levels lie (`model`: at the timesteps); order: of the method; eta: share of fresh noise, 0
    to 1; timestep_spacing: as in Lin et al. 2023, arXiv:2305.08891, table 2; variance: of the noise `ddpm` draws.
    Raises UsageError for what this scheduler does not take.
    """
    asked = {"sigmas": sigmas, "order": order, "eta": eta, "timestep_spacing": timestep_spacing, "variance": variance}
    chosen = {name: value for name, value in asked.items() if value is not None}
    for name, value in chosen.items():
        _check_choice(scheduler, name, value)
        if scheduler.choices.get(name, value) != value:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {value}: the scheduler's name says {scheduler.choices[name]}", "leave one out")
    overrides, of_steps = dict(scheduler.overrides), dict(scheduler.step_arguments)
    if sigmas is not None:
        overrides |= {key: key == f"use_{sigmas}_sigmas" for key in SIGMA_KEYS} | {"use_lu_lambdas": False}
    if order is not None and scheduler.has_order_by_step:
        of_steps["order"] = order
    elif order is not None:
        overrides["solver_order"] = order
    if eta is not None:
        of_steps["eta"] = eta
    if timestep_spacing is not None:
        overrides["timestep_spacing"] = timestep_spacing
    if variance is not None:
        overrides["variance_type"] = variance.replace("-", "_")
    return replace(
        scheduler,
        order=order if order is not None and not scheduler.is_stochastic else scheduler.order,
        is_stochastic=eta > 0 if eta is not None else scheduler.is_stochastic,
        overrides=overrides,
        step_arguments=of_steps,
        choices={**scheduler.choices, **chosen},
    )


def describe(scheduler: Scheduler, step_counts: tuple[int, ...] = STEP_COUNTS) -> Description:
    """What `sdcli schedulers` shows of one scheduler; needs no tensor."""
    spacings = scheduler.spacings or ("distilled",)
    configs = {spacing: {"timestep_spacing": spacing, "steps_offset": 1} for spacing in spacings}
    limits = {spacing: step_limits(scheduler, config) for spacing, config in configs.items()}
    fewest, most = min(low for low, _ in limits.values()), max(high for _, high in limits.values())
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
        sigmas=SIGMAS if scheduler.takes_sigmas else (),
        orders=scheduler.orders,
        eta=(0.0, 1.0) if scheduler.default_eta is not None else None,
        timestep_spacings=scheduler.spacings,
        variances=VARIANCES if scheduler.takes_variance else (),
        overrides=dict(scheduler.overrides),
        choices=dict(scheduler.choices),
        evaluations={n: scheduler.evaluations(n) if fewest <= n <= most else None for n in step_counts},
        limits=limits,
    )


def check_steps(scheduler: Scheduler, steps: int, config: Mapping[str, object]) -> None:
    """Refuse, before a model is loaded, what this scheduler cannot do with this model's scheduler config.

    Raises InputError for a config out of range, UsageError for a prediction type or a number of steps it cannot sample.
    """
    check_config(config)
    _check_prediction(scheduler, config)
    _check_variance(scheduler, config)
    check_count(scheduler, steps, {**config, **scheduler.overrides})


def create(
    scheduler: Scheduler, config: Mapping[str, object], steps: int, device: str | torch.device = "cpu"
) -> SchedulerMixin:
    """A fresh diffusers scheduler with its timesteps set, equal to that of `from_config(config, **overrides)`.

    config: the model's scheduler_config.json; what the class does not know is left out, and a learned `variance_type`
    where the scheduler does not draw with it.
    It starts at its first timestep; `pipeline.start.start_at` makes it start at a later one.
    Multistep solvers carry history: one for each micro-batch, never shared.
    Raises as `check_steps`.
    """
    check_steps(scheduler, steps, config)
    make = _sampler_class(scheduler)
    arguments = {**LATENT_DEFAULTS, **config, **scheduler.overrides}
    if has_learned_variance(config) and not scheduler.uses_learned_variance:
        del arguments["variance_type"]  # by it DPM-Solver would cut every prediction to the 3 channels of a picture
    accepted = inspect.signature(make).parameters
    try:
        sampler = make(**{key: value for key, value in arguments.items() if key in accepted})
        sampler.set_timesteps(steps, device=device)
    except Exception as error:  # whatever a class of others raises
        if not scheduler.package:
            raise
        raise _broken(scheduler.name, "cannot be made", error, scheduler.package) from error
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


def _check_variance(scheduler: Scheduler, config: Mapping[str, object]) -> None:
    if scheduler.overrides.get("variance_type") in LEARNED_VARIANCES and not has_learned_variance(config):
        raise UsageError(
            f"--variance {scheduler.choices.get('variance')}: this model has learned no variance",
            "leave it out, or choose fixed-small or fixed-large",
        )


def _check_choice(scheduler: Scheduler, name: str, value: object) -> None:
    """Raise UsageError unless this scheduler takes the option, and the value is one of those it takes."""
    allowed: Mapping[str, tuple[object, ...]] = {
        "sigmas": SIGMAS if scheduler.takes_sigmas else (),
        "order": scheduler.orders,
        "timestep_spacing": scheduler.spacings,
        "variance": VARIANCES if scheduler.takes_variance else (),
    }
    option = "--" + name.replace("_", "-")
    what = f"{option} {value}: scheduler {scheduler.name}"
    if name == "eta":
        if scheduler.default_eta is None:
            able = [other.name for other in BUILT_IN if other.default_eta is not None]
            raise UsageError(f"{what} takes no {option}", f"{' and '.join(able)} do")
        if not (isinstance(value, float | int) and 0 <= value <= 1):
            raise UsageError(f"{option} {value}: out of range", "it must lie in 0..1")
    elif not allowed[name]:
        raise UsageError(f"{what} takes no {option}", f"`sdcli schedulers {scheduler.name}` tells what it takes")
    elif value not in allowed[name]:
        raise UsageError(f"{what} does not take it", f"use one of {', '.join(map(str, allowed[name]))}")


def _predictions(scheduler: Scheduler, has_zero_snr: bool) -> tuple[str, ...]:
    return scheduler.zero_snr_predictions if has_zero_snr else scheduler.predictions


def _named(key: str) -> Scheduler | None:
    """The scheduler of exactly this normalized name, built in or of a plug-in, which is loaded."""
    for scheduler in BUILT_IN:
        if key == scheduler.name or key in scheduler.aliases:
            return scheduler
    if key in ORDERED:
        name, order = ORDERED[key]
        return choose(find(name), order=order)
    plugins = _plugins()
    return _load(plugins[key]) if key in plugins else None


def _normalized(name: str) -> str:
    key = name.strip().casefold().replace("_", "-").replace(" ", "-")
    return key.replace("dpmpp", "dpm++").replace("++-", "++")


def _built_in_keys() -> list[str]:
    return [*(key for scheduler in BUILT_IN for key in (scheduler.name, *scheduler.aliases)), *ORDERED]


def _plugins() -> dict[str, EntryPoint]:
    """Entry points of other packages by name, those left out that a built-in scheduler shadows."""
    from importlib.metadata import entry_points  # 20 ms, wanted only when a name is unknown or all are listed

    taken = set(_built_in_keys())
    found = {_normalized(entry_point.name): entry_point for entry_point in entry_points(group=PLUGIN_GROUP)}
    return {key: found[key] for key in sorted(found) if key not in taken}


def _load(entry_point: EntryPoint) -> Scheduler:
    """What a plug-in says of its scheduler. Raises UsageError where it does not load, or what it says does not hold."""
    package = entry_point.dist.name if entry_point.dist is not None else entry_point.value
    try:
        loaded = entry_point.load()
    except Exception as error:  # whatever a package of others raises
        raise _broken(entry_point.name, "its plug-in does not load", error, package) from error
    if not isinstance(loaded, Scheduler):
        hint = f"update or remove the package {package}"
        raise UsageError(f"scheduler {entry_point.name}: its plug-in is no sdcli.schedulers.Scheduler", hint)
    scheduler = replace(loaded, name=_normalized(entry_point.name), package=package)
    try:
        describe(scheduler)
    except Exception as error:
        raise _broken(entry_point.name, "its plug-in does not describe it", error, package) from error
    return scheduler


def _broken(name: str, what: str, error: Exception, package: str) -> UsageError:
    said = f"{type(error).__name__}: {error}"
    return UsageError(f"scheduler {name}: {what}: {said}", f"update or remove the package {package}")
