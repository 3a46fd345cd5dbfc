"""WHEN: counting, loading ahead, checkpoints, validation, samples, stopping. What is trained is the task's business."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from sdcli.errors import OutputError, Stopped
from sdcli.files import make_folder, output_error, sync
from sdcli.layout import read_json, write_json
from sdcli.pages import report
from sdcli.train_specs import TrainSpec
from sdcli.training.data import readers
from sdcli.training.journal import Journal
from sdcli.training.order import Draw, Order
from sdcli.training.state import Batch, State, Turn


@dataclass(frozen=True)
class Preparing:
    """Work around the training itself: reading pictures, caching latents, measuring, drawing samples."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Planned:
    """What a run would do: `--dry-run`."""

    facts: dict[str, object]


@dataclass(frozen=True)
class StepDone:
    """One optimizer step."""

    step: int
    steps: int
    terms: dict[str, float | None]
    images_per_second: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Compiling:
    """The next step compiles first what learns: minutes in which nothing is lost by ending."""


@dataclass(frozen=True)
class Validated:
    """What the averaged weights do on held-out samples."""

    step: int
    terms: dict[str, float]


@dataclass(frozen=True)
class Paused:
    """`--stop-after` was reached; the same command goes on from here."""

    step: int
    steps: int


@dataclass(frozen=True)
class Finished:
    """The run is complete and exported."""

    export: Path
    summary: dict[str, float] = field(default_factory=dict)


Report = Preparing | Planned | Compiling | StepDone | Saved | Validated | Paused | Finished


class Task(Protocol):
    """What a trainer provides. In `validate`, `sample` and `export` the first turn's module holds the average."""

    @property
    def turns(self) -> Sequence[Turn]:
        """What moves; the first is what is averaged and exported."""

    def load(self, draws: Sequence[Draw]) -> Batch:
        """The batch of some draws: a pure function of them, called ahead on another thread."""

    def validate(self) -> Generator[Preparing, None, dict[str, float]]:
        """Terms over the held-out samples, by chance that is the same at every call; empty when none is held out."""

    def sample(self, folder: Path) -> Generator[Preparing, None, dict[str, float]]:
        """Write pictures that show what is learned so far into an empty folder."""

    def export(self, folder: Path, step: int) -> Generator[Preparing, None, dict[str, float]]:
        """Write the trained model, as it was after `step` steps, into an empty folder."""


def train(
    task: Task, spec: TrainSpec, folder: Path, *, accelerator: Accelerator, order: Order, config_hash: str
) -> Iterator[Report]:
    """Train to `spec.steps`, from the newest whole checkpoint in `folder` if there is one, then export.

    order: of the batches of all processes together. config_hash: what a checkpoint must carry to belong to this run.
    Throwing Stopped into the generator saves a checkpoint before it is raised again, in every process.
    Raises NumericalError after three non-finite steps in a row, ResourceError when one sample is too much.
    """
    state = State(task.turns, spec, folder, accelerator, config_hash)
    state.restore()
    if state.step == spec.steps and (finished := _exported(folder, spec)) is not None:
        _report(folder, accelerator)  # a kill may have come just before it
        yield finished
        return

    def load(step: int) -> Batch:
        draws = order.batch(step)
        share = len(draws) // accelerator.num_processes
        return task.load(draws[accelerator.process_index * share :][:share])

    last = spec.steps if spec.stop_after is None else min(spec.steps, state.step + spec.stop_after)
    with readers(1) as pool, Journal(folder, accelerator, state.step, spec.tracker, spec.offline) as journal:
        yield from _look(task, spec, state, journal)  # what a kill left undone, as the next line does
        state.prune(journal.best(state.saved_steps))
        upcoming = pool.submit(load, state.step)
        if spec.compile and state.step < last:
            yield Compiling()
        while state.step < last:
            began, stop = time.perf_counter(), None
            batch = upcoming.result()
            upcoming = pool.submit(load, state.step + 1)
            terms = state.advance(batch)
            journal.add(state.step, terms)
            try:
                if state.step % spec.save_every == 0 or state.step == last:
                    yield Saved(state.step, state.save())
                speed = order.batch_size / (time.perf_counter() - began)
                yield StepDone(state.step, spec.steps, terms, speed)
                yield from _look(task, spec, state, journal)
            except Stopped as error:
                stop = error
            stop = _agreed(stop, accelerator)
            if stop is not None and state.step not in state.saved_steps:
                state.save()
            state.prune(journal.best(state.saved_steps))
            if stop is not None:
                _report(folder, accelerator)
                raise stop
        best = journal.best(state.saved_steps)
    if state.step < spec.steps:
        _report(folder, accelerator)
        yield Paused(state.step, spec.steps)
        return
    if spec.export == "best" and best is not None:
        state.load_average_of(best)
    with state.averaged():
        if accelerator.is_main_process:
            yield from _export(task, folder, spec, best)
        accelerator.wait_for_everyone()


def _exported(folder: Path, spec: TrainSpec) -> Finished | None:
    """What a run ended with at an earlier call, where that is what is asked for now."""
    if not ((folder / "export").is_dir() and (folder / "summary.json").exists()):
        return None
    summary = read_json(folder / "summary.json")
    is_asked_for = (summary.pop("dtype", None), summary.pop("of", None)) == (spec.export_dtype, spec.export)
    return Finished(folder / "export", summary) if is_asked_for else None


def _look(task: Task, spec: TrainSpec, state: State, journal: Journal) -> Iterator[Report]:
    """Validate and draw samples, where this step is one to do so and it has not been done."""
    step = state.step
    if step == 0:
        return
    validate_every = spec.validate_every if spec.validate_every is not None else spec.save_every
    is_due = spec.holdout > 0 and (step % validate_every == 0 or step == spec.steps)
    if is_due and step not in journal.validated:
        with state.averaged():
            terms = yield from task.validate()
        if terms:
            journal.add(step, {"validation": terms})
            _report(state.folder, state.accelerator)
            yield Validated(step, terms)
    pictures = state.folder / "samples" / f"step-{step:08d}"
    is_due = spec.sample_every is not None and (step % spec.sample_every == 0 or step == spec.steps)
    if is_due and not _exists(pictures, state.accelerator):
        with state.averaged():
            if state.accelerator.is_main_process:
                yield from _placed(pictures, task.sample)
            state.accelerator.wait_for_everyone()
        _report(state.folder, state.accelerator)


def _exists(path: Path, accelerator: Accelerator) -> bool:
    """Whether a path exists for the first process; all agree, for they draw together."""
    there = [path.exists()]
    return bool(broadcast_object_list(there)[0]) if accelerator.num_processes > 1 else there[0]


def _report(folder: Path, accelerator: Accelerator) -> None:
    """Write report.html anew, in the first process."""
    if accelerator.is_main_process:
        report.write_report(folder)


def _agreed(stop: Stopped | None, accelerator: Accelerator) -> Stopped | None:
    """Whether any process was told to stop: then all do, after the same step."""
    if accelerator.num_processes == 1:
        return stop
    mine = torch.tensor([stop.signal_number if stop is not None else 0], device=accelerator.device)
    told = int(accelerator.gather(mine).max())
    return stop if stop is not None or told == 0 else Stopped(told, "another process of this run was stopped")


def _export(task: Task, folder: Path, spec: TrainSpec, best: int | None) -> Iterator[Report]:
    """Put the trained model in its place, `export/`, instead of one of another type or step that may lie there.

    summary.json says that it lies there and what it is: it goes before the one and comes after the other.
    """
    (folder / "summary.json").unlink(missing_ok=True)
    step = best if spec.export == "best" and best is not None else spec.steps
    summary = yield from _placed(folder / "export", lambda part: task.export(part, step))
    if best is not None:
        summary["best_validated_step"] = best
    write_json(folder / "summary.json", {**summary, "dtype": spec.export_dtype, "of": spec.export})
    report.write_report(folder)
    yield Finished(folder / "export", summary)


def _placed(
    final: Path, write: Callable[[Path], Generator[Preparing, None, dict[str, float]]]
) -> Generator[Report, None, dict[str, float]]:
    """Let `write` fill a folder that then takes its place, whole. Raises OutputError; nothing half stays."""
    part, old = final.with_name(f"{final.name}.part"), final.with_name(f"{final.name}.old.part")
    make_folder(final.parent)
    try:
        part.mkdir()
        found = yield from write(part)
        for path in (*part.rglob("*"), part):
            sync(path)
        if final.exists():
            final.rename(old)
        part.rename(final)
        sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise output_error(final, error) from error
    except SafetensorError as error:  # what the library makes of a full disk
        raise OutputError(f"{final}: {error}", "free some space") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found
