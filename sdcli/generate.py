"""STORY: a plan -> images on disk, one record each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from sdcli import drawing, latent_files
from sdcli.drawing import extras, records
from sdcli.drawing.reading import Reader, Reading
from sdcli.events import ImageRecord as ImageRecord
from sdcli.events import Progress as Progress
from sdcli.files import exists, place, remove_dead_parts
from sdcli.pipeline import init, vae
from sdcli.pipeline.bundle import ModelBundle, load_bundle
from sdcli.pipeline.device import pick_device, pick_dtype
from sdcli.pipeline.images import to_images
from sdcli.pipeline.metadata import picture_bytes
from sdcli.plan import Plan, naming
from sdcli.specs import GenerateSpec

if TYPE_CHECKING:
    from sdcli.pipeline.bundle import Vae


class Loader(Protocol):
    """What gives the model in a folder: `load_bundle`, or who keeps the last one."""

    def __call__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> ModelBundle: ...


def run(spec: GenerateSpec, plan: Plan, load: Loader = load_bundle) -> Iterator[Progress | ImageRecord]:
    """Draw the images of a plan, yielding after every step and for every image written.

    load: gives the model, which stays as it is.
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
    for folder in {path.parent for path in (*plan.targets, *plan.latent_targets)} | plan.beside.folders:
        remove_dead_parts(folder)
    device = pick_device(spec.device)
    words, adapters = drawing.read_words(plan), drawing.read_adapters(plan.loras, plan.model.folder)
    picture = drawing.read_picture(plan)
    # No name keeps the model as it was loaded: with adapters in its weights another takes its place.
    bundle = load(plan.model.folder, device=device, dtype=pick_dtype(spec.dtype, device))
    bundle = drawing.equipped(bundle, words, adapters)
    del adapters
    reader = Reader(bundle.conditioner, words.embeddings)
    shared = records.shared_facts(spec, plan, words.embeddings) | records.picture_facts(plan, picture)
    shared |= records.precision_facts(bundle)
    steps = extras.Steps(plan, bundle.vae, spec.if_exists) if spec.save_steps is not None else None
    sheet = extras.Sheet(plan.beside.grid, len(todo)) if plan.beside.grid is not None else None
    done = 0
    for ids, read in _micro_batches(todo, plan, reader, drawing.micro_batch_size(spec, plan)):
        began = time.perf_counter()
        evaluations = 0
        latents = torch.empty(0)
        seeds = [plan.seeds[i] for i in ids]
        context, away = reader.contexts(read)
        for step in drawing.draw_from(bundle, plan, context, away, seeds=seeds, picture=picture):
            latents, evaluations = step.latents, step.index
            if steps is not None:
                yield from map(_record, steps.after(step, ids))
            yield Progress(done * step.total + step.index * len(ids), len(todo) * step.total)
        done += len(ids)
        images = to_images(vae.decode_finite(bundle.vae, latents))
        if picture is not None:
            images = [init.paste_kept(image, picture) for image in images]
        seconds = (time.perf_counter() - began) / len(ids)
        for row, (i, image) in enumerate(zip(ids, images, strict=True)):
            facts = shared | records.word_facts(plan.prompts[i], read[row])
            facts |= {"seed": plan.seeds[i], "evaluations": evaluations, "seconds": round(seconds, 3)}
            if plan.latent_targets:  # before the picture: where that is, they are
                path = save_latents(latents[row : row + 1], bundle.vae, facts, plan.latent_targets[i], spec)
                facts["saved_latents"] = str(path)
            yield write(image, facts, plan.targets[i], spec)
            if sheet is not None:
                sheet.add(image, plan.seeds[i], plan.label.name if plan.label is not None else facts["prompt"])
    if sheet is not None:
        yield _record(sheet.write(spec))


def _micro_batches(
    todo: Sequence[int], plan: Plan, reader: Reader, size: int
) -> Iterator[tuple[list[int], list[Reading]]]:
    """Images that follow each other in portions that can be drawn together, and what their words are."""
    each = ((i, reader.read(plan.prompts[i], plan)) for i in todo)
    for _, alike in groupby(each, key=lambda one: one[1].count):
        while some := list(islice(alike, size)):
            yield [i for i, _ in some], [reading for _, reading in some]


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


def _record(written: extras.Written) -> ImageRecord:
    path, facts = written
    return ImageRecord({"path": str(path), **facts}, path)
