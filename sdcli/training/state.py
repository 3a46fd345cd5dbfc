"""All that moves while training (weights, optimizers, averages, chance), one step of it, and its checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from sdcli.errors import InputError, NumericalError, ResourceError, SdcliWarning
from sdcli.files import reason
from sdcli.pipeline import compiling
from sdcli.train_specs import TrainSpec
from sdcli.training import checkpoint, optimizers, sharding
from sdcli.training.order import mixed_seed

Batch = dict[str, Tensor]  # every tensor has one row a sample

BAD_STEPS_AT_MOST = 3  # non-finite steps in a row before the run gives up


@dataclass(frozen=True)
class Turn:
    """What one optimizer lowers in every step. With several, one may leave tensors in the batch for those after it.

    losses: (module, perhaps wrapped; batch; step from 0) -> every term, with what is minimised under `loss`. A term is
    a mean over the batch, or one value a sample, (B,), NaN where it says nothing of one.
    begin: the first step, from 0, in which it takes part.
    after: called after every step that was good, with the portions of its batch, the step and the optimizer.
    """

    name: str
    module: nn.Module
    losses: Callable[[nn.Module, Batch, int], dict[str, Tensor]]
    begin: int = 0
    after: Callable[[Sequence[Batch], int, torch.optim.Optimizer], None] | None = None


class State:
    """The turns of a run with their optimizers, the average of what the first turn trains, and the step reached."""

    def __init__(
        self, turns: Sequence[Turn], spec: TrainSpec, folder: Path, accelerator: Accelerator, config_hash: str
    ) -> None:
        self.spec, self.folder, self.config_hash, self.accelerator = spec, folder, config_hash, accelerator
        torch.manual_seed(mixed_seed(spec.seed, "process", accelerator.process_index))
        self.players = [_Player(turn, spec, accelerator) for turn in turns]
        self.ema = Ema(self.players[0].trained, spec.ema) if spec.ema > 0 else None
        self.micro_size = spec.batch_size  # samples in one pass of the network
        self.step = 0
        self.saved_steps: list[int] = []  # of the checkpoints to keep, the last of which is known to be whole
        self.bad_steps = 0

    def advance(self, batch: Batch) -> dict[str, float | None]:
        """One step of every optimizer; where anything is not finite, none moves. Returns the terms to log."""
        rate = lr_at(self.step, self.spec)
        tallies, portions = self._gradients(batch)
        self.accelerator.unscale_gradients()
        limit = self.spec.clip_norm if self.spec.clip_norm > 0 else math.inf
        norms = {player.prefix + "grad_norm": player.clip(limit) for player in self._playing()}
        terms = self._means(tallies) | norms
        losses = [terms[player.prefix + "loss"] for player in self._playing()]
        is_loss_good = all(loss is not None and math.isfinite(loss) for loss in losses)
        is_good = is_loss_good and all(map(math.isfinite, norms.values()))
        scaler = self.accelerator.scaler
        is_overflow = scaler is not None and is_loss_good and scaler.get_scale() > 1
        if is_good:
            for player in self._playing():
                player.step(rate, scaler)
        if scaler is not None:
            scaler.update()  # once a step, whatever the number of optimizers; a bad one lowers the scale
        if is_good:
            for player in self._playing():
                if player.turn.after is not None:
                    player.turn.after(portions, self.step, player.optimizer.optimizer)
            if self.ema is not None:
                self.ema.update(self.players[0].trained)
            self.bad_steps = 0
        self.step += 1
        if not is_good and not is_overflow:
            self._count_bad_step()
        return {**terms, "lr": rate}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights that are exported - the moving average, if one is kept - in place of those that train.

        Every process takes part: where the weights lie in shards, each gets them whole.
        """
        player = self.players[0]
        place: AbstractContextManager[None]
        if player.is_sharded:
            place = sharding.filled(player.turn.module, self.ema.values if self.ema is not None else player.trained)
        else:
            place = self.ema.in_place_of(player.trained) if self.ema is not None else nullcontext()
        with place:
            player.turn.module.eval()
            try:
                yield
            finally:
                player.turn.module.train()

    def save(self) -> Path:
        """Put a checkpoint of this very moment on disk; every process takes part, the first one writes."""
        tensors: dict[str, Mapping[str, Tensor]] = {"rng": self._chance()}
        settings = {}
        for player in self.players:
            optimizer, settings[player.turn.name] = optimizers.state(player.optimizer.optimizer)
            tensors |= {player.turn.name: player.kept, f"{player.turn.name}-optimizer": optimizer}
        if self.ema is not None:
            tensors["ema"] = self.ema.values
        is_main = self.accelerator.is_main_process
        whole = {name: sharding.gathered(part, is_kept=is_main) for name, part in tensors.items()}
        scaler = self.accelerator.scaler
        state: dict[str, Any] = {"optimizers": settings, "scaler": scaler.state_dict() if scaler is not None else None}
        state |= {"bad_steps": self.bad_steps, "averaged_steps": self.ema.steps if self.ema is not None else 0}
        if is_main:
            snapshot = checkpoint.Snapshot(self.step, whole, state)
            checkpoint.save(self.folder, snapshot, config_hash=self.config_hash)
        self.accelerator.wait_for_everyone()
        self.saved_steps.append(self.step)
        return checkpoint.place(self.folder, self.step)

    def prune(self, best: int | None) -> None:
        """Keep the last checkpoints, as many as asked, and the best one; remove those before them."""
        kept = self.saved_steps[-self.spec.keep :]
        self.saved_steps = [best, *kept] if best in self.saved_steps and best not in kept else kept
        if self.accelerator.is_main_process and self.saved_steps:
            checkpoint.prune(self.folder, keep=self.saved_steps)

    def restore(self) -> None:
        """Go back to the newest whole checkpoint of the folder, if there is one.

        Raises InputError for one that is whole and holds something else than this run's.
        """
        snapshot = checkpoint.newest(self.folder, config_hash=self.config_hash)
        if snapshot is not None:
            try:
                self._load(snapshot)
            except torch.OutOfMemoryError:
                raise
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                what = f"{checkpoint.place(self.folder, snapshot.step)}: holds no state of this run ({reason(error)})"
                raise InputError(what, "remove it; the one before is then taken") from error
            # Damaged ones after it count for nothing; they are replaced or pruned as the run passes them.
            self.saved_steps = [step for step in checkpoint.steps(self.folder) if step <= self.step]

    def load_average_of(self, step: int) -> None:
        """Take the exported weights of an earlier step, for an export of the best. Raises InputError when damaged."""
        snapshot = checkpoint.at(self.folder, step, config_hash=self.config_hash)
        _assign(self.players[0].kept, snapshot.tensors[self.players[0].turn.name])
        if self.ema is not None:
            _assign(self.ema.values, snapshot.tensors["ema"])

    def _playing(self) -> list[_Player]:
        return [player for player in self.players if player.turn.begin <= self.step]

    def _gradients(self, batch: Batch) -> tuple[dict[str, Tensor], list[Batch]]:
        """Gradients of every turn, in smaller portions from now on where the memory does not do for one."""
        while True:
            try:
                with compiling.explained() if self.spec.compile else nullcontext():
                    return self._backward(batch)
            except torch.OutOfMemoryError as error:
                if self.micro_size == 1 or self.accelerator.num_processes > 1:
                    raise ResourceError(
                        f"{self.micro_size} pictures at once need more memory than {self.accelerator.device} has",
                        "lower --batch-size and raise --accumulate, or add --gradient-checkpointing",
                    ) from error
            self.micro_size = (self.micro_size + 1) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"out of memory: the batch goes in portions of {self.micro_size} from step {self.step + 1} on",
                SdcliWarning,
                stacklevel=2,
            )

    def _backward(self, batch: Batch) -> tuple[dict[str, Tensor], list[Batch]]:
        """Accumulate the gradients of every turn over the portions of a batch.

        Returns (sum, count) of every term, and the portions with what the turns left in them.
        """
        count = len(next(iter(batch.values())))
        portions = [
            {name: rows[first : first + self.micro_size].to(self.accelerator.device) for name, rows in batch.items()}
            for first in range(0, count, self.micro_size)
        ]
        tallies: dict[str, Tensor] = {}
        for player in self._playing():
            player.optimizer.zero_grad()
            for portion in portions:
                size = len(next(iter(portion.values())))
                is_last = portion is portions[-1]
                with nullcontext() if is_last else self.accelerator.no_sync(player.module):
                    with self.accelerator.autocast():
                        losses = player.turn.losses(player.module, portion, self.step)
                    self.accelerator.backward(losses["loss"] * (size / count))
                for name, value in losses.items():
                    tally = _tally(value.detach().float(), size)
                    tallies[player.prefix + name] = tallies.get(player.prefix + name, 0) + tally
        return tallies, portions

    def _means(self, tallies: dict[str, Tensor]) -> dict[str, float | None]:
        """The mean of every term over all samples of all processes; None of what says nothing about any."""
        table = self.accelerator.reduce(torch.stack(list(tallies.values())), "sum").tolist()
        return {name: total / count if count else None for name, (total, count) in zip(tallies, table, strict=True)}

    def _chance(self) -> dict[str, Tensor]:
        """The state of every process's random streams."""
        mine = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        rows = {name: self.accelerator.gather(row[None].to(self.accelerator.device)) for name, row in mine.items()}
        return {f"{name}{rank}": row for name, table in rows.items() for rank, row in enumerate(table.cpu())}

    def _load(self, snapshot: checkpoint.Snapshot) -> None:
        for player in self.players:
            _assign(player.kept, snapshot.tensors[player.turn.name])
            optimizer, settings = snapshot.tensors[f"{player.turn.name}-optimizer"], snapshot.state["optimizers"]
            optimizers.load_state(player.optimizer.optimizer, optimizer, settings[player.turn.name])
        if self.ema is not None:
            _assign(self.ema.values, snapshot.tensors["ema"])
            self.ema.steps = snapshot.state["averaged_steps"]
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(snapshot.state["scaler"])
        rank, rng = self.accelerator.process_index, snapshot.tensors["rng"]
        torch.set_rng_state(rng[f"cpu{rank}"])
        if f"cuda{rank}" in rng and torch.cuda.is_available():  # the run may have begun on another machine
            torch.cuda.set_rng_state(rng[f"cuda{rank}"], self.accelerator.device)
        self.step, self.bad_steps = snapshot.step, snapshot.state["bad_steps"]

    def _count_bad_step(self) -> None:
        self.bad_steps += 1
        if self.bad_steps == BAD_STEPS_AT_MOST:
            good = f"checkpoint {self.saved_steps[-1]}" if self.saved_steps else "none was saved yet"
            raise NumericalError(
                f"loss or gradient not finite for {self.bad_steps} steps up to step {self.step} (last good: {good})",
                "lower --lr or use another --mixed-precision",
            )


class Ema:
    """Exponential moving average of named tensors; its decay grows with the steps: the first are soon forgotten."""

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.decay = decay
        self.steps = 0

    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Move towards the tensors' values now; the first time, take them."""
        warm = min(self.decay, (1.0 + self.steps) / (10.0 + self.steps))  # as tf.train.ExponentialMovingAverage
        share = 1.0 - warm if self.steps > 0 else 1.0
        averages, values = map(sharding.local, self.values.values()), map(sharding.local, tensors.values())
        torch._foreach_lerp_(list(averages), list(values), share)
        self.steps += 1

    @contextmanager
    def in_place_of(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the tensors hold their averages within the block."""
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        _assign(tensors, self.values)
        try:
            yield
        finally:
            _assign(tensors, before)


def lr_at(step: int, spec: TrainSpec) -> float:
    """The learning rate of step `step` (from 0): warm-up, then constant, or falling to 0 in a line or half a cosine."""
    if step < spec.lr_warmup:
        return spec.peak_lr * (step + 1) / spec.lr_warmup
    done = (step - spec.lr_warmup) / max(1, spec.steps - spec.lr_warmup)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return spec.peak_lr * factor[spec.lr_schedule]


class _Player:
    """A turn with its optimizer, ready for the device and the processes of the run.

    Where accelerate shards what is trained, that is a twin of the turn's module, which is empty but when looked at.
    """

    def __init__(self, turn: Turn, spec: TrainSpec, accelerator: Accelerator) -> None:
        self.turn = turn
        self.prefix = "" if turn.name == "model" else f"{turn.name}_"  # of its terms in the log
        turn.module.to(accelerator.device).train()
        self.is_sharded = accelerator.distributed_type is DistributedType.FSDP
        self.learner = sharding.twin(turn.module) if self.is_sharded else turn.module
        optimizer = optimizers.create(list(_trained(self.learner).values()), spec)
        self.module, self.optimizer = accelerator.prepare(self.learner, optimizer)
        if spec.compile and turn.name == "model":  # not the turn's own module, which is measured and drawn with
            self.module = cast(nn.Module, torch.compile(self.module))
        self.trained = _trained(self.learner)  # sharding replaced them
        if self.is_sharded:
            sharding.empty(turn.module)

    @property
    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the module: what is trained, and its buffers.

        Asked for anew each time: wrapping the module for several processes gives its parameters other storage.
        """
        frozen = {name for name, p in self.learner.named_parameters() if not p.requires_grad}
        return {name: tensor for name, tensor in self.learner.state_dict().items() if name not in frozen}

    def clip(self, limit: float) -> float:
        """Shorten the gradient to this norm where it is longer; most are not, and then nothing is written. Its norm."""
        norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        found = float(sharding.whole(norm))
        if found > limit:
            nn.utils.clip_grads_with_norm_(self.trained.values(), limit, norm)
        return found

    def step(self, rate: float, scaler: torch.amp.GradScaler | None) -> None:
        optimizer = self.optimizer.optimizer  # accelerate's own step would update the scaler, too
        for group in optimizer.param_groups:
            group["lr"] = rate
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def _assign(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(sharding.like(values[name], tensor))


def _tally(value: Tensor, samples: int) -> Tensor:
    """(sum, count) over samples of a term: () a mean of all, or (B,) with NaN where it says nothing."""
    if value.ndim == 0:
        return torch.stack([value * samples, torch.full_like(value, samples)])
    is_said = ~value.isnan()
    return torch.stack([value[is_said].sum(), is_said.sum().to(value.dtype)])
