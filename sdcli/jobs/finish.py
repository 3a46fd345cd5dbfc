"""The second half of a batch's work, in a thread of its own: latents -> pictures on disk -> records in the ledger.

While it decodes and writes, the next images are denoised.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sdcli import generate
from sdcli.errors import NumericalError, OutputError, SdcliError
from sdcli.files import exists
from sdcli.jobs.ledger import Ledger
from sdcli.jobs.plan import Job
from sdcli.pipeline import init, vae
from sdcli.pipeline.images import to_images
from sdcli.pipeline.metadata import read_record

if TYPE_CHECKING:
    from sdcli.pipeline.bundle import Vae

DEPTH = 2  # micro-batches that wait: enough that neither side does, few enough to keep memory flat


@dataclass(frozen=True)
class Finished:
    """An image is there: made, or found (`done` by its record, `adopted` by what the picture says of itself)."""

    job: Job
    facts: Mapping[str, Any]
    how: str


@dataclass(frozen=True)
class Failed:
    """A job whose image was not made, and why; `line` alone where it is no job."""

    line: int
    error: SdcliError
    job: Job | None = None


@dataclass(frozen=True)
class Denoised:
    """A micro-batch on its way to the disk."""

    jobs: Sequence[Job]
    facts: Sequence[Mapping[str, Any]]
    latents: Tensor  # (B, C, h, w)
    seconds: float  # that it took up to here
    vae: Vae
    picture: init.Picture | None  # that all of them start from


Outcome = Finished | Failed


class Finisher:
    """The thread, up to `close`; what goes wrong in it is raised where its results are taken."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._todo: Queue[Denoised | None] = Queue(DEPTH)
        self._done: Queue[Outcome] = Queue()
        self._problem: BaseException | None = None
        self._is_dropping = False
        self._thread = Thread(target=self._work, name="finish")
        self._thread.start()

    def put(self, denoised: Denoised) -> None:
        """Hand over a micro-batch, waiting while there are too many."""
        self._todo.put(denoised)

    def ready(self) -> Iterator[Outcome]:
        """What has come to its end, without waiting. Raises OutputError when the disk refused."""
        while True:
            try:
                yield self._done.get_nowait()
            except Empty:
                break
        if self._problem is not None:
            raise self._problem

    def drained(self) -> Iterator[Outcome]:
        """What comes to its end, until nothing is on its way."""
        self._todo.join()
        yield from self.ready()

    def close(self, *, is_abort: bool) -> None:
        """End the thread; is_abort: what waits is dropped."""
        self._is_dropping = self._is_dropping or is_abort
        self._todo.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (denoised := self._todo.get()) is not None:
            try:
                if not self._is_dropping:
                    for outcome in _finish(denoised, self._ledger):
                        self._done.put(outcome)
            except BaseException as problem:  # noqa: BLE001  raised again by the other thread
                self._problem, self._is_dropping = problem, True
            finally:
                self._todo.task_done()
                del denoised
        self._todo.task_done()


def _finish(denoised: Denoised, ledger: Ledger) -> Iterator[Outcome]:
    """Decode a micro-batch and put its pictures in place; where one is not finite, each alone."""
    began = time.perf_counter()
    try:
        images = to_images(vae.decode_finite(denoised.vae, denoised.latents))
    except NumericalError as error:
        if len(denoised.jobs) == 1:
            yield Failed(denoised.jobs[0].line, error, denoised.jobs[0])
            return
        for one in _each(denoised):
            yield from _finish(one, ledger)
        return
    if denoised.picture is not None:
        images = [init.paste_kept(image, denoised.picture) for image in images]
    seconds = (denoised.seconds + time.perf_counter() - began) / len(images)
    for job, facts, image in zip(denoised.jobs, denoised.facts, images, strict=True):
        try:
            record = generate.write(image, {**facts, "seconds": round(seconds, 3)}, job.target, job.spec)
        except OutputError as error:
            if not exists(job.target):
                raise
            yield _made_meanwhile(job, error)
            continue
        ledger.add(job.key, {**record.facts, "path": job.target.name})
        yield Finished(job, record.facts, "made")


def _made_meanwhile(job: Job, error: OutputError) -> Outcome:
    """What is to be said of a job whose file another process has written: the same picture, or something else."""
    if (read_record(job.target) or {}).get("job") == job.key:
        return Finished(job, {"path": str(job.target), **job.names(), "skipped": True}, "done")
    return Failed(job.line, error, job)


def _each(denoised: Denoised) -> Iterator[Denoised]:
    for index, job in enumerate(denoised.jobs):
        part = slice(index, index + 1)
        seconds = denoised.seconds / len(denoised.jobs)
        yield replace(denoised, jobs=[job], facts=denoised.facts[part], latents=denoised.latents[part], seconds=seconds)
