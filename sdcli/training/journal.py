"""metrics.jsonl of a run: a line a step, a line a validation; the same to a tracker, where one is named."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import broadcast_object_list

from sdcli.errors import UsageError
from sdcli.files import atomic_write, output_error

METRICS = "metrics.jsonl"
ID_LENGTH = 16


class Journal:
    """What is measured while training. Only the first process reads and writes the file."""

    def __init__(
        self, folder: Path, accelerator: Accelerator, step: int, tracker: str | None = None, offline: bool = False
    ) -> None:
        """Open the journal of a run that stands at `step`; lines after it are dropped, for they will come again.

        tracker: `tensorboard` or `wandb`, whose package must be there. Raises UsageError where it does not start.
        """
        self.path = folder / METRICS
        self._tracker: GeneralTracker | None = None
        self.validated: dict[int, float] = {}  # step -> validation loss
        self._stream: IO[bytes] | None = None
        if accelerator.is_main_process:
            for row in self._rows(step):
                self._note(row)
            if self.path.exists():
                with atomic_write(self.path) as part, part.open("wb") as stream:
                    stream.writelines(_line(row) for row in self._rows(step))
            self._stream = self.path.open("ab", buffering=0)
            if tracker is not None:
                self._tracker = _TRACKERS[tracker](folder, step, offline)
        if accelerator.num_processes > 1:  # what is done next depends on it
            (self.validated,) = broadcast_object_list([self.validated])

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._tracker is not None:
            self._tracker.finish()

    def add(self, step: int, terms: dict[str, Any]) -> None:
        """Log the terms of a step; numbers that are not finite become null. Raises OutputError."""
        row = {"step": step, **{name: _finite(value) for name, value in terms.items()}}
        self._note(row)
        if self._stream is None:
            return
        try:
            self._stream.write(_line(row))
        except OSError as error:
            raise output_error(self.path, error) from error
        if self._tracker is not None:
            self._tracker.log(_flat(row), step=step)

    def best(self, steps: list[int]) -> int | None:
        """The one of these steps with the lowest validation loss; None where none was validated."""
        known = [step for step in steps if step in self.validated]
        return min(known, key=lambda step: self.validated[step], default=None)

    def _note(self, row: dict[str, Any]) -> None:
        validation = row.get("validation")
        loss = validation.get("loss") if isinstance(validation, dict) else None
        if isinstance(loss, float):
            self.validated[row["step"]] = loss

    def _rows(self, step: int) -> Iterator[dict[str, Any]]:
        """The lines up to `step`, and up to the half line of a killed process."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            for line in stream:
                try:
                    row = json.loads(line)
                    number = row["step"]
                except (ValueError, KeyError, TypeError):
                    return
                if isinstance(number, int) and number <= step:
                    yield row


def _tensorboard(folder: Path, step: int, offline: bool) -> GeneralTracker:
    tracker = TensorBoardTracker("sdcli", folder / "tracker", purge_step=step + 1)
    tracker.start()
    return tracker


def _wandb(folder: Path, step: int, offline: bool) -> GeneralTracker:
    import wandb  # deferred: few have it, and `start.accelerator_for` has asked

    identity = hashlib.sha256((folder / "config.json").read_bytes() + os.fsencode(folder.resolve())).hexdigest()
    mode = "offline" if offline else None  # None: as WANDB_MODE or `wandb offline` say, else online
    tracker = WandBTracker("sdcli", name=folder.name, dir=folder, mode=mode, id=identity[:ID_LENGTH], resume="allow")
    try:
        tracker.start()
    except wandb.Error as error:
        raise UsageError(f"--tracker wandb: {error}", "set WANDB_MODE=offline to keep it on this machine") from error
    return tracker


_TRACKERS: dict[str, Callable[[Path, int, bool], GeneralTracker]] = {"tensorboard": _tensorboard, "wandb": _wandb}


def _line(row: dict[str, Any]) -> bytes:
    return f"{json.dumps(row)}\n".encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(row: dict[str, Any]) -> dict[str, float]:
    """A row as trackers want it: names with a slash for what is nested, and no nulls."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        inner = {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: v for key, v in inner.items() if v is not None and key != "step"}
    return flat
