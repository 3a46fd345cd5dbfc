"""The reference solution of pictures under a model: the UNet in float64 where the device can, and kept in a file."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sdcli.errors import NumericalError, SdcliWarning
from sdcli.files import atomic_write, open_regular
from sdcli.layout import with_sorted_header
from sdcli.pipeline import sampling
from sdcli.pipeline.bundle import ModelBundle
from sdcli.pipeline.context import Context, joined
from sdcli.pipeline.device import unhooked
from sdcli.pipeline.noise import alpha_bars
from sdcli.pipeline.reference import NoiseLevels, Predict, solve

NO_FLOAT64 = ("mps",)  # kinds of devices
KEY = "latents"
PROBLEM, HASH = "problem", "sha256"  # metadata: which reference it is, and of the values


@dataclass(frozen=True)
class Pictures:
    """What is drawn together: the context of B pictures, that to be led away from or None, and a seed each."""

    context: Context
    negative: Context | None
    seeds: tuple[int, ...]
    shape: tuple[int, int, int]  # (C, h, w) of one


@dataclass(frozen=True)
class Facts:
    """How a reference was computed. error: RMSE of its latents to the solution in half as many steps."""

    steps: int
    evaluations: int
    dtype: str
    error: float
    seconds: float


@dataclass(frozen=True)
class Reference:
    """The solution: latents (all pictures, C, h, w) float64 on the CPU."""

    latents: Tensor
    facts: Facts


def solved(
    bundle: ModelBundle,
    batches: Sequence[Pictures],
    path: Path,
    *,
    problem: str,
    prediction_type: str,
    guidance: float,
    steps: int,
) -> Generator[tuple[int, int], None, Reference]:
    """The reference of all pictures: that of the file, else computed and put there. Yields steps done and in all.

    problem: the hash of all that the solution depends on; a file of another problem or of other steps is replaced.
    It is integrated twice, in `steps` and in half as many steps: their difference bounds what distances to it mean.
    Raises NumericalError when the model gives values that are not finite.
    """
    shape = (sum(len(batch.seeds) for batch in batches), *batches[0].shape)
    kept = read(path, problem)
    if kept is not None and kept.facts.steps == steps and tuple(kept.latents.shape) == shape:
        return kept
    began = time.perf_counter()
    dtype = torch.float32 if bundle.device.type in NO_FLOAT64 else torch.float64
    # diffusers' own `to` warns of every other dtype
    unet = torch.nn.Module.to(unhooked(bundle.unet), bundle.device, dtype)
    levels = NoiseLevels.of(alpha_bars(bundle.scheduler_config))
    half = steps // 2
    total, before = (steps + half) * len(batches), 0
    results: list[list[Tensor]] = []
    for count in (half, steps):
        results.append([])
        for batch in batches:
            predict = _predict(unet, batch, guidance, dtype)
            noise = sampling.initial_noise(batch.shape, sampling.generators(batch.seeds))
            x = noise
            for stage in solve(predict, noise, levels, prediction_type=prediction_type, steps=count):
                x = stage.latents
                yield before + stage.index, total
            before += count
            results[-1].append(x)
    coarse, fine = (torch.cat(parts) for parts in results)
    if not fine.isfinite().all():
        raise NumericalError("the reference solution is not finite", "check the weights of this model")
    error = float((fine - coarse).square().mean().sqrt())
    seconds = time.perf_counter() - began
    facts = Facts(steps, 2 * steps - 1, str(dtype).removeprefix("torch."), error, round(seconds, 3))
    reference = Reference(fine, facts)
    _write(path, reference, problem)
    return reference


def read(path: Path, problem: str) -> Reference | None:
    """The solution of this problem that a file keeps; None when there is none, with a warning where it is damaged."""
    if not path.exists():
        return None
    open_regular(path).close()
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            if told.get(PROBLEM) != problem:
                return None
            latents = file.get_tensor(KEY)
        facts = Facts(
            int(told["steps"]), int(told["evaluations"]), told["dtype"], float(told["error"]), float(told["seconds"])
        )
        if told[HASH] != _hash(latents):
            raise ValueError("its values are not those that were written")
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        warnings.warn(f"{path}: is damaged and left aside ({error})", SdcliWarning, stacklevel=2)
        return None
    return Reference(latents, facts)


def _predict(unet: torch.nn.Module, batch: Pictures, guidance: float, dtype: torch.dtype) -> Predict:
    """The model's answer, guided as samplers are."""
    context = batch.context if batch.negative is None else joined([batch.negative, batch.context])
    context = context.to(dtype)

    def predict(x: Tensor, t: float) -> Tensor:
        shown = x.to(dtype).to(context.hidden.device)
        answer = sampling.guided_prediction(unet, shown, torch.tensor(t), context, guidance=guidance)  # type: ignore[arg-type]
        return answer[:, : x.shape[1]].cpu().double()

    return predict


def _write(path: Path, reference: Reference, problem: str) -> None:
    facts = asdict(reference.facts).items()
    metadata = {name: repr(value) if isinstance(value, float) else str(value) for name, value in facts}
    metadata |= {PROBLEM: problem, HASH: _hash(reference.latents)}
    with atomic_write(path) as part:
        part.write_bytes(with_sorted_header(save({KEY: reference.latents.contiguous()}, metadata)))


def _hash(latents: Tensor) -> str:
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()
