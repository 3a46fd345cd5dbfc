"""The first half of a batch's work: jobs -> micro-batches of equal settings -> latents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sdcli import drawing
from sdcli.drawing import Words, records
from sdcli.drawing.ladder import Ladder, measures, of_denoising
from sdcli.drawing.reading import Reader, Reading
from sdcli.errors import InputError, SdcliError, is_out_of_memory
from sdcli.jobs.finish import Denoised, Failed, failure_of
from sdcli.jobs.plan import Job
from sdcli.pipeline import offload
from sdcli.pipeline.bundle import ModelBundle, load_bundle
from sdcli.pipeline.compiling import check_compiler
from sdcli.pipeline.device import pick_dtype
from sdcli.plan import Plan
from sdcli.specs import GenerateSpec


class Studio:
    """One model at a time, as the jobs at hand need it, and the contexts of their prompts, each computed once."""

    def __init__(
        self, defaults: Plan, device: torch.device, spec: GenerateSpec, settle: Callable[[], object] = lambda: None
    ) -> None:
        """spec: the options of the whole run. settle: waits until what was drawn is decoded."""
        self._default = _variant(defaults)
        self._device, self._dtype, self._spec = device, pick_dtype(spec.dtype, device), spec
        self._settle = settle
        self._folder: object = None
        self._variant: object = None
        self._plain: ModelBundle | None = None
        self._ladder: Ladder | None = None
        self._words = Words((), ())
        self._reader: Reader | None = None
        self._facts: dict[str, dict[str, Any]] = {}

    def micro_batches(self, jobs: Sequence[Job]) -> Iterator[list[Job] | Failed]:
        """The jobs of a window in groups that can be drawn together, those of one model after one another.

        Raises InputError for the model of the command line; jobs that name a faulty one fail.
        """
        if self._reader is not None:
            self._reader.forget()
        self._facts.clear()
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
                most = 1 if plan.latents is not None else drawing.micro_batch_size(group[0].spec, plan)
                while group:
                    size = most if self._ladder is None else self._ladder.together(most, (plan.width, plan.height))
                    yield group[:size]
                    group = group[size:]

    def draw(self, jobs: Sequence[Job]) -> Iterator[Denoised | Failed | None]:
        """Denoise a micro-batch; where a number or a file fails, its halves, where memory runs out, these, and then
        again after what saves some. None: a step is done."""
        try:
            yield from self._denoised(jobs)
            return
        except (SdcliError, MemoryError, RuntimeError) as error:
            failed, lacks_memory = failure_of(jobs[0], error), is_out_of_memory(error)
        is_relieved = lacks_memory and self._relieved(jobs)
        if len(jobs) == 1 and not is_relieved:
            yield failed
            return
        del failed  # what it keeps of the memory is needed
        half = (len(jobs) + 1) // 2
        for part in filter(None, (jobs[:half], jobs[half:])):
            yield from self.draw(part)

    def _denoised(self, jobs: Sequence[Job]) -> Iterator[Denoised | None]:
        began = time.perf_counter()
        plan, (ladder, reader) = jobs[0].settings.plan, self._ready(jobs[0])
        bundle = ladder.bundle_for((plan.width, plan.height))
        reader.ask(bundle.conditioner)
        context, away = reader.contexts([self._reading(job) for job in jobs])
        latents, evaluations = torch.empty(0), 0
        picture, seeds = drawing.read_picture(plan), [job.seed for job in jobs]
        for step in drawing.draw_from(bundle, plan, context, away, seeds=seeds, picture=picture):
            latents, evaluations = step.latents, step.index
            yield None
        started = records.picture_facts(plan, picture) | records.precision_facts(bundle)
        facts = [self._facts_of(job, evaluations) | started for job in jobs]
        _check_unchanged(jobs[0], facts[0])
        yield Denoised(jobs, facts, latents, time.perf_counter() - began, ladder, picture)

    def _relieved(self, jobs: Sequence[Job]) -> bool:
        """Whether something was done to save memory, after it ran out for these images at once."""
        plan = jobs[0].settings.plan
        of = of_denoising(has_guidance=plan.guidance > 1, has_vae=plan.initial is not None)
        return self._ladder is not None and self._ladder.relieve(len(jobs), (plan.width, plan.height), of=of)

    def _ready(self, job: Job) -> tuple[Ladder, Reader]:
        """The model of a job, loaded unless it is the one at hand, and what reads its words."""
        plan = job.settings.plan
        variant = _variant(plan), job.settings.additions
        if self._ladder is None or self._reader is None or self._variant != variant:
            words = drawing.read_words(plan)
            adapters = drawing.read_adapters(plan.loras, plan.model.folder)
            if self._plain is None or self._folder != plan.model.folder:
                self._ladder = self._plain = self._reader = None  # before the next is there: memory is for one
                self._plain = self._loaded(plan)
                self._folder = plan.model.folder
            bundle = drawing.prepared(
                drawing.equipped(self._plain, words, adapters),
                how_offloaded=self._spec.offload,
                is_compiled=self._spec.compile,
                is_tiled=self._spec.tiling,
            )
            if self._ladder is None:
                rungs = measures(bundle, is_exact=self._spec.deterministic)
                self._ladder = Ladder(bundle, rungs, settle=self._settle)
            else:
                self._ladder.again(bundle)
            self._words, self._variant = words, variant
            self._reader = Reader(self._ladder.bundle.conditioner, words.embeddings)
            self._facts.clear()
        return self._ladder, self._reader

    def _loaded(self, plan: Plan) -> ModelBundle:
        if self._spec.compile:
            check_compiler(self._device)
        home = offload.home(self._device, self._spec.offload)
        loaded = load_bundle(plan.model.folder, device=home, dtype=self._dtype, is_lean=not self._spec.compile)
        return replace(loaded, device=self._device)

    def _reading(self, job: Job) -> Reading:
        """What a job's words are; to be asked while its model is at hand."""
        _, reader = self._ready(job)
        return reader.read(job.prompts, job.settings.plan)

    def _facts_of(self, job: Job, evaluations: int) -> dict[str, Any]:
        """The record of a job's picture, but for what the end of its drawing tells."""
        digest = job.settings.digest
        if digest not in self._facts:
            self._facts[digest] = records.shared_facts(job.spec, job.settings.plan, self._words.embeddings)
        words = records.word_facts(job.prompts, self._reading(job))
        return self._facts[digest] | words | {"seed": job.seed, "evaluations": evaluations} | job.names()


def _check_unchanged(job: Job, facts: Mapping[str, Any]) -> None:
    """Raise InputError where a file is not the one that the job's hash tells of."""
    for name, expected in job.settings.contents.items():
        told = facts.get(name, [])
        for one, digest in zip(told, expected, strict=True) if isinstance(told, list) else [(told, expected)]:
            if one["sha256"] != digest:
                what = f"{one['file']}: was changed while the batch ran"
                raise InputError(what, "the same command again draws from what it is now")


def _variant(plan: Plan) -> object:
    """What tells a model, with the adapters and words that it is given, from another."""
    return plan.model.folder, plan.loras, plan.embeddings, plan.swaps, plan.clip_skip
