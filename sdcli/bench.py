"""STORY: schedulers x steps -> UNet evaluations, time, distance to the solution of the same ODE, Frechet distance."""

from __future__ import annotations

import csv
import hashlib
import io
import statistics
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sdcli import __version__, generate, ledger, plots, schedulers, store
from sdcli.bench_plan import BenchPlan, Cell
from sdcli.errors import NumericalError, UsageError
from sdcli.files import place, read_bytes
from sdcli.pipeline import frechet, sampling, vae
from sdcli.pipeline.bundle import ModelBundle, load_bundle
from sdcli.pipeline.contexts import contexts
from sdcli.pipeline.device import Peak, pick_device, pick_dtype, synchronize
from sdcli.pipeline.measures import Gaussian, RunningGaussian, frechet_distance, psnr
from sdcli.pipeline.noise import alpha_bars
from sdcli.pipeline.reference import NoiseLevels, first_scale, missed
from sdcli.pipeline.solution import Pictures, Reference, solved
from sdcli.scheduler_config import has_zero_terminal_snr, prediction_type, train_timesteps
from sdcli.specs import BenchSpec

COLUMNS = (
    *("scheduler", "steps", "status", "evaluations", "seconds_per_step", "seconds_per_image", "latent_rmse"),
    *("psnr_db", "frechet_distance", "features", "pictures", "data_pictures", "memory_bytes", "memory", "note"),
)
REFERENCE = "reference.safetensors"
# Of the noise that an end at the first timestep instead of sigma 0 would leave; whole strides leave a tenth.
LARGEST_MISS = 0.5
MAX_FEATURES_BYTES = 1 << 30
QUALITY = {"rmse": "latent_rmse", "psnr": "psnr_db", "frechet": "frechet_distance"}
QUALITY_LABELS = {
    "rmse": "RMSE of the latents to the reference",
    "psnr": "PSNR of the pictures to the reference, dB",
    "frechet": "Frechet distance",
}
OVER = {"seconds": "seconds_per_image", "evaluations": "evaluations", "steps": "steps"}
OVER_LABELS = {"seconds": "seconds an image", "evaluations": "evaluations of the UNet", "steps": "steps"}


@dataclass(frozen=True)
class Settings:
    """What all rows share, where they are kept, and how many were there already."""

    facts: dict[str, Any]
    folder: Path
    done: int
    total: int


@dataclass(frozen=True)
class Progress:
    """Where one piece of the work stands."""

    what: str
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
    """A table or a figure was put in place."""

    path: Path


Event = Settings | Progress | Solved | Row | Written


def run(spec: BenchSpec, plan: BenchPlan) -> Iterator[Event]:
    """Measure what the run folder lacks, yielding every row of the table, those that were there included.

    Raises LockedError or InputError when the folder is another's, InputError for a malformed model or picture,
    OutputError when something cannot be written, NumericalError where a scheduler that was named gives NaN.
    """
    device = pick_device(spec.device)
    dtype = pick_dtype(spec.dtype, device)
    data = frechet.pictures(spec.data) if spec.data is not None else []
    identity = _identity(spec, plan, data, device, dtype)
    folder = spec.run if spec.run is not None else Path("runs") / f"bench-{ledger.digest(identity)}"
    rows: list[dict[str, Any]] = []
    with ledger.opened(folder, identity) as book:
        todo = [cell for cell in plan.cells if not cell.problem and cell.key not in book.rows]
        able = [cell for cell in plan.cells if not cell.problem]
        yield Settings(identity, folder, len(able) - len(todo), len(able))
        laboratory = (yield from _laboratory(spec, plan, data, device, dtype, folder, todo)) if todo else None
        for cell in plan.cells:
            if cell.problem:
                row = _row(cell, status="skipped", note=cell.problem)
            elif cell.key in book.rows:
                row = book.rows[cell.key]
            else:
                assert laboratory is not None
                row = yield from _measured(laboratory, cell, must_work=not plan.is_all)
                book.add(cell.key, row)
            rows.append(row)
            yield Row(row)
    yield from _written(spec, rows)


@dataclass(frozen=True)
class Laboratory:
    """Everything that measuring a row needs: the model, the pictures to draw, and what they are compared with."""

    bundle: ModelBundle
    config: dict[str, Any]
    guidance: float
    batches: tuple[Pictures, ...]
    reference: Reference | None  # None where every scheduler draws noise
    targets: tuple[Tensor, ...]  # the reference's pictures, batch by batch: (B, 3, H, W)
    network: frechet.Extractor | None
    data: Gaussian | None
    data_pictures: int


def _laboratory(
    spec: BenchSpec,
    plan: BenchPlan,
    data: Sequence[Path],
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    todo: Sequence[Cell],
) -> Generator[Event, None, Laboratory]:
    network, seen = None, RunningGaussian()
    if data:
        network = frechet.extractor(spec.features, device)
        for done in frechet.look_at_files(network, data, (plan.base.width, plan.base.height), seen):
            yield Progress("looking at the data", done, len(data))
    bundle = load_bundle(plan.base.model.folder, device=device, dtype=dtype)
    batches = _batches(spec, plan, bundle)
    reference = None
    if any(not cell.scheduler.is_stochastic for cell in todo):
        solving = solved(
            bundle,
            batches,
            folder / REFERENCE,
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
    yield from _warmed(laboratory)
    return laboratory


def _told(what: str, work: Generator[tuple[int, int], None, Reference]) -> Generator[Progress, None, Reference]:
    """Long work with its progress under a name."""
    while True:
        try:
            done, total = next(work)
        except StopIteration as end:
            return cast("Reference", end.value)
        yield Progress(what, done, total)


def _batches(spec: BenchSpec, plan: BenchPlan, bundle: ModelBundle) -> tuple[Pictures, ...]:
    """The pictures in the portions in which they are drawn together, each with its contexts and its own seed."""
    null = getattr(bundle.conditioner, "null", "")
    subjects = [
        label if label is not None else (subject if isinstance(null, str) else null)
        for subject, label in zip(plan.subjects, plan.labels, strict=True)
    ]
    conditions = [subject for subject in subjects for _ in range(spec.seeds)]
    size = spec.batch_size
    size = size if size is not None else generate.auto_batch_size(plan.base.width, plan.base.height)
    factor = vae.factor(bundle.vae)
    shape = (int(bundle.unet.config["in_channels"]), plan.base.height // factor, plan.base.width // factor)
    negative = spec.negative if isinstance(null, str) else null
    batches = []
    for first in range(0, len(conditions), size):
        some = conditions[first : first + size]
        context, away = contexts(bundle.conditioner, some, negative if plan.base.guidance > 1 else None)
        seeds = [(spec.seed + first + i) % 2**64 for i in range(len(some))]
        batches.append(Pictures(context, away, tuple(seeds), shape))
    return tuple(batches)


def _warmed(laboratory: Laboratory) -> Iterator[Event]:
    """One evaluation that nobody times: the first of a process pays for kernels and memory."""
    scheduler = schedulers.find("ddim")
    config = laboratory.config | {"prediction_type": "v_prediction"}
    for _ in _drawn(laboratory, laboratory.batches[0], schedulers.create(scheduler, config, 1), 1.0, {}):
        yield Progress("warming up", 1, 1)


def _drawn(
    laboratory: Laboratory, batch: Pictures, scheduler: Any, scale: float, extra: Mapping[str, float]
) -> Iterator[sampling.Step]:
    sources = sampling.generators(batch.seeds)
    noise = sampling.initial_noise(batch.shape, sources)
    yield from sampling.denoise(
        laboratory.bundle.unet,
        scheduler,
        noise * scale,
        batch.context,
        negative=batch.negative,
        guidance=laboratory.guidance,
        sources=sources,
        step_arguments=extra,
    )


def _measured(laboratory: Laboratory, cell: Cell, *, must_work: bool) -> Generator[Event, None, dict[str, Any]]:
    """The row of a cell; a scheduler nobody named that fails gets a row that says so."""
    try:
        return (yield from _measure(laboratory, cell))
    except (UsageError, NumericalError) as error:
        if must_work:
            raise
        return _row(cell, status="failed", note=error.message)


def _measure(laboratory: Laboratory, cell: Cell) -> Generator[Event, None, dict[str, Any]]:
    """Draw every picture with a scheduler; measure the time without VAE and text, then compare."""
    bundle, device = laboratory.bundle, laboratory.bundle.device
    make = partial(schedulers.create, cell.scheduler, laboratory.config, cell.steps, device=str(device))
    scale = first_scale(make())
    note = _why_not_comparable(cell, laboratory.config)
    seconds: list[float] = []
    results: list[Tensor] = []
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = bundle.unet.register_forward_hook(count)
    try:
        with Peak(device) as peak:
            for done, batch in enumerate(laboratory.batches):
                scheduler = make()  # carries history: a fresh one for each batch
                latents = torch.empty(0)
                began = time.perf_counter()
                for step in _drawn(laboratory, batch, scheduler, scale, cell.scheduler.step_arguments):
                    synchronize(device)
                    seconds.append(time.perf_counter() - began)
                    latents = step.latents
                    peak.look()
                    what = f"{cell.label}, {cell.steps} steps"
                    yield Progress(what, done * step.total + step.index, len(laboratory.batches) * step.total)
                    began = time.perf_counter()
                results.append(latents)
    finally:
        hook.remove()
    pictures = sum(len(batch.seeds) for batch in laboratory.batches)
    evaluations = calls // len(laboratory.batches)
    return _row(
        cell,
        status="done",
        note=note,
        evaluations=evaluations,
        seconds_per_step=statistics.median(seconds) * evaluations / cell.steps,
        seconds_per_image=sum(seconds) / pictures,
        pictures=pictures,
        memory_bytes=peak.bytes,
        memory=peak.kind,
        **_compared(laboratory, results, is_comparable=not note),
    )


def _compared(laboratory: Laboratory, results: Sequence[Tensor], *, is_comparable: bool) -> dict[str, Any]:
    """Distances of latents (B, C, h, w), batch by batch, to the reference and, as pictures, to the data."""
    facts: dict[str, Any] = {}
    seen, decibels = RunningGaussian(), []
    needs_pictures = is_comparable or laboratory.network is not None
    for number, latents in enumerate(results if needs_pictures else ()):
        pixels = vae.decode_finite(laboratory.bundle.vae, latents)
        if laboratory.network is not None:
            frechet.look_at_drawn(laboratory.network, pixels, seen)
        if is_comparable:
            decibels.append(psnr(pixels.clamp(-1, 1), laboratory.targets[number].clamp(-1, 1)))
    if is_comparable:
        assert laboratory.reference is not None
        apart = torch.cat([one.cpu().double() for one in results]) - laboratory.reference.latents
        facts |= {"latent_rmse": float(apart.square().mean().sqrt()), "psnr_db": float(torch.cat(decibels).mean())}
    if laboratory.network is not None and laboratory.data is not None:
        facts["frechet_distance"] = frechet_distance(seen.gaussian(), laboratory.data)
        facts |= {"features": laboratory.network.name, "data_pictures": laboratory.data_pictures}
    return facts


def _why_not_comparable(cell: Cell, config: dict[str, Any]) -> str:
    """Why the result of a scheduler is no solution of the reference's problem; empty when it is one."""
    if cell.scheduler.is_stochastic:
        return "draws noise on the way: only its Frechet distance says something"
    kind = "sample" if has_zero_terminal_snr(config) else "epsilon"
    probe: Any = schedulers.create(cell.scheduler, config | {"prediction_type": kind}, cell.steps)
    first, last = float(probe.timesteps[0]), train_timesteps(config) - 1
    if abs(first - last) > 0.5:
        return f"starts at timestep {first:g} of {last}: not the reference's problem"
    left = missed(probe, prediction_type=kind, step_arguments=cell.scheduler.step_arguments)
    if not left <= LARGEST_MISS * NoiseLevels.of(alpha_bars(config)).sigmas[0]:
        return f"starts or ends at another sigma than the reference ({left:.3f} of the noise is left)"
    return ""


def _row(cell: Cell, *, status: str, note: str = "", **facts: Any) -> dict[str, Any]:
    known = {"scheduler": cell.label, "steps": cell.steps, "status": status, "note": note, **facts}
    return {name: known.get(name) for name in COLUMNS}


def _identity(
    spec: BenchSpec, plan: BenchPlan, data: Sequence[Path], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What makes two calls the same run, as plain JSON values. Schedulers and steps are not: they only add rows."""
    features = spec.features
    if data and features != BenchSpec.features:
        features = hashlib.sha256(read_bytes(Path(features), max_bytes=MAX_FEATURES_BYTES)).hexdigest()
    return {
        "kind": "bench",
        "sdcli": __version__,
        "model": plan.base.model.ref,
        "model_hash": store.model_hash(plan.base.model),
        "scheduler_config": plan.config,
        "subjects": list(plan.subjects),
        "negative": spec.negative,
        "seed": spec.seed,
        "seeds": spec.seeds,
        "guidance": plan.base.guidance,
        "width": plan.base.width,
        "height": plan.base.height,
        "batch_size": spec.batch_size,
        "reference_steps": spec.reference_steps,
        "data_hash": _data_hash(spec, data),
        "features": features if data else None,
        "device": str(device) if device.type != "cuda" else torch.cuda.get_device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _data_hash(spec: BenchSpec, data: Sequence[Path]) -> str | None:
    if spec.data is None:
        return None
    digest = hashlib.sha256()
    for path in data:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.relative_to(spec.data).as_posix()} {found}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _written(spec: BenchSpec, rows: Sequence[dict[str, Any]]) -> Iterator[Written]:
    """The table and the figure, where they were asked for; a file that says the same already stays."""
    for path, make in ((spec.csv, partial(_csv, rows)), (spec.plot, partial(_figure, spec, rows))):
        if path is None:
            continue
        content = make()
        is_there = path.is_file() and path.read_bytes() == content
        if is_there or (spec.if_exists == "skip" and path.exists()):
            yield Written(path)
        else:
            yield Written(place(content, path, spec.if_exists))


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode(errors="surrogateescape")


def _figure(spec: BenchSpec, rows: Sequence[dict[str, Any]]) -> bytes:
    """Quality over cost, a curve a scheduler."""
    quality, cost = QUALITY[spec.plot_quality], OVER[spec.plot_over]
    curves = []
    for name in dict.fromkeys(row["scheduler"] for row in rows):
        points = [(r[cost], r[quality]) for r in rows if r["scheduler"] == name and r[quality] is not None]
        if points:
            curves.append(plots.Curve(name, [x for x, _ in sorted(points)], [y for _, y in sorted(points)]))
    # Few values would each be a tick of a logarithmic axis: fine for counts, crowded for seconds.
    is_spread = spec.plot_over != "seconds" or len({x for curve in curves for x in curve.xs}) > plots.MAX_OWN_TICKS
    return plots.line_chart(
        curves,
        title=f"Schedulers on {spec.model or store.BUILTIN}",
        x_label=OVER_LABELS[spec.plot_over],
        y_label=QUALITY_LABELS[spec.plot_quality],
        log_x=is_spread,
        log_y=spec.plot_quality == "rmse",
    )
