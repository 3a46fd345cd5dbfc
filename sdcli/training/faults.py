"""What is wrong with a dataset, all of it and before the first step, and what of it can be mended."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdcli.errors import InputError
from sdcli.files import atomic_write, open_regular, read_bytes
from sdcli.pipeline.images import SUFFIXES, file_format, read_image, suffixes_of
from sdcli.training import layouts
from sdcli.training.known import content_hash
from sdcli.training.loop import Preparing
from sdcli.training.samples import MAX_CAPTION_BYTES, Fault, Layout, Sample, class_names
from sdcli.training.shards import PACK_ANEW

MIN_SIDE = 8  # px: the smallest picture that training accepts
OLD_ENCODING = "cp1252"  # of texts that are no Unicode; where it is wrong, letters are, and no caption is lost


@dataclass(frozen=True)
class Checked:
    """The end of a check: how the folder is laid out, its pictures, how many say what they show, its classes."""

    layout: str
    pictures: int
    captions: int
    classes: int


def find(root: Path, *, workers: int = 2) -> Iterator[Preparing | Fault | Checked]:
    """Look at every caption and every picture of a folder: yields each fault, and at the end what was looked at.

    Raises InputError when there is no such folder, or its table is none.
    """
    found = layouts.read(root)
    yield from found.faults
    if not found.samples and not found.faults:
        yield Fault("folder", str(root), "holds no picture", f"accepted are {', '.join(sorted(SUFFIXES))}")
    pictures = _pictures(found)
    custom = _Custom(
        has_captions=any(_says_something(sample) for sample in found.samples),
        has_classes=any(sample.label is not None for sample in found.samples),
        table=found.table,
    )
    originals: dict[str, Path] = {}
    with ThreadPoolExecutor(workers) as pool:
        looked_at = pool.map(partial(_faults_of, custom=custom), pictures)
        for done, (sample, (faults, content)) in enumerate(zip(pictures, looked_at, strict=True), start=1):
            yield from faults
            if content is not None and originals.setdefault(content, sample.place) != sample.place:
                same = originals[content].relative_to(root)
                yield _fault("duplicate", sample, f"is the same picture as {same}", "remove one of them")
            yield Preparing("reading pictures", done, len(pictures))
    captions = sum(_says_something(sample) for sample in pictures)
    yield Checked(found.name, len(pictures), captions, len(class_names(pictures)))


def mend(fault: Fault) -> bool:
    """Mend a fault where nothing is lost by it: a caption is saved as UTF-8, a picture named as what it is.

    Returns whether it is mended: not where it cannot be, or where the name is taken.
    Raises OutputError when the folder cannot be written.
    """
    if not fault.is_mendable:
        return False
    path = Path(fault.path)
    if fault.kind == "encoding":
        text = _decoded(read_bytes(path, max_bytes=MAX_CAPTION_BYTES))
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8")
        return True
    with open_regular(path) as stream:
        target = path.with_suffix(suffixes_of(file_format(stream, path))[0])
    if target.exists():
        return False
    path.rename(target)
    return True


@dataclass(frozen=True)
class _Custom:
    """What other pictures of a dataset have, so that each should, and the table that names them if there is one."""

    has_captions: bool
    has_classes: bool
    table: Path | None


def _pictures(found: Layout) -> list[Sample]:
    """Every picture once; of one that is listed several times, a listing that says nothing before those that do."""
    pictures: dict[Path, Sample] = {}
    for sample in found.samples:
        if sample.place not in pictures or not _says_something(sample):
            pictures[sample.place] = sample
    return list(pictures.values())


def _says_something(sample: Sample) -> bool:
    return any(caption.strip() for caption in sample.captions)


def _faults_of(sample: Sample, *, custom: _Custom) -> tuple[list[Fault], str | None]:
    """What is wrong with one picture, and the hash of its bytes unless it cannot be read."""
    place = sample.place
    try:
        with sample.open() as stream:
            image = read_image(stream, place)
            stream.seek(0)
            form = file_format(stream, place)
    except InputError as error:
        return [_fault("picture", sample, error.message.removeprefix(f"{place}: "), error.hint)], None
    faults = []
    if min(image.size) < MIN_SIDE:
        what = f"is {image.width} x {image.height} px"
        faults.append(_fault("size", sample, what, f"at least {MIN_SIDE} x {MIN_SIDE} are needed"))
    if place.suffix.lower() not in suffixes_of(form):
        faults.append(_misnamed(sample, form, custom.table))
    if custom.has_captions and not _says_something(sample):
        text = place.with_suffix(".txt").name
        hint = f"write {text}" if custom.table is None else f"say what it shows in {custom.table.name}"
        faults.append(_fault("no caption", sample, "has no caption", hint))
    if custom.has_classes and sample.label is None:
        label = place.with_suffix(".cls").name
        hint = f"write {label}" if custom.table is None else f"add its label to {custom.table.name}"
        faults.append(_fault("no class", sample, "has no class", hint))
    return faults, content_hash(sample)


def _misnamed(sample: Sample, form: str, table: Path | None) -> Fault:
    """The fault of a picture whose suffix says another format. It is renamed only where no table would lose it."""
    target = sample.place.with_suffix(suffixes_of(form)[0])
    hint = f"rename it to {target.name}" + (f", in {table.name} too" if table is not None else "")
    is_mendable = table is None and sample.member is None and not target.exists()
    return _fault("suffix", sample, f"holds {form}", hint, is_mendable=is_mendable)


def _fault(kind: str, sample: Sample, problem: str, hint: str, *, is_mendable: bool = False) -> Fault:
    hint = f"{hint}; {PACK_ANEW}" if sample.member is not None else hint
    return Fault(kind, str(sample.place), problem, hint, is_mendable)


def _decoded(data: bytes) -> str:
    is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_utf_16 else OLD_ENCODING, errors="replace")
