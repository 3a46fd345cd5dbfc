"""What generate writes beside the pictures: where a sheet of all, a film or frames of the denoising go. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdcli.errors import OutputError, UsageError
from sdcli.files import check_writable, exists, is_folder
from sdcli.plan.naming import (
    SUFFIXES,
    apart,
    check_free,
    check_names,
    check_sides,
    is_output_folder,
    is_template,
    picture_format,
)
from sdcli.specs import GenerateSpec

FRAME = re.compile(r"(?P<picture>.+)-step-\d{4,}\.png", re.DOTALL)


@dataclass(frozen=True)
class Beside:
    """Where all of it goes; what was not asked for goes nowhere."""

    grid: Path | None = None
    film: Path | None = None
    frames: tuple[Path, ...] = ()  # of each picture the path of its frames without their number

    @property
    def folders(self) -> set[Path]:
        """The folders that are written to."""
        return {path.parent for path in (self.grid, self.film, *self.frames) if path is not None}

    def describe(self, last: int) -> dict[str, Any]:
        """The paths as plain values; of frames, `last` of a picture, those of one as `x-step-{0001..0025}.png`."""
        rows: dict[str, Any] = {"grid": str(self.grid)} if self.grid is not None else {}
        if self.film is not None:
            rows["save_steps"] = str(self.film)
        if self.frames:
            numbers = f"{{0001..{last:04d}}}" if last > 1 else f"{last:04d}"
            rows["save_steps"] = [f"{path}-step-{numbers}.png" for path in self.frames]
        return rows


def frame(path: Path, step: int) -> Path:
    """The file of one frame of a picture."""
    return path.with_name(f"{path.name}-step-{step:04d}.png")


def arrange(
    spec: GenerateSpec, paths: Sequence[Path], last: int, settings: Mapping[str, object]
) -> tuple[tuple[Path, ...], Beside]:
    """The paths of the pictures, numbered on where their frames would mix with those of others, and of all beside them.

    last: the number of the last frame of a picture. settings: `width` and `height` in px.
    Raises UsageError for what cannot be such a name, or would be that of a picture, OutputError when it cannot be
    written or is there and must not be replaced.
    """
    steps, film, frames = spec.save_steps, None, tuple[Path, ...]()
    for option, place in (("--grid", spec.grid), ("--save-steps", steps), ("--save-latents", spec.save_latents)):
        if place is not None:
            _check_place(option, place)
    if steps is not None and is_output_folder(steps):
        paths, frames = _with_frames(spec, steps, paths, last)
    elif steps is not None:
        film = steps
        _check_film(film, spec.count, settings)
        _check_extra("--save-steps", film, spec.if_exists, paths)
    if spec.grid is not None:
        _check_extra("--grid", spec.grid, spec.if_exists, paths if film is None else [*paths, film])
        if spec.quality is not None and picture_format(spec.grid, None) == "png":
            what = f"--quality {spec.quality} with --grid {spec.grid}: a PNG picture loses nothing"
            raise UsageError(what, "name a .webp or .jpg file, or leave out --quality")
    return tuple(paths), Beside(spec.grid, film, frames)


def _check_place(option: str, place: Path) -> None:
    if str(place) == "-":
        raise UsageError(f"{option} -: stdout takes a picture alone", "name a file or a folder")
    if is_template(place):
        raise UsageError(f"{option} {place}: has braces, and only --output has fields", "write the name out")


def _with_frames(
    spec: GenerateSpec, folder: Path, paths: Sequence[Path], last: int
) -> tuple[list[Path], tuple[Path, ...]]:
    check_writable(folder)
    there = _pictures_with_frames(folder)
    if spec.if_exists == "number":
        paths = _numbered_on(paths, there)
    frames = tuple(folder / path.name for path in apart([Path(path.stem) for path in paths], "number"))
    for path in frames:
        check_names(frame(path, last), "--save-steps")
        if spec.if_exists == "error" and path.name in there:
            hint = "choose another folder, or another --if-exists"
            raise OutputError(f"{folder}: has steps of a picture {path.name} already", hint)
    return list(paths), frames


def _pictures_with_frames(folder: Path) -> set[str]:
    """The names of pictures, without suffixes, that have frames in a folder."""
    if not is_folder(folder):
        return set()
    return {match["picture"] for path in folder.iterdir() if (match := FRAME.fullmatch(path.name))}


def _numbered_on(paths: Sequence[Path], there: set[str]) -> list[Path]:
    """The same paths, those of pictures that are there, or have frames, with the first number of which neither is."""
    taken, found = set(paths), list[Path]()
    for path in paths:
        one, number = path, 1
        while exists(one) or one.stem in there or (one != path and one in taken):
            number += 1
            one = path.with_name(f"{path.stem}-{number}{path.suffix}")
        taken.add(one)
        found.append(one)
    return found


def _check_film(path: Path, count: int, settings: Mapping[str, object]) -> None:
    if path.suffix.lower() != ".webp":
        raise UsageError(
            f"--save-steps {path}: a film is a .webp file", "name one, or for a picture a step a folder as NAME/"
        )
    if count > 1:
        what = f"--count {count} with --save-steps {path}: a film shows one picture"
        raise UsageError(what, "name a folder")
    check_sides("webp", settings)


def _check_extra(option: str, path: Path, if_exists: str, beside: Sequence[Path]) -> None:
    """Refuse a picture file that is written besides the images, if it is no name for one, or one of theirs."""
    if path.suffix.lower() not in SUFFIXES or is_output_folder(path):
        raise UsageError(f"{option} {path}: is no name of a picture file", f"name a file of {', '.join(SUFFIXES)}")
    if os.path.realpath(path) in map(os.path.realpath, beside):
        raise UsageError(f"{option} {path}: would be the name of a picture, too", "choose another")
    check_names(path, option)
    check_writable(path.parent)
    check_free([path], if_exists)
