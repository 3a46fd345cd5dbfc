"""A plan -> latents: what the text encoder knows besides its own words, what is started from, and the denoising."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdcli import latent_files, schedulers
from sdcli.errors import SdcliWarning
from sdcli.pipeline import init, offload, sampling, text, vae, vocabulary
from sdcli.pipeline.adapters import Embedding, read_embedding
from sdcli.pipeline.bundle import ModelBundle
from sdcli.pipeline.classes import ClassEmbedder
from sdcli.pipeline.compiling import compiled
from sdcli.pipeline.context import Context
from sdcli.pipeline.contexts import Condition, contexts
from sdcli.pipeline.lora import Adapter, merged, read_adapter
from sdcli.pipeline.lora_names import model_layers
from sdcli.pipeline.start import Start, start_at
from sdcli.pipeline.vocabulary import Swap
from sdcli.plan import Plan
from sdcli.plan.lora_files import LoraFile
from sdcli.plan.parts import text_widths, vae_factor
from sdcli.specs import GenerateSpec

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


AUTO_BATCH_PIXELS = 4 * 512 * 512  # images denoised together: four of SD 1.5's size
AUTO_BATCH_MOST = 16


@dataclass(frozen=True)
class Words:
    """What the text encoder of a plan knows besides its own vocabulary, and how many of its layers are left out."""

    embeddings: tuple[Embedding, ...]
    swaps: tuple[Swap, ...]
    clip_skip: int = 0


def read_words(plan: Plan) -> Words:
    """Read what a plan adds to the vocabulary. Raises InputError for a file, UsageError for a word."""
    embeddings = []
    if plan.embeddings:
        width, second = text_widths(plan.model.folder)
        embeddings = [read_embedding(e.path, width=width, second=second, token=e.token) for e in plan.embeddings]
    return Words(tuple(embeddings), _swaps(plan, embeddings), plan.clip_skip)


def read_adapters(files: Sequence[LoraFile], folder: Path) -> tuple[Adapter, ...]:
    """Read LoRA files for the model of a folder. Raises InputError for one that does not fit it."""
    if not files:
        return ()
    layers = model_layers(folder)
    return tuple(read_adapter(one.path, layers, one.scale) for one in files)


def equipped(bundle: ModelBundle, words: Words, adapters: Sequence[Adapter] = ()) -> ModelBundle:
    """A model with the adapters in its weights that knows the words, too; the one given stays as it is."""
    if adapters:
        bundle = merged(bundle, adapters)
    conditioner = bundle.conditioner
    if isinstance(conditioner, ClassEmbedder):
        return bundle
    if words.embeddings:
        conditioner = text.knowing(conditioner, words.embeddings)
    conditioner = text.each(conditioner, lambda one: text.with_swaps(one, words.swaps))
    return replace(bundle, conditioner=text.without_last_layers(conditioner, words.clip_skip))


def prepared(bundle: ModelBundle, *, how_offloaded: str, is_compiled: bool, is_tiled: bool = False) -> ModelBundle:
    """An equipped model as it is drawn with: offloaded, in tiles, compiled, as the options ask; the one given stays."""
    bundle = offload.placed(bundle, bundle.device, how_offloaded)
    if is_tiled:
        bundle = replace(bundle, vae=vae.tiled(bundle.vae))
    return compiled(bundle) if is_compiled else bundle


def draw(
    bundle: ModelBundle,
    plan: Plan,
    conditions: Sequence[Condition],
    negative: Condition,
    *,
    seeds: Sequence[int],
    picture: init.Picture | None = None,
) -> Iterator[sampling.Step]:
    """Denoise one micro-batch, one image a condition and seed, each as if it were alone.

    conditions, negative: prompts for a model that reads text, else labels, of which the negative is the null class.
    picture: what they all start from, where the plan says so. At strength 0 the one step is number 0: the picture.
    """
    context, away = contexts(bundle.conditioner, conditions, negative if plan.guidance > 1 else None)
    yield from draw_from(bundle, plan, context, away, seeds=seeds, picture=picture)


def draw_from(
    bundle: ModelBundle,
    plan: Plan,
    context: Context,
    away: Context | None,
    *,
    seeds: Sequence[int],
    picture: init.Picture | None = None,
) -> Iterator[sampling.Step]:
    """Denoise one micro-batch from its context and that to keep away from, which may differ by image."""
    # A fresh one a micro-batch: PNDM, LMS, Heun and DPM-Solver carry history.
    scheduler = schedulers.create(plan.scheduler, plan.scheduler_config, plan.steps, device=str(bundle.device))
    sources = sampling.generators(seeds)
    begin, noise = _start(bundle, plan, scheduler, picture, sources)
    if begin is not None and begin.picture is not None and not begin.steps:
        yield sampling.Step(0, 0, 0.0, begin.picture)
        return
    yield from sampling.denoise(
        sampling.by_rows(bundle.unet) if bundle.is_sliced else bundle.unet,
        scheduler,
        noise,
        context.of_size(plan.width, plan.height),
        negative=away.of_size(plan.width, plan.height) if away is not None else None,
        guidance=plan.guidance,
        sources=sources,
        interval=plan.guidance_interval,
        rescale=plan.guidance_rescale,
        step_arguments=plan.scheduler.step_arguments,
        start=begin,
    )


def _start(
    bundle: ModelBundle,
    plan: Plan,
    scheduler: SchedulerMixin,
    picture: init.Picture | None,
    sources: Sequence[torch.Generator],
) -> tuple[Start | None, Tensor]:
    """Where a micro-batch starts and its noise (B, C, h, w): of the file or the seeds alone, or on the picture."""
    if plan.initial is None or picture is None:
        channels, factor = int(bundle.vae.config["latent_channels"]), vae.factor(bundle.vae)
        noise = sampling.initial_noise((channels, plan.height // factor, plan.width // factor), sources)
        if plan.latents is not None:  # what comes later is still drawn after that of the seed
            noise = latent_files.read(plan.latents, bundle.vae.config).float()
        return None, noise
    steps, strength = plan.initial.steps, plan.initial.strength
    timesteps = start_at(scheduler, plan.steps - steps)
    begin = init.start_of_inpainting if plan.initial.is_for_unet else init.start_from
    return begin(bundle.vae, timesteps, picture, sources, steps=steps, strength=strength)


def read_picture(plan: Plan) -> init.Picture | None:
    """The picture to start from, read before any weights are. Warns of a mask that leaves nothing to draw."""
    if plan.initial is None:
        return None
    factor = vae_factor(plan.model.folder)
    picture = init.load(plan.initial.path, plan.initial.mask, size=plan.initial.size, factor=factor)
    if picture.mask is not None and picture.mask.getextrema() == (0, 0):
        warnings.warn(f"--mask {plan.initial.mask}: is black: nothing is repainted", SdcliWarning, stacklevel=3)
    return picture


def micro_batch_size(spec: GenerateSpec, plan: Plan) -> int:
    """How many images are denoised together; each alone where not a bit may depend on its neighbours."""
    if spec.deterministic:
        return 1
    return spec.batch_size if spec.batch_size is not None else auto_batch_size(plan.width, plan.height)


def auto_batch_size(width: int, height: int) -> int:
    """How many images of a size are denoised together unless the user says."""
    return max(1, min(AUTO_BATCH_MOST, AUTO_BATCH_PIXELS // (width * height)))


def _swaps(plan: Plan, embeddings: Sequence[Embedding]) -> tuple[Swap, ...]:
    """What is fed in place of which words. Raises UsageError."""
    if not plan.swaps:
        return ()
    words = vocabulary.load_vocabulary(plan.model.folder)
    if embeddings:
        words = vocabulary.with_tokens(words, [(one.token, len(one.vectors)) for one in embeddings])
    for swap in plan.swaps:
        words = vocabulary.with_swap(words, swap.option, swap.word, swap.terms)
    return words.swaps
