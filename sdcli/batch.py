"""STORY: a job file, or jobs as they come -> the images that are missing -> a ledger of those that are there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from sdcli.errors import InputError, OutputError, PartialError, Stopped, UsageError
from sdcli.files import exists
from sdcli.jobs import lines, plan
from sdcli.jobs.album import arrange, one_at_a_time
from sdcli.jobs.finish import Failed as Failed  # one of the events
from sdcli.jobs.finish import Finished, Finisher, Outcome
from sdcli.jobs.ledger import Ledger, opened
from sdcli.jobs.plan import Checked, Job, Resolver
from sdcli.jobs.stdin import stdin_lines
from sdcli.jobs.studio import Studio
from sdcli.jobs.tally import Tally
from sdcli.pages.gallery import MAX_PICTURES, write_gallery
from sdcli.pipeline.device import local_device, pick_device
from sdcli.pipeline.metadata import read_record
from sdcli.plan.naming import GALLERY
from sdcli.specs import BatchSpec

WINDOW = 1024  # jobs among which those of equal settings are sought


@dataclass(frozen=True)
class Progress:
    """How many images have come to their end, of all of this process; of stdin, of those that have been asked for."""

    done: int
    total: int
    what: str = "images"


@dataclass(frozen=True)
class Gallery:
    """The page that shows what lies in the folder, and how many pictures it has room for and not."""

    path: Path
    pictures: int
    left_out: int


@dataclass(frozen=True)
class Summary:
    """What became of the images: made now, found on the disk without a record, there before, not made."""

    made: int
    adopted: int
    done: int
    failed: int


Event = Progress | Finished | Failed | Summary | Gallery


def run(spec: BatchSpec, checked: Checked, stop: Sequence[int]) -> Iterator[Event]:
    """Make the images that the output folder lacks, yielding each as it comes to its end.

    stop: the numbers of signals so far; after the first, the images in flight are finished.
    Raises PartialError at the end when a job failed, Stopped after a signal, LockedError, InputError for the model of
    the command line, OutputError when the disk refuses.
    """
    share = plan.share(spec, os.environ)
    if share[1] > 1 and str(spec.jobs) == "-":
        raise UsageError("--shard of stdin: one process reads it", "put the jobs into a file")
    device = pick_device(local_device(spec.defaults.device))
    with opened(spec.defaults.output, share) as ledger:
        work = _Work(spec, checked, ledger, stop, share, device)
        finisher = Finisher(ledger)
        is_whole = False
        ended: PartialError | Stopped | None = None
        try:
            yield from work.through(finisher)
            is_whole = True
        except (PartialError, Stopped) as error:  # a gallery shows what there is all the same
            ended = error
        finally:
            finisher.close(is_abort=not is_whole)
        if spec.gallery:
            yield from _gallery(spec, checked.lines)
        if ended is not None:
            raise ended


def _gallery(spec: BatchSpec, lines: int) -> Iterator[Event]:
    """A page of all that the ledger has, in the order of the jobs; of stdin, and of other jobs, as they were made."""
    folder, is_stream = spec.defaults.output, str(spec.jobs) == "-"
    with one_at_a_time(folder):
        jobs = () if is_stream else plan.good_jobs(spec, (1, 1), lines)
        album = arrange(folder, (job.target.name for job in jobs), MAX_PICTURES)
        for done in write_gallery(folder, album.records(), album.left_out):
            yield Progress(done, len(album.places), "thumbnails")
    if int(os.environ.get("RANK", "0")) == 0:  # of processes launched together all write it, so that the last is whole
        yield Gallery(folder / GALLERY, len(album.places), album.left_out)


class _Work:
    """One run over the jobs, and the count of what became of them."""

    def __init__(
        self,
        spec: BatchSpec,
        checked: Checked,
        ledger: Ledger,
        stop: Sequence[int],
        share: tuple[int, int],
        device: torch.device,
    ) -> None:
        self._spec, self._ledger, self._stop, self._defaults = spec, ledger, stop, checked.defaults
        self._device, self._lines = device, checked.lines
        self._is_stream = str(spec.jobs) == "-"
        self._bad = checked.bad  # lines, told of before the first image
        self._counts = {"made": 0, "adopted": 0, "done": 0, "failed": checked.bad}
        self._total = len(range(share[0] - 1, checked.images, share[1]))
        self._share = share
        self._claimed = Tally()  # by this run, whatever became of them

    def through(self, finisher: Finisher) -> Iterator[Event]:
        """All windows, one after another."""
        studio = None
        for window in self._windows():
            todo, repeats = [], []
            for one in window:
                if isinstance(one, Job) and self._claimed.get(one.key):  # perhaps on its way just now
                    repeats.append(one)
                    continue
                outcome = self._there(one) if isinstance(one, Job) else one
                if outcome is not None:
                    yield from self._counted([outcome])
                elif isinstance(one, Job):
                    self._claimed.add(one.key)
                    todo.append(one)
            if todo:
                studio = studio or Studio(self._defaults, self._device, self._spec.defaults, finisher.settle)
                yield from self._made(studio, todo, finisher)
            if repeats or self._is_stream:  # who waits for a record before writing the next line is not kept waiting
                yield from self._counted(finisher.drained())
                yield from self._counted(map(self._repeated, repeats))
            if self._is_stream:  # what is sent once more later on is looked for anew
                self._claimed = Tally() if window else self._claimed
            yield from self._ended_early(finisher)
        yield from self._counted(finisher.drained())
        yield Summary(**self._counts)
        if self._counts["failed"]:
            hint = "mend them; the same command again makes what is missing"
            raise PartialError(f"{self._counts['failed']} of {sum(self._counts.values())} jobs failed", hint)

    def _made(self, studio: Studio, todo: list[Job], finisher: Finisher) -> Iterator[Event]:
        for some in studio.micro_batches(todo):
            yield from self._ended_early(finisher)
            for half in [some] if isinstance(some, Failed) else studio.draw(some):
                if isinstance(half, Failed):
                    yield from self._counted([half])
                elif half is not None:
                    finisher.put(half)
                yield from self._counted(finisher.ready())

    def _ended_early(self, finisher: Finisher) -> Iterator[Event]:
        """After a signal, or too many failures: finish what is in flight, then raise why."""
        most = self._spec.max_failures
        if not self._stop and (most is None or self._counts["failed"] - self._bad < most):
            return
        yield from self._counted(finisher.drained())
        yield Summary(**self._counts)
        hint = "the same command again makes what is missing"
        if self._stop:
            raise Stopped(self._stop[0], f"stopped; {hint}")
        raise PartialError(f"stopped: --max-failures {most} is reached", hint)

    def _counted(self, outcomes: Iterable[Outcome]) -> Iterator[Event]:
        for outcome in outcomes:
            kind = outcome.how if isinstance(outcome, Finished) else "failed"
            self._counts[kind] += 1
            if isinstance(outcome, Finished) and kind != "done":
                self._ledger.note(outcome.job.key, outcome.job.target.name)
            if kind != "done" or self._is_stream:
                yield outcome
            ended = sum(self._counts.values())
            yield Progress(ended, max(ended, self._total))

    def _there(self, job: Job) -> Outcome | None:
        """What is to be said of a job whose file is there; None where the image is to be made."""
        if not os.path.lexists(job.target):
            return None
        path = {"path": str(job.target)}
        if self._ledger.has(job.key, job.target.name) and exists(job.target):
            record = (read_record(job.target) or job.names()) if self._is_stream else {}
            return Finished(job, {**path, **record, "skipped": True}, "done")
        record = read_record(job.target) or {}
        if record.get("job") == job.key:
            self._ledger.add(job.key, {**record, "path": job.target.name})
            return Finished(job, {**path, **record, "adopted": True}, "adopted")
        if self._spec.defaults.if_exists == "overwrite":
            return None
        if self._spec.defaults.if_exists == "skip":
            return Finished(job, {**path, **job.names(), "skipped": True}, "done")
        error = OutputError(f"{job.target}: exists and is another picture", "use another id, or --if-exists")
        return Failed(job.line, error, job)

    def _repeated(self, job: Job) -> Outcome:
        """What is to be said of a job that is equal to one before it, seed and all."""
        outcome = self._there(job)
        if outcome is not None:
            return outcome
        return Failed(job.line, OutputError(f"{job.target}: the same job failed before", "see there"), job)

    def _windows(self) -> Iterator[Sequence[Job | Failed]]:
        """The jobs of this process by the thousand, or as many as stand on stdin; waits there, unless it is to stop."""
        if not self._is_stream:
            rest = plan.good_jobs(self._spec, self._share, self._lines)
            while window := list(islice(rest, WINDOW)):
                yield window
            return
        resolver = Resolver(self._spec)
        for arrived in stdin_lines(WINDOW):
            asked: list[Job | Failed] = [one for number, data in arrived for one in self._asked(resolver, number, data)]
            self._total += len(asked)
            yield asked

    def _asked(self, resolver: Resolver, number: int, data: bytes | None) -> Iterator[Job | Failed]:
        """The images of a line of stdin."""
        line = lines.parse_json(self._spec.jobs, number, data)
        try:
            yield from resolver.jobs(line) if line is not None else ()
        except InputError as error:
            yield Failed(number, error)
