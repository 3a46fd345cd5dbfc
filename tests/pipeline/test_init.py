"""Pictures and masks as they are drawn from: sizes, edges, what a mask may look like."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdcli.errors import InputError, SdcliWarning
from sdcli.pipeline import init
from sdcli.pipeline.bundle import load_vae
from sdcli.pipeline.sampling import generators

SIZE = (32, 24)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def masked(tmp_path: Path, picture: Path) -> Any:
    """The mask that is made of one drawn, as an array of 0 and 255."""

    def load(mask: Image.Image, *, size: tuple[int, int] | None = None, name: str = "mask.png", **save: Any) -> Any:
        mask.save(tmp_path / name, **save)
        loaded = init.load(picture, tmp_path / name, size=size, factor=2)
        assert loaded.mask is not None and loaded.mask.size == loaded.image.size
        assert loaded.mask_sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        return np.array(loaded.mask)

    return load


def halves(mode: str, left: Any, right: Any, size: tuple[int, int] = SIZE) -> Image.Image:
    """An image whose left half has one colour and whose right another."""
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


RIGHT = np.array(halves("L", 0, 255))


@pytest.mark.parametrize(
    ("mode", "left", "right"),
    [
        ("L", 0, 255),
        ("L", 127, 128),  # grey counts by its nearer end
        ("1", 0, 1),
        ("RGB", (0, 0, 0), (255, 255, 255)),
        ("RGB", (120, 120, 120), (130, 130, 130)),
        ("RGBA", (0, 0, 0, 255), (255, 255, 255, 255)),
        ("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)),  # what is transparent is repainted
        ("LA", (0, 255), (90, 20)),
        ("I;16", 0, 65535),
        ("P", 0, 255),
    ],
)
def test_white_is_repainted_whatever_the_mask_is_made_of(masked: Any, mode: str, left: Any, right: Any) -> None:
    mask = halves("L", left, right).convert("P") if mode == "P" else halves(mode, left, right)
    assert np.array_equal(masked(mask), RIGHT)


def test_a_mask_turned_by_its_exif_is_turned(masked: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert np.array_equal(masked(halves("L", 255, 0), exif=exif), RIGHT)


@pytest.mark.parametrize("size", [(64, 48), (16, 12), (320, 24)])
def test_a_mask_of_another_size_is_brought_to_the_pictures_without_grey_edges(
    masked: Any, size: tuple[int, int]
) -> None:
    assert np.array_equal(masked(halves("L", 0, 255, size)), RIGHT)


def test_a_mask_is_cropped_as_its_picture_is(masked: Any) -> None:
    """32 x 24 scaled to 64 x 48 and cropped to 40 x 48: the middle stays in the middle."""
    assert np.array_equal(masked(halves("L", 0, 255), size=(40, 48)), np.array(halves("L", 0, 255, (40, 48))))


def test_a_mask_is_cut_as_its_picture_is(tmp_path: Path) -> None:
    Image.new("RGB", (35, 33)).save(tmp_path / "odd.png")
    halves("L", 0, 255, (35, 33)).save(tmp_path / "mask.png")
    with pytest.warns(SdcliWarning, match="35 x 33 px cut to 32 x 32"):
        loaded = init.load(tmp_path / "odd.png", tmp_path / "mask.png", size=None, factor=8)
    assert loaded.image.size == (32, 32)
    assert np.array_equal(np.array(loaded.mask), np.array(halves("L", 0, 255, (35, 33)).crop((1, 0, 33, 32))))


def test_what_is_kept_is_the_picture_to_the_bit(picture: Path, tmp_path: Path) -> None:
    halves("L", 0, 255).save(tmp_path / "mask.png")
    loaded = init.load(picture, tmp_path / "mask.png", size=None, factor=2)
    drawn = Image.new("RGB", SIZE, (9, 8, 7))
    pasted, original = np.array(init.paste_kept(drawn, loaded)), np.array(Image.open(picture))
    assert np.array_equal(pasted[:, :16], original[:, :16])
    assert (pasted[:, 16:] == (9, 8, 7)).all()
    assert init.paste_kept(drawn, init.load(picture, None, size=None, factor=2)) is drawn


@pytest.mark.parametrize("which", ["picture", "mask"])
def test_what_is_no_picture_is_refused_by_name(picture: Path, tmp_path: Path, which: str) -> None:
    (tmp_path / "no.png").write_bytes(b"no picture")
    paths = (tmp_path / "no.png", picture) if which == "picture" else (picture, tmp_path / "no.png")
    with pytest.raises(InputError, match=r"no\.png: is no picture"):
        init.load(*paths, size=None, factor=2)


def test_every_image_draws_its_sample_and_then_its_noise_from_its_own_generator(sd1: Path, picture: Path) -> None:
    coder = load_vae(sd1, device=torch.device("cpu"), dtype=torch.float32)
    loaded = init.load(picture, None, size=None, factor=2)
    timesteps = torch.tensor([500, 1])
    both, noise = init.start_from(coder, timesteps, loaded, generators([5, 6]), steps=2, strength=0.5)
    one, own = init.start_from(coder, timesteps, loaded, generators([6]), steps=2, strength=0.5)
    assert both.picture is not None and one.picture is not None
    assert torch.allclose(both.picture[1:], one.picture, atol=1e-6) and torch.equal(noise[1:], own)
    assert not torch.allclose(both.picture[0], both.picture[1], atol=1e-4)
    source = torch.Generator("cpu").manual_seed(6)
    torch.randn(4, 12, 16, generator=source)
    assert torch.equal(own[0], torch.randn(4, 12, 16, generator=source))
