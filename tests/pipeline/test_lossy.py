"""A picture goes through a lossy format as a given file did, so that both have lost the same."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from sdcli.pipeline.lossy import encoded_as
from sdcli.pipeline.metadata import picture_bytes
from tests.pipeline.test_metadata import RECORD


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Noise, smoothed: what a codec keeps some of."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((72, 48), Image.Resampling.BICUBIC)


def saved(image: Image.Image, **how: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, **how)  # type: ignore[arg-type]
    return stream.getvalue()


def apart(image: Image.Image, data: bytes) -> int:
    there = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)
    return int(np.abs(np.asarray(image, dtype=np.int16) - there).max())


@pytest.mark.parametrize("form", ["jpg", "webp"])
@pytest.mark.parametrize("quality", [1, 30, 89, 90, 99])
def test_our_own_files_are_met_to_the_bit_with_their_quality(picture: Image.Image, form: str, quality: int) -> None:
    data = picture_bytes(picture, {**RECORD, "prompt": "x" * 500}, form, quality)
    again = encoded_as(picture, data)
    assert (again.form, again.quality, again.is_lossy) == (form, quality, True)
    assert apart(again.image, data) == 0


@pytest.mark.parametrize("how", [{"format": "PNG"}, {"format": "WEBP", "lossless": True}])
def test_what_loses_nothing_leaves_the_picture_as_it_is(picture: Image.Image, how: dict[str, object]) -> None:
    again = encoded_as(picture, saved(picture, **how))
    assert again.image is picture and not again.is_lossy


@pytest.mark.parametrize(
    "how",
    [
        {"qtables": [[3] * 64, [9] * 64], "subsampling": 1},
        {"quality": 60, "subsampling": 0},
        {"quality": 60, "progressive": True, "optimize": True},
    ],
)
def test_a_jpeg_of_another_program_is_met_by_its_own_tables(picture: Image.Image, how: dict[str, object]) -> None:
    data = saved(picture, format="JPEG", **how)
    assert apart(encoded_as(picture, data).image, data) == 0


def test_a_webp_of_another_effort_is_met_nearly(picture: Image.Image) -> None:
    data = saved(picture, format="WEBP", quality=70, method=6)
    again = encoded_as(picture, data)
    assert again.quality is not None and abs(again.quality - 70) <= 5
    assert apart(again.image, data) < apart(picture, data)


def test_another_picture_stays_another(picture: Image.Image) -> None:
    data = picture_bytes(picture, None, "webp", 80)
    assert apart(encoded_as(Image.new("RGB", picture.size, "red"), data).image, data) > 50
    assert encoded_as(Image.new("RGB", (8, 8)), data).image.size == (8, 8)
