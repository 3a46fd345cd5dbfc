"""Where results go: names from a prompt, and what a path may be. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sdcli.errors import OutputError, UsageError
from sdcli.files import check_writable, is_folder
from sdcli.specs import MAX_SEED, GenerateSpec

SLUG_LENGTH = 60
SUFFIXES = {".png": "png", ".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg"}
MAX_NAME_BYTES = 255  # of a file, on every file system in common use


def targets(spec: GenerateSpec, seed: int, subject: str) -> tuple[Path, ...]:
    """The path of each image: the file named (numbered from the second image on), or a name of its own in a folder.

    subject: what the pictures show, in words.
    Raises OutputError when the folder cannot be written, or a file is there that must not be replaced.
    """
    many = is_output_folder(spec.output)
    form = picture_format(Path() if many else spec.output, spec.format)
    check_quality(form, spec.quality)
    if str(spec.output) == "-":
        return (spec.output,)
    check_names(spec.output)
    folder = spec.output if many else spec.output.parent
    check_writable(folder)
    if many:
        names = [f"{slug(subject)}-{(seed + i) % (MAX_SEED + 1)}.{form}" for i in range(spec.count)]
    else:
        stem, suffix = spec.output.stem, spec.output.suffix.lower()
        names = [spec.output.name] + [f"{stem}-{i}{suffix}" for i in range(2, spec.count + 1)]
    paths = tuple(folder / name for name in names)
    check_free(paths, spec.if_exists)
    return paths


def picture_format(output: Path, asked: str | None) -> str:
    """The format of a picture, `png`, `webp` or `jpg`: by its suffix if it has one, else the one asked for, else PNG.

    Raises UsageError for a suffix that names none of them, or another than asked for.
    """
    suffix = output.suffix.lower()
    if not suffix:
        return asked if asked is not None else "png"
    if suffix not in SUFFIXES:
        kinds = ", ".join(SUFFIXES)
        raise UsageError(f"--output {output}: is of no kind of picture", f"name a file of {kinds}, or a folder")
    if asked not in (None, SUFFIXES[suffix]):
        raise UsageError(f"--output {output} with --format {asked}: contradict each other", "leave out --format")
    return SUFFIXES[suffix]


def check_quality(form: str, quality: int | None) -> None:
    """Raise UsageError for a quality of what has none."""
    if quality is not None and form == "png":
        raise UsageError(f"--quality {quality}: a PNG picture loses nothing", "leave it out, or use --format webp")


def is_output_folder(output: Path) -> bool:
    """Whether `--output` means a folder: one that is there, or a name without a suffix."""
    return is_folder(output) or output.suffix == ""


def slug(subject: str) -> str:
    """A prompt, or the name of a class, as a file name: lower-case letters and digits, words joined by hyphens."""
    words = "".join(c if c.isalnum() else " " for c in subject.lower()).split()
    name = "-".join(words).encode()[: SLUG_LENGTH * 2].decode(errors="ignore")[:SLUG_LENGTH].strip("-")
    return name or "image"


def check_names(output: Path) -> None:
    """Raise OutputError when a name in the path is longer than file systems take."""
    for name in output.parts:
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise OutputError(f"--output {name[:40]}...: has over {MAX_NAME_BYTES} bytes", "choose a shorter name")


def check_free(targets: Iterable[Path], if_exists: str) -> None:
    """Raise OutputError when a file is there although `--if-exists error` forbids it."""
    for path in targets:
        if if_exists == "error" and path.exists():
            raise OutputError(f"{path}: exists", "choose another name, or --if-exists number, skip or overwrite")
