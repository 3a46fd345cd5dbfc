"""A picture and the one drawn again: how far apart their pixels are, and what differs in what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sdcli.archive.foreign import shown
from sdcli.pipeline import lossy, measures
from sdcli.pipeline.images import to_pixels
from sdcli.pipeline.metadata import picture_bytes

TOLERANCE = 2  # of 255: what a batch may move a pixel by
# What a record tells that is no setting, or that may differ without moving a pixel.
NOT_COMPARED = frozenset({
    *("path", "seconds", "saved_latents", "source", "raw", "job", "id", "model", "sampler"),
    "saved_memory",  # of which only tiles move a pixel, and these are told by themselves
})  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """equal: `bytes`, `pixels` or None; differences in 1/255, and in dB, None where the sizes are two.

    encoded: how the picture drawn again was brought into the file's lossy format; None where nothing is lost.
    """

    equal: str | None
    largest: int | None
    mean: float | None
    psnr: float | None
    encoded: str | None

    @property
    def is_within(self) -> bool:
        return self.largest is not None and self.largest <= TOLERANCE

    def facts(self) -> dict[str, Any]:
        """By the names of the record."""
        facts = {"equal": self.equal, "within": self.is_within, "largest": self.largest, "mean": self.mean}
        return facts | {"psnr": self.psnr, **({"encoded": self.encoded} if self.encoded is not None else {})}


def compare(data: bytes, there: Image.Image, drawn: Image.Image, record: Mapping[str, Any] | None) -> Comparison:
    """How far a picture drawn again is from the one in a file.

    data: the file, `there` its pixels. A lossy file is compared with what its format leaves of the picture drawn.
    record: what would be written into the picture drawn; None where nothing is.
    """
    again = lossy.encoded_as(drawn, data)
    encoded = None
    if again.is_lossy:
        encoded = f"{again.form} {f'quality {again.quality}' if again.quality is not None else 'with its own tables'}"
    if again.image.size != there.size:
        return Comparison(None, None, None, None, encoded)
    apart = np.abs(np.asarray(again.image, dtype=np.int16) - np.asarray(there, dtype=np.int16))
    equal = "pixels" if not apart.any() else None
    is_known = again.quality is not None or not again.is_lossy
    if equal and is_known and picture_bytes(drawn, record, again.form, again.quality) == data:
        equal = "bytes"
    psnr = measures.psnr(to_pixels(there), to_pixels(again.image)).item()
    return Comparison(equal, int(apart.max()), round(float(apart.mean()), 4), round(psnr, 2), encoded)


def drift(there: Mapping[str, Any], here: Mapping[str, Any], *, is_own: bool) -> list[str]:
    """What a picture says and the one drawn again says otherwise, a sentence each.

    is_own: whether it has our record, in which what is missing is missing, too; hashes of others are not compared here.
    """
    found = []
    for name in dict.fromkeys([*there, *(here if is_own else ())]):
        if name in NOT_COMPARED or (not is_own and (name not in here or name == "model_hash")):
            continue
        if there.get(name) != here.get(name):
            found.append(f"{name}: {_told(there.get(name))} there, {_told(here.get(name))} here")
    return found


def _told(value: object) -> str:
    return shown(value) if value is not None else "nothing"
