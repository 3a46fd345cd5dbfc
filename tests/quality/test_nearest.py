"""The judge of the quality measurement finds what it is shown."""

import numpy as np
import pytest
from nearest import Array, nearest, reference_views
from PIL import Image, ImageChops, features

from sdcli.builtin import recipe

pytestmark = pytest.mark.skipif(
    not (recipe.FONT.is_file() and recipe.EMOJI_LIST.is_file() and features.check("raqm")),
    reason="needs the Debian packages fonts-noto-color-emoji and unicode-data, and Pillow with libraqm",
)
EVERY_SEVENTH = slice(None, 280, 7)  # 40 of the 285 concepts


@pytest.fixture(scope="module")
def views() -> list[Array]:
    return reference_views(recipe.concepts()[EVERY_SEVENTH])


@pytest.fixture(scope="module")
def renderings() -> list[Image.Image]:
    return [recipe.render(concept, 64) for concept in recipe.concepts()[EVERY_SEVENTH]]


def test_every_rendering_is_nearest_to_itself(renderings: list[Image.Image], views: list[Array]) -> None:
    assert nearest(renderings, views) == list(range(40))


@pytest.mark.parametrize(("right", "down"), [(1, 0), (-1, 0), (0, 1), (2, -2)])
def test_a_shifted_rendering_is_nearest_to_itself(
    renderings: list[Image.Image], views: list[Array], right: int, down: int
) -> None:
    shifted = [ImageChops.offset(picture, right, down) for picture in renderings]
    assert nearest(shifted, views) == list(range(40))


def test_a_noisy_smaller_rendering_is_nearest_to_itself(views: list[Array]) -> None:
    rng = np.random.default_rng(0)
    noisy = []
    for concept in recipe.concepts()[EVERY_SEVENTH]:
        pixels = np.asarray(recipe.render(concept, 64, fill=0.85)) + rng.normal(0, 30, (64, 64, 3))
        noisy.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    assert nearest(noisy, views) == list(range(40))


def test_a_rendering_of_another_size_is_nearest_to_itself(views: list[Array]) -> None:
    large = [recipe.render(concept, 128) for concept in recipe.concepts()[EVERY_SEVENTH]]
    assert nearest(large, views) == list(range(40))


def test_the_distance_is_the_least_mean_squared_error_over_the_views(views: list[Array]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    seen = np.asarray(picture).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).ravel() / 255
    errors = [[float(np.mean((row - seen) ** 2)) for row in view] for view in views]
    assert nearest([picture], views) == [int(np.min(errors, axis=0).argmin())]
