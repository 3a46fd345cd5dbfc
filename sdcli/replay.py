"""STORY: pictures -> what each says about its making -> the same pictures again, or how far they are from those."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdcli import generate
from sdcli.archive import comparing, hearing
from sdcli.archive.asking import ask, form, model_remarks, prediction_drift
from sdcli.archive.comparing import Comparison
from sdcli.archive.foreign import Remark
from sdcli.archive.reading import MAX_FILE_BYTES, said_in
from sdcli.archive.specs import ReplaySpec
from sdcli.errors import (
    InputError,
    NumericalError,
    PartialError,
    ResourceError,
    SdcliError,
    UsageError,
    is_out_of_memory,
    out_of_memory,
)
from sdcli.files import exists, read_bytes
from sdcli.inputs import check_apart, files_of
from sdcli.pipeline import images
from sdcli.pipeline.bundle import ModelBundle, load_bundle
from sdcli.pipeline.metadata import read_record
from sdcli.pipeline.offload import is_at_hand
from sdcli.pipeline.provenance import Provenance
from sdcli.plan import Plan, plan
from sdcli.plan.naming import SUFFIXES, check_targets, is_output_folder, picture_format
from sdcli.specs import GenerateSpec

UNEXPLAINED = "nothing told differs: it was changed, or drawn on another device, by another torch, or in a batch"


@dataclass(frozen=True)
class Progress:
    """Where the denoising of all pictures stands, in steps."""

    done: int
    total: int


@dataclass(frozen=True)
class Unheeded:
    """Something that a picture says and that is not honoured."""

    source: Path
    remark: Remark


@dataclass(frozen=True)
class Replayed:
    """A picture drawn again. path: where it is, None where it is nowhere, with its bytes in `data` if stdout takes it.

    comparison: with the picture there was; drift: what may be why they differ. None and nothing unless asked for.
    """

    source: Path
    facts: dict[str, Any]
    path: Path | None = None
    data: bytes | None = None
    comparison: Comparison | None = None
    drift: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """A picture that cannot be drawn again, and why."""

    source: Path
    error: SdcliError


Event = Progress | Unheeded | Replayed | Failed


@dataclass(frozen=True)
class _Drawn:
    image: Image.Image
    facts: dict[str, Any]


def run(spec: ReplaySpec) -> Iterator[Event]:
    """Draw every picture again from what it says about itself; what goes wrong with one leaves the others alone.

    Raises UsageError and OutputError before the first; what is wrong with the one picture there is; PartialError at the
    end when one of several could not be drawn, or with `check` differs by more than 2/255.
    """
    sources = files_of(spec.inputs, frozenset(SUFFIXES), opened=False)
    targets = _targets(spec, sources)
    models = _Models()
    failed = differ = 0
    for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if target is not None and spec.if_exists == "skip" and str(target) != "-" and exists(target):
            yield Replayed(source, {"path": str(target), "source": str(source), "skipped": True}, target)
            continue
        try:
            for event in _replayed(spec, source, target, models):
                if isinstance(event, Progress):
                    share = event.total
                    event = Progress(number * share + event.done, len(sources) * share)
                if isinstance(event, Replayed) and event.comparison is not None:
                    differ += not event.comparison.is_within
                yield event
        except (InputError, UsageError, NumericalError, ResourceError, MemoryError, RuntimeError) as error:
            known = error if isinstance(error, SdcliError) else out_of_memory(str(source), "use --size")
            if len(sources) == 1 or not (known is error or is_out_of_memory(error)):
                raise
            failed += 1
            yield Failed(source, known)
    if failed or differ:
        raise _end(len(sources), failed, differ)


def _end(total: int, failed: int, differ: int) -> PartialError:
    parts = [f"{failed} could not be drawn again"] if failed else []
    if differ:
        parts.append(f"{differ} differ{'s' if differ == 1 else ''} by more than {comparing.TOLERANCE}/255")
    hint = "the drift named may be why" if differ else "what is missing may be named with options"
    return PartialError(f"of {total} picture{'s' if total > 1 else ''} {' and '.join(parts)}", hint)


def _replayed(spec: ReplaySpec, source: Path, target: Path | None, models: _Models) -> Iterator[Event]:
    """One picture. Raises InputError for what it says, or UsageError where an option may be to blame."""
    data = read_bytes(source, max_bytes=MAX_FILE_BYTES)
    said = said_in(data, source)
    there = images.read_image(io.BytesIO(data), source) if spec.check else None
    try:
        asked = ask(spec, said, source, target)
        decided = plan(asked.spec)
        decided = replace(decided, model=replace(decided.model, ref=asked.model))
    except UsageError as error:
        if spec.says_something:
            raise UsageError(f"{source}: {error.message}", error.hint) from error
        raise InputError(f"{source}: {error.message.removeprefix('--')}", error.hint) from error
    remarks = [*asked.remarks, *model_remarks(spec, said, decided.model, source)]
    for remark in remarks:
        yield Unheeded(source, remark)
    drawn = None
    for event in _draw(asked.spec, decided, models):
        if isinstance(event, _Drawn):
            drawn = event
        else:
            yield event
    assert drawn is not None
    before = (read_record(source) if hearing.is_own(said) else None) or {}
    record = _record(drawn.facts, before)
    path, facts, extra = None, drawn.facts, None
    if target is not None:
        written = generate.write(drawn.image, record, target, asked.spec)
        path, facts, extra = written.path, dict(written.facts), written.data
    unheeded = [remark.text for remark in remarks]
    if there is None:
        told = {"unheeded": unheeded} if unheeded else {}
        yield Replayed(source, {**facts, "source": str(source), **told}, path, extra)
        return
    record |= {name: before[name] for name in ("job", "id") if name in before}  # as a batch says of its own
    known = unheeded + prediction_drift(spec, asked.spec, decided.model)
    verdict = _compared(data, there, drawn.image, said, source, record, known)
    yield replace(verdict, facts={**({"path": str(path)} if path is not None else {}), **verdict.facts}, path=path)


class _Models:
    """The models of the pictures, of which the last one stays loaded."""

    def __init__(self) -> None:
        self._name: object = None
        self._bundle: ModelBundle | None = None

    def load(self, folder: Path, *, device: torch.device, dtype: torch.dtype, is_lean: bool) -> ModelBundle:
        """The weights in a folder, read unless they are those at hand."""
        name = (folder, device, dtype, is_lean)
        if self._bundle is None or self._name != name or not is_at_hand(self._bundle):
            self._bundle = None  # before the next is there: memory is for one
            self._bundle = load_bundle(folder, device=device, dtype=dtype, is_lean=is_lean)
            self._name = name
        return self._bundle


def _draw(spec: GenerateSpec, decided: Plan, models: _Models) -> Iterator[Progress | _Drawn]:
    """The one picture of a plan and its record, without loss and written nowhere. Errors as `generate.run`."""
    nowhere = replace(spec, output=Path("-"), format="png", quality=None, no_metadata=True)
    for event in generate.run(nowhere, replace(decided, targets=(nowhere.output,)), models.load):
        if isinstance(event, generate.Progress):
            yield Progress(event.done, event.total)
        elif event.data is not None:
            facts = {name: value for name, value in event.facts.items() if name != "path"}
            yield _Drawn(Image.open(io.BytesIO(event.data)).convert("RGB"), facts)


def _record(drawn: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture drawn again says, in the order in which it said so before, so that equal records are equal bytes.

    Drawn is what the wildcards of the prompts had given; what they were is kept with it.
    """
    templates = {f"{name}_template": name for name in ("prompt", "negative")}
    kept = {one: before[one] for one, of in templates.items() if one in before and before.get(of) == drawn.get(of)}
    record = {**drawn, **kept}
    return {**{name: record[name] for name in before if name in record}, **record}


def _compared(
    data: bytes,
    there: Image.Image,
    drawn: Image.Image,
    said: Provenance,
    source: Path,
    record: Mapping[str, Any],
    known: list[str],
) -> Replayed:
    """The verdict on one picture; record: what the one drawn again would say, known: drift that it does not show."""
    is_own = hearing.is_own(said)
    comparison = comparing.compare(data, there, drawn, record if is_own else None)
    drift = known + comparing.drift(said.facts, record, is_own=is_own)
    if comparison.largest is None:
        drift.append(f"size: {there.width} x {there.height} px there, {drawn.width} x {drawn.height} here")
    if comparison.equal is None and not drift:
        drift.append(UNEXPLAINED)
    facts = {"source": str(source), "program": said.source, **comparison.facts(), "drift": drift}
    return Replayed(source, facts, comparison=comparison, drift=tuple(drift))


def _targets(spec: ReplaySpec, sources: list[Path]) -> list[Path] | list[None]:
    """Where each picture goes: the file named, or under the name that it has in the folder named.

    Raises UsageError when that is no place for them all, OutputError when it cannot be written.
    """
    if spec.output is None and spec.check:
        return [None] * len(sources)
    output = spec.output if spec.output is not None else Path()
    many = is_output_folder(output) and str(output) != "-"
    if not many and len(sources) > 1:
        raise UsageError(f"--output {output}: is one file for {len(sources)} results", "name a folder")
    if str(output) == "-":
        return [output]
    if not many:
        picture_format(output, spec.format)
    targets = [output / f"{one.stem}.{form(spec, one)}" for one in sources] if many else [output]
    check_apart(targets, spec.if_exists)
    check_targets(targets, spec.if_exists)
    return targets
