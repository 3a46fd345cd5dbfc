"""What is wrong with a dataset, all of it and before the first step, and what of it can be mended."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdcli.errors import InputError
from sdcli.files import atomic_write, open_regular, read_bytes
from sdcli.pipeline.images import file_format, read_image, suffixes_of
from sdcli.training import layouts
from sdcli.training.data import content_hash
from sdcli.training.loop import Preparing
from sdcli.training.samples import MAX_CAPTION_BYTES, Fault, Sample

MIN_SIDE = 8  # px: the smallest picture that training accepts
OLD_ENCODING = "cp1252"  # of texts that are not UTF-8; where it is wrong, letters are, and no caption is lost


@dataclass(frozen=True)
class Checked:
    """The end of a check: how the folder is laid out, and how many pictures it holds."""

    layout: str
    pictures: int


def find(root: Path, *, workers: int = 2) -> Iterator[Preparing | Fault | Checked]:
    """Look at every caption and every picture of a folder: yields each fault, and at the end what was looked at.

    Raises InputError when there is no such folder, or its metadata.csv is no table.
    """
    found = layouts.read(root)
    yield from found.faults
    pictures = {sample.place: sample for sample in found.samples}
    has_captions = any(_says_something(sample) for sample in found.samples)
    originals: dict[str, Path] = {}
    with ThreadPoolExecutor(workers) as pool:
        looked_at = pool.map(partial(_faults_of, has_captions=has_captions), pictures.values())
        for done, (sample, (faults, content)) in enumerate(zip(pictures.values(), looked_at, strict=True), start=1):
            yield from faults
            if content is not None and originals.setdefault(content, sample.place) != sample.place:
                same = originals[content].relative_to(root)
                yield Fault("duplicate", str(sample.place), f"is the same file as {same}", "remove one of them")
            yield Preparing("reading pictures", done, len(pictures))
    yield Checked(found.name, len(pictures))


def mend(fault: Fault) -> bool:
    """Mend a fault where nothing is lost by it: a caption is saved as UTF-8, a picture named as what it is.

    Raises OutputError when the folder cannot be written.
    """
    if not fault.is_mendable:
        return False
    path = Path(fault.path)
    if fault.kind == "encoding":
        text = read_bytes(path, max_bytes=MAX_CAPTION_BYTES).decode(OLD_ENCODING, errors="replace")
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8")
        return True
    if fault.kind == "suffix":
        with open_regular(path) as stream:
            target = path.with_suffix(suffixes_of(file_format(stream, path))[0])
        if target.exists():
            return False
        path.rename(target)
        return True
    return False


def _says_something(sample: Sample) -> bool:
    return any(caption.strip() for caption in sample.captions)


def _faults_of(sample: Sample, *, has_captions: bool) -> tuple[list[Fault], str | None]:
    """What is wrong with one picture, and the hash of its bytes unless it cannot be read."""
    path = sample.place
    try:
        with sample.open() as stream:
            image = read_image(stream, path)
            stream.seek(0)
            form = file_format(stream, path)
    except InputError as error:
        return [Fault("picture", str(path), error.message.removeprefix(f"{path}: "), error.hint)], None
    faults = []
    if min(image.size) < MIN_SIDE:
        what = f"is {image.width} x {image.height} px"
        faults.append(Fault("size", str(path), what, f"at least {MIN_SIDE} x {MIN_SIDE} are needed"))
    if path.suffix.lower() not in suffixes_of(form):
        hint = f"rename it to {path.with_suffix(suffixes_of(form)[0]).name}"
        faults.append(Fault("suffix", str(path), f"holds {form}", hint, is_mendable=sample.member is None))
    if has_captions and not _says_something(sample):
        faults.append(Fault("no caption", str(path), "has no caption", f"write {path.with_suffix('.txt').name}"))
    return faults, content_hash(sample)
