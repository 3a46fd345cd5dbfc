"""Five steps of every trainer in float64, by one process or by two: what both must agree on.

As a script it is one of the processes; `accelerate` reads their number and rank from the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from torch import Tensor, nn

from sdcli.pipeline import features
from sdcli.train_specs import TrainEmbeddingSpec, TrainSpec, TrainUnetSpec, TrainVaeSpec
from sdcli.training import caches, data, embedding, parts, sharding, start, unet
from sdcli.training.denoising import DenoisingTask
from sdcli.training.order import Order
from sdcli.training.state import Batch, State
from sdcli.training.vae import VaeTask

Made = tuple[DenoisingTask | VaeTask, TrainSpec]

SHARDED_KIND = "sharded unet"  # the last: its processes cannot go back
CLASSES = "classes"  # beside the folder of the pictures: one folder a class
CPU, SIZE = torch.device("cpu"), (16, 16)
WHOLE_BATCH, STEPS = 8, 5


def vae_task(pictures: Path, model: Path, work: Path, accelerator: Accelerator, **settings: Any) -> Made:
    spec = TrainVaeSpec(
        data=pictures, init="tiny", device="cpu", lr=1e-3, disc_start=1, disc_layers=1, disc_width=16, **settings
    )
    part = parts.vae(spec, CPU)
    network = features.perceptual("builtin")
    return VaeTask(part.model, spec, data.find(pictures), 16, network, accelerator), spec


def vq_task(pictures: Path, model: Path, work: Path, accelerator: Accelerator, **settings: Any) -> Made:
    return vae_task(pictures, model, work, accelerator, regularizer="vq", codebook_size=16, **settings)


def unet_task(pictures: Path, model: Path, work: Path, accelerator: Accelerator, **settings: Any) -> Made:
    usual = {"model": str(model), "device": "cpu", "lr": 1e-3, "train_text_encoder": True, "loss": "min-snr"}
    return _unet(TrainUnetSpec(data=pictures, **(usual | settings)), work, accelerator)


def lora_task(pictures: Path, model: Path, work: Path, accelerator: Accelerator, **settings: Any) -> Made:
    return unet_task(pictures, model, work, accelerator, lora_rank=2, **settings)


def hybrid_task(pictures: Path, model: Path, work: Path, accelerator: Accelerator, **settings: Any) -> Made:
    return unet_task(pictures, model, work, accelerator, loss="hybrid", **settings)


def classes_task(pictures: Path, model: Path, work: Path, accelerator: Accelerator, **settings: Any) -> Made:
    fresh: Any = {"init": "tiny", "vae": str(model), "condition": "class", "device": "cpu", "lr": 1e-3}
    return _unet(TrainUnetSpec(data=pictures.with_name(CLASSES), **(fresh | settings)), work, accelerator)


def embedding_task(pictures: Path, model: Path, work: Path, accelerator: Accelerator, **settings: Any) -> Made:
    spec = TrainEmbeddingSpec(
        data=pictures, model=str(model), device="cpu", token="<x>", init_token="disc", vectors=2, **settings
    )
    dataset = embedding._named(data.find(pictures), spec)
    whole, _, condition = embedding.prepare(spec, parts.model_as_it_is(spec, CPU))
    return _denoising(spec, whole, dataset, condition, work, accelerator), spec


TASKS: dict[str, Callable[..., Made]] = {
    "vae": vae_task,
    "vq": vq_task,
    "unet": unet_task,
    "lora": lora_task,
    "hybrid": hybrid_task,
    "classes": classes_task,
    "embedding": embedding_task,
    SHARDED_KIND: unet_task,
}
SHARDED = {  # as `accelerate launch --use_fsdp` sets it, each block a unit of its own
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
}


def run(kind: str, pictures: Path, model: Path, work: Path) -> dict[str, Tensor]:
    """The averaged gradients of the second step and the weights after the fifth, of every turn."""
    accelerator = start.accelerator_for(TrainUnetSpec(device="cpu"))
    processes = accelerator.num_processes
    task, spec = TASKS[kind](pictures, model, work, accelerator, batch_size=WHOLE_BATCH // processes)
    for module in (*(turn.module for turn in task.turns), getattr(task, "network", nn.Module())):
        module.double()
    if isinstance(task, DenoisingTask):
        task.bundle.unet.double()
    state = State(task.turns, spec, work, accelerator, "hash")
    assert state.players[0].is_sharded == (kind == SHARDED_KIND and processes > 1)
    order = Order([task.training], batch_size=WHOLE_BATCH, seed=spec.seed)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        draws = order.batch(step)
        share = len(draws) // processes
        batch = _wide(task.load(draws[accelerator.process_index * share :][:share]))
        if step == 1:  # the second: from the first on, the discriminator takes part
            state._gradients(dict(batch))
            for player in state.players:
                grads = {name: sharding.whole(p.grad) for name, p in player.trained.items() if p.grad is not None}
                found |= {f"grad.{player.turn.name}.{name}": grad.clone() for name, grad in grads.items()}
        state.advance(batch)
    for player in state.players:
        found |= {f"weight.{player.turn.name}.{name}": sharding.whole(p).clone() for name, p in player.trained.items()}
    return found


def _unet(spec: TrainUnetSpec, work: Path, accelerator: Accelerator) -> Made:
    dataset = data.find(spec.data)
    whole = parts.model(spec, CPU, dataset)
    condition = _result(parts.condition(spec, whole.bundle, dataset, work, accelerator))
    unet._prepare(spec, whole, condition)
    return _denoising(spec, whole, dataset, condition, work, accelerator), spec


def _denoising(
    spec: Any, whole: parts.ModelParts, dataset: data.Dataset, condition: Any, work: Path, accelerator: Accelerator
) -> DenoisingTask:
    sizes: Sequence[caches.Size] = [SIZE] * len(dataset.pictures)
    moments = _result(caches.moments(work, whole.bundle.vae, dataset, sizes, spec, accelerator))
    return DenoisingTask(whole, spec, dataset, moments, condition, size=SIZE, write=lambda *_: None)


def _result(stream: Any) -> Any:
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value


def _wide(batch: Batch) -> Batch:
    return {name: rows.double() if rows.is_floating_point() else rows for name, rows in batch.items()}


if __name__ == "__main__":
    pictures, model, out = map(Path, sys.argv[1:])
    for kind in TASKS:
        if kind == SHARDED_KIND:
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ |= SHARDED
        tensors = run(kind, pictures, model, out / f"cache-{kind}")
        if PartialState().is_main_process:
            save_file(tensors, out / f"{kind}.safetensors")
