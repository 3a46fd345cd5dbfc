"""The training loop, on a task small enough to be computed by hand: a line through points."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdcli.errors import NumericalError, OutputError, ResourceError, SdcliWarning, Stopped
from sdcli.train_specs import TrainSpec
from sdcli.training import checkpoint
from sdcli.training.loop import Finished, Paused, Preparing, Report, Saved, StepDone, Validated, train
from sdcli.training.order import Draw, Order
from sdcli.training.state import Batch, Turn, lr_at
from tests.runs import DAMAGES, final_files, metrics, names, newest_checkpoint

COUNT = 5  # samples
HASH = "0123abcd"


@dataclass
class Line:
    """A task: y = 2 x_1 - x_2 + 0.5 from samples that a generator draws; dropout draws on torch's own stream."""

    dropout: float = 0.0
    bad_losses: Iterable[int] = ()  # steps, from 0
    bad_gradients: Iterable[int] = ()
    loaded: list[list[Draw]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(7)
        self.model: nn.Module = nn.Sequential(nn.Dropout(self.dropout), nn.Linear(2, 1))
        self.turns = [Turn("model", self.model, self.losses)]

    def load(self, draws: Sequence[Draw]) -> Batch:
        self.loaded.append(list(draws))
        return {"x": torch.stack([torch.randn(2, generator=draw.generator()) for draw in draws])}

    def losses(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        x = batch["x"]
        loss = (model(x) - (2 * x[:, :1] - x[:, 1:] + 0.5)).square().mean()
        if step in self.bad_losses:
            loss = loss * math.inf
        if step in self.bad_gradients:  # the loss stays finite, and d sqrt(0) is not
            loss = loss + (model(x) * 0).abs().sqrt().sum()
        return {"loss": loss, "double": 2 * loss}

    def validate(self) -> Generator[Preparing, None, dict[str, float]]:
        yield from ()
        return {}

    def sample(self, folder: Path) -> Generator[Preparing, None, dict[str, float]]:
        yield Preparing("drawing", 0, 1)
        (folder / "line.txt").write_text(str(self.model.state_dict()), encoding="utf-8")
        return {}

    def export(self, folder: Path, step: int) -> Generator[Preparing, None, dict[str, float]]:
        yield Preparing("exporting", 0, 1)
        save_file(self.model.state_dict(), folder / "line.safetensors")
        yield Preparing("exporting", 1, 1)
        return {"bias": float(cast(nn.Linear, cast(nn.Sequential, self.model)[1]).bias.detach()), "as_of": step}


def spec_of(**settings: Any) -> TrainSpec:
    defaults = {"steps": 6, "batch_size": 4, "lr": 0.1, "ema": 0.9, "save_every": 2, "keep": 1, "device": "cpu"}
    return TrainSpec(**{**defaults, **settings})


def order_of(spec: TrainSpec) -> Order:
    return Order([range(COUNT)], batch_size=spec.batch_size, seed=spec.seed)


def start(folder: Path, task: Line | None = None, **settings: Any) -> Generator[Report, None, None]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    stream = train(
        task if task is not None else Line(),
        spec_of(**settings),
        folder,
        accelerator=Accelerator(cpu=True),
        order=order_of(spec_of(**settings)),
        config_hash=HASH,
    )
    return cast("Generator[Report, None, None]", stream)


def run(folder: Path, task: Line | None = None, **settings: Any) -> list[Report]:
    return list(start(folder, task, **settings))


def exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "export" / "line.safetensors")


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (folder / "checkpoints").iterdir())


# By hand


def by_hand(spec: TrainSpec, task: Line) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, float]]]:
    """The loop's mathematics spelled out: last weights, their moving average, the metrics."""
    parameters = list(task.model.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=spec.weight_decay)
    averages = [p.detach().clone() for p in parameters]
    rows = []
    for step in range(spec.steps):
        terms = task.losses(task.model, task.load(order_of(spec).batch(step)), step)
        optimizer.zero_grad()
        terms["loss"].backward()
        norm = torch.stack([cast(Tensor, p.grad).norm() for p in parameters]).norm()
        for p in parameters:
            cast(Tensor, p.grad).mul_(min(1.0, spec.clip_norm / float(norm)) if spec.clip_norm > 0 else 1.0)
        optimizer.param_groups[0]["lr"] = lr_at(step, spec)
        optimizer.step()
        decay = min(spec.ema, (1 + step) / (10 + step)) if step > 0 else 0.0
        averages = [decay * a + (1 - decay) * p.detach() for a, p in zip(averages, parameters, strict=True)]
        rows.append({"step": step + 1, "loss": float(terms["loss"].detach()), "grad_norm": float(norm)})
    state = task.model.state_dict()
    return state, dict(zip(state, averages, strict=True)), rows


@pytest.mark.parametrize("clip_norm", [0.0, 0.3, 1000.0])
def test_the_weights_the_average_and_the_metrics_are_those_computed_by_hand(tmp_path: Path, clip_norm: float) -> None:
    settings = {"steps": 12, "clip_norm": clip_norm, "lr_warmup": 3, "lr_schedule": "cosine", "weight_decay": 0.1}
    weights, averages, rows = by_hand(spec_of(**settings), Line())
    run(tmp_path, **settings)
    torch.testing.assert_close(exported(tmp_path), averages)
    torch.testing.assert_close(load_file(newest_checkpoint(tmp_path) / "model.safetensors"), weights)
    assert len(metrics(tmp_path)) == len(rows)
    for found, expected in zip(metrics(tmp_path), rows, strict=True):
        assert {key: found[key] for key in expected} == pytest.approx(expected)
        assert found["double"] == pytest.approx(2 * found["loss"])
        assert found["lr"] == lr_at(found["step"] - 1, spec_of(**settings))


def test_without_a_moving_average_the_last_weights_are_exported(tmp_path: Path) -> None:
    weights, _, _ = by_hand(spec_of(), Line())
    run(tmp_path, ema=0.0)
    torch.testing.assert_close(exported(tmp_path), weights)
    assert not (newest_checkpoint(tmp_path) / "ema.safetensors").exists()


def test_every_step_sees_the_batch_of_its_number(tmp_path: Path) -> None:
    task = Line()
    run(tmp_path, task)
    assert task.loaded[:6] == [order_of(spec_of()).batch(step) for step in range(6)]


# The learning rate


def test_a_constant_rate_stays() -> None:
    assert {lr_at(step, spec_of(lr=0.1)) for step in range(6)} == {0.1}


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    spec = spec_of(lr=0.1, lr_warmup=4, steps=8)
    assert [lr_at(step, spec) for step in range(6)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_a_linear_rate_falls_in_equal_steps_and_would_reach_0_after_the_last() -> None:
    spec = spec_of(lr=0.1, lr_schedule="linear", lr_warmup=2, steps=6)
    rates = [lr_at(step, spec) for step in range(7)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025, 0.0])


def test_a_cosine_rate_is_half_way_down_in_the_middle_and_would_reach_0_after_the_last() -> None:
    spec = spec_of(lr=0.1, lr_schedule="cosine", steps=8)
    rates = [lr_at(step, spec) for step in range(9)]
    assert rates[0] == 0.1
    assert rates[4] == pytest.approx(0.05)
    assert rates[8] == pytest.approx(0.0)
    assert rates[2] == pytest.approx(0.1 * (1 + math.sqrt(0.5)) / 2)


# Resuming


@pytest.mark.parametrize("stops", [[3], [1, 1, 1, 1, 1], [2, 2], [4, 1], [5]], ids=str)
@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_a_run_in_parts_ends_as_a_straight_one_bit_for_bit(tmp_path: Path, stops: list[int], ema: float) -> None:
    settings: dict[str, Any] = {"ema": ema, "lr_schedule": "linear"}
    run(tmp_path / "straight", Line(dropout=0.5), **settings)
    done = 0
    for stop in stops:
        torch.manual_seed(99)  # whatever the new process begins with
        reports = run(tmp_path / "parts", Line(dropout=0.5), stop_after=stop, **settings)
        done += stop
        assert reports[-1] == Paused(done, 6)
    run(tmp_path / "parts", Line(dropout=0.5), **settings)
    assert final_files(tmp_path / "parts") == final_files(tmp_path / "straight")


def test_stopped_at_any_report_a_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = run(tmp_path / "straight", Line(dropout=0.5))
    for number, last in enumerate(whole):
        folder = tmp_path / str(number)
        stream = start(folder, Line(dropout=0.5))
        seen = list(itertools.islice(stream, number + 1))
        assert [type(report) for report in seen] == [type(report) for report in whole[: number + 1]]
        with pytest.raises(Stopped):
            stream.throw(Stopped(15))
        steps = len(metrics(folder))
        assert saved_steps(folder) == [steps], last  # nothing that was done is lost
        assert not [name for name in names(folder) if name.endswith(".part")]
        run(folder, Line(dropout=0.5))
        assert final_files(folder) == final_files(tmp_path / "straight"), last


def test_left_at_any_report_a_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = run(tmp_path / "straight", Line(dropout=0.5))
    for number in range(len(whole)):
        folder = tmp_path / str(number)
        stream = start(folder, Line(dropout=0.5))
        list(itertools.islice(stream, number + 1))
        stream.close()
        run(folder, Line(dropout=0.5))
        assert final_files(folder) == final_files(tmp_path / "straight")


def test_the_same_command_after_the_end_tells_the_same_and_changes_no_file(tmp_path: Path) -> None:
    first = run(tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    task = Line()
    assert run(tmp_path, task) == [first[-1]]
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    assert {p: content for p, (_, content) in after.items()} == {p: content for p, (_, content) in before.items()}
    assert task.loaded == []


def test_a_stop_beyond_the_end_is_no_stop(tmp_path: Path) -> None:
    assert isinstance(run(tmp_path, stop_after=100)[-1], Finished)


# Checkpoints


def test_every_so_many_steps_and_at_the_end_a_checkpoint_is_saved(tmp_path: Path) -> None:
    reports = run(tmp_path, steps=7, save_every=3, keep=10)
    saved = [report.step for report in reports if isinstance(report, Saved)]
    assert saved == saved_steps(tmp_path) == [3, 6, 7]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    run(tmp_path, stop_after=3, save_every=1, keep=keep)
    run(tmp_path, save_every=1, keep=keep)
    assert saved_steps(tmp_path) == [4, 5, 6][3 - keep :]


def test_a_report_comes_for_every_step_with_what_was_logged(tmp_path: Path) -> None:
    done = [report for report in run(tmp_path) if isinstance(report, StepDone)]
    assert [(report.step, report.steps) for report in done] == [(step, 6) for step in range(1, 7)]
    assert [{"step": report.step, **report.terms} for report in done] == metrics(tmp_path)
    assert all(report.images_per_second > 0 for report in done)


@pytest.mark.parametrize("damage", DAMAGES)
def test_with_the_newest_checkpoint_damaged_the_one_before_leads_to_the_same_end(tmp_path: Path, damage: str) -> None:
    run(tmp_path / "straight", Line(dropout=0.5))
    folder = tmp_path / "damaged"
    run(folder, Line(dropout=0.5), stop_after=4, keep=2)
    DAMAGES[damage](newest_checkpoint(folder) / "model-optimizer.safetensors")
    with pytest.warns(SdcliWarning, match="checkpoint-00000004"):
        run(folder, Line(dropout=0.5), keep=2)
    assert saved_steps(folder) == [4, 6]
    assert final_files(folder) == final_files(tmp_path / "straight")


def test_a_damaged_checkpoint_never_pushes_a_whole_one_out(tmp_path: Path) -> None:
    run(tmp_path, stop_after=4, keep=2)
    (newest_checkpoint(tmp_path) / "model.safetensors").unlink()  # of step 4; that of step 2 is whole
    with pytest.warns(SdcliWarning, match="checkpoint-00000004"):
        run(tmp_path, stop_after=1, save_every=1, keep=2)
    assert saved_steps(tmp_path) == [2, 3, 4]
    with pytest.warns(SdcliWarning, match="checkpoint-00000004"):
        run(tmp_path, stop_after=2, keep=2)
    assert saved_steps(tmp_path) == [4, 5]
    run(tmp_path, keep=2)


def test_a_stop_just_after_a_save_does_not_replace_the_whole_checkpoint(tmp_path: Path) -> None:
    stream = start(tmp_path)
    for report in stream:
        if isinstance(report, StepDone) and report.step == 2:
            break
    before = newest_checkpoint(tmp_path).stat().st_ino
    with pytest.raises(Stopped):
        stream.throw(Stopped(15))
    assert newest_checkpoint(tmp_path).stat().st_ino == before


def test_an_export_made_again_after_damage_is_the_same(tmp_path: Path) -> None:
    run(tmp_path, keep=2)
    before = final_files(tmp_path)
    (newest_checkpoint(tmp_path) / "model.safetensors").unlink()
    with pytest.warns(SdcliWarning):
        run(tmp_path, keep=2)
    assert final_files(tmp_path) == before
    assert not [name for name in names(tmp_path) if name.endswith(".part")]


def test_an_export_that_fails_leaves_none_and_the_next_call_makes_it(tmp_path: Path) -> None:
    class FullDisk(Line):
        def export(self, folder: Path, step: int) -> Generator[Preparing, None, dict[str, float]]:
            (folder / "half").touch()
            yield Preparing("exporting", 0, 1)
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="free some space"):
        run(tmp_path, FullDisk())
    assert not [name for name in names(tmp_path) if name.startswith("export")]
    assert [type(report) for report in run(tmp_path)] == [Preparing, Preparing, Finished]


# Numerical failure


@pytest.mark.parametrize("kind", ["bad_losses", "bad_gradients"])
def test_a_step_that_is_not_finite_moves_nothing(tmp_path: Path, kind: str) -> None:
    run(tmp_path / "before", steps=3, save_every=1)
    run(tmp_path / "after", Line(**{kind: [3]}), steps=4, save_every=1)
    for name in ("model.safetensors", "ema.safetensors", "model-optimizer.safetensors"):
        before, after = (load_file(newest_checkpoint(tmp_path / run) / name) for run in ("before", "after"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", ["bad_losses", "bad_gradients"])
def test_three_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path: Path, kind: str) -> None:
    with pytest.raises(NumericalError, match=r"for 3 steps up to step 5 \(last good: checkpoint 4\)"):
        run(tmp_path, Line(**{kind: range(2, 10)}), steps=9, keep=9)
    assert saved_steps(tmp_path) == [2, 4]
    for path in tmp_path.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())
    assert not (tmp_path / "export").exists()


def test_two_at_a_time_do_not_end_it(tmp_path: Path) -> None:
    assert isinstance(run(tmp_path, Line(bad_losses=[0, 1, 3, 4]))[-1], Finished)


def test_bad_steps_are_counted_across_a_resume(tmp_path: Path) -> None:
    for _ in range(2):
        assert isinstance(run(tmp_path, Line(bad_losses=range(9)), stop_after=1)[-1], Paused)
    with pytest.raises(NumericalError):
        run(tmp_path, Line(bad_losses=range(9)), stop_after=1)


def test_metrics_are_json_even_of_a_step_that_is_not_finite(tmp_path: Path) -> None:
    run(tmp_path, Line(bad_losses=[2]))
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["loss"] is None for row in rows] == [False, False, True, False, False, False]


def test_overflows_that_a_loss_scale_mends_are_no_bad_steps(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    # What accelerate sets up for float16 on a GPU, which this machine may lack.
    accelerator.scaler, accelerator.native_amp = scaler, True
    accelerator.state._mixed_precision = "fp16"
    try:
        tmp_path.joinpath("run").mkdir()
        tmp_path.joinpath("run", "config.json").write_text("{}", encoding="utf-8")
        stream = train(
            Line(),
            spec_of(steps=20),
            tmp_path / "run",
            accelerator=accelerator,
            order=order_of(spec_of()),
            config_hash=HASH,
        )
        assert isinstance(list(stream)[-1], Finished)
    finally:
        accelerator.state._mixed_precision = "no"
    norms = [row["grad_norm"] for row in metrics(tmp_path / "run")]
    skipped = norms.count(None)
    assert 3 < skipped < 12
    assert scaler.get_scale() == 2.0 ** (20 - skipped)
    state = checkpoint.newest(tmp_path / "run", config_hash=HASH)
    assert state is not None and state.state["scaler"]["scale"] == scaler.get_scale()


# Portions of a batch


def test_accumulated_batches_are_one_large_one(tmp_path: Path) -> None:
    for name, settings in (("whole", {"batch_size": 4}), ("parts", {"batch_size": 2, "accumulate": 2})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
        spec = spec_of(**settings)
        order = Order([range(COUNT)], batch_size=4, seed=0)
        accelerator = Accelerator(cpu=True)
        list(train(Line(), spec, tmp_path / name, accelerator=accelerator, order=order, config_hash=HASH))
    torch.testing.assert_close(exported(tmp_path / "parts"), exported(tmp_path / "whole"))
    assert [row["loss"] for row in metrics(tmp_path / "parts")] == pytest.approx(
        [row["loss"] for row in metrics(tmp_path / "whole")]
    )


class Narrow(Line):
    """A line whose memory has room for so many samples at once."""

    room = 1

    def losses(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        if len(batch["x"]) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().losses(model, batch, step)


def test_where_memory_runs_out_the_batch_goes_in_halves_and_the_result_is_the_same(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.warns(SdcliWarning, match="the batch goes in portions of") as said:
        run(tmp_path / "parts", Narrow())
    assert [str(one.message).split(" from ")[0][-1] for one in said] == ["2", "1"]
    torch.testing.assert_close(exported(tmp_path / "parts"), exported(tmp_path / "whole"))


def test_one_sample_that_is_too_large_ends_the_run(tmp_path: Path) -> None:
    class Full(Narrow):
        room = 0

    with pytest.warns(SdcliWarning), pytest.raises(ResourceError, match="need more memory"):
        run(tmp_path, Full())
    assert not (tmp_path / "export").exists()


# Two turns


class Duel(Line):
    """A line, and a second one that from step 3 on learns to tell the first one's answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.judge = nn.Linear(1, 1)
        self.turns.append(Turn("critic", self.judge, self.judge_losses, begin=3))

    def losses(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        terms = super().losses(model, batch, step)
        batch["answers"] = model(batch["x"]).detach()
        return terms

    def judge_losses(self, judge: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": (judge(batch["answers"]) - 1).square().mean()}


def test_a_turn_begins_at_its_step_and_its_terms_carry_its_name(tmp_path: Path) -> None:
    task = Duel()
    before = task.judge.weight.detach().clone()
    run(tmp_path, task, stop_after=3)
    assert torch.equal(task.judge.weight, before)
    run(tmp_path, task)
    assert not torch.equal(task.judge.weight, before)
    assert ["critic_loss" in row for row in metrics(tmp_path)] == [False] * 3 + [True] * 3
    assert {"critic.safetensors", "critic-optimizer.safetensors"} <= set(names(newest_checkpoint(tmp_path)))


@pytest.mark.parametrize("stop", range(1, 12))
def test_stopped_at_any_of_twelve_steps_a_run_of_two_turns_ends_as_a_straight_one(tmp_path: Path, stop: int) -> None:
    run(tmp_path / "straight", Duel(dropout=0.5), steps=12)
    run(tmp_path / "parts", Duel(dropout=0.5), steps=12, stop_after=stop)
    run(tmp_path / "parts", Duel(dropout=0.5), steps=12)
    assert final_files(tmp_path / "parts") == final_files(tmp_path / "straight")


# Validation and samples


class Watched(Line):
    """A line that is validated: the losses said of the steps."""

    said: ClassVar[dict[int, float]] = {2: 0.5, 4: 0.1, 6: 0.3, 8: 0.2}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked = 0
        self.step = 0

    def losses(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        self.step = step + 1
        return super().losses(model, batch, step)

    def validate(self) -> Generator[Preparing, None, dict[str, float]]:
        yield Preparing("validating", 1, 1)
        self.asked += 1
        return {"loss": self.said[self.step]}


def test_the_best_checkpoint_is_kept_beside_the_last_ones(tmp_path: Path) -> None:
    reports = run(tmp_path, Watched(), steps=8, holdout=0.5)
    assert [(r.step, r.terms["loss"]) for r in reports if isinstance(r, Validated)] == list(Watched.said.items())
    assert saved_steps(tmp_path) == [4, 8]
    assert isinstance(reports[-1], Finished) and reports[-1].summary["best_validated_step"] == 4
    assert [row for row in metrics(tmp_path) if "validation" in row] == [
        {"step": step, "validation": {"loss": loss}} for step, loss in Watched.said.items()
    ]


def test_the_best_can_be_exported_and_the_last_again(tmp_path: Path) -> None:
    run(tmp_path, Watched(), steps=8, holdout=0.5)
    last = exported(tmp_path)
    *_, best = run(tmp_path, Watched(), steps=8, holdout=0.5, export="best")
    assert isinstance(best, Finished) and best.summary["as_of"] == 4
    average = load_file(tmp_path / "checkpoints" / "checkpoint-00000004" / "ema.safetensors")
    torch.testing.assert_close(exported(tmp_path), average, rtol=0, atol=0)
    *_, again = run(tmp_path, Watched(), steps=8, holdout=0.5, export="last")
    assert isinstance(again, Finished) and again.summary["as_of"] == 8
    torch.testing.assert_close(exported(tmp_path), last, rtol=0, atol=0)


def test_left_between_a_save_and_its_validation_a_run_makes_up_for_it(tmp_path: Path) -> None:
    run(tmp_path / "straight", Watched(), steps=8, holdout=0.5)
    stream = start(tmp_path / "left", Watched(), steps=8, holdout=0.5)
    for report in stream:
        if isinstance(report, Saved) and report.step == 4:
            break
    stream.close()
    task = Watched()
    task.step = 4
    run(tmp_path / "left", task, steps=8, holdout=0.5)
    assert final_files(tmp_path / "left") == final_files(tmp_path / "straight")


def test_samples_are_drawn_when_asked_for_and_at_the_end(tmp_path: Path) -> None:
    run(tmp_path, sample_every=4)
    assert names(tmp_path / "samples") == [
        "step-00000004",
        "step-00000004/line.txt",
        "step-00000006",
        "step-00000006/line.txt",
    ]


def test_samples_show_the_average_and_leave_the_weights_that_train(tmp_path: Path) -> None:
    run(tmp_path, sample_every=6)
    average = load_file(newest_checkpoint(tmp_path) / "ema.safetensors")
    said = (tmp_path / "samples" / "step-00000006" / "line.txt").read_text(encoding="utf-8")
    with_samples = load_file(newest_checkpoint(tmp_path) / "model.safetensors")
    assert f"{float(average['1.bias']):.4f}"[:6] in said
    run(tmp_path / "without")
    without = load_file(newest_checkpoint(tmp_path / "without") / "model.safetensors")
    assert all(torch.equal(value, without[name]) for name, value in with_samples.items())
