"""The sizes at which pictures of several shapes are trained on."""

from __future__ import annotations

import pytest

from sdcli.training.buckets import WIDEST, bucket_sizes, nearest


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (64, 16), (768, 8), (100, 16)])
def test_every_bucket_has_about_the_resolutions_area_and_sides_that_fit_the_unet(
    resolution: int, multiple: int
) -> None:
    choices = bucket_sizes(resolution, multiple)
    for width, height in choices:
        assert width % multiple == height % multiple == 0
        assert width * height <= resolution**2
        assert 1 / WIDEST <= width / height <= WIDEST
        assert (width + multiple) * (height + multiple) > resolution**2  # none could be larger both ways
        assert (height, width) in choices
    assert len(set(choices)) == len(choices)


def test_there_is_a_square_even_where_nothing_else_fits() -> None:
    assert bucket_sizes(8, 16) == [(16, 16)]
    assert (512, 512) in bucket_sizes(512, 64)


def test_a_picture_goes_into_the_bucket_nearest_to_its_shape() -> None:
    choices = bucket_sizes(512, 64)
    assert nearest((1000, 1000), choices) == (512, 512)
    assert nearest((4000, 3000), choices) == (576, 448)
    assert nearest((3000, 4000), choices) == (448, 576)
    assert nearest((9000, 10), choices) == max(choices, key=lambda choice: choice[0] / choice[1])


def test_of_two_buckets_equally_near_the_larger_is_taken() -> None:
    assert nearest((300, 300), [(64, 64), (512, 512), (128, 128)]) == (512, 512)
