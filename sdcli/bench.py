"""STORY: schedulers x steps -> UNet evaluations, time, distance to the solution of the same ODE, Frechet distance."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from sdcli import __version__, drawing, ledger, store
from sdcli.errors import InputError, SdcliWarning, UsageError
from sdcli.files import place, sha256
from sdcli.lab.plan import BenchPlan, Cell
from sdcli.lab.row import Laboratory, is_compared, measured, row_of, warmed
from sdcli.lab.row import Progress as Progress  # one of the events
from sdcli.lab.specs import BenchSpec
from sdcli.lab.table import COLUMNS, DONE, csv_bytes, figure
from sdcli.pipeline import frechet, offload, prompt, solution, text, vae
from sdcli.pipeline.bundle import ModelBundle, load_bundle
from sdcli.pipeline.classes import ClassEmbedder
from sdcli.pipeline.compiling import check_compiler
from sdcli.pipeline.contexts import contexts, lengths
from sdcli.pipeline.device import pick_device, pick_dtype
from sdcli.pipeline.measures import RunningGaussian
from sdcli.pipeline.noise import alpha_bars
from sdcli.pipeline.reference import NoiseLevels
from sdcli.pipeline.solution import Pictures, solved
from sdcli.plan.lora_files import lora_facts
from sdcli.plan.words import warn_of_networks
from sdcli.schedulers.config import prediction_type

REFERENCE = "reference.safetensors"
MAX_FEATURES_BYTES = 1 << 30


@dataclass(frozen=True)
class Settings:
    """What all rows share, where they are kept, and how many were there already."""

    facts: dict[str, Any]
    folder: Path
    done: int
    total: int


@dataclass(frozen=True)
class Solved:
    """The reference solution is there: how it was computed, and its own error."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of the table: the facts by COLUMNS."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class Written:
    """A table or a figure was put in place, or is there and stays, as it says the same or as --if-exists skip asks."""

    path: Path
    is_skipped: bool = False


@dataclass(frozen=True)
class Kept:
    """Where a run keeps its reference, and the hash of the problem that it solves."""

    path: Path
    problem: str


Outcome = TypeVar("Outcome")
Event = Settings | Progress | Solved | Row | Written


def run(spec: BenchSpec, plan: BenchPlan) -> Iterator[Event]:
    """Measure what the run folder lacks, yielding every row of the table, those that were there included.

    Raises LockedError or InputError when the folder is another's, InputError for a malformed model or picture,
    OutputError when something cannot be written, NumericalError where a scheduler that was named gives NaN.
    """
    device = pick_device(spec.device)
    if spec.compile:
        check_compiler(device)
    dtype = pick_dtype(spec.dtype, device)
    data = frechet.pictures(spec.data) if spec.data is not None else []
    _check(spec, plan)
    data_hash = None
    if spec.data is not None:
        data_hash = yield from _told("reading the data", frechet.checked(spec.data, data))
    identity = _identity(spec, plan, data_hash, device, dtype)
    folder = spec.run if spec.run is not None else Path("runs") / f"bench-{ledger.digest(identity)}"
    rows: list[dict[str, Any]] = []
    with ledger.opened(folder, identity, COLUMNS) as book:
        able = [cell for cell in plan.cells if not cell.problem]
        todo = [cell for cell in able if not _is_done(cell, book.rows)]
        yield Settings(identity, folder, len(able) - len(todo), len(able))
        place = Kept(folder / REFERENCE, ledger.digest(identity))
        laboratory = None
        if todo:
            laboratory = yield from _laboratory(spec, plan, data, device, dtype, place, todo)
        if laboratory is None or laboratory.reference is None:
            yield from _known(place, able)
        for cell in plan.cells:
            if cell.problem:
                row = row_of(cell, status="skipped", note=cell.problem)
            elif _is_done(cell, book.rows):
                row = book.rows[cell.key]
            else:
                assert laboratory is not None
                row = yield from measured(laboratory, cell, must_work=not plan.is_all)
                if row["status"] == DONE:  # what failed is tried again
                    book.add(cell.key, row)
            rows.append(row)
            yield Row(row)
    yield from _written(spec, rows)


def _check(spec: BenchSpec, plan: BenchPlan) -> None:
    """Refuse a noise schedule that has no solution to compare with, and a figure that would be empty."""
    levels = NoiseLevels.of(alpha_bars(plan.config))
    if not levels.is_finite and prediction_type(plan.config) == "epsilon":
        what = f"{plan.base.model.ref}: predicts epsilon at a timestep that holds nothing but noise"
        raise InputError(what, "there is no solution to compare with; choose smaller betas")
    if spec.plot is None or spec.plot_quality == "frechet":
        return
    if not any(is_compared(cell, plan.config) for cell in plan.cells if not cell.problem):
        what = f"--plot {spec.plot}: none of these rows will have a distance to the reference"
        raise UsageError(what, "compare dpm or ddim, too, or give --data and --plot-quality frechet")


def _is_done(cell: Cell, rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether there is a row of this cell, and it was measured."""
    row = rows.get(cell.key)
    return row is not None and (row["scheduler"], row["steps"], row["status"]) == (cell.label, cell.steps, DONE)


def _known(place: Kept, cells: Sequence[Cell]) -> Iterator[Solved]:
    """What the rows that are there were compared with, if anything."""
    has_reference = not all(cell.scheduler.is_stochastic for cell in cells)
    known = solution.read(place.path, place.problem) if has_reference else None
    if known is not None:
        yield Solved(asdict(known.facts))


def _laboratory(
    spec: BenchSpec,
    plan: BenchPlan,
    data: Sequence[Path],
    device: torch.device,
    dtype: torch.dtype,
    place: Kept,
    todo: Sequence[Cell],
) -> Generator[Event, None, Laboratory]:
    network, seen = None, RunningGaussian()
    if data:
        network = frechet.extractor(spec.features, device)
        for done in frechet.look_at_files(network, data, (plan.base.width, plan.base.height), seen):
            yield Progress("looking at the data", done, len(data))
    folder = plan.base.model.folder
    words, adapters = drawing.read_words(plan.base), drawing.read_adapters(plan.base.loras, folder)
    loaded = load_bundle(folder, device=offload.home(device, spec.offload), dtype=dtype, is_lean=not spec.compile)
    bundle = drawing.equipped(replace(loaded, device=device), words, adapters)
    bundle = drawing.prepared(bundle, how_offloaded=spec.offload, is_compiled=spec.compile)
    _warn_of_unnamed(spec, plan, words, bundle)
    batches = _batches(spec, plan, bundle)
    reference = None
    if any(not cell.scheduler.is_stochastic for cell in todo):
        solving = solved(
            bundle,
            batches,
            place.path,
            problem=place.problem,
            prediction_type=prediction_type(plan.config),
            guidance=plan.base.guidance,
            steps=spec.reference_steps,
        )
        reference = yield from _told("solving the ODE", solving)
        yield Solved(asdict(reference.facts))
    latents = reference.latents.split([len(batch.seeds) for batch in batches]) if reference is not None else ()
    laboratory = Laboratory(
        bundle=bundle,
        config=plan.config,
        guidance=plan.base.guidance,
        batches=batches,
        reference=reference,
        targets=tuple(vae.decode_finite(bundle.vae, one.float()) for one in latents),
        network=network,
        data=seen.gaussian() if data else None,
        data_pictures=seen.count,
    )
    yield from warmed(laboratory)
    return laboratory


def _warn_of_unnamed(spec: BenchSpec, plan: BenchPlan, words: drawing.Words, bundle: ModelBundle) -> None:
    """Warn of each learned word that no prompt has: it was given, and changes nothing."""
    if isinstance(bundle.conditioner, ClassEmbedder):
        return
    said = (*plan.subjects, *([spec.negative] if plan.base.guidance > 1 else []))
    for file, embedding in zip(plan.base.embeddings, words.embeddings, strict=True):
        if not any(text.names(bundle.conditioner, one, embedding.token) for one in said):
            note = f"--embedding {file.path}: no prompt names its token {embedding.token}, so it changes nothing"
            warnings.warn(note, SdcliWarning, stacklevel=2)


def _told(what: str, work: Generator[tuple[int, int], None, Outcome]) -> Generator[Progress, None, Outcome]:
    """Long work with its progress under a name."""
    while True:
        try:
            done, total = next(work)
        except StopIteration as end:
            return cast("Outcome", end.value)
        yield Progress(what, done, total)


def _batches(spec: BenchSpec, plan: BenchPlan, bundle: ModelBundle) -> tuple[Pictures, ...]:
    """The pictures in the portions in which they are drawn together, each with its contexts and its own seed."""
    null = getattr(bundle.conditioner, "null", "")
    subjects = [
        label if label is not None else (subject if isinstance(null, str) else null)
        for subject, label in zip(plan.subjects, plan.labels, strict=True)
    ]
    conditions = [subject for subject in subjects for _ in range(spec.seeds)]
    width, height = plan.base.width, plan.base.height
    size = spec.batch_size if spec.batch_size is not None else drawing.auto_batch_size(width, height)
    factor = vae.factor(bundle.vae)
    shape = (int(bundle.unet.config["in_channels"]), height // factor, width // factor)
    negative = spec.negative if isinstance(null, str) else null
    away_from = negative if plan.base.guidance > 1 else None
    if isinstance(null, str):
        warn_of_networks(prompt.networks(*plan.subjects, spec.negative))
    batches = []
    for alike in _alike(lengths(bundle.conditioner, conditions, away_from)):
        for places in (alike[i : i + size] for i in range(0, len(alike), size)):
            context, away = contexts(bundle.conditioner, [conditions[i] for i in places], away_from)
            seeds = tuple((spec.seed + i) % 2**64 for i in places)
            away = away.of_size(width, height) if away is not None else None
            batches.append(Pictures(context.of_size(width, height), away, seeds, shape))
    return tuple(batches)


def _alike(values: Sequence[int]) -> Iterator[range]:
    """The places of equal values that follow each other."""
    first = 0
    for _, run_of_them in groupby(values):
        count = len(list(run_of_them))
        yield range(first, first + count)
        first += count


def _identity(
    spec: BenchSpec, plan: BenchPlan, data_hash: str | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What makes two calls the same run, as plain JSON values. Schedulers and steps are not: they only add rows."""
    features, embeddings = spec.features, plan.base.embeddings
    if data_hash is not None and features != BenchSpec.features:
        features = sha256(Path(features), max_bytes=MAX_FEATURES_BYTES)
    return {
        "kind": "bench",
        "sdcli": __version__,
        "model": plan.base.model.ref,
        "model_hash": store.model_hash(plan.base.model),
        "scheduler_config": plan.config,
        "subjects": list(plan.subjects),
        "negative": spec.negative,
        **({"loras": lora_facts(plan.base.loras)} if plan.base.loras else {}),
        **({"embeddings": [[store.file_hash(one.path), one.token] for one in embeddings]} if embeddings else {}),
        "seed": spec.seed,
        "seeds": spec.seeds,
        "guidance": plan.base.guidance,
        "width": plan.base.width,
        "height": plan.base.height,
        "batch_size": spec.batch_size,
        "reference_steps": spec.reference_steps,
        "data_hash": data_hash,
        "features": features if data_hash is not None else None,
        "device": str(device) if device.type != "cuda" else torch.cuda.get_device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        **({"offload": spec.offload} if spec.offload != BenchSpec.offload else {}),
        **({"compile": True} if spec.compile else {}),
        "threads": torch.get_num_threads(),
    }


def _written(spec: BenchSpec, rows: Sequence[dict[str, Any]]) -> Iterator[Written]:
    """The table and the figure, where they were asked for; a file that says the same already stays."""
    title = f"Schedulers on {spec.model if spec.model is not None else store.BUILTIN}"
    for path, make in (
        (spec.csv, partial(csv_bytes, rows)),
        (spec.plot, partial(figure, rows, title=title, quality=spec.plot_quality, over=spec.plot_over)),
    ):
        if path is None:
            continue
        content = make()
        is_there = path.is_file() and path.read_bytes() == content
        if is_there or (spec.if_exists == "skip" and path.exists()):
            yield Written(path, is_skipped=not is_there)
        else:
            yield Written(place(content, path, spec.if_exists))
