"""The second half of a batch's work, in a thread of its own: latents -> pictures on disk -> records in the ledger.

While it decodes and writes, the next images are denoised.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import Empty, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sdcli import generate
from sdcli.drawing.ladder import TILED, Ladder
from sdcli.errors import NumericalError, OutputError, ResourceError, SdcliError, is_out_of_memory, out_of_memory
from sdcli.jobs.ledger import Ledger
from sdcli.jobs.plan import Job
from sdcli.pipeline import init
from sdcli.pipeline.images import to_images
from sdcli.pipeline.metadata import read_record
from sdcli.pipeline.offload import is_offloaded

if TYPE_CHECKING:
    from PIL.Image import Image

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
    ladder: Ladder
    picture: init.Picture | None  # that all of them start from


Outcome = Finished | Failed


class Finisher:
    """The thread, up to `close`; what goes wrong in it is raised where its results are taken."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._todo: Queue[Denoised | None] = Queue(DEPTH)
        self._done: Queue[Outcome] = Queue()
        self._problem: BaseException | None = None
        self._drops = Event()  # what waits is not finished any more
        self._thread = Thread(target=self._work, name="finish")
        self._thread.start()

    def put(self, denoised: Denoised) -> None:
        """Hand over a micro-batch, waiting while there are too many, or, where one thread alone may draw with its
        model, until it is finished."""
        self._todo.put(denoised)
        if is_offloaded(denoised.ladder.bundle):
            self.settle()

    def settle(self) -> None:
        """Wait until nothing is on its way."""
        self._todo.join()

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
        self.settle()
        yield from self.ready()

    def close(self, *, is_abort: bool) -> None:
        """End the thread; is_abort: what waits is dropped."""
        if is_abort:
            self._drops.set()
        self._todo.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (denoised := self._todo.get()) is not None:
            try:
                for outcome in () if self._drops.is_set() else _finish(denoised, self._ledger):
                    self._done.put(outcome)
                    if self._drops.is_set():
                        break
            except BaseException as problem:  # noqa: BLE001  raised again by the other thread
                self._problem = problem
                self._drops.set()
            finally:
                self._todo.task_done()
                del denoised
        self._todo.task_done()


def failure_of(job: Job, error: Exception) -> Failed:
    """What is to be said of a job that failed; raises the error where it is a bug, and no fault of the job."""
    if not isinstance(error, SdcliError) and not is_out_of_memory(error):
        raise error
    known = error if isinstance(error, SdcliError) else out_of_memory(hint="use a smaller size")
    return Failed(job.line, known, job)


def _finish(denoised: Denoised, ledger: Ledger) -> Iterator[Outcome]:
    """Decode a micro-batch and put its pictures in place; where one is not finite, or memory runs out, each alone."""
    began = time.perf_counter()
    images: list[Image] = []
    try:
        images = to_images(denoised.ladder.decoded(denoised.latents, of=(TILED,)))
    except (NumericalError, ResourceError, MemoryError, RuntimeError) as error:
        failed = failure_of(denoised.jobs[0], error)
        if len(denoised.jobs) == 1:
            yield failed
            return
    if not images:  # the error, and what it keeps of the memory, is gone
        for one in _each(denoised):
            yield from _finish(one, ledger)
        return
    if denoised.picture is not None:
        images = [init.paste_kept(image, denoised.picture) for image in images]
    seconds = (denoised.seconds + time.perf_counter() - began) / len(images)
    for job, facts, image in zip(denoised.jobs, denoised.facts, images, strict=True):
        saved = denoised.ladder.facts(image.size)
        yield _placed(job, {**facts, **saved, "seconds": round(seconds, 3)}, image, ledger)


def _placed(job: Job, facts: Mapping[str, Any], image: Image, ledger: Ledger) -> Outcome:
    """Put a picture in place, and its record into the ledger."""
    ledger.check_in_place()
    row = {**facts, "path": job.target.name}
    # A picture that says nothing of itself is known by its record alone, which must not come too late.
    is_told_first = job.spec.no_metadata and not os.path.lexists(job.target)
    if is_told_first:
        ledger.add(job.key, row)
    try:
        record = generate.write(image, facts, job.target, job.spec)
    except OutputError as error:
        if not os.path.lexists(job.target):
            raise
        return _made_meanwhile(job, error)
    if not is_told_first:
        ledger.add(job.key, row)
    return Finished(job, record.facts, "made")


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
