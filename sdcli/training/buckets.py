"""The size at which each picture is trained on: one for all, or the nearest of some of about equal area."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdcli.training import data
from sdcli.training.caches import Size

WIDEST = 2.0  # sides of the widest bucket to each other; of the tallest, too


def sizes(dataset: data.Dataset, size: Size, multiple: int, *, are_buckets: bool) -> list[Size]:
    """The size in px at which each of `dataset.pictures` is trained on.

    size: a square. are_buckets: whether pictures keep about their shape, at its area; else all become this square.
    multiple: of which both sides of a bucket are.
    """
    if not are_buckets:
        return [size] * len(dataset.pictures)
    choices = bucket_sizes(size[0], multiple)
    return [nearest(data.picture_size(picture), choices) for picture in dataset.pictures]


def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """Every size of up to `resolution` squared px whose sides are multiples, each as high as its width lets it be."""
    side = max(multiple, resolution // multiple * multiple)
    found = set()
    for width in range(multiple, int(side * math.sqrt(WIDEST)) + 1, multiple):
        height = resolution**2 // width // multiple * multiple
        if height >= multiple and max(width, height) <= WIDEST * min(width, height):
            found |= {(width, height), (height, width)}
    return sorted(found | {(side, side)})


def nearest(size: Size, choices: Sequence[Size]) -> Size:
    """The choice whose shape is nearest to a picture's, by the logarithm of its sides' ratio."""
    shape = math.log(size[0] / size[1])
    return min(choices, key=lambda choice: (abs(math.log(choice[0] / choice[1]) - shape), -choice[0] * choice[1]))
