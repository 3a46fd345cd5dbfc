"""STORY: what a model's noise schedule and the schedulers look like, as a figure and as numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdcli import layout, schedulers, store
from sdcli.errors import SdcliWarning, UsageError
from sdcli.files import place
from sdcli.lab import plots
from sdcli.lab.specs import FigureSpec
from sdcli.pipeline import noise
from sdcli.pipeline.reference import NoiseLevels
from sdcli.plan import DEFAULT_STEPS, own_settings
from sdcli.plan.naming import check_targets, is_output_folder
from sdcli.schedulers.config import check_config

TITLES = {"betas": "beta_t", "alpha-bar": "alpha_bar_t", "snr": "signal-to-noise ratio"}
NAMES_SHOWN = 3  # of schedulers that walk the same sigmas, in a legend
MAX_NAME = 28  # characters of a model's name
SAME = 1e-2  # relative difference of sigmas that no eye can see

NAMED = ("sigmas", "timestep_spacing")  # choices that move the noise levels, shown beside a scheduler's name

Numbers = list[float | None]  # None where it is not finite: a noise level without any signal


@dataclass(frozen=True)
class FigureRecord:
    """One figure, and the numbers in it."""

    path: Path
    facts: dict[str, Any]


@dataclass(frozen=True)
class Walk:
    """Where a scheduler calls the UNet, in order: training timesteps and noise levels sigma."""

    name: str
    timesteps: list[float]
    sigmas: Numbers


def run(spec: FigureSpec) -> FigureRecord:
    """Draw one figure: betas, alpha_bar or SNR of a model over t, or the sigmas of one scheduler or of all.

    Raises UsageError for a scheduler that cannot do the steps or shows no sigmas, InputError for a malformed config,
    OutputError when the figure cannot be written.
    """
    chosen = _chosen(spec) if spec.name is not None else None
    target = _target(spec, chosen.name if chosen is not None else "schedulers")
    model = store.resolve(spec.model, offline=spec.offline)
    config = layout.config(model.folder, "scheduler")
    check_config(config)
    facts: dict[str, Any] = {"plot": spec.plot, "model": model.ref}
    if spec.plot == "sigmas":
        steps = spec.steps if spec.steps is not None else int(own_settings(model).get("steps", DEFAULT_STEPS))
        walks = [_walk(chosen, config, steps)] if chosen is not None else _walks(config, steps)
        png = _draw_sigmas(walks, model.ref, steps)
        rows = [{"scheduler": w.name, "timesteps": w.timesteps, "sigmas": w.sigmas} for w in walks]
        facts |= {"steps": steps, **(chosen.choices if chosen is not None else {}), "schedulers": rows}
    else:
        values = _values(spec.plot, config)
        png = _draw_schedule(spec.plot, values, model.ref)
        facts |= {"values": values}
    path = place(png, target, spec.if_exists)
    return FigureRecord(path, {"path": str(path), **facts})


def _chosen(spec: FigureSpec) -> schedulers.Scheduler:
    """The scheduler named, with the options given for it."""
    return schedulers.choose(
        schedulers.find(str(spec.name)), sigmas=spec.sigmas, order=spec.order, timestep_spacing=spec.timestep_spacing
    )


def _target(spec: FigureSpec, name: str) -> Path:
    many = is_output_folder(spec.output)
    if not many and spec.output.suffix.lower() != ".png":
        raise UsageError(f"--output {spec.output}: figures are written as PNG", "name a .png file or a folder")
    target = spec.output / f"{name}-{spec.plot}.png" if many else spec.output
    check_targets([target], spec.if_exists)
    return target


def _values(plot: str, config: dict[str, Any]) -> Numbers:
    """One value a timestep, from t = 0 on."""
    alpha_bar = noise.alpha_bars(config)
    if plot == "betas":
        return _numbers(noise.betas(alpha_bar).tolist())
    if plot == "snr":
        return _numbers(noise.snr(torch.arange(len(alpha_bar)), alpha_bar).tolist())
    return _numbers(alpha_bar.tolist())


def _draw_schedule(plot: str, values: Numbers, model: str) -> bytes:
    curve = plots.Curve(TITLES[plot], range(len(values)), _drawn(values))
    title = f"{TITLES[plot]} ({_short(model)})"
    return plots.line_chart([curve], title=title, x_label="t", y_label=TITLES[plot], log_y=plot == "snr")


def _walks(config: dict[str, Any], steps: int) -> list[Walk]:
    """Those of all schedulers that can do these steps; the others are told in one warning."""
    listing = schedulers.listing()
    found, left_out = [], list(listing.warnings)
    for scheduler in listing.schedulers:
        try:
            found.append(_walk(scheduler, config, steps))
        except UsageError as error:
            left_out.append(error.message)
    if left_out:
        warnings.warn(f"left out: {'; '.join(left_out)}", SdcliWarning, stacklevel=2)
    if not found:
        raise UsageError(f"--steps {steps}: no scheduler can do them with this model", "try 25")
    return found


def _walk(scheduler: schedulers.Scheduler, config: dict[str, Any], steps: int) -> Walk:
    solver: Any = schedulers.create(scheduler, config, steps)  # diffusers types its schedulers loosely
    timesteps = [float(t) for t in solver.timesteps]
    sigmas, alpha_bar = getattr(solver, "sigmas", None), getattr(solver, "alphas_cumprod", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        levels = [float(sigma) for sigma in sigmas[: len(timesteps)]]
        if hasattr(solver, "sigmas_interpol"):
            # DPM-Solver-2's every second call is at a level between; diffusers has those of the ancestral one a row up.
            late = 1 if scheduler.is_stochastic else 0
            levels[1::2] = [float(solver.sigmas_interpol[call - late]) for call in range(1, len(levels), 2)]
    elif alpha_bar is not None:
        of = NoiseLevels.of(alpha_bar).sigmas
        levels = [of[int(t)] for t in timesteps]
    else:
        raise UsageError(f"scheduler {scheduler.name}: shows neither sigmas nor alphas_cumprod", "plot another")
    name = " ".join([scheduler.name, *(str(scheduler.choices[key]) for key in NAMED if key in scheduler.choices)])
    return Walk(name, timesteps, _numbers(levels))


def _draw_sigmas(walks: Sequence[Walk], model: str, steps: int) -> bytes:
    """A curve for all that walk alike: many differ in what they make of the UNet's answers, not in where they ask."""
    alike: list[list[Walk]] = []
    for walk in walks:
        group = next((group for group in alike if _is_same(group[0], walk)), None)
        if group is None:
            alike.append([walk])
        else:
            group.append(walk)
    curves = [
        plots.Curve(_listed([w.name for w in group]), range(1, len(group[0].sigmas) + 1), _drawn(group[0].sigmas))
        for group in alike
    ]
    what = f"sigmas of {walks[0].name}" if len(walks) == 1 else "sigmas"
    title = f"{what}, {steps} steps ({_short(model)})"
    return plots.line_chart(curves, title=title, x_label="evaluation of the UNet", y_label="sigma", log_y=True)


def _is_same(one: Walk, other: Walk) -> bool:
    pairs = zip(_drawn(one.sigmas), _drawn(other.sigmas), strict=False)
    return len(one.sigmas) == len(other.sigmas) and all(a == b or abs(a - b) <= SAME * max(a, b) for a, b in pairs)


def _short(model: str) -> str:
    """A model's name as a title has room for it."""
    name = Path(model).name
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..."


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _numbers(values: Sequence[float]) -> Numbers:
    return [value if math.isfinite(value) else None for value in values]


def _drawn(values: Numbers) -> list[float]:
    return [value if value is not None else math.inf for value in values]
