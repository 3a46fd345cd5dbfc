"""What a run of generate makes beside the pictures: their denoising as frames or a film, and a sheet of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdcli.drawing.ladder import Ladder
from sdcli.files import exists, place
from sdcli.pipeline import film, sheets
from sdcli.pipeline.metadata import picture_bytes, png_bytes
from sdcli.pipeline.sampling import Step
from sdcli.plan import Plan
from sdcli.plan.beside import frame
from sdcli.plan.naming import picture_format
from sdcli.specs import GenerateSpec

Written = tuple[Path, dict[str, Any]]  # a file, and what its record says


class Steps:
    """The denoising: frames that are written as they come, or kept for the film that follows the last."""

    def __init__(self, plan: Plan, ladder: Ladder, if_exists: str) -> None:
        self._plan, self._ladder, self._if_exists = plan, ladder, if_exists
        self._shown: list[Image.Image] = []
        self._told: dict[int, int] = {}  # of an image the last step that was shown

    def after(self, step: Step, ids: Sequence[int]) -> Iterator[Written]:
        """What is to be written after a step of the images of these numbers."""
        beside, is_last = self._plan.beside, step.index == step.total
        if beside.film is not None and not film.is_kept(step.index, step.total):
            return
        if all(self._told.get(i, -1) >= step.index for i in ids):  # drawn again, as memory ran out
            return
        images = film.frames(self._ladder.coder(step.latents), step.latents, is_last=is_last)
        self._told |= dict.fromkeys(ids, step.index)
        if beside.film is not None:
            self._shown += images
            if is_last:
                facts = {"seed": self._plan.seeds[ids[0]], "frames": len(self._shown)}
                yield from self._placed(film.animation(self._shown), beside.film, facts)
            return
        for i, image in zip(ids, images, strict=True):
            path, facts = frame(beside.frames[i], step.index), {"seed": self._plan.seeds[i], "step": step.index}
            yield from self._placed(png_bytes(image, None), path, {**facts, "t": step.t})

    def _placed(self, data: bytes, path: Path, facts: dict[str, Any]) -> Iterator[Written]:
        if not (self._if_exists == "skip" and exists(path)):
            yield place(data, path, self._if_exists), facts


class Sheet:
    """The contact sheet of `count` pictures: over them what they all show, else under each what it alone does."""

    def __init__(self, target: Path, count: int) -> None:
        self._target, self._count = target, count
        self._tiles: list[Image.Image] = []
        self._seeds: list[int] = []
        self._shown: list[str] = []

    def add(self, image: Image.Image, seed: int, shown: str) -> None:
        """Keep a picture, at the size that it has on the sheet. shown: what it is of, in words."""
        self._tiles.append(sheets.tile(image, self._count))
        self._seeds.append(seed)
        self._shown.append(shown)

    def write(self, spec: GenerateSpec) -> Written:
        """Put the sheet of the pictures so far in place, unless it is there and to be kept."""
        if spec.if_exists == "skip" and exists(self._target):
            return self._target, {"skipped": True}
        captions, heading = [f"seed {seed}" for seed in self._seeds], self._shown[0]
        if len(set(self._shown)) > 1:
            captions = [f"{seed}\n{shown}" for seed, shown in zip(captions, self._shown, strict=True)]
            heading = ""
        sheet = sheets.contact_sheet(self._tiles, captions, heading)
        data = picture_bytes(sheet, None, picture_format(self._target, None), spec.quality)
        return place(data, self._target, spec.if_exists), {"grid": list(self._seeds)}
