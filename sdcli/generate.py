"""STORY: a plan -> images on disk, one record each."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from sdcli import drawing, latent_files
from sdcli.drawing import extras, records
from sdcli.drawing.ladder import Ladder, measures, of_denoising
from sdcli.drawing.reading import Reader, Reading
from sdcli.errors import is_out_of_memory, out_of_memory
from sdcli.events import ImageRecord as ImageRecord
from sdcli.events import Progress as Progress
from sdcli.files import exists, place, remove_dead_parts
from sdcli.pipeline import init, offload
from sdcli.pipeline.bundle import ModelBundle, load_bundle
from sdcli.pipeline.compiling import check_compiler
from sdcli.pipeline.device import let_go, pick_device, pick_dtype, trim
from sdcli.pipeline.images import to_images
from sdcli.pipeline.metadata import picture_bytes
from sdcli.plan import Plan, naming
from sdcli.specs import GenerateSpec

if TYPE_CHECKING:
    from sdcli.pipeline.bundle import Vae


class Loader(Protocol):
    """What gives the model in a folder: `load_bundle`, or who keeps the last one."""

    def __call__(self, folder: Path, *, device: torch.device, dtype: torch.dtype, is_lean: bool) -> ModelBundle: ...


def run(spec: GenerateSpec, plan: Plan, load: Loader = load_bundle) -> Iterator[Progress | ImageRecord]:
    """Draw the images of a plan, yielding after every step and for every image written.

    load: gives the model. Where memory of a device runs out, its weights may be brought to main memory for good
    (`offload.is_at_hand` tells); they stay as they are to the bit.
    Raises InputError for a malformed model, NumericalError where the model gives NaN (no file is then written),
    OutputError when a picture cannot be written, ResourceError where memory runs out whatever is done.
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
    words, adapters = drawing.read_words(plan), drawing.read_adapters(plan.loras, plan.model.folder)
    picture = drawing.read_picture(plan)
    # No name keeps the model as it was loaded: with adapters in its weights another takes its place.
    bundle = drawing.equipped(_loaded(spec, plan, load), words, adapters)
    bundle = drawing.prepared(bundle, how_offloaded=spec.offload, is_compiled=spec.compile, is_tiled=spec.tiling)
    del adapters
    ladder = Ladder(bundle, measures(bundle, is_exact=spec.deterministic))
    reader = Reader(bundle.conditioner, words.embeddings)
    shared = records.shared_facts(spec, plan, words.embeddings) | records.picture_facts(plan, picture)
    shared |= records.precision_facts(bundle)
    del bundle
    steps = extras.Steps(plan, ladder, spec.if_exists) if spec.save_steps is not None else None
    sheet = extras.Sheet(plan.beside.grid, len(todo)) if plan.beside.grid is not None else None
    work = _Work(spec, plan, ladder, reader, picture, shared, steps)
    for ids, read in _micro_batches(todo, spec, plan, reader, ladder):
        for event in work.drawn(ids, read):
            if isinstance(event, _Drawn):
                yield event.record
                if sheet is not None:
                    sheet.add(event.image, event.seed, event.subject)
            elif isinstance(event, Progress):
                yield Progress(event.done, len(todo) * event.total)
            else:
                yield event
    if sheet is not None:
        yield _record(sheet.write(spec))


def _loaded(spec: GenerateSpec, plan: Plan, load: Loader) -> ModelBundle:
    device = pick_device(spec.device)
    if spec.compile:
        check_compiler(device)
    dtype, home = pick_dtype(spec.dtype, device), offload.home(device, spec.offload)
    return replace(load(plan.model.folder, device=home, dtype=dtype, is_lean=not spec.compile), device=device)


@dataclass(frozen=True)
class _Made:
    """The pictures of a micro-batch, not yet written, their latents (B, C, h, w), and what it took."""

    images: Sequence[Image.Image]
    latents: Tensor
    evaluations: int
    seconds: float  # an image


@dataclass(frozen=True)
class _Drawn:
    """A picture that is in place."""

    image: Image.Image
    seed: int
    subject: str  # its prompt, or the name of its class
    record: ImageRecord


class _Work:
    """The drawing of all micro-batches, and how many images are done."""

    def __init__(
        self,
        spec: GenerateSpec,
        plan: Plan,
        ladder: Ladder,
        reader: Reader,
        picture: init.Picture | None,
        shared: Mapping[str, Any],
        steps: extras.Steps | None,
    ) -> None:
        self._spec, self._plan, self._ladder, self._reader = spec, plan, ladder, reader
        self._picture, self._shared, self._steps = picture, shared, steps
        self._size = plan.width, plan.height
        self._done = self._told = 0  # images that are written; the most that was told of progress

    def drawn(self, ids: Sequence[int], read: Sequence[Reading]) -> Iterator[Progress | ImageRecord | _Drawn]:
        """Draw a micro-batch; where memory runs out, again in smaller ones, or after what saves some.

        The total of the progress is of one image. Raises ResourceError where nothing is left to save memory by.
        """
        has_vae = self._picture is not None or self._steps is not None
        of = of_denoising(has_guidance=self._plan.guidance > 1, has_vae=has_vae)
        waiting: list[Sequence[int]] = [range(len(ids))]
        while waiting:
            places = waiting.pop(0)
            some, words, made = [ids[i] for i in places], [read[i] for i in places], None
            try:
                made = yield from self._made(some, words)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            if made is not None:
                yield from self._placed(some, words, made)
                continue
            if not self._ladder.relieve(len(places), self._size, of=of):  # the error, and what it keeps, is gone
                raise out_of_memory()
            waiting = [*self._ladder.portions(places, self._size), *waiting]

    def _made(self, ids: Sequence[int], read: Sequence[Reading]) -> Generator[Progress | ImageRecord, None, _Made]:
        began, evaluations, latents = time.perf_counter(), 0, torch.empty(0)
        plan, seeds = self._plan, [self._plan.seeds[i] for i in ids]
        bundle = self._ladder.bundle_for(self._size)
        self._reader.ask(bundle.conditioner)  # which lies elsewhere once memory ran out
        context, away = self._reader.contexts(read)
        for step in drawing.draw_from(bundle, plan, context, away, seeds=seeds, picture=self._picture):
            latents, evaluations = step.latents, step.index
            if self._steps is not None:
                yield from map(_record, self._steps.after(step, ids))
            self._told = max(self._told, self._done * step.total + step.index * len(ids))
            yield Progress(self._told, step.total)
        let_go(bundle.unet)  # before the VAE asks for its memory
        trim()
        images = to_images(self._ladder.decoded(latents))
        if self._picture is not None:
            images = [init.paste_kept(image, self._picture) for image in images]
        return _Made(images, latents, evaluations, (time.perf_counter() - began) / len(ids))

    def _placed(self, ids: Sequence[int], read: Sequence[Reading], made: _Made) -> Iterator[_Drawn]:
        plan, coder = self._plan, self._ladder.bundle.vae
        for row, (i, image) in enumerate(zip(ids, made.images, strict=True)):
            facts = {**self._shared} | records.word_facts(plan.prompts[i], read[row]) | self._ladder.facts(self._size)
            facts |= {"seed": plan.seeds[i], "evaluations": made.evaluations, "seconds": round(made.seconds, 3)}
            if plan.latent_targets:  # before the picture: where that is, they are
                path = save_latents(made.latents[row : row + 1], coder, facts, plan.latent_targets[i], self._spec)
                facts["saved_latents"] = str(path)
            subject = plan.label.name if plan.label is not None else facts["prompt"]
            record = write(image, facts, plan.targets[i], self._spec)
            self._done += 1
            yield _Drawn(image, plan.seeds[i], subject, record)


def _micro_batches(
    todo: Sequence[int], spec: GenerateSpec, plan: Plan, reader: Reader, ladder: Ladder
) -> Iterator[tuple[list[int], list[Reading]]]:
    """Images that follow each other in portions that can be drawn together, and what their words are."""
    most = drawing.micro_batch_size(spec, plan)
    each = ((i, reader.read(plan.prompts[i], plan)) for i in todo)
    for _, alike in groupby(each, key=lambda one: one[1].count):
        while some := list(islice(alike, ladder.together(most, (plan.width, plan.height)))):
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
