"""Where results go: names from a prompt, and what a path may be. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from sdcli.errors import OutputError, UsageError
from sdcli.files import check_writable, is_folder
from sdcli.specs import MAX_SEED, GenerateSpec

SLUG_LENGTH = 60
MAX_NAME_BYTES = 255  # of a file, on every file system in common use


def targets(spec: GenerateSpec, seed: int, subject: str) -> tuple[Path, ...]:
    """The path of each image: the file named (numbered from the second image on), or a name of its own in a folder.

    subject: what the pictures show, in words.
    Raises OutputError when the folder cannot be written, or a file is there that must not be replaced.
    """
    if str(spec.output) == "-":
        return (spec.output,)
    check_names(spec.output)
    many = is_output_folder(spec.output)
    folder = spec.output if many else spec.output.parent
    if not many and spec.output.suffix.lower() != ".png":
        raise UsageError(f"--output {spec.output}: pictures are written as PNG", "name a .png file or a folder")
    check_writable(folder)
    if many:
        names = [f"{slug(subject)}-{(seed + i) % (MAX_SEED + 1)}.png" for i in range(spec.count)]
    else:
        names = [spec.output.name] + [f"{spec.output.stem}-{i}.png" for i in range(2, spec.count + 1)]
    paths = tuple(folder / name for name in names)
    check_free(paths, spec.if_exists)
    return paths


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
