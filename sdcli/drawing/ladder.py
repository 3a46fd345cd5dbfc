"""A model to draw with, and what is done when memory runs out: one measure after the other, each kept from then on.

Fewer images at once; the UNet on one row of its batch after the other; the VAE in tiles; the parts of the model on the
device one after the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from sdcli.errors import ResourceError, SdcliWarning, is_out_of_memory
from sdcli.pipeline import offload, vae
from sdcli.pipeline.bundle import ModelBundle
from sdcli.pipeline.device import give_back

SLICED, TILED, OFFLOADED = "sliced", "tiled", "offloaded"
OF_DECODING = (TILED, OFFLOADED)
HINT = "use a smaller size or batch"

Item = TypeVar("Item")


class Ladder:
    """The model as it is drawn with now, how many images at once, and what has been done to save memory."""

    def __init__(
        self,
        bundle: ModelBundle,
        size: int,
        *,
        rungs: Sequence[str] | None = None,
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        """rungs: the measures there are, in order; None: those that help this model. settle: waits until no other
        thread draws with it."""
        self.bundle, self.size = bundle, size
        self._rungs = list(rungs if rungs is not None else measures(bundle))
        self._settle = settle
        self._done: list[str] = []
        self._lock = Lock()

    def facts(self) -> dict[str, Any]:
        """What the record of an image says of this: nothing where memory sufficed."""
        return {"saved_memory": list(self._done)} if self._done else {}

    def portions(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        """Images in portions that are drawn together."""
        return [items[first : first + self.size] for first in range(0, len(items), self.size)]

    def relieve(self, count: int, *, of: Sequence[str] = (SLICED, TILED, OFFLOADED)) -> bool:
        """Take the next measure after memory ran out for so many images at once; False where none is left.

        of: the measures that may help.
        """
        give_back()
        with self._lock:
            if count > 1:
                self.size = min(self.size, (count + 1) // 2)
                self._tell(f"batch of {self.size}")
                return True
            rung = next((one for one in self._rungs if one in of), None)
            if rung is None:
                return False
            self._rungs.remove(rung)
            self.bundle = self.eased(self.bundle, rung)
            self._tell(rung)
            return True

    def again(self, bundle: ModelBundle) -> None:
        """Go on with another model, to which is done what was done to the one before."""
        for rung in (SLICED, TILED, OFFLOADED):
            bundle = self.eased(bundle, rung) if rung in self._done else bundle
        self.bundle = bundle

    def eased(self, bundle: ModelBundle, rung: str) -> ModelBundle:
        """A model after one measure."""
        if rung == SLICED:
            return replace(bundle, is_sliced=True)
        if rung == TILED:
            return replace(bundle, vae=vae.tiled(bundle.vae))
        self._settle()
        device = bundle.device
        return offload.placed(offload.brought_home(bundle), device, "model")

    def decoded(self, latents: Tensor, *, of: Sequence[str] = OF_DECODING) -> Tensor:
        """Pixels of latents as `decode_finite` gives them; where memory runs out, one by one, then after measures.

        Raises ResourceError where none is left, and as `decode_finite`.
        """
        while True:
            try:
                return vae.decode_finite(self.bundle.vae, latents)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            if len(latents) > 1:  # the error, and what it keeps of the memory, is gone
                give_back()
                return torch.cat([self.decoded(one, of=of) for one in latents.split(1)])
            if not self.relieve(1, of=of):
                raise ResourceError("out of memory", HINT)

    def _tell(self, measure: str) -> None:
        batch = [one for one in self._done if not one.startswith("batch") or not measure.startswith("batch")]
        self._done = [*batch, measure]
        warnings.warn(f"out of memory: going on {WORDS.get(measure, f'with a {measure}')}", SdcliWarning, stacklevel=3)


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
