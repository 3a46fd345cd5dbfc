"""Work in tiles covers the whole once, without edges, and leaves what is one tile as it is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from sdcli.pipeline import vae
from sdcli.pipeline.bundle import load_vae
from sdcli.pipeline.measures import psnr
from sdcli.pipeline.tiles import in_tiles
from sdcli.store import BUILTIN_FOLDER
from tests import models

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [(8, 8), (9, 30), (23, 11), (16, 8), (40, 41)])
def test_work_on_each_number_alone_gives_what_it_gives_at_once(size: tuple[int, int]) -> None:
    whole = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(in_tiles(lambda x: 2 * x + 1, whole, side=8, overlap=3), 2 * whole + 1, atol=1e-6)


def test_work_that_enlarges_or_shrinks_puts_every_tile_in_its_place() -> None:
    chance = torch.Generator().manual_seed(0)
    whole = torch.randn(1, 2, 37, 21, generator=chance)
    enlarged = in_tiles(lambda x: interpolate(x, scale_factor=4), whole, side=16, overlap=4)
    assert torch.allclose(enlarged, interpolate(whole, scale_factor=4), atol=1e-6)
    pixels = torch.randn(1, 2, 4 * 37, 4 * 21, generator=chance)
    shrunk = in_tiles(lambda x: avg_pool2d(x, 4), pixels, side=64, overlap=16, unit=4)
    assert torch.allclose(shrunk, avg_pool2d(pixels, 4), atol=1e-6)


def test_no_tile_is_larger_than_asked_for_and_each_shares_its_overlap() -> None:
    seen: list[Tensor] = []
    place = torch.arange(50.0).expand(1, 1, 20, 50)
    in_tiles(lambda x: seen.append(x) or x, place, side=20, overlap=6)  # type: ignore[func-returns-value]
    assert all(tile.shape[2:] == (20, 20) for tile in seen)
    columns = [(int(tile.min()), int(tile.max())) for tile in seen]
    assert columns[0][0] == 0 and columns[-1][1] == 49
    assert all(last - first + 1 >= 6 for (_, last), (first, _) in pairwise(columns))


@torch.no_grad()
def test_a_tiled_vae_leaves_pictures_of_one_tile_as_they_are(sd1: Path) -> None:
    coder = load_vae(sd1, device=CPU, dtype=torch.float32)
    chance = torch.Generator().manual_seed(0)
    tiling, latents = vae.tiled(coder), torch.randn(1, *models.LATENTS, generator=chance)
    assert vae.is_tiled(tiling) and not vae.is_tiled(coder)
    assert torch.equal(vae.decode(tiling, latents), vae.decode(coder, latents))
    pixels = torch.rand(1, 3, 32, 32, generator=chance)
    assert torch.equal(vae.encode(tiling, pixels), vae.encode(coder, pixels))


@torch.no_grad()
def test_a_picture_in_tiles_is_near_the_picture_made_at_once() -> None:
    """The embedded VAE at 2 tiles; each has the statistics of its own part, so that no more than this can be asked."""
    coder = load_vae(BUILTIN_FOLDER, device=CPU, dtype=torch.float32)
    ramp = torch.linspace(-1, 1, 288)
    pixels = torch.stack([ramp.expand(48, -1), ramp[:48, None].expand(-1, 288), ramp.flip(0).expand(48, -1)])
    latents = vae.encode(coder, pixels[None])
    in_parts = vae.encode(vae.tiled(coder), pixels[None])
    assert float((in_parts - latents).square().mean().sqrt()) < 0.1
    whole, parts = vae.decode(coder, latents), vae.decode(vae.tiled(coder), latents)
    assert float(psnr(parts.clamp(-1, 1), whole.clamp(-1, 1))) > 35
