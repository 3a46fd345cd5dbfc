"""The denoising as pictures, step by step, and as an animation."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from sdcli.pipeline.images import to_images
from sdcli.pipeline.vae import decode_finite

if TYPE_CHECKING:
    from sdcli.pipeline.bundle import Vae

MAX_FRAMES = 100  # of an animation, which are all in memory at its end
FRAME_MS, LAST_MS = 100, 2000
QUALITY = 90


def frames(vae: Vae, latents: Tensor, *, is_last: bool) -> list[Image.Image]:
    """x_t as pictures, its noise included: what there is after a step.

    latents: (B, C, h, w). Solvers in the form x_0 + sigma eps are far wider than latents at first; an image's are
    scaled to the spread of latents, 1, where theirs is larger, so that the VAE sees what it knows. is_last: these are
    the result, which is shown as it is.
    Raises NumericalError as `decode_finite`.
    """
    if not is_last:
        latents = latents / latents.std(dim=(1, 2, 3), keepdim=True).clamp(min=1.0)
    return to_images(decode_finite(vae, latents))


def is_kept(index: int, total: int) -> bool:
    """Whether the frame after step `index` of `total` is part of an animation: all, evenly fewer, always the last.

    Of no steps at all, as from a picture at strength 0, there is one frame: index 0 of 0.
    """
    return index == total or (total - index) % math.ceil(total / MAX_FRAMES) == 0


def animation(shown: Sequence[Image.Image]) -> bytes:
    """A WebP file that shows the frames over and over, the last one longest."""
    times = [FRAME_MS] * (len(shown) - 1) + [LAST_MS]
    stream = io.BytesIO()
    first, *others = shown
    first.save(
        stream,
        format="WEBP",
        save_all=True,
        append_images=others,
        duration=times,
        loop=0,
        quality=QUALITY,
        method=4,
        minimize_size=False,
    )
    return stream.getvalue()
