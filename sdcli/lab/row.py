"""One row of `sdcli bench`: every picture drawn with one scheduler in so many steps, timed, and compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdcli import schedulers
from sdcli.errors import NumericalError, UsageError
from sdcli.lab.plan import Cell
from sdcli.lab.table import COLUMNS, DONE
from sdcli.pipeline import frechet, sampling, vae
from sdcli.pipeline.bundle import ModelBundle
from sdcli.pipeline.device import Peak, synchronize
from sdcli.pipeline.measures import Gaussian, RunningGaussian, frechet_distance, psnr
from sdcli.pipeline.noise import alpha_bars
from sdcli.pipeline.reference import NoiseLevels, first_scale, missed
from sdcli.pipeline.solution import Pictures, Reference
from sdcli.schedulers.config import has_zero_terminal_snr, train_timesteps

# Of the noise that an end at the first timestep instead of sigma 0 would leave; whole strides leave a tenth.
LARGEST_MISS = 0.5


@dataclass(frozen=True)
class Progress:
    """Where one piece of the work stands."""

    what: str
    done: int
    total: int


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


def measured(laboratory: Laboratory, cell: Cell, *, must_work: bool) -> Generator[Progress, None, dict[str, Any]]:
    """The row of a cell; a scheduler nobody named that fails gets a row that says so."""
    try:
        return (yield from _measure(laboratory, cell))
    except (UsageError, NumericalError) as error:
        if must_work:
            raise
        return row_of(cell, status="failed", note=error.message)


def row_of(cell: Cell, *, status: str, note: str = "", **facts: Any) -> dict[str, Any]:
    """A row by COLUMNS; what is not given was not measured."""
    known = {"scheduler": cell.label, "steps": cell.steps, "status": status, "note": note, **facts}
    return {name: known.get(name) for name in COLUMNS}


def warmed(laboratory: Laboratory) -> Iterator[Progress]:
    """One evaluation that nobody times: the first of a process pays for kernels and memory."""
    scheduler = schedulers.find("ddim")
    config = laboratory.config | {"prediction_type": "v_prediction"}
    for _ in _drawn(laboratory, laboratory.batches[0], schedulers.create(scheduler, config, 1), 1.0, {}):
        yield Progress("warming up", 1, 1)


def _measure(laboratory: Laboratory, cell: Cell) -> Generator[Progress, None, dict[str, Any]]:
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
    return row_of(
        cell,
        status=DONE,
        note=note,
        evaluations=evaluations,
        seconds_per_step=statistics.median(seconds) * evaluations / cell.steps,
        seconds_per_image=sum(seconds) / pictures,
        pictures=pictures,
        memory_bytes=peak.bytes,
        memory=peak.kind if peak.bytes is not None else None,
        **_compared(laboratory, results, is_comparable=not note),
    )


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
        facts |= {"features": laboratory.network.name, "feature_dimensions": len(laboratory.data.mean)}
        facts |= {"data_pictures": laboratory.data_pictures}
    return facts


def is_compared(cell: Cell, config: dict[str, Any]) -> bool:
    """Whether a row of this cell will have a distance to the reference."""
    try:
        return not _why_not_comparable(cell, config)
    except UsageError:
        return False


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
