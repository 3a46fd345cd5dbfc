"""Pixels <-> latents. The only file that knows the scaling factor."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from sdcli.errors import InputError, NumericalError, SdcliWarning
from sdcli.pipeline.device import computing_device, computing_dtype, unhooked
from sdcli.pipeline.tiles import in_tiles

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vq_model import VQModel

    from sdcli.pipeline.bundle import Vae

TILE, OVERLAP = 64, 16  # latents along a side; what a tile shares with the next
LOGVAR_RANGE = (-30.0, 20.0)  # Rombach et al. 2022, released code; what diffusers clamps to as well


def tiled(vae: Vae) -> Vae:
    """The same VAE, of the same weights, which encodes and decodes what is larger than a tile in tiles.

    That takes the memory of one of them. Each is normalised by itself and sees nothing beyond its overlap, so that the
    whole differs from what is made at once, without edges.
    """
    tiling = copy.copy(vae)  # of the same parts, and the hooks that bring these to a device
    tiling.use_tiling = True
    return tiling


def is_tiled(vae: Vae) -> bool:
    """Whether a VAE works in tiles."""
    return bool(getattr(vae, "use_tiling", False))  # of a VQ model ours, else diffusers' own


def is_vq(vae: Vae) -> bool:
    """Whether the latents are quantized by a codebook instead of drawn from a posterior."""
    return hasattr(vae, "quantize")


def factor(vae: Vae) -> int:
    """Pixels per latent along a side (8 for SD 1.x)."""
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


def encoder(vae: Vae) -> nn.ModuleList:
    """The layers that make moments of pixels."""
    return nn.ModuleList([vae.encoder, *([vae.quant_conv] if vae.quant_conv is not None else [])])


def moments(vae: Vae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the posterior q(z | x), unscaled.

    pixels: (B, 3, H, W) in [-1, 1]; H and W multiples of the VAE factor. Returns 2 x (B, C, H/f, W/f); of a VQ model,
    which has no posterior, the vectors before quantization, and the least log-variance there is.
    Raises InputError if H or W is not a multiple of the factor.
    Source: Rombach et al. 2022, arXiv:2112.10752, section 3.1.
    """
    f = factor(vae)
    height, width = pixels.shape[-2:]
    if height % f or width % f:
        raise InputError(f"image of {width} x {height} px", f"both must be multiples of {f} for this VAE")

    def half(part: Tensor) -> Tensor:
        h: Tensor = vae.encoder(part)
        return vae.quant_conv(h) if vae.quant_conv is not None else h

    whole = partial(in_tiles, half, side=TILE * f, overlap=OVERLAP * f, unit=f) if is_tiled(vae) else half
    h = whole(pixels)
    if is_vq(vae):
        return h, torch.full_like(h, LOGVAR_RANGE[0])
    mean, logvar = h.chunk(2, dim=1)  # 2 x (B, C, H/f, W/f)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def encode(vae: Vae, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
    """Scaled latents of images: a sample of the posterior, or its mean.

    pixels: (B, 3, H, W) in [-1, 1]. generators: one CPU generator an image; None takes the mean.
    Returns (B, C, H/f, W/f), scaled so that std is about 1. Raises InputError as `moments` does.
    """
    mean, logvar = moments(vae, pixels)
    if generators is None:
        return scale(vae, mean)
    noise = torch.cat([torch.randn((1, *mean.shape[1:]), generator=g) for g in generators])
    return scale(vae, mean + (0.5 * logvar).exp() * noise.to(mean.device, mean.dtype))


def decode(vae: Vae, latents: Tensor) -> Tensor:
    """Pixels of scaled latents: (B, C, h, w) -> (B, 3, f h, f w), about [-1, 1], not clipped."""
    z = unscale(vae, latents)
    return decode_quantized(vae, quantized(cast("VQModel", vae), z)[0] if is_vq(vae) else z)


def quantized(vae: VQModel, z: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes of unscaled vectors, through which the codebook learns, and their indices.

    z: (B, C, h, w). Returns codes like z, and (B, h, w) int64.
    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1 and 2.
    """
    codes = vae.quantize.embedding.weight  # (codes, C)
    vectors = z.detach().movedim(1, -1)  # (B, h, w, C)
    indices = torch.cdist(vectors.flatten(0, 2).float(), codes.detach().float()).argmin(dim=1)
    return codes[indices].view_as(vectors).movedim(-1, 1), indices.view(vectors.shape[:-1])


def decode_quantized(vae: Vae, z: Tensor) -> Tensor:
    """Pixels of unscaled vectors as they are: (B, C, h, w) -> (B, 3, f h, f w), about [-1, 1], not clipped."""

    def half(part: Tensor) -> Tensor:
        pixels: Tensor = vae.decoder(vae.post_quant_conv(part) if vae.post_quant_conv is not None else part)
        return pixels

    return in_tiles(half, z, side=TILE, overlap=OVERLAP) if is_tiled(vae) else half(z)


@torch.no_grad()
def decode_finite(vae: Vae, latents: Tensor) -> Tensor:
    """Pixels as `decode` gives them, in the VAE's own precision; where that overflows, in float32, with a warning.

    Raises NumericalError when they are not finite then either.
    """
    dtype = computing_dtype(vae)
    pixels = decode(vae, latents.to(computing_device(vae), dtype))
    if not pixels.isfinite().all() and dtype != torch.float32:
        warnings.warn(f"the VAE overflows in {dtype}: decoded again in float32", SdcliWarning, stacklevel=2)
        exact = torch.nn.Module.to(unhooked(vae), computing_device(vae), torch.float32)
        pixels = decode(exact, latents.to(exact.device, torch.float32))
    if not pixels.isfinite().all():
        raise NumericalError("the decoded picture is not finite", "check the latents and the VAE of this model")
    return pixels


def scale(vae: Vae, z: Tensor) -> Tensor:
    """Posterior sample -> latents: (z - shift) * scaling_factor."""
    return (z - _shift(vae)) * float(vae.config["scaling_factor"])


def unscale(vae: Vae, latents: Tensor) -> Tensor:
    """Latents -> posterior sample: latents / scaling_factor + shift."""
    return latents / float(vae.config["scaling_factor"]) + _shift(vae)


def _shift(vae: Vae) -> float:
    shift = vae.config.get("shift_factor")
    return float(shift) if shift is not None else 0.0
