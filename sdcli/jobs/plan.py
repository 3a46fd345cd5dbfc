"""The lines of a job file -> the images they ask for, every default decided, or what is wrong with a line. No torch.

A file is read twice, a line at a time: once to find all that is wrong, once to draw. What has to be remembered of the
lines for that is in `Tally`, so that memory does not grow with them.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize

from sdcli import layout, store
from sdcli.checks import MAX_SEED, parse_shard
from sdcli.errors import InputError, SdcliWarning, UsageError
from sdcli.files import check_writable
from sdcli.jobs import inputs, lines
from sdcli.jobs.lines import Line
from sdcli.jobs.tally import Tally, key_of
from sdcli.pipeline import wildcards
from sdcli.pipeline.prompt import networks
from sdcli.pipeline.wildcards import Prompts, Template
from sdcli.plan import Plan, plan
from sdcli.plan.conditioning import asked_label
from sdcli.plan.lora_files import content
from sdcli.plan.naming import check_gallery, slug
from sdcli.plan.words import drawn_prompts, embedding_file, read_prompts, warn_of_networks
from sdcli.specs import BatchSpec, GenerateSpec

MOST_SETTINGS = 256  # kept at a time: jobs that differ in more than prompt and seed ask for a plan of their own
MOST_NAMED = 5  # bad lines told of with what is wrong; the others by number
MOST_RANGES = 50  # of the numbers of bad lines, in an error
SLUG_LENGTH = 40
JOB_SEED_BITS = 32  # short enough to be typed again
# What differs among jobs that are drawn together.
OF_A_JOB = frozenset({"prompt", "negative", "seed", "count"})
RESOLVED = frozenset(
    {"model", "steps", "scheduler", "guidance", "size", "width", "height", "class_name", "lora", "embedding"}
)


@dataclass(frozen=True)
class Settings:
    """What jobs that may be drawn together have in common, and its hash."""

    plan: Plan
    classes: tuple[str, ...] | None
    digest: str
    contents: Mapping[str, Any]  # by their field of a record the SHA-256 of the files that are named, or of several
    additions: str  # a hash of what inputs.FILES_AND_MORE add to the model


@dataclass(frozen=True)
class Job:
    """One image to make."""

    line: int
    id: str | None
    spec: GenerateSpec
    settings: Settings
    seed: int
    prompts: Prompts  # wildcards drawn by the seed
    key: str  # the hash of what is to be drawn and by which model
    target: Path

    def names(self) -> dict[str, Any]:
        """What a record says of the job besides the picture."""
        return {"job": self.key, **({"id": self.id} if self.id is not None else {})}


@dataclass
class Checked:
    """What a job file asks for, and what is wrong with it."""

    defaults: Plan  # of the options alone
    images: int = 0
    lines: int = 0
    bad: int = 0
    first: list[InputError] = dataclasses.field(default_factory=list)
    ranges: list[list[int]] = dataclasses.field(default_factory=list)  # of bad lines, first and last

    def add(self, error: InputError, number: int) -> None:
        """Count a bad line."""
        self.bad += 1
        self.first += [error] if len(self.first) < MOST_NAMED else []
        if self.ranges and self.ranges[-1][1] == number - 1:
            self.ranges[-1][1] = number
        elif len(self.ranges) <= MOST_RANGES:
            self.ranges.append([number, number])

    def error(self, path: Path) -> InputError:
        """All that is wrong, in one sentence."""
        if self.bad == 1:
            return self.first[0]
        shown = [str(a) if a == b else f"{a}-{b}" for a, b in self.ranges[:MOST_RANGES]]
        numbers = ", ".join(shown) + (" and more" if len(self.ranges) > MOST_RANGES else "")
        hint = "nothing was made: mend them, or --keep-going makes the others"
        return InputError(f"{path}: {self.bad} of {self.lines} lines are bad: {numbers}", hint)


def plan_batch(spec: BatchSpec) -> Checked:
    """Look at every line of the job file, naming the first bad ones in warnings; of stdin only at the options.

    Raises UsageError for an option, OutputError when the folder cannot be written, InputError when there is no such
    file, it asks for nothing, or lines of it are bad and `--keep-going` was not given.
    """
    checked = Checked(_plan_defaults(spec))
    if str(spec.jobs) == "-":
        return checked
    resolver, names, alike = Resolver(spec, opens_pictures=True), Tally(), Tally()
    named = dict[str, None]()
    for line in lines.read(spec.jobs):
        checked.lines += 1
        try:
            for job in _named_apart(resolver, line, names, spec.jobs):
                checked.images += 1
                named |= dict.fromkeys(networks(job.prompts.prompt, job.prompts.negative))
                if job.id is not None and alike.add(key_of(normalize("NFC", job.target.name.casefold()))):
                    note = f"{spec.jobs}:{line.number}: id: {job.id} and another differ in case or accents' form alone"
                    warnings.warn(f"{note}: one file on macOS and Windows", SdcliWarning, stacklevel=2)
        except InputError as error:
            checked.add(error, line.number)
    if spec.dry_run:  # else they are told of when they are drawn
        warn_of_networks(named)
    if not checked.lines:
        raise InputError(f"{spec.jobs}: holds no job", "write a job a line")
    for wrong in checked.first if spec.keep_going or checked.bad > 1 else ():
        warnings.warn(str(wrong), SdcliWarning, stacklevel=2)
    if checked.bad and (not spec.keep_going or not checked.images):
        raise checked.error(spec.jobs)
    return checked


def share(spec: BatchSpec, environment: Mapping[str, str]) -> tuple[int, int]:
    """Which share of the images this process makes, as (I, N): that of `--shard`, cut once more among the processes
    that `accelerate launch` or `torchrun` began."""
    index, count = parse_shard(spec.shard)
    world, rank = (int(environment.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    return (index - 1) * world + rank + 1, count * world


def good_jobs(spec: BatchSpec, share_of: tuple[int, int], most: int | None = None) -> Iterator[Job]:
    """The images of this process's share, in the order of the file; bad lines were told of before.

    most: lines that were looked at; what was written below them since is for the next call. None: all.
    Raises InputError for a bad line where there was none before.
    """
    resolver, names, index = Resolver(spec), Tally(), 0
    for line in islice(lines.read(spec.jobs), most):
        try:
            for job in _named_apart(resolver, line, names, spec.jobs):
                if index % share_of[1] == share_of[0] - 1:
                    yield job
                index += 1
        except InputError:
            if not spec.keep_going:
                raise


def _named_apart(resolver: Resolver, line: Line, names: Tally, source: Path) -> Iterator[Job]:
    """The images of a line. Raises InputError, before the first, where one has the file name of another job's."""
    for index, job in enumerate(resolver.jobs(line)):
        if job.id is not None and not index:
            own = [f"{_name(job.id, i)}{job.target.suffix}" for i in range(job.spec.count)]
            taken = next((name for name in own if names.get(key_of(name))), None)
            if taken is not None:
                what = f"id: {job.id} gives {taken}, as another job does"
                raise lines.located(source, line.number, what, "give every job an id of its own")
            for name in own:
                names.add(key_of(name))
        yield job


def _name(job_id: str, index: int) -> str:
    """The file name, without its suffix, of a job's image, counted from 0."""
    return f"{job_id}-{index + 1}" if index else job_id


class Resolver:
    """Makes images of lines; it remembers how many equal ones there were, for their seeds."""

    def __init__(self, spec: BatchSpec, *, opens_pictures: bool = False) -> None:
        """opens_pictures: whether a picture that cannot be decoded is found now, and not when it is drawn from."""
        self._spec, self._opens_pictures = spec, opens_pictures
        self._own = _own(spec.defaults)
        of_pictures = {"strength": spec.strength, "mask": spec.mask}
        self._of_pictures = {name: value for name, value in of_pictures.items() if value is not None}
        self._settings: OrderedDict[tuple[Any, ...], Settings] = OrderedDict()
        self._equal = Tally()

    def jobs(self, line: Line) -> Iterator[Job]:
        """The images of a line. Raises InputError, with the number, for all that is wrong with it."""
        if line.error is not None:
            raise line.error
        try:
            values = self._of_pictures | line.values if "init_image" in line.values else line.values
            asked = GenerateSpec(**_merged(self._own, values))
            settings = self._settings_of(asked, line)
            templates = read_prompts(asked)
            asked_label(asked, settings.classes)
            yield from self._images(line, asked, settings, templates)
        except (UsageError, InputError) as error:
            raise lines.located(self._spec.jobs, line.number, error.message.removeprefix("--"), error.hint) from error

    def _images(
        self, line: Line, asked: GenerateSpec, settings: Settings, templates: tuple[Template, Template]
    ) -> Iterator[Job]:
        said = json.dumps([settings.digest, asked.prompt, asked.negative])
        first = asked.seed
        if first is None:
            base = json.dumps([said, line.id])
            equal = self._equal.add(key_of(base)) if line.id is None else 0  # an id is one job's alone
            first = int(key_of(f"{base}:{equal}"), 16) % (1 << JOB_SEED_BITS)
        seeds = [(first + index) % (MAX_SEED + 1) for index in range(asked.count)]
        drawn = [drawn_prompts(*templates, seed) for seed in seeds]  # all before the first: a line is good or bad
        for index, (seed, prompts) in enumerate(zip(seeds, drawn, strict=True)):
            name = _name(line.id, index) if line.id is not None else None
            key = key_of(json.dumps([said, seed, name]))
            if name is None:
                label = settings.plan.label
                words = slug(prompts.prompt if label is None else label.name)[:SLUG_LENGTH].strip("-")
                name = f"{words}-{key}"
            target = asked.output / f"{name}.{asked.format or 'png'}"
            yield Job(line.number, line.id, asked, settings, seed, prompts, key, target)

    def _settings_of(self, asked: GenerateSpec, line: Line) -> Settings:
        """What a job shares with others, worked out once for all of them, and again when a file of theirs changes."""
        said = tuple((key, value) for key, value in sorted(line.values.items()) if key not in OF_A_JOB)
        name = (said, *map(inputs.stamp, inputs.files(asked)))
        found = self._settings.get(name)
        if found is None:
            found = _settings(asked)
            if self._opens_pictures and found.plan.initial is not None:
                inputs.check_pictures(found.plan.initial)
            self._settings[name] = found
            if len(self._settings) > MOST_SETTINGS:
                self._settings.popitem(last=False)
        return found


def _plan_defaults(spec: BatchSpec) -> Plan:
    """What the options alone decide. Raises UsageError, InputError for a model, OutputError for the folder."""
    check_writable(spec.defaults.output)
    if spec.gallery:
        check_gallery(spec.defaults.output, spec.defaults.if_exists)
    classes = layout.classes(store.resolve(spec.defaults.model, offline=spec.defaults.offline).folder)
    if classes is None:
        some = replace(spec.defaults, prompt="x")
    else:
        some = replace(spec.defaults, class_name=spec.defaults.class_name or ("0" if classes else None))
    return plan(_alone(some), may_lack_picture=True)


def _own(defaults: GenerateSpec) -> dict[str, Any]:
    return {one.name: getattr(defaults, one.name) for one in dataclasses.fields(defaults)}


def _merged(own: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A job's settings over those of the command line; a size in either form takes the place of both."""
    merged = own | values
    if "size" in values:
        merged |= {name: values.get(name) for name in ("width", "height")}
    elif "width" in values or "height" in values:
        merged["size"] = None
    # A Hub id of a job must be in the cache already: what stands in a file opens no socket.
    return merged | {"offline": True} if values.get("model", own["model"]) != own["model"] else merged


def _alone(asked: GenerateSpec) -> GenerateSpec:
    """The same for one picture of any name, to be planned; of wildcards, which its seed is to draw, all choices."""
    prompt, negative = (wildcards.template(text).choices for text in (asked.prompt, asked.negative))
    asked = replace(asked, prompt=prompt, negative=negative, count=1)
    return replace(asked, output=asked.output / f"x.{asked.format or 'png'}", if_exists="number")


def _settings(asked: GenerateSpec) -> Settings:
    """What is drawn how, and the hash of all of it but prompt, negative prompt and seed."""
    decided = plan(_alone(asked))
    facts: dict[str, Any] = {
        "model": store.model_hash(decided.model),
        "schedule": decided.scheduler_config,  # no part of the weights: what the UNet predicts, and the noise it knows
        "scheduler": [decided.scheduler.name, dict(decided.scheduler.choices)],
        "steps": decided.steps,
        "guidance": decided.guidance,
        "size": [decided.width, decided.height],
        "label": dataclasses.asdict(decided.label) if decided.label is not None else None,
        **({"lora": [content(one) for one in decided.loras]} if decided.loras else {}),
        "embedding": [[inputs.content(one.path), one.token] for one in map(embedding_file, asked.embedding)],
    }
    contents: dict[str, Any] = {
        "loras": [digest for digest, _ in facts.get("lora", [])],
        "embeddings": [digest for digest, _ in facts["embedding"]],
    }
    for one in dataclasses.fields(GenerateSpec):
        value = getattr(asked, one.name)
        if one.name not in BatchSpec.OF_THE_RUN | OF_A_JOB | RESOLVED and value != one.default:
            facts[one.name] = str(value)
            if isinstance(value, Path):
                facts[one.name] = contents[one.name] = inputs.content(value)
    digest = key_of(json.dumps(facts, sort_keys=True))
    additions = key_of(json.dumps([facts[name] for name in inputs.FILES_AND_MORE if name in facts]))
    return Settings(decided, layout.classes(decided.model.folder), digest, contents, additions)
