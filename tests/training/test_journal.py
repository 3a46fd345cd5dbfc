"""metrics.jsonl: what is kept on a resume, and which step was best."""

from __future__ import annotations

import json
import math
from pathlib import Path

from accelerate import Accelerator

from sdcli.training.journal import Journal
from tests.runs import metrics


def journal(folder: Path, step: int) -> Journal:
    return Journal(folder, Accelerator(cpu=True), step)


def test_lines_after_the_step_resumed_from_and_the_half_line_of_a_killed_process_are_dropped(tmp_path: Path) -> None:
    lines = [f'{{"step": {step}, "loss": 0.1}}\n' for step in range(1, 5)]
    path = tmp_path / "metrics.jsonl"
    for at, kept in ((10, 4), (3, 3), (0, 0)):
        path.write_text("".join(lines) + '{"step": 5, "lo', encoding="utf-8")
        with journal(tmp_path, at):
            pass
        assert path.read_text(encoding="utf-8") == "".join(lines[:kept])


def test_numbers_that_are_not_finite_are_null_wherever_they_stand(tmp_path: Path) -> None:
    with journal(tmp_path, 0) as log:
        log.add(1, {"loss": math.nan, "validation": {"loss": math.inf, "psnr": 2.0}})
    assert metrics(tmp_path) == [{"step": 1, "loss": None, "validation": {"loss": None, "psnr": 2.0}}]


def test_the_best_step_is_that_of_the_lowest_validation_loss_among_those_asked_for(tmp_path: Path) -> None:
    with journal(tmp_path, 0) as log:
        assert log.best([1, 2]) is None
        for step, loss in ((1, 0.5), (2, 0.2), (3, 0.3), (4, 0.1)):
            log.add(step, {"loss": 9.0})
            log.add(step, {"validation": {"loss": loss}})
        assert log.best([1, 2, 3]) == 2
    again = journal(tmp_path, 3)
    assert again.validated == {1: 0.5, 2: 0.2, 3: 0.3}
    assert again.best([1, 3, 4]) == 3


def test_a_validation_that_gave_no_number_is_never_the_best(tmp_path: Path) -> None:
    with journal(tmp_path, 0) as log:
        log.add(1, {"validation": {"loss": math.nan}})
        log.add(2, {"validation": {"loss": 5.0}})
        assert log.best([1, 2]) == 2


def test_a_line_is_json_on_its_own(tmp_path: Path) -> None:
    with journal(tmp_path, 0) as log:
        log.add(1, {"loss": 1e-7, "lr": 0.1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8")) == {"step": 1, "loss": 1e-7, "lr": 0.1}
