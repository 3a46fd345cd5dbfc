"""Where a run begins and what it owns: device and processes, the run folder, the checked data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from sdcli.errors import UsageError
from sdcli.pipeline import vae as latent
from sdcli.pipeline.bundle import ModelBundle
from sdcli.pipeline.compiling import check_compiler
from sdcli.pipeline.device import pick_device
from sdcli.train_specs import TrainSpec, TrainUnetSpec
from sdcli.training import checkpoint, data
from sdcli.training.loop import Planned, Preparing, Report
from sdcli.training.order import Order

HASH_LENGTH = 12
WAYS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
PATIENCE = timedelta(days=1)  # of the other processes, while the first one reads pictures and fills caches


def accelerator_for(spec: TrainSpec) -> Accelerator:
    """The device, the precision and the processes of a run, as `accelerate launch` set them up.

    Raises UsageError where the device cannot do the precision or a package is missing, and as `pick_device`.
    """
    device = pick_device(spec.device)
    if device.type == "cpu" and spec.mixed_precision == "fp16":
        raise UsageError("--mixed-precision fp16: a CPU cannot train in it", "use bf16 or no")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if spec.compile:
        check_compiler(device)
    if spec.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise UsageError("--optimizer adamw8bit: bitsandbytes is not installed", "pip install 'sdcli[8bit]'")
    if spec.tracker is not None and find_spec(spec.tracker) is None:
        raise UsageError(f"--tracker {spec.tracker}: is not installed", f"pip install {spec.tracker}, or leave it out")
    plugin = _sharding(spec) if parse_flag_from_env("ACCELERATE_USE_FSDP") else None
    accelerator = Accelerator(
        mixed_precision=spec.mixed_precision,
        cpu=device.type == "cpu",
        fsdp_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if plugin is not None and accelerator.distributed_type is DistributedType.MULTI_CPU:
        _shard_on_cpu(accelerator, plugin)
    if accelerator.distributed_type not in WAYS:
        raise UsageError(
            f"accelerate is set up for {accelerator.distributed_type.value}, which splits the model in its own way",
            "launch with --multi_gpu (every process holds the whole model), or for train-unet with --use_fsdp",
        )
    return accelerator


def _sharding(spec: TrainSpec) -> FullyShardedDataParallelPlugin:
    """How `accelerate launch --use_fsdp` was told to shard. Raises UsageError for what cannot be done so."""
    version = os.environ.get("FSDP_VERSION", "1")  # accelerate's own default
    whole = "launch with --multi_gpu; where memory is short, add --gradient-checkpointing or train with --lora-rank"
    if not isinstance(spec, TrainUnetSpec) or spec.lora_rank is not None:
        raise UsageError("FSDP shards a UNet that is trained whole, and this run trains something else", whole)
    if version != "2":
        raise UsageError(f"FSDP of version {version}: only version 2 is supported", "launch with --fsdp_version 2")
    plugin = FullyShardedDataParallelPlugin()
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UsageError("FSDP with weights offloaded to the CPU is not supported", "set fsdp_offload_params to false")
    if plugin.activation_checkpointing:
        raise UsageError("FSDP: fsdp_activation_checkpointing is not supported", "use --gradient-checkpointing")
    if spec.mixed_precision == "fp16" or spec.optimizer != "adamw":
        raise UsageError("FSDP with --mixed-precision fp16 or 8-bit AdamW is not supported", "use bf16 and adamw")
    if spec.compile:
        raise UsageError("FSDP with --compile is not supported", "leave it out")
    plugin.cpu_ram_efficient_loading = False  # every process has read the whole model already
    return plugin


def _shard_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Let accelerate shard among processes on CPUs: told so in its state, it does as it does by itself on GPUs."""
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def resolution(spec: TrainSpec, native: object, factor: int) -> int:
    """The side of the training pictures in px: `spec.resolution`, else `native`, the model's own.

    Raises UsageError unless it is a multiple of the VAE factor, or where the model does not say its own.
    """
    side = spec.resolution if spec.resolution is not None else native
    if type(side) is not int or side < 1:
        raise UsageError(f"the model's own size is {native!r}", "say --resolution, in pixels")
    if side % factor:
        below = max(factor, side // factor * factor)
        raise UsageError(
            f"--resolution {side}: is no multiple of {factor}, which this VAE needs", f"use {below} or {below + factor}"
        )
    return side


def size(spec: TrainSpec, bundle: ModelBundle) -> tuple[int, int]:
    """The square of the training pictures of a whole model, in px; errors as in `resolution`."""
    factor, native = latent.factor(bundle.vae), bundle.unet.config["sample_size"]
    side = resolution(spec, native * factor if type(native) is int else native, factor)
    return side, side


@dataclass(frozen=True)
class RunPlan:
    """A run's folder, and what makes another call the same run."""

    folder: Path
    identity: dict[str, Any]
    config_hash: str  # what its checkpoints carry


def plan(spec: TrainSpec, kind: str, dataset: data.Dataset, origin: str, accelerator: Accelerator) -> RunPlan:
    """The run of these settings, this data, this start and so many processes."""
    identity: dict[str, Any] = {**spec.identity(), "kind": kind, "data_hash": dataset.manifest_hash, "origin": origin}
    identity |= {"layout": dataset.layout, "processes": accelerator.num_processes}
    config_hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = spec.run if spec.run is not None else Path("runs") / f"{kind}-{config_hash[:HASH_LENGTH]}"
    return RunPlan(folder, identity, config_hash)


def planned(
    run: RunPlan, spec: TrainSpec, dataset: data.Dataset, accelerator: Accelerator, module: nn.Module
) -> Iterator[Report]:
    """Check the data and tell what the run would do, writing nothing.

    module: what it would train.
    """
    yield from checked(dataset, spec, accelerator)
    batch = spec.batch_size * spec.accumulate * accelerator.num_processes
    training, held_out = data.split(dataset, spec.holdout, spec.seed)
    saved = checkpoint.steps(run.folder)
    yield Planned(
        {
            "run": str(run.folder),
            "resumes_from": saved[-1] if saved else 0,
            "steps": spec.steps,
            "layout": dataset.layout,
            "pictures": len(dataset.pictures),
            "samples": len(training),
            "held_out": len(held_out),
            "pictures_a_step": batch,
            "epochs": round(spec.steps * batch / len(training), 2),
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
            "lr": spec.peak_lr,
        }
    )


@contextmanager
def opened(run: RunPlan, accelerator: Accelerator) -> Iterator[None]:
    """Own the run folder; the first process does so for all."""
    with checkpoint.owned(run.folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            checkpoint.open_run(run.folder, run.identity)
        accelerator.wait_for_everyone()
        yield


def checked(dataset: data.Dataset, spec: TrainSpec, accelerator: Accelerator) -> Iterator[Preparing]:
    """Decode every picture once, in the first process, while the others wait. Raises InputError naming the bad ones."""
    if accelerator.is_main_process:
        for done in data.check(dataset, spec.workers):
            yield Preparing("reading pictures", done, len(dataset.pictures))
    accelerator.wait_for_everyone()


def order(spec: TrainSpec, accelerator: Accelerator, groups: Sequence[Sequence[int]]) -> Order:
    """The order of the batches of all processes together."""
    return Order(groups, batch_size=spec.batch_size * spec.accumulate * accelerator.num_processes, seed=spec.seed)
