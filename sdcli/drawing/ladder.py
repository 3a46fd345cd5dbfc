"""A model to draw with, and what is done when memory runs out: one measure after the other.

Fewer images at once; the UNet on one row of its batch after the other; the VAE in tiles; the parts of the model on the
device one after the other. All but the last hold only for what is as large as that for which memory ran out, so that
what is smaller is drawn as if nothing had happened; the last changes no picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sdcli.errors import SdcliWarning, is_out_of_memory, out_of_memory
from sdcli.pipeline import offload, vae
from sdcli.pipeline.bundle import ModelBundle
from sdcli.pipeline.device import give_back

if TYPE_CHECKING:
    from sdcli.pipeline.bundle import Vae

SLICED, TILED, OFFLOADED = "sliced", "tiled", "offloaded"

Item = TypeVar("Item")
Size = tuple[int, int]  # (width, height) of an image in pixels


class Ladder:
    """A model, how many images are drawn at once, and what has been done to save memory, for images of which size."""

    def __init__(
        self, bundle: ModelBundle, rungs: Sequence[str], *, settle: Callable[[], object] = lambda: None
    ) -> None:
        """rungs: the measures there are, in order. settle: waits until no other thread draws with the model."""
        self.bundle = bundle
        self._rungs, self._settle = rungs, settle
        self._least: dict[str, int] = {}  # pixels of an image from which on a measure holds
        self._most: int | None = None  # pixels of all images that are drawn at once

    def bundle_for(self, size: Size) -> ModelBundle:
        """The model as images of a size are drawn with."""
        is_sliced, is_tiled = self._holds(SLICED, size), self._holds(TILED, size)
        coder = vae.tiled(self.bundle.vae) if is_tiled else self.bundle.vae
        return replace(self.bundle, is_sliced=is_sliced, vae=coder)

    def facts(self, size: Size) -> dict[str, Any]:
        """What the record of an image of a size says of this: nothing where it was drawn at once, and memory sufficed.

        To be asked after it is decoded.
        """
        saved = [rung for rung in (SLICED, TILED, OFFLOADED) if self._holds(rung, size)]
        is_tiled = vae.is_tiled(self.bundle_for(size).vae) and self._is_beyond_a_tile(size)
        return {**({"saved_memory": saved} if saved else {}), **({"tiling": True} if is_tiled else {})}

    def together(self, most: int, size: Size) -> int:
        """How many images of a size are drawn at once, of so many that may be."""
        return most if self._most is None else max(1, min(most, self._most // _pixels(size)))

    def portions(self, items: Sequence[Item], size: Size) -> list[Sequence[Item]]:
        """Images of a size in portions that are drawn at once."""
        count = self.together(len(items), size)
        return [items[first : first + count] for first in range(0, len(items), count)]

    def relieve(self, count: int, size: Size, *, of: Sequence[str]) -> bool:
        """Take the next measure after memory ran out for so many images of a size at once; False where none is left.

        of: the measures that may help. Those of OFFLOADED are no thread's but that which denoises.
        """
        if OFFLOADED in of:
            self._settle()
        give_back()
        if count > 1:
            self._limit((count + 1) // 2 * _pixels(size))
            _tell(f"with a batch of {self.together(count, size)}")
            return True
        rung = next((one for one in self._rungs if one in of and self._may_help(one, size)), None)
        if rung is None:
            return False
        self._limit(_pixels(size))
        if rung == OFFLOADED:
            self.bundle = _offloaded(self.bundle)
        self._least[rung] = 0 if rung == OFFLOADED else _pixels(size)
        _tell(WORDS[rung])
        return True

    def again(self, bundle: ModelBundle) -> None:
        """Go on with another model, to which is done what was done to the one before."""
        if OFFLOADED in self._least:
            self._settle()
            bundle = _offloaded(bundle)
        self.bundle = bundle

    def coder(self, latents: Tensor) -> Vae:
        """The VAE as it decodes latents (B, C, h, w)."""
        return self.bundle_for(self._size(latents)).vae

    def decoded(self, latents: Tensor, *, of: Sequence[str] = (TILED, OFFLOADED)) -> Tensor:
        """Pixels of latents as `decode_finite` gives them; where memory runs out, one by one, then after measures.

        Raises ResourceError where none is left, and as `decode_finite`.
        """
        while True:
            try:
                return vae.decode_finite(self.coder(latents), latents)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            if len(latents) > 1:  # the error, and what it keeps of the memory, is gone
                give_back()
                return torch.cat([self.decoded(one, of=of) for one in latents.split(1)])
            if not self.relieve(1, self._size(latents), of=of):
                raise out_of_memory()

    def _holds(self, rung: str, size: Size) -> bool:
        return rung in self._least and _pixels(size) >= self._least[rung]

    def _may_help(self, rung: str, size: Size) -> bool:
        """Whether a measure is not taken yet for a size, and would change anything."""
        return not self._holds(rung, size) and (rung != TILED or self._is_beyond_a_tile(size))

    def _is_beyond_a_tile(self, size: Size) -> bool:
        return max(size) > vae.TILE * vae.factor(self.bundle.vae)

    def _limit(self, pixels: int) -> None:
        self._most = pixels if self._most is None else min(self._most, pixels)

    def _size(self, latents: Tensor) -> Size:
        height, width = latents.shape[-2:]
        f = vae.factor(self.bundle.vae)
        return f * width, f * height


WORDS = {
    SLICED: "with one row of the UNet's batch at a time",
    TILED: "with the VAE in tiles",
    OFFLOADED: "with one part of the model on the device at a time",
}


def measures(bundle: ModelBundle, *, is_exact: bool = False) -> list[str]:
    """What can be done for a model, in the order in which it is tried.

    is_exact: what changes no bit of a picture alone.
    """
    found = [] if is_exact else [SLICED, *([TILED] if not vae.is_tiled(bundle.vae) else [])]
    # In main memory weights are mapped from their file: the system takes them away by itself.
    return found if bundle.device.type == "cpu" or offload.is_offloaded(bundle) else [*found, OFFLOADED]


def of_denoising(*, has_guidance: bool, has_vae: bool) -> list[str]:
    """The measures that may help where memory ran out in denoising one image.

    has_guidance: whether the UNet is given two rows for it. has_vae: whether the VAE works there, too.
    """
    return [*([SLICED] if has_guidance else []), *([TILED] if has_vae else []), OFFLOADED]


def _pixels(size: Size) -> int:
    return size[0] * size[1]


def _offloaded(bundle: ModelBundle) -> ModelBundle:
    return offload.placed(offload.brought_home(bundle), bundle.device, "model")


def _tell(how: str) -> None:
    warnings.warn(f"out of memory: going on {how}", SdcliWarning, stacklevel=4)
