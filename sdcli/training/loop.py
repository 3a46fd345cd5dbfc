"""WHEN: counting, learning rate, logging, checkpoints, stopping. What is trained is the task's business."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sdcli.errors import NumericalError, OutputError, Stopped
from sdcli.files import output_error, sync
from sdcli.layout import read_json, write_json
from sdcli.specs import TrainSpec
from sdcli.training import checkpoint, data

Batch = dict[str, Tensor]

BAD_STEPS_AT_MOST = 3  # non-finite steps in a row before the run gives up


@dataclass(frozen=True)
class Preparing:
    """Work around the training itself: reading pictures, caching latents, measuring the result."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class StepDone:
    """One optimizer step."""

    step: int
    steps: int
    terms: dict[str, float]
    images_per_second: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk."""

    step: int
    path: Path


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


Report = Preparing | StepDone | Saved | Paused | Finished


class Task(Protocol):
    """What a trainer provides; its `model` is all that moves."""

    model: nn.Module

    def load(self, step: int, ids: list[int]) -> Batch:
        """The batch of a step: a pure function of its arguments, called ahead on another thread."""

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Every term, with the sum to minimise under `loss`. `model` is `self.model`, perhaps wrapped."""

    def export(self, folder: Path) -> Generator[Preparing, None, dict[str, float]]:
        """Write the trained model, whose weights are in `self.model` now, into an empty folder."""


def train(
    task: Task, spec: TrainSpec, folder: Path, *, accelerator: Accelerator, count: int, config_hash: str
) -> Iterator[Report]:
    """Train to `spec.steps`, from the newest whole checkpoint in `folder` if there is one, then export.

    count: samples in the dataset. config_hash: what a checkpoint must carry to belong to this run.
    Throwing Stopped into the generator saves a checkpoint before it is raised again.
    Raises NumericalError after three non-finite steps in a row.
    """
    run = _Run(task, spec, folder, accelerator, config_hash)
    run.restore()
    if run.step == spec.steps and (folder / "export").is_dir():
        summary = read_json(folder / "summary.json")
        if summary.pop("dtype", None) == spec.export_dtype:
            yield Finished(folder / "export", summary)
            return

    def load(step: int) -> Batch:
        return task.load(step, data.batch_ids(step, batch_size=spec.batch_size, count=count, seed=spec.seed))

    last = spec.steps if spec.stop_after is None else min(spec.steps, run.step + spec.stop_after)
    with ThreadPoolExecutor(1) as pool, (folder / "metrics.jsonl").open("ab", buffering=0) as metrics:
        upcoming = pool.submit(load, run.step)
        while run.step < last:
            began = time.perf_counter()
            batch = upcoming.result()
            upcoming = pool.submit(load, run.step + 1)
            terms = run.advance(batch)
            try:
                metrics.write(_metrics_line(run.step, terms))
            except OSError as error:
                raise output_error(folder / "metrics.jsonl", error) from error
            if run.step % spec.save_every == 0 or run.step == last:
                yield run.save()
            try:
                yield StepDone(run.step, spec.steps, terms, spec.batch_size / (time.perf_counter() - began))
            except Stopped:
                if run.step not in run.saved_steps:
                    run.save()
                raise
    if run.step < spec.steps:
        yield Paused(run.step, spec.steps)
    else:
        run.use_averaged_weights()
        yield from _export(task, folder, spec.export_dtype)


def lr_at(step: int, spec: TrainSpec) -> float:
    """The learning rate of step `step` (from 0): warm-up, then constant, or falling to 0 in a line or half a cosine."""
    if step < spec.lr_warmup:
        return spec.lr * (step + 1) / spec.lr_warmup
    done = (step - spec.lr_warmup) / max(1, spec.steps - spec.lr_warmup)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return spec.lr * factor[spec.lr_schedule]


def _metrics_line(step: int, terms: dict[str, float]) -> bytes:
    row = {"step": step} | {k: v if math.isfinite(v) else None for k, v in terms.items()}
    return f"{json.dumps(row)}\n".encode()


class _Run:
    """All that moves while training, and how it is saved and brought back."""

    def __init__(self, task: Task, spec: TrainSpec, folder: Path, accelerator: Accelerator, config_hash: str) -> None:
        self.task, self.spec, self.folder, self.config_hash = task, spec, folder, config_hash
        self.accelerator = accelerator
        task.model.to(accelerator.device).train()
        optimizer = torch.optim.AdamW(task.model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay, fused=True)
        self.model, self.optimizer = accelerator.prepare(task.model, optimizer)
        self.ema = AveragedModel(task.model, multi_avg_fn=_ema_rule(spec.ema)) if spec.ema > 0 else None
        self.step = 0
        self.saved_steps: list[int] = []  # of the checkpoints to keep, the last of which is known to be whole
        self.bad_steps = 0

    def advance(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; a non-finite one moves nothing. Returns the terms to log."""
        rate = lr_at(self.step, self.spec)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.accelerator.autocast():
            losses = self.task.losses(self.model, {k: v.to(self.accelerator.device) for k, v in batch.items()})
        self.optimizer.zero_grad()
        self.accelerator.backward(losses["loss"])
        limit = self.spec.clip_norm if self.spec.clip_norm > 0 else math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.task.model.parameters(), limit))
        terms = {name: float(value.detach()) for name, value in losses.items()} | {"grad_norm": norm, "lr": rate}
        self.step += 1
        is_good = math.isfinite(terms["loss"]) and math.isfinite(norm)
        scaler = self.accelerator.scaler
        is_overflow = scaler is not None and math.isfinite(terms["loss"]) and scaler.get_scale() > 1
        if is_good or scaler is not None:  # a scaler skips the bad step itself, and needs to, to lower its scale
            self.optimizer.step()
        if is_good:
            if self.ema is not None:
                self.ema.update_parameters(self.task.model)
            self.bad_steps = 0
        elif not is_overflow:
            self._count_bad_step()
        return terms

    def save(self) -> Saved:
        """Put a checkpoint of this very moment on disk."""
        optimizer, settings = checkpoint.optimizer_state(self.optimizer.optimizer)
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        tensors = {"weights": self.task.model.state_dict(), "optimizer": optimizer, "rng": rng}
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        scaler = self.accelerator.scaler
        state = {"optimizer": settings, "scaler": scaler.state_dict() if scaler is not None else None}
        snapshot = checkpoint.Snapshot(self.step, tensors, {**state, "bad_steps": self.bad_steps})
        path = checkpoint.save(self.folder, snapshot, config_hash=self.config_hash)
        self.saved_steps = [*self.saved_steps, self.step][-self.spec.keep :]
        checkpoint.prune(self.folder, keep=self.saved_steps)
        return Saved(self.step, path)

    def restore(self) -> None:
        """Go back to the newest whole checkpoint of the folder, if there is one."""
        snapshot = checkpoint.newest(self.folder, config_hash=self.config_hash)
        if snapshot is not None:
            self.task.model.load_state_dict(snapshot.tensors["weights"])
            checkpoint.load_optimizer_state(
                self.optimizer.optimizer, snapshot.tensors["optimizer"], snapshot.state["optimizer"]
            )
            if self.ema is not None:
                self.ema.load_state_dict(snapshot.tensors["ema"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(snapshot.state["scaler"])
            rng = snapshot.tensors["rng"]
            torch.set_rng_state(rng["cpu"])
            for i in range(torch.cuda.device_count()):
                if f"cuda{i}" in rng:  # the run may have begun on another machine
                    torch.cuda.set_rng_state(rng[f"cuda{i}"], i)
            self.step = snapshot.step
            # Damaged ones after it count for nothing; they are replaced or pruned as the run passes them.
            self.saved_steps = [s for s in checkpoint.steps(self.folder) if s <= self.step][-self.spec.keep :]
            checkpoint.prune(self.folder, keep=self.saved_steps)
            self.bad_steps = snapshot.state.get("bad_steps", 0)
        checkpoint.truncate_metrics(self.folder, self.step)

    def use_averaged_weights(self) -> None:
        """Put the moving average, if one is kept, into the task's model."""
        if self.ema is not None:
            self.task.model.load_state_dict(self.ema.module.state_dict())
        self.task.model.eval()

    def _count_bad_step(self) -> None:
        self.bad_steps += 1
        if self.bad_steps == BAD_STEPS_AT_MOST:
            good = f"checkpoint {self.saved_steps[-1]}" if self.saved_steps else "none was saved yet"
            raise NumericalError(
                f"loss or gradient not finite for {self.bad_steps} steps up to step {self.step} (last good: {good})",
                "lower --lr or use another --mixed-precision",
            )


def _ema_rule(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Exponential moving average whose decay grows with the steps, so that the first weights are soon forgotten."""

    def update(averages: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        warm = min(decay, (1.0 + float(count)) / (10.0 + float(count)))  # as tf.train.ExponentialMovingAverage
        torch._foreach_lerp_(list(averages), list(current), 1.0 - warm)

    return update


def _export(task: Task, folder: Path, dtype: str) -> Iterator[Report]:
    part, final, old = folder / "export.part", folder / "export", folder / "export.old.part"
    try:
        part.mkdir()
        summary = yield from task.export(part)
        for path in (*part.rglob("*"), part):
            sync(path)
        write_json(folder / "summary.json", {**summary, "dtype": dtype})
        if final.exists():  # of another type, or a later checkpoint was damaged after the export
            final.rename(old)
        part.rename(final)
        sync(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise output_error(final, error) from error
    except SafetensorError as error:  # what the library makes of a full disk
        raise OutputError(f"{final}: {error}", "free some space") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    yield Finished(final, summary)
