"""A picture, and the part of it to repaint, as latents that a denoising starts from."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from sdcli.errors import NumericalError
from sdcli.files import read_bytes
from sdcli.pipeline import images, vae
from sdcli.pipeline.device import computing_device, computing_dtype
from sdcli.pipeline.sampling import initial_noise
from sdcli.pipeline.start import Start

if TYPE_CHECKING:
    from sdcli.pipeline.bundle import Vae

WHITE_FROM = 128  # of 0 to 255: what of a mask is repainted


@dataclass(frozen=True)
class Picture:
    """A picture as it is drawn from, the part of it to repaint, and the SHA-256 of the files."""

    image: Image.Image
    mask: Image.Image | None  # of the same size, mode L: 255 where it is repainted, else 0
    sha256: str
    mask_sha256: str | None


def load(path: Path, mask: Path | None, *, size: tuple[int, int] | None, factor: int) -> Picture:
    """Read a picture and its mask.

    size: in px, to which the picture is scaled and cropped at its centre; None: its own, cut to multiples of `factor`.
    The mask is brought to the size of the picture (nearest), and then cropped as it is. White repaints, black keeps,
    grey does one or the other by its nearer end; what is transparent counts as white, as on white paper.
    Raises InputError as `images.load_image` does.
    """
    data = read_bytes(path, max_bytes=images.MAX_FILE_BYTES)
    whole = images.read_image(io.BytesIO(data), path)
    image = images.fit(whole, *size) if size is not None else images.cut(whole, factor, path)
    digest = hashlib.sha256(data).hexdigest()
    if mask is None:
        return Picture(image, None, digest, None)
    mask_data = read_bytes(mask, max_bytes=images.MAX_FILE_BYTES)
    grey = images.read_image(io.BytesIO(mask_data), mask).convert("L")
    grey = grey.resize(whole.size, Image.Resampling.NEAREST)
    grey = images.fit(grey, *size, Image.Resampling.NEAREST) if size is not None else images.crop(grey, *image.size)
    white = grey.point([255 * (value >= WHITE_FROM) for value in range(256)])
    return Picture(image, white, digest, hashlib.sha256(mask_data).hexdigest())


def paste_kept(drawn: Image.Image, picture: Picture) -> Image.Image:
    """What was drawn where the mask is white, every other pixel as it is in the picture."""
    return Image.composite(drawn, picture.image, picture.mask) if picture.mask is not None else drawn


@torch.no_grad()
def start_from(
    coder: Vae, timesteps: Tensor, picture: Picture, sources: Sequence[torch.Generator], *, steps: int, strength: float
) -> tuple[Start, Tensor]:
    """Where image to image, or inpainting by an ordinary UNet, starts; and the noise (B, C, h, w).

    Each image draws from its own generator: its sample of the picture's posterior, then the noise; with a mask another
    sample, which diffusers draws and does not use, so that what a stochastic scheduler draws is the same.
    With a mask, strength 1 starts from noise alone (diffusers' StableDiffusionInpaintPipeline); else from the picture.
    """
    latents = _sample(coder, images.to_pixels(picture.image), sources)
    shape = (latents.shape[1], latents.shape[2], latents.shape[3])
    noise = initial_noise(shape, sources)
    if picture.mask is None:
        return Start(timesteps, steps, latents), noise
    if not vae.is_vq(coder):
        initial_noise(shape, sources)
    mask = _latent_mask(picture.mask, latents)
    return Start(timesteps, steps, latents, is_all_noise=strength == 1, mask=mask), noise


@torch.no_grad()
def start_of_inpainting(
    coder: Vae, timesteps: Tensor, picture: Picture, sources: Sequence[torch.Generator], *, steps: int, strength: float
) -> tuple[Start, Tensor]:
    """Where a UNet starts that reads mask and masked picture beside the latents; and the noise (B, C, h, w).

    Each image draws from its own generator: below strength 1 its sample of the picture's posterior, then the noise,
    then a sample of the picture with grey where the mask is white.
    Source: Rombach et al. 2022, arXiv:2112.10752, section 4.5; the order of the draws is diffusers'.
    """
    assert picture.mask is not None
    pixels = images.to_pixels(picture.image)
    latents = _sample(coder, pixels, sources) if strength < 1 else None
    height, width = (side // vae.factor(coder) for side in pixels.shape[2:])
    noise = initial_noise((int(coder.config["latent_channels"]), height, width), sources)
    kept = torch.from_numpy(np.array(picture.mask)) == 0  # (H, W)
    masked = _sample(coder, pixels * kept, sources)
    mask = _latent_mask(picture.mask, masked).expand(len(masked), -1, -1, -1)
    return Start(timesteps, steps, latents, beside=torch.cat([mask, masked], dim=1)), noise


def _sample(coder: Vae, pixels: Tensor, sources: Sequence[torch.Generator]) -> Tensor:
    """A sample (B, C, h, w) float32 of one picture's posterior from each generator; of a VQ model its latents."""
    generators = None if vae.is_vq(coder) else sources
    latents = vae.encode(coder, pixels.to(computing_device(coder), computing_dtype(coder)), generators).float()
    if not latents.isfinite().all():
        raise NumericalError("the picture gives latents that are not finite", "try --dtype float32")
    return latents.expand(len(sources), -1, -1, -1)


def _latent_mask(mask: Image.Image, latents: Tensor) -> Tensor:
    """A mask (1, 1, h, w) of 0 and 1 for latents: each counts as its first pixel does, as in diffusers."""
    pixels = torch.from_numpy(np.array(mask)).view(1, 1, mask.height, mask.width).float() / 255
    return interpolate(pixels, size=latents.shape[2:]).to(latents.device)
