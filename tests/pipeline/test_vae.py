"""Pixels to latents and back: equal to diffusers' own, and the scaling factor used once each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from sdcli.errors import InputError
from sdcli.pipeline import sampling, vae
from sdcli.pipeline.bundle import load_vae
from tests import models

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[0.18215, 1.7])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same VAE, loaded by us and by diffusers."""
    folder = models.write_sd1(tmp_path_factory.mktemp("sd1"), scaling_factor=request.param)
    ours = load_vae(folder, device=torch.device("cpu"), dtype=torch.float32)
    return ours, AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).requires_grad_(False)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_encode_without_a_generator_is_the_mean_of_diffusers(both: Any, pixels: torch.Tensor) -> None:
    ours, theirs = both
    expected = theirs.encode(pixels).latent_dist.mean * theirs.config.scaling_factor
    assert expected.std() > 0.01
    assert torch.allclose(vae.encode(ours, pixels), expected, rtol=0, atol=TOLERANCE)


def test_encode_with_a_generator_is_the_sample_of_diffusers(both: Any, pixels: torch.Tensor) -> None:
    ours, theirs = both
    for row, seed in zip(pixels, (7, 8), strict=True):
        sample = theirs.encode(row[None]).latent_dist.sample(torch.Generator("cpu").manual_seed(seed))
        got = vae.encode(ours, row[None], sampling.generators([seed]))
        assert torch.allclose(got, sample * theirs.config.scaling_factor, rtol=0, atol=TOLERANCE)


def test_a_sample_does_not_depend_on_its_neighbours(both: Any, pixels: torch.Tensor) -> None:
    together = vae.encode(both[0], pixels, sampling.generators([7, 8]))
    alone = vae.encode(both[0], pixels[1:], sampling.generators([8]))
    assert torch.allclose(together[1], alone[0], atol=TOLERANCE)
    assert not torch.allclose(together[1], vae.encode(both[0], pixels[1:], sampling.generators([9]))[0], atol=1e-2)


@pytest.mark.parametrize("gain", [1.0, 1000.0])
def test_moments_are_those_of_diffusers_the_variance_clamped(both: Any, pixels: torch.Tensor, gain: float) -> None:
    loud = AutoencoderKL.from_config(both[1].config).requires_grad_(False)
    loud.load_state_dict(both[1].state_dict())
    loud.quant_conv.weight.mul_(gain)
    mean, logvar = vae.moments(loud, pixels)
    posterior = loud.encode(pixels).latent_dist
    assert torch.allclose(mean, posterior.mean, atol=TOLERANCE * gain)
    assert torch.allclose(logvar, posterior.logvar, atol=TOLERANCE * gain)
    assert ((logvar.min(), logvar.max()) == (-30, 20)) == (gain > 1)


def test_decode_is_that_of_diffusers(both: Any) -> None:
    ours, theirs = both
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    expected = theirs.decode(latents / theirs.config.scaling_factor).sample
    assert torch.allclose(vae.decode(ours, latents), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shift", [None, 0.25])
def test_scale_and_unscale_are_inverse_and_latents_are_shifted_before_scaling(both: Any, shift: float | None) -> None:
    shifted = AutoencoderKL.from_config({**both[1].config, "shift_factor": shift})
    z = torch.randn(1, 4, 2, 2)
    latents = vae.scale(shifted, z)
    assert torch.allclose(latents, (z - (shift or 0.0)) * shifted.config["scaling_factor"])
    assert torch.allclose(vae.unscale(shifted, latents), z, atol=1e-6)


def test_a_vae_without_the_outer_convolutions_works(pixels: torch.Tensor) -> None:
    small = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).requires_grad_(False)
    latents = vae.encode(small, pixels)
    assert torch.allclose(latents, small.encode(pixels).latent_dist.mean * 0.18215, atol=TOLERANCE)
    assert torch.allclose(vae.decode(small, latents), small.decode(latents / 0.18215).sample, atol=TOLERANCE)


def test_the_factor_counts_the_levels(both: Any) -> None:
    assert vae.factor(both[0]) == models.FACTOR
    assert vae.factor(AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)) == 1


def test_pixels_that_are_no_multiple_of_the_factor_are_refused(both: Any) -> None:
    with pytest.raises(InputError, match=r"15 x 16 px.*multiples of 2"):
        vae.encode(both[0], torch.zeros(1, 3, 16, 15))


def test_the_folder_written_by_diffusers_is_left_as_it_was(tmp_path: Path) -> None:
    folder = models.write_sd1(tmp_path / "sd1")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    load_vae(folder, device=torch.device("cpu"), dtype=torch.float16)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
