"""A folder of pictures -> samples, and the order in which training sees them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from sdcli.errors import InputError, SdcliWarning
from sdcli.pipeline.images import SUFFIXES, fit, read_image, read_size, to_pixels
from sdcli.training import layouts
from sdcli.training.known import Known
from sdcli.training.order import mixed_seed
from sdcli.training.samples import Sample, class_names, some


@dataclass(frozen=True)
class Dataset:
    """The samples of a folder in a fixed order, and how they were found."""

    root: Path
    layout: str
    samples: tuple[Sample, ...]
    manifest_hash: str

    @property
    def has_captions(self) -> bool:
        """Whether any sample says what it shows."""
        return any(sample.captions for sample in self.samples)

    @cached_property
    def pictures(self) -> tuple[Sample, ...]:
        """Every picture once, however often an epoch shows it."""
        return tuple({sample.place: sample for sample in self.samples}.values())

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, each at its index; none where no sample has one."""
        return class_names(self.samples)


def find(root: Path, caption: str | None = None) -> Dataset:
    """The dataset in a folder, in whichever of the layouts of layouts.py it has.

    caption: one caption for every picture that has none; without it and any caption, a picture's class is its caption.
    Raises InputError when there is no picture, or a caption or a line of metadata is wrong.
    """
    found = layouts.read(root)
    if found.faults:
        first, more = found.faults[0], len(found.faults) - 1
        also = f" (and {more} faults more; sdcli dataset check names all)" if more else ""
        raise InputError(f"{first.path}: {first.problem}{also}", first.hint)
    if not found.samples:
        raise InputError(f"{root}: holds no picture", f"accepted are {', '.join(sorted(SUFFIXES))}")
    says_nothing = not any(_said(sample) for sample in found.samples)
    samples = [replace(s, captions=_said(s) or _otherwise(s, caption, says_nothing)) for s in found.samples]
    return Dataset(root, found.name, tuple(samples), _manifest(root, samples))


def check_captions(dataset: Dataset) -> None:
    """Refuse a dataset in which some pictures have captions and some have none; warn when none has one.

    Raises InputError.
    """
    if not dataset.has_captions:
        warnings.warn(
            f"{dataset.root}: no picture has a caption, so the model is trained without text; to add captions, write "
            'a.txt beside a.png, or metadata.jsonl, or give one to all with --caption "..."',
            SdcliWarning,
            stacklevel=2,
        )
        return
    without = [s.name(dataset.root) for s in dataset.samples if not s.captions]
    if without:
        raise InputError(
            f"{dataset.root}: {len(without)} of {len(dataset.samples)} pictures have no caption: {some(without)}",
            "add the captions, or give one to all of these with --caption",
        )


def check(dataset: Dataset, workers: int = 2) -> Iterator[int]:
    """Decode every picture once, yielding how many are done; all that cannot be read are named together.

    One that an earlier start decoded, and that has not changed since, is not decoded again.
    Raises InputError at the end if any failed.
    """
    known = Known(dataset.root)

    def problem(sample: Sample) -> str | None:
        if known.is_decoded(sample):
            return None
        try:
            load_image(sample)
        except InputError as error:
            return error.message
        known.note_decoded(sample)
        return None

    problems: list[str] = []
    try:
        with readers(workers) as pool:
            for done, found in enumerate(pool.map(problem, dataset.pictures), start=1):
                problems += [found] if found else []
                yield done
    finally:  # a start that is stopped here has not looked in vain
        known.save(dataset.pictures)
    if problems:
        raise InputError(
            f"{dataset.root}: {len(problems)} pictures cannot be read: {some(problems)}", "mend or remove them"
        )


def split(dataset: Dataset, share: float, seed: int) -> tuple[list[int], list[int]]:
    """The samples that train and those held out, every picture on one side alone, however often it is shown.

    share: of the pictures to hold out; above 0 it is at least one of them, and one is always left to train on.
    Raises InputError where there is one picture alone.
    """
    pictures = [sample.place for sample in dataset.pictures]
    if share > 0 and len(pictures) < 2:
        raise InputError(f"{dataset.root}: holds one picture, and --holdout needs another", "leave it out")
    count = min(max(round(share * len(pictures)), 1), len(pictures) - 1) if share > 0 else 0
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(mixed_seed(seed, "holdout")))
    held_out = {pictures[i] for i in order[:count].tolist()}
    sides: tuple[list[int], list[int]] = ([], [])
    for i, sample in enumerate(dataset.samples):
        sides[sample.place in held_out].append(i)
    return sides


def load_image(sample: Sample) -> Image.Image:
    """A sample's picture, from its file or out of its tar. Raises InputError and warns as `images.load_image` does."""
    with sample.open() as stream:
        return read_image(stream, sample.place)


def picture_size(sample: Sample) -> tuple[int, int]:
    """Width and height in px of a sample's picture as it is meant to be seen. Errors as in `load_image`."""
    with sample.open() as stream:
        return read_size(stream, sample.place)


def readers(count: int) -> ThreadPoolExecutor:
    """Threads that read beside the one that computes, each on one core.

    OpenMP would give each a team of its own. With more threads than cores it lets none wait actively, and each of the
    short kernels of a step on a CPU ends in a system call.
    """
    torch.get_num_threads()  # settles that of the thread that asks, before the readers' becomes the default
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def load_pixels(sample: Sample, size: tuple[int, int], crop_by: torch.Generator | None = None) -> Tensor:
    """A sample's picture as (1, 3, H, W) pixels.

    size: width and height in px. crop_by: None scales and centre-crops; a generator cuts a random part of that size at
    the picture's own scale, after enlarging it only if a side of it is below.
    """
    image = load_image(sample)
    width, height = size
    if crop_by is None or image.width < width or image.height < height:
        return to_pixels(fit(image, width, height))
    left = int(torch.randint(image.width - width + 1, (), generator=crop_by))
    top = int(torch.randint(image.height - height + 1, (), generator=crop_by))
    return to_pixels(image.crop((left, top, left + width, top + height)))


def _said(sample: Sample) -> tuple[str, ...]:
    """The sample's captions; blank ones say nothing."""
    return sample.captions if any(caption.strip() for caption in sample.captions) else ()


def _otherwise(sample: Sample, caption: str | None, says_nothing: bool) -> tuple[str, ...]:
    """What stands for the captions of a sample that has none.

    says_nothing: whether the whole dataset has none: beside captions a class would be another language.
    """
    if caption:
        return (caption,)
    return (sample.label,) if sample.label is not None and says_nothing else ()


def _manifest(root: Path, samples: list[Sample]) -> str:
    """A hash of names, contents and captions, so that no run goes on with other data than it began with."""
    digest = hashlib.sha256()
    contents: dict[Path, str] = {}
    known = Known(root)
    for sample in samples:
        if sample.place not in contents:
            try:
                contents[sample.place] = known.content(sample)
            except InputError as error:  # `check` names it
                contents[sample.place] = error.message
        row = [sample.name(root), contents[sample.place], list(sample.captions)]
        digest.update(json.dumps(row if sample.label is None else [*row, sample.label]).encode())
    known.save(samples)
    return digest.hexdigest()
