"""Say which concept a picture shows: the one whose plain rendering is nearest.

Distance: mean squared error of 32x32 RGB pictures, the least over small shifts and scales of the rendering.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdcli.builtin import recipe

SIZE_PX = 64  # of the renderings, and of every picture before it is compared
SHIFTS_PX = (-2, -1, 0, 1, 2)
SCALES = (0.9, 1.0, 1.1)

Array = NDArray[np.float32]


def reference_views(concepts: Sequence[recipe.Concept]) -> list[Array]:
    """Show every concept on white at each shift and scale of the search.

    Returns one (concepts, 32 * 32 * 3) array for each of the 75 shifts and scales.
    """
    reach = max(SHIFTS_PX)
    views = []
    for scale in SCALES:
        large = np.stack([np.asarray(recipe.render(c, SIZE_PX, fill=recipe.LARGE * scale)) for c in concepts])
        padded = np.pad(large, ((0, 0), (reach, reach), (reach, reach), (0, 0)), constant_values=255)
        for down, right in itertools.product(SHIFTS_PX, repeat=2):
            rows, columns = (slice(reach - shift, reach - shift + SIZE_PX) for shift in (down, right))
            views.append(_halve(padded[:, rows, columns]))
    return views


def nearest(pictures: Sequence[Image.Image], views: Sequence[Array]) -> list[int]:
    """Find, for each picture, the concept (its row in the views) with the least distance over all views."""
    resized = [p.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS) for p in pictures]
    seen = _halve(np.stack([np.asarray(picture) for picture in resized]))  # (pictures, 3072)
    # |a - b|^2 less |a|^2, which is the same for all candidates
    distances = [(view**2).sum(axis=1) - 2 * seen @ view.T for view in views]
    least = np.minimum.reduce(distances)  # (pictures, concepts)
    return [int(row) for row in least.argmin(axis=1)]


def _halve(pixels: NDArray[np.uint8]) -> Array:
    """Average (N, 64, 64, 3) in [0, 255] over blocks of 2x2, to (N, 3072) in [0, 1]."""
    blocks = pixels.reshape(len(pixels), SIZE_PX // 2, 2, SIZE_PX // 2, 2, 3)
    means: Array = blocks.mean(axis=(2, 4), dtype=np.float32) / 255
    return means.reshape(len(pixels), -1)
