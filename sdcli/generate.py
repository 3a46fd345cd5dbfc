"""STORY: a plan -> images on disk, one record each."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sdcli import __version__, latent_files, naming, schedulers, store
from sdcli.errors import SdcliWarning
from sdcli.files import exists, place, read_bytes, remove_dead_parts
from sdcli.parts import text_width, vae_factor
from sdcli.pipeline import film, init, sampling, sheets, text, vae, vocabulary
from sdcli.pipeline.adapters import MAX_BYTES, Embedding, read_embedding
from sdcli.pipeline.bundle import Conditioner, ModelBundle, TextEncoder, load_bundle
from sdcli.pipeline.classes import ClassEmbedder
from sdcli.pipeline.contexts import Condition, contexts
from sdcli.pipeline.device import pick_device, pick_dtype
from sdcli.pipeline.images import to_images
from sdcli.pipeline.metadata import picture_bytes, png_bytes
from sdcli.pipeline.prompt import Chunks
from sdcli.pipeline.start import Start, start_at
from sdcli.pipeline.vocabulary import Swap
from sdcli.plan import Plan
from sdcli.specs import GenerateSpec

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from sdcli.pipeline.bundle import Vae

AUTO_BATCH_PIXELS = 4 * 512 * 512  # images denoised together: four of SD 1.5's size
AUTO_BATCH_MOST = 16


@dataclass(frozen=True)
class Progress:
    """Where the denoising of all images stands, in steps."""

    done: int
    total: int


@dataclass(frozen=True)
class ImageRecord:
    """One image: how it was made, where it is, and its bytes when it went to no file."""

    facts: Mapping[str, Any]
    path: Path | None
    data: bytes | None = None


@dataclass(frozen=True)
class Words:
    """What the text encoder of a plan knows besides its own vocabulary."""

    embeddings: tuple[Embedding, ...]
    swaps: tuple[Swap, ...]


def run(spec: GenerateSpec, plan: Plan) -> Iterator[Progress | ImageRecord]:
    """Draw the images of a plan, yielding after every step and for every image written.

    Raises InputError for a malformed model, NumericalError where the model gives NaN (no file is then written),
    OutputError when a picture cannot be written.
    """
    todo = []
    for i, path in enumerate(plan.targets):
        if spec.if_exists == "skip" and str(path) != "-" and exists(path):
            yield ImageRecord({"path": str(path), "skipped": True}, path)
        else:
            todo.append(i)
    if not todo:
        return
    for folder in {path.parent for path in (*plan.targets, *plan.latent_targets)}:
        remove_dead_parts(folder)
    device = pick_device(spec.device)
    words = read_words(plan)
    picture = read_picture(plan)
    bundle = equipped(load_bundle(plan.model.folder, device=device, dtype=pick_dtype(spec.dtype, device)), words)
    condition, negative, chunks = conditions_of(spec, plan, bundle.conditioner, words.embeddings)
    shared = shared_facts(spec, plan, chunks, words.embeddings) | picture_facts(plan, picture)
    size = micro_batch_size(spec, plan)
    tiles: list[Image.Image] = []
    shown: list[Image.Image] = []
    for first in range(0, len(todo), size):
        ids = todo[first : first + size]
        began = time.perf_counter()
        evaluations = 0
        latents = torch.empty(0)
        seeds = [plan.seeds[i] for i in ids]
        for step in draw(bundle, plan, [condition] * len(ids), negative, seeds=seeds, picture=picture):
            latents, evaluations = step.latents, step.index
            if spec.save_steps is not None:
                yield from _save_step(step, ids, bundle, plan, spec.save_steps, spec.if_exists, shown)
            yield Progress(first * step.total + step.index * len(ids), len(todo) * step.total)
        images = to_images(vae.decode_finite(bundle.vae, latents))
        if picture is not None:
            images = [init.paste_kept(image, picture) for image in images]
        seconds = (time.perf_counter() - began) / len(ids)
        for row, (i, image) in enumerate(zip(ids, images, strict=True)):
            facts = shared | {"seed": plan.seeds[i], "evaluations": evaluations, "seconds": round(seconds, 3)}
            if plan.latent_targets:  # before the picture: where that is, they are
                path = save_latents(latents[row : row + 1], bundle.vae, facts, plan.latent_targets[i], spec)
                facts["saved_latents"] = str(path)
            yield write(image, facts, plan.targets[i], spec)
            if spec.grid is not None:
                tiles.append(sheets.tile(image, len(todo)))
    if spec.grid is not None:
        yield _write_grid(spec.grid, tiles, [plan.seeds[i] for i in todo], spec, plan)


def read_words(plan: Plan) -> Words:
    """Read what a plan adds to the vocabulary. Raises InputError for a file, UsageError for a word."""
    embeddings = [read_embedding(e.path, width=text_width(plan.model.folder), token=e.token) for e in plan.embeddings]
    return Words(tuple(embeddings), _swaps(plan, embeddings))


def equipped(bundle: ModelBundle, words: Words) -> ModelBundle:
    """A model that knows the words, too; the one given stays as it is."""
    if isinstance(bundle.conditioner, TextEncoder) and words.embeddings:
        bundle = replace(bundle, conditioner=text.with_embeddings(bundle.conditioner, words.embeddings))
    if isinstance(bundle.conditioner, TextEncoder) and words.swaps:
        bundle = replace(bundle, conditioner=text.with_swaps(bundle.conditioner, words.swaps))
    return bundle


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
    context: Tensor,
    away: Tensor | None,
    *,
    seeds: Sequence[int],
    picture: init.Picture | None = None,
) -> Iterator[sampling.Step]:
    """Denoise one micro-batch from contexts (B, 77 k, D) and those to keep away from, which may differ by image."""
    # A fresh one a micro-batch: PNDM, LMS, Heun and DPM-Solver carry history.
    scheduler = schedulers.create(plan.scheduler, plan.scheduler_config, plan.steps, device=str(bundle.device))
    sources = sampling.generators(seeds)
    begin, noise = _start(bundle, plan, scheduler, picture, sources)
    if begin is not None and begin.picture is not None and not begin.steps:
        yield sampling.Step(0, 0, 0.0, begin.picture)
        return
    yield from sampling.denoise(
        bundle.unet,
        scheduler,
        noise,
        context,
        negative=away,
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


def write(image: Image.Image, facts: Mapping[str, Any], target: Path, spec: GenerateSpec) -> ImageRecord:
    """Put one picture in place, under a free name if `--if-exists number` asks for it."""
    form = naming.picture_format(target, spec.format)
    data = picture_bytes(image, None if spec.no_metadata else facts, form, spec.quality)
    if str(target) == "-":
        return ImageRecord({"path": "-", **facts}, None, data)
    path = place(data, target, spec.if_exists)
    return ImageRecord({"path": str(path), **facts}, path)


def save_latents(latents: Tensor, coder: Vae, facts: Mapping[str, Any], target: Path, spec: GenerateSpec) -> Path:
    """Put the final latents (1, C, h, w) of one picture in place as a latent file; returns where it went."""
    if spec.if_exists == "skip" and target.exists():
        return target
    made_by = {key: facts[key] for key in ("model", "height", "width", "seed", "prompt")}
    made_by |= {"mode": "generate", "scaling_factor": coder.config["scaling_factor"]}
    data = latent_files.file_bytes(latents.float().cpu(), made_by)
    return place(data, target, spec.if_exists, ending=latent_files.SUFFIX)


def _save_step(
    step: sampling.Step,
    ids: Sequence[int],
    bundle: ModelBundle,
    plan: Plan,
    output: Path,
    if_exists: str,
    shown: list[Image.Image],
) -> Iterator[ImageRecord]:
    """A picture of every image after a step; of an animation, for which `shown` keeps the frames, after the last."""
    is_film, stems = not naming.is_output_folder(output), naming.stems(plan.targets)
    if is_film and not film.is_kept(step.index, step.total):
        return
    for i, image in zip(ids, film.frames(bundle.vae, step.latents, is_last=step.index == step.total), strict=True):
        facts = {"seed": plan.seeds[i], "step": step.index, "t": step.t}
        path, data = output / f"{stems[i]}-step-{step.index:04d}.png", None
        if not is_film:
            data = png_bytes(image, None)
        else:
            shown.append(image)
            if step.index == step.total:
                path, data = output, film.animation(shown)
                facts = {"seed": plan.seeds[i], "frames": len(shown)}
        if data is not None and not (if_exists == "skip" and path.exists()):
            path = place(data, path, if_exists)
            yield ImageRecord({"path": str(path), **facts}, path)


def _write_grid(
    target: Path, tiles: Sequence[Image.Image], seeds: Sequence[int], spec: GenerateSpec, plan: Plan
) -> ImageRecord:
    """The contact sheet of the pictures drawn, in the order of their seeds."""
    if spec.if_exists == "skip" and exists(target):
        return ImageRecord({"path": str(target), "skipped": True}, target)
    heading = spec.prompt if plan.label is None else plan.label.name
    sheet = sheets.contact_sheet(tiles, [f"seed {seed}" for seed in seeds], heading)
    form = naming.picture_format(target, None)
    path = place(picture_bytes(sheet, None, form, spec.quality), target, spec.if_exists)
    return ImageRecord({"path": str(path), "grid": list(seeds)}, path)


def micro_batch_size(spec: GenerateSpec, plan: Plan) -> int:
    """How many images are denoised together; each alone where not a bit may depend on its neighbours."""
    if spec.deterministic:
        return 1
    return spec.batch_size if spec.batch_size is not None else auto_batch_size(plan.width, plan.height)


def auto_batch_size(width: int, height: int) -> int:
    """How many images of a size are denoised together unless the user says."""
    return max(1, min(AUTO_BATCH_MOST, AUTO_BATCH_PIXELS // (width * height)))


def conditions_of(
    spec: GenerateSpec, plan: Plan, conditioner: Conditioner, embeddings: Sequence[Embedding]
) -> tuple[Condition, Condition, Chunks | None]:
    """What to draw, what guidance leads away from, and the pieces of the prompt if there is one."""
    if isinstance(conditioner, ClassEmbedder):
        label = plan.label.index if plan.label is not None else conditioner.null
        return label, conditioner.null, None
    chunks = text.read(conditioner, spec.prompt)
    vocabulary.warn_of_cut(chunks, "prompt")
    vocabulary.warn_of_unused(conditioner.swaps, chunks)
    if plan.guidance > 1:
        vocabulary.warn_of_cut(text.read(text.without_swaps(conditioner), spec.negative), "negative prompt")
    _warn_of_unnamed(conditioner, spec, plan, embeddings)
    return spec.prompt, spec.negative, chunks


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


def _warn_of_unnamed(encoder: TextEncoder, spec: GenerateSpec, plan: Plan, embeddings: Sequence[Embedding]) -> None:
    """Warn of each learned token that no prompt names: it was given, and changes nothing."""
    read = [(encoder, spec.prompt), (text.without_swaps(encoder), spec.negative)][: 2 if plan.guidance > 1 else 1]
    for file, embedding in zip(plan.embeddings, embeddings, strict=True):
        if not any(text.names(reader, prompt, embedding.token) for reader, prompt in read):
            note = f"--embedding {file.path}: no prompt names its token {embedding.token}, so it changes nothing"
            warnings.warn(note, SdcliWarning, stacklevel=3)


def shared_facts(
    spec: GenerateSpec, plan: Plan, chunks: Chunks | None, embeddings: Sequence[Embedding]
) -> dict[str, Any]:
    facts = {
        "prompt": spec.prompt,
        "negative": spec.negative,
        **({"class": asdict(plan.label)} if plan.label is not None else {}),
        "model": plan.model.ref,
        "model_hash": store.model_hash(plan.model),
        "seed": 0,
        "width": plan.width,
        "height": plan.height,
        "scheduler": plan.scheduler.name,
        **plan.scheduler.choices,
        "steps": plan.steps,
        "evaluations": 0,
        "guidance": plan.guidance,
        **plan.guidance_facts(),
        "seconds": 0.0,
        "tokens": (chunks if chunks is not None else Chunks(())).counts(),
        "sdcli": __version__,
    }
    facts |= {key: list(given) for key, given in (("replace", spec.replace), ("mix", spec.mix)) if given}
    if embeddings:
        facts["embeddings"] = [
            {"file": _name(file.path), "token": embedding.token, "sha256": _hash(file.path)}
            for file, embedding in zip(plan.embeddings, embeddings, strict=True)
        ]
    if plan.latents is not None:
        facts["latents"] = _file(plan.latents, latent_files.sha256(plan.latents))
    return facts


def read_picture(plan: Plan) -> init.Picture | None:
    """The picture to start from, read before any weights are. Warns of a mask that leaves nothing to draw."""
    if plan.initial is None:
        return None
    factor = vae_factor(plan.model.folder)
    picture = init.load(plan.initial.path, plan.initial.mask, size=plan.initial.size, factor=factor)
    if picture.mask is not None and picture.mask.getextrema() == (0, 0):
        warnings.warn(f"--mask {plan.initial.mask}: is black: nothing is repainted", SdcliWarning, stacklevel=3)
    return picture


def picture_facts(plan: Plan, picture: init.Picture | None) -> dict[str, Any]:
    if plan.initial is None or picture is None:
        return {}
    facts = {"strength": plan.initial.strength, "init_image": _file(plan.initial.path, picture.sha256)}
    if plan.initial.mask is not None:
        facts["mask"] = _file(plan.initial.mask, str(picture.mask_sha256))
    return facts


def _file(path: Path, sha256: str) -> dict[str, str]:
    """What a record says of a file that a picture was made with: nothing of where it lies."""
    return {"file": _name(path), "sha256": sha256}


def _name(path: Path) -> str:
    return path.name.encode(errors="replace").decode()


def _hash(embedding: Path) -> str:
    return hashlib.sha256(read_bytes(embedding, max_bytes=MAX_BYTES)).hexdigest()
