"""A BenchSpec -> which scheduler is run with which numbers of steps on which pictures, decided without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli import layout, ledger, plan, schedulers, store
from sdcli.errors import InputError, UsageError
from sdcli.files import check_writable, is_folder, open_regular
from sdcli.lab.specs import BenchSpec
from sdcli.plan import naming, words
from sdcli.schedulers import Scheduler
from sdcli.schedulers.config import has_zero_terminal_snr, prediction_type
from sdcli.specs import GenerateSpec

# Things the embedded model knows, and other models, too.
PROMPTS = ("a picture of a puppy", "an apple on a blue background", "a penguin", "a green turtle on a pink background")
# What may be chosen with a scheduler. Not the timestep spacing: GRID has that of all.
OPTIONS: dict[str, Callable[[str], object]] = {"order": int, "sigmas": str.lower, "eta": float, "variance": str.lower}
# One grid of noise levels for all: from the last timestep to 0, so that what differs is the solver.
GRID: dict[str, object] = {
    "timestep_spacing": "trailing",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "sigma_min": None,
    "sigma_max": None,
    "clip_sample": False,
    "thresholding": False,
}


@dataclass(frozen=True)
class Cell:
    """One row of the table to come; `problem` says why the scheduler cannot do so many steps, empty when it can."""

    scheduler: Scheduler
    steps: int
    problem: str = ""

    @property
    def label(self) -> str:
        """What the table calls the scheduler: its name, and what was chosen with it, as `DPM++ 2M Karras` does."""
        chosen = [f"{name.replace('_', '-')}={value}" for name, value in self.scheduler.choices.items()]
        return " ".join([self.scheduler.name, *chosen])

    @property
    def key(self) -> str:
        """What a ledger knows the row by: the scheduler as it is defined, and the steps."""
        one = self.scheduler
        target = f"{one.module}.{one.class_name}"
        facts = {"name": self.label, "target": target, "overrides": dict(one.overrides), "steps": self.steps}
        facts |= {"step_arguments": dict(one.step_arguments)}
        return ledger.digest(facts)


@dataclass(frozen=True)
class BenchPlan:
    """What `bench` is going to do. `base` is the plan of the first picture: model, guidance, size."""

    base: plan.Plan
    config: dict[str, Any]  # of every scheduler
    cells: tuple[Cell, ...]
    subjects: tuple[str, ...]  # prompts, or names of classes; one empty one of an unconditional model
    labels: tuple[int | None, ...]  # of each: the index of its class, None for a prompt
    is_all: bool  # the schedulers were not named one by one
    notes: tuple[str, ...] = ()  # plug-ins that do not load


def plan_bench(spec: BenchSpec) -> BenchPlan:
    """Resolve every default and refuse whatever can be refused without a tensor; errors as in `plan.plan`.

    Schedulers that were named must load and be able to do every number of steps; of `all`, those that cannot are told.
    """
    chosen, notes = _chosen(spec)
    for option, text in (*(("--prompt", one) for one in spec.prompt), ("--negative", spec.negative)):
        words.check_no_wildcards(text, option)
    model = store.resolve(spec.model, offline=spec.offline)
    shared: dict[str, Any] = {"model": spec.model, "guidance": spec.guidance, "size": spec.size, "seed": spec.seed}
    shared |= {"negative": spec.negative, "prediction": spec.prediction, "lora": spec.lora}
    shared |= {"embedding": spec.embedding, "offline": spec.offline, "output": Path("-")}
    shared |= {"scheduler": "ddim", "steps": 1, "timestep_spacing": "trailing"}  # not the model's own: nobody asked
    asked = _asked(spec, layout.classes(model.folder))
    pictures = [plan.plan(GenerateSpec(**shared, **one)) for one in asked]
    labels = [picture.label for picture in pictures]
    config = {**pictures[0].scheduler_config, **GRID}
    if has_zero_terminal_snr(config) and prediction_type(config) == "epsilon":
        what = f"{model.ref}: predicts epsilon at zero terminal SNR, which says nothing of the picture there"
        raise UsageError(what, "there is no solution to compare with; train it with --prediction v")
    for path in (spec.csv, spec.plot):
        if path is not None:
            naming.check_names(path)
            check_writable(path.parent)
            naming.check_free([path], spec.if_exists)
    if spec.features != BenchSpec.features:
        open_regular(Path(spec.features)).close()
    if spec.data is not None and not is_folder(spec.data):
        raise InputError(f"--data {spec.data}: is no folder", "name a folder of pictures")
    named = [label.name if label else "" for label in labels]
    return BenchPlan(
        base=pictures[0],
        config=config,
        cells=tuple(_cells(chosen, spec, config)),
        subjects=tuple(one.get("prompt", name) for one, name in zip(asked, named, strict=True)),
        labels=tuple(label.index if label else None for label in labels),
        is_all=not spec.scheduler_names(),
        notes=notes,
    )


def _chosen(spec: BenchSpec) -> tuple[list[Scheduler], tuple[str, ...]]:
    names = spec.scheduler_names()
    if not names:
        listing = schedulers.listing()
        return list(listing.schedulers), listing.warnings
    return list({Cell(found, 1).key: found for found in map(_named, names)}.values()), ()


def _named(text: str) -> Scheduler:
    """The scheduler that `NAME` or `NAME:OPTION=VALUE:...` means, with the options of `generate`. Raises UsageError."""
    name, *options = text.split(":")
    chosen: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        key = key.strip().lower()
        try:
            chosen[key] = OPTIONS[key](value.strip())
        except (KeyError, ValueError) as error:
            hint = f"write options as lms:order=2 or ddim:eta=1; there are {', '.join(OPTIONS)}"
            raise UsageError(f"--schedulers {text}: {option!r} is no option", hint) from error
    return schedulers.choose(schedulers.find(name), **chosen)


def _cells(chosen: list[Scheduler], spec: BenchSpec, config: dict[str, Any]) -> Iterator[Cell]:
    for scheduler in chosen:
        for steps in spec.step_counts():
            try:
                schedulers.check_steps(scheduler, steps, config)
                yield Cell(scheduler, steps)
            except UsageError as error:
                if spec.scheduler_names():
                    raise
                yield Cell(scheduler, steps, error.message)


def _asked(spec: BenchSpec, classes: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """What `generate` would be asked for each prompt or class; its own checks refuse what the model cannot draw."""
    if spec.class_name:
        return [{"class_name": name} for name in spec.class_name]
    if spec.prompt or classes is None:
        return [{"prompt": prompt} for prompt in spec.prompt or PROMPTS]
    return [{"class_name": name} for name in classes[: len(PROMPTS)]] or [{}]
