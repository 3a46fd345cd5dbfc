"""A folder of pictures -> samples, and the order in which training sees them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sdcli.errors import InputError, SdcliWarning
from sdcli.files import open_regular
from sdcli.pipeline.images import SUFFIXES, fit, load_image, to_pixels
from sdcli.training import layouts
from sdcli.training.samples import Sample

NAMED_AT_MOST = 5


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

    @property
    def pictures(self) -> tuple[Sample, ...]:
        """Every picture once, however often an epoch shows it."""
        return tuple({sample.path: sample for sample in self.samples}.values())


def find(root: Path, caption: str | None = None) -> Dataset:
    """The dataset in a folder, in whichever of the layouts of layouts.py it has.

    caption: one caption for every picture that has none.
    Raises InputError when there is no picture, or a caption or a line of metadata is wrong.
    """
    found = layouts.read(root)
    if found.faults:
        first, more = found.faults[0], len(found.faults) - 1
        also = f" (and {more} faults more; sdcli dataset check names all)" if more else ""
        raise InputError(f"{first.path}: {first.problem}{also}", first.hint)
    if not found.samples:
        raise InputError(f"{root}: holds no picture", f"accepted are {', '.join(sorted(SUFFIXES))}")
    samples = [replace(s, captions=_said(s) or ((caption,) if caption else ())) for s in found.samples]
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
    without = [s.path.name for s in dataset.samples if not s.captions]
    if without:
        raise InputError(
            f"{dataset.root}: {len(without)} of {len(dataset.samples)} pictures have no caption: {_some(without)}",
            "add the captions, or give one to all of these with --caption",
        )


def check(dataset: Dataset, workers: int = 2) -> Iterator[int]:
    """Decode every picture once, yielding how many are done; all that cannot be read are named together.

    Raises InputError at the end if any failed.
    """

    def problem(sample: Sample) -> str | None:
        try:
            load_image(sample.path)
        except InputError as error:
            return error.message
        return None

    problems: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        for done, found in enumerate(pool.map(problem, dataset.pictures), start=1):
            problems += [found] if found else []
            yield done
    if problems:
        raise InputError(
            f"{dataset.root}: {len(problems)} pictures cannot be read: {_some(problems)}", "mend or remove them"
        )


def load_pixels(sample: Sample, resolution: int, crop_by: torch.Generator | None = None) -> Tensor:
    """A sample's picture as (1, 3, resolution, resolution) pixels.

    crop_by: None scales and centre-crops; a generator cuts a random square at the picture's own scale, after
    enlarging it only if its shorter side is below the resolution.
    """
    image = load_image(sample.path)
    if crop_by is None or min(image.size) < resolution:
        return to_pixels(fit(image, resolution, resolution))
    left = int(torch.randint(image.width - resolution + 1, (), generator=crop_by))
    top = int(torch.randint(image.height - resolution + 1, (), generator=crop_by))
    return to_pixels(image.crop((left, top, left + resolution, top + resolution)))


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises InputError when it cannot be read."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _said(sample: Sample) -> tuple[str, ...]:
    """The sample's captions; blank ones say nothing."""
    return sample.captions if any(caption.strip() for caption in sample.captions) else ()


def _manifest(root: Path, samples: list[Sample]) -> str:
    """A hash of names, contents and captions, so that no run goes on with other data than it began with."""
    digest = hashlib.sha256()
    contents: dict[Path, str] = {}
    for sample in samples:
        if sample.path not in contents:
            try:
                contents[sample.path] = content_hash(sample.path)
            except InputError as error:  # `check` names it
                contents[sample.path] = error.message
        row = [sample.path.relative_to(root).as_posix(), contents[sample.path], list(sample.captions)]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMED_AT_MOST])
    more = len(names) - NAMED_AT_MOST
    return f"{shown} and {more} more" if more > 0 else shown
