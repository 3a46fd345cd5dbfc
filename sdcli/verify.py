"""STORY: a model -> what is wrong with it, part by part; nothing is drawn."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdcli import layout, store
from sdcli.errors import SdcliError
from sdcli.original.checkpoint import PART_NAMES, Checkpoint
from sdcli.pipeline.bundle import build_part
from sdcli.pipeline.vocabulary import load_vocabulary
from sdcli.pipeline.weights import State, check_shapes, is_finite, read_state, read_tensors, shapes
from sdcli.plan.parts import parts_shape
from sdcli.schedulers.config import check_config

NAMES_SHOWN, MAX_SHOWN = 5, 100  # of tensors, and characters of a name
BLOB = re.compile(r"[0-9a-f]{64}")  # what the Hub's cache calls a weight file: its SHA-256


@dataclass(frozen=True)
class Report:
    """What was looked at and found of one part of a model, of all of them together, or of one file."""

    what: str
    facts: dict[str, Any]
    faults: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()  # faults, too: tensors that hold NaN or Inf

    @property
    def words(self) -> str:
        """What is wrong, or that nothing is."""
        return "; ".join((*self.faults, *self.not_finite)) or "sound"

    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {"what": self.what, **self.facts, "faults": [*self.faults, *self.not_finite]}


def run(model: store.Model) -> Iterator[Report]:
    """Look at every tensor of a model, and at whether its parts fit together; a fault is no error here, but told.

    Raises InputError for what is no model that we read.
    """
    checkpoint = layout.single_file(model.folder)
    there = layout.parts(model.folder) if checkpoint is None else tuple(checkpoint.sources)
    for part in there:
        yield _part(model.folder, part)
    if checkpoint is not None:
        yield from _rest(checkpoint)
    if checkpoint is not None and not checkpoint.is_supported:
        yield Report("model", {}, (f"is a {checkpoint.family}, which is not read",))
    elif checkpoint is not None and checkpoint.lacks:
        yield Report("model", {"lacks": ", ".join(PART_NAMES[part] for part in checkpoint.lacks)})
    else:
        yield _whole(model.folder)
    files = store.files(model)
    for path, digest in store.hashes(files):
        yield Report(path.name, {"path": str(path), "sha256": digest}, tuple(_named_otherwise(path, digest)))


def _part(place: Path, part: str) -> Report:
    facts: dict[str, Any] = {}
    try:
        state = read_state(place, part)
        facts = _facts(state)
        check_shapes(place, part, shapes(build_part(place, part).state_dict()), shapes(state))
    except SdcliError as error:
        return Report(part, facts, (error.message,))
    faults = [f"{key} is of type {value.dtype}" for key, value in state.items() if not value.is_floating_point()]
    empty = [key for key, value in state.items() if value.dim() > 1 and not value.any()]
    facts |= {"all_zero": empty[:NAMES_SHOWN]} if empty else {}
    return Report(part, facts, tuple(faults), tuple(_not_finite(state.items())))


def _rest(checkpoint: Checkpoint) -> Iterator[Report]:
    """The numbers of what no part of a single file's model is made of, averages of training among it."""
    names = checkpoint.rest
    if not names:
        return
    facts: dict[str, Any] = {"tensors": len(names)}
    if checkpoint.strangers:
        facts["unused"] = [name[:MAX_SHOWN] for name in checkpoint.strangers[:NAMES_SHOWN]]
    try:
        yield Report("the rest", facts, (), tuple(_not_finite(read_tensors(checkpoint.path, names))))
    except SdcliError as error:
        yield Report("the rest", facts, (error.message,))


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    for key, value in tensors:
        if value.is_floating_point() and not is_finite(value):
            yield f"{key[:MAX_SHOWN]} holds NaN or Inf"


def _facts(state: State) -> dict[str, Any]:
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    return {"tensors": len(state), "parameters": sum(value.numel() for value in state.values()), "dtypes": dtypes}


def _whole(place: Path) -> Report:
    """Whether the parts fit together: channels, widths, tokenizer, scheduler."""
    try:
        scheduler = layout.config(place, "scheduler")
        check_config(scheduler)
        factor, side = parts_shape(place, scheduler, may_read_mask=True)
        if layout.conditioner(place) == "text_encoder":
            load_vocabulary(place)
    except SdcliError as error:
        return Report("model", {}, (error.message,))
    return Report("model", {"vae_factor": factor, "size": f"{side}x{side}"})


def _named_otherwise(path: Path, digest: str) -> Iterator[str]:
    """A fault of a file in the Hub's cache whose content is not what its name says."""
    name = path.readlink().name if path.is_symlink() else path.name
    if BLOB.fullmatch(name) and name != digest:
        yield f"{path.name} is damaged: its SHA-256 is not the one it was fetched by"
