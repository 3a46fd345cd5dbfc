"""The first half of a batch's work: jobs -> micro-batches of equal settings -> latents."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdcli import drawing, records
from sdcli.drawing import Words
from sdcli.errors import NumericalError, ResourceError, SdcliError, is_out_of_memory
from sdcli.jobs.finish import Denoised, Failed
from sdcli.jobs.plan import Job
from sdcli.pipeline import text
from sdcli.pipeline.bundle import ModelBundle, TextEncoder, load_bundle
from sdcli.pipeline.contexts import Condition, contexts, lengths
from sdcli.pipeline.device import local_device, pick_device, pick_dtype
from sdcli.pipeline.prompt import Chunks
from sdcli.plan import Plan
from sdcli.specs import GenerateSpec


@dataclass(frozen=True)
class Reading:
    """What a job's words are to the model."""

    condition: Condition
    negative: Condition
    chunks: Chunks | None  # None for a model that reads no text
    count: int  # of chunks that prompt and negative prompt are filled to


class Studio:
    """One model at a time, as the jobs at hand need it, and the contexts of their prompts, each computed once."""

    def __init__(self, spec: GenerateSpec, defaults: Plan) -> None:
        self._default = _variant(defaults)
        self._device = pick_device(local_device(spec.device))
        self._dtype = pick_dtype(spec.dtype, self._device)
        self._folder: object = None
        self._variant: object = None
        self._plain: ModelBundle | None = None
        self._bundle: ModelBundle | None = None
        self._words = Words((), ())
        self._forget()

    def micro_batches(self, jobs: Sequence[Job]) -> Iterator[list[Job] | Failed]:
        """The jobs of a window in groups that can be drawn together, those of one model after one another.

        Raises InputError for the model of the command line; jobs that name a faulty one fail.
        """
        self._forget()
        models: dict[object, list[Job]] = {}
        for job in jobs:
            models.setdefault(_variant(job.settings.plan), []).append(job)
        for of_one in sorted(models.values(), key=lambda some: str(some[0].settings.plan.model.folder)):
            try:
                self._ready(of_one[0])
            except SdcliError as error:
                if _variant(of_one[0].settings.plan) == self._default:
                    raise
                yield from (Failed(job.line, error, job) for job in of_one)
                continue
            groups: dict[object, list[Job]] = {}
            for job in of_one:
                groups.setdefault((job.settings.digest, self._reading(job).count), []).append(job)
            for group in groups.values():
                plan = group[0].settings.plan
                size = 1 if plan.latents is not None else drawing.micro_batch_size(group[0].spec, plan)
                yield from (group[first : first + size] for first in range(0, len(group), size))

    def draw(self, jobs: Sequence[Job]) -> Iterator[Denoised | Failed | None]:
        """Denoise a micro-batch; where memory runs out or a number overflows, its halves. None: a step was done."""
        try:
            yield from self._denoised(jobs)
            return
        except (NumericalError, MemoryError, RuntimeError) as error:
            is_memory = is_out_of_memory(error)
            if not is_memory and not isinstance(error, NumericalError):
                raise
            if len(jobs) == 1:
                known = (
                    error if isinstance(error, NumericalError) else ResourceError("out of memory", "use a smaller size")
                )
                yield Failed(jobs[0].line, known, jobs[0])
                return
        half = len(jobs) // 2
        for part in (jobs[:half], jobs[half:]):
            yield from self.draw(part)

    def _forget(self) -> None:
        """Let go of what belongs to the prompts of a window, or to a model."""
        self._contexts: dict[object, Tensor] = {}
        self._readings: dict[object, Reading] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def _denoised(self, jobs: Sequence[Job]) -> Iterator[Denoised | None]:
        began = time.perf_counter()
        plan, bundle = jobs[0].settings.plan, self._ready(jobs[0])
        read = [self._reading(job) for job in jobs]
        context = torch.stack([self._context(one.condition, one.count, is_negative=False) for one in read])
        away = None
        if plan.guidance > 1:
            away = torch.stack([self._context(one.negative, one.count, is_negative=True) for one in read])
        latents, evaluations = torch.empty(0), 0
        picture, seeds = drawing.read_picture(plan), [job.seed for job in jobs]
        for step in drawing.draw_from(bundle, plan, context, away, seeds=seeds, picture=picture):
            latents, evaluations = step.latents, step.index
            yield None
        started = records.picture_facts(plan, picture)
        facts = [self._facts_of(job, evaluations) | started for job in jobs]
        yield Denoised(jobs, facts, latents, time.perf_counter() - began, bundle.vae, picture)

    def _ready(self, job: Job) -> ModelBundle:
        """The model of a job, loaded unless it is the one at hand."""
        plan = job.settings.plan
        if self._bundle is None or self._variant != _variant(job.settings.plan):
            words = drawing.read_words(plan)
            adapters = drawing.read_adapters(plan.loras, plan.model.folder)
            if self._plain is None or self._folder != plan.model.folder:
                self._bundle = self._plain = None  # before the next is there: memory is for one
                self._plain = load_bundle(plan.model.folder, device=self._device, dtype=self._dtype)
                self._folder = plan.model.folder
            self._words, self._bundle = words, drawing.equipped(self._plain, words, adapters)
            self._variant = _variant(job.settings.plan)
            self._forget()
        return self._bundle

    def _reading(self, job: Job) -> Reading:
        """What a job's words are; to be asked while its model is at hand."""
        said = (job.spec.prompt, job.spec.negative, job.settings.digest)
        if said not in self._readings:
            conditioner = self._ready(job).conditioner
            plan = job.settings.plan
            condition, negative, chunks = drawing.conditions_of(job.spec, plan, conditioner, self._words.embeddings)
            (count,) = lengths(conditioner, [condition], negative if plan.guidance > 1 else None)
            self._readings[said] = Reading(condition, negative, chunks, count)
        return self._readings[said]

    @torch.no_grad()
    def _context(self, words: Condition, count: int, *, is_negative: bool) -> Tensor:
        """The context (77 k, D) of a prompt filled to k chunks, encoded alone: its neighbours change no bit of it."""
        name = (words, count, is_negative)
        if name not in self._contexts:
            assert self._bundle is not None
            conditioner = self._bundle.conditioner
            if isinstance(conditioner, TextEncoder):
                reader = text.without_swaps(conditioner) if is_negative else conditioner
                self._contexts[name] = text.encode_chunks(reader, [text.read(reader, str(words)).padded(count)])[0]
            else:
                self._contexts[name] = contexts(conditioner, [words], None)[0][0]
        return self._contexts[name]

    def _facts_of(self, job: Job, evaluations: int) -> dict[str, Any]:
        """The record of a job's picture, but for the seconds."""
        digest = job.settings.digest
        if digest not in self._facts:
            self._facts[digest] = records.shared_facts(job.spec, job.settings.plan, None, self._words.embeddings)
        chunks = self._reading(job).chunks
        own = {"prompt": job.spec.prompt, "negative": job.spec.negative, "seed": job.seed, "evaluations": evaluations}
        counts = {"tokens": chunks.counts()} if chunks is not None else {}
        return self._facts[digest] | own | counts | job.names()


def _variant(plan: Plan) -> object:
    """What tells a model, with the adapters and words that it is given, from another."""
    return plan.model.folder, plan.loras, plan.embeddings, plan.swaps
