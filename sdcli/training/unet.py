"""WHAT train-unet trains: the UNet of a model, whole or by adapters, and the text encoder or classes along."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sdcli.pipeline import known_words
from sdcli.pipeline import vae as latent
from sdcli.pipeline.bundle import TextEncoder, save_bundle
from sdcli.train_specs import TrainUnetSpec
from sdcli.training import data, denoising, lora, parts, start
from sdcli.training.caches import Size
from sdcli.training.conditions import Condition
from sdcli.training.denoising import Write
from sdcli.training.loop import Preparing, Report
from sdcli.training.parts import ModelParts


def run(spec: TrainUnetSpec) -> Iterator[Report]:
    """Train the UNet of a model, or one from scratch, and yield what happens; RUN/export is a whole model or a LoRA."""
    accelerator = start.accelerator_for(spec)
    dataset = data.find(spec.data, spec.caption)
    model = parts.model(spec, accelerator.device, dataset)
    size, factor = start.size(spec, model.bundle), latent.factor(model.bundle.vae)

    def prepare(cache: Path) -> Generator[Preparing, None, tuple[Condition, Write]]:
        condition = yield from parts.condition(spec, model.bundle, dataset, cache, accelerator)
        encoder = _prepare(spec, model, condition)
        model.bundle.unet.register_to_config(sample_size=size[0] // factor)
        return condition, lambda folder, _: _write(folder, spec, model, encoder, size, dataset)

    learned = model.bundle.unet
    yield from denoising.run(spec, "unet", dataset, model, accelerator, learned=learned, prepare=prepare)


def _prepare(spec: TrainUnetSpec, model: ModelParts, condition: Condition) -> nn.Module | None:
    """Say what learns. Returns the text encoder, where it is trained along."""
    conditioner = model.bundle.conditioner
    encoder = conditioner.model if isinstance(conditioner, TextEncoder) and condition.module is not None else None
    model.bundle.unet.requires_grad_(True)
    if condition.module is not None:  # an adapter has no place for a table of classes
        condition.module.requires_grad_(spec.lora_rank is None)
    if spec.lora_rank is not None:
        for module, targets in ((model.bundle.unet, lora.UNET_TARGETS), (encoder, lora.TEXT_TARGETS)):
            if module is not None:
                lora.adapt(module, targets, rank=spec.lora_rank, alpha=spec.alpha, seed=spec.seed)
    return encoder


def _write(
    folder: Path, spec: TrainUnetSpec, model: ModelParts, encoder: nn.Module | None, size: Size, dataset: data.Dataset
) -> None:
    """The whole model, trained parts beside those that stayed as they were; or the adapters alone."""
    dtype = getattr(torch, spec.export_dtype)
    if spec.lora_rank is not None:
        lora.write(folder, model.bundle.unet, encoder, rank=spec.lora_rank, alpha=spec.alpha, dtype=dtype)
    else:
        settings = model.settings | {"size": f"{size[0]}x{size[1]}"}
        save_bundle(folder, replace(model.bundle, dtype=dtype), model.tokenizer, settings)
        if model.words is not None:
            captions = (caption for sample in dataset.pictures for caption in sample.captions)
            known_words.write(folder, model.words.union(*map(known_words.words, captions)))
