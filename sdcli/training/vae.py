"""WHAT train-vae trains: reconstruction and KL, and the scaling factor that its latents need."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdcli.pipeline import vae as latent
from sdcli.pipeline.bundle import save_part
from sdcli.specs import TrainVaeSpec
from sdcli.training import data, start
from sdcli.training.loop import Preparing, Report, train
from sdcli.training.order import Draw, fixed
from sdcli.training.state import Batch, Turn

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

NARROW_LOGVAR = -8.0  # a fresh posterior begins with std e^-4: noise of std 1 would hide the mean for 1,000 steps
PSNR_PEAK = 2.0  # pixels span [-1, 1]


def run(spec: TrainVaeSpec) -> Iterator[Report]:
    """Train the VAE of a model, or one from scratch, and yield what happens; the result lies in RUN/export/vae."""
    accelerator = start.accelerator_for(spec)
    dataset = data.find(spec.data, spec.caption)
    part = start.vae(spec, accelerator.device)
    resolution = start.resolution(spec, part.model.config["sample_size"], latent.factor(part.model))
    with start.opened(spec, "vae", dataset, part.origin, accelerator) as (folder, config_hash):
        yield from start.checked(dataset, spec, accelerator)
        if part.is_fresh:
            _narrow(part.model)
        task = _VaeTask(part.model, spec, dataset, resolution)
        order = start.order(spec, accelerator, [range(len(dataset.samples))])
        yield from train(task, spec, folder, accelerator=accelerator, order=order, config_hash=config_hash)


class Autoencoder(nn.Module):
    """Encoder, posterior sample and decoder as one forward pass."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) pixels and (B, C, h, w) noise -> reconstruction, posterior mean, posterior log-variance."""
        mean, logvar = latent.moments(self.vae, pixels)
        z = mean + (0.5 * logvar).exp() * noise
        return latent.decode(self.vae, latent.scale(self.vae, z)), mean, logvar


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, I)) of posterior moments, summed over all their values, in nats.

    Source: Kingma and Welling 2013, arXiv:1312.6114, appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum()


class _VaeTask:
    def __init__(self, vae: AutoencoderKL, spec: TrainVaeSpec, dataset: data.Dataset, resolution: int) -> None:
        self.model = Autoencoder(vae)
        self.turns = [Turn("model", self.model, self.losses)]
        self.vae, self.spec, self.dataset = vae, spec, dataset
        self.resolution = resolution  # px
        side = resolution // latent.factor(vae)
        self.noise_shape = (1, int(vae.config["latent_channels"]), side, side)
        self.readers = ThreadPoolExecutor(spec.workers)

    def load(self, draws: Sequence[Draw]) -> Batch:
        rows = list(self.readers.map(self._load_one, draws))
        return {"pixels": torch.cat([r[0] for r in rows]), "noise": torch.cat([r[1] for r in rows])}

    def losses(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        pixels = batch["pixels"]
        reconstruction, mean, logvar = (value.float() for value in model(pixels, batch["noise"]))
        l1 = (reconstruction - pixels).abs().mean()
        l2 = (reconstruction - pixels).square().mean()
        kl = kl_divergence(mean, logvar) / pixels.numel()  # a pixel value: its weight means the same at any size
        loss = self.spec.l1_weight * l1 + self.spec.l2_weight * l2 + self.spec.kl_weight * kl
        return {"loss": loss, "l1": l1, "l2": l2, "kl": kl}

    def validate(self) -> Generator[Preparing, None, dict[str, float]]:
        yield from ()
        return {}

    def sample(self, folder: Path) -> Generator[Preparing, None, dict[str, float]]:
        yield from ()
        return {}

    @torch.no_grad()
    def export(self, folder: Path) -> Generator[Preparing, None, dict[str, float]]:
        """Measure the latents over the whole data, write the scaling factor that makes their std 1, save the VAE."""
        device = next(self.vae.parameters()).device
        count, batch = len(self.dataset.samples), self.spec.batch_size
        sums, squares, values, psnr = 0.0, 0.0, 0, 0.0
        for first in range(0, count, batch):
            draws = fixed(range(first, min(first + batch, count)), self.spec.seed, "measure")
            rows = {k: v.to(device) for k, v in self.load(draws).items()}
            mean, logvar = latent.moments(self.vae, rows["pixels"])
            z = (mean + (0.5 * logvar).exp() * rows["noise"]).double()
            sums, squares, values = sums + float(z.sum()), squares + float(z.square().sum()), values + z.numel()
            back = latent.decode(self.vae, latent.scale(self.vae, mean)).clamp(-1, 1)
            error = (back - rows["pixels"]).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
            psnr += float((10 * (PSNR_PEAK**2 / error).log10()).sum())
            yield Preparing("measuring the latents", draws[-1].sample + 1, count)
        std = (squares / values - (sums / values) ** 2) ** 0.5
        self.vae.register_to_config(scaling_factor=1.0 / std)
        if not self.spec.random_crop:  # a crop's size is not that of the pictures
            self.vae.register_to_config(sample_size=self.resolution)
        save_part(folder / "vae", self.vae, getattr(torch, self.spec.export_dtype))
        return {"scaling_factor": 1.0 / std, "psnr": psnr / count}

    def _load_one(self, draw: Draw) -> tuple[Tensor, Tensor]:
        generator = draw.generator()
        crop_by = generator if self.spec.random_crop else None
        pixels = data.load_pixels(self.dataset.samples[draw.sample], self.resolution, crop_by)
        return pixels, torch.randn(self.noise_shape, generator=generator)


@torch.no_grad()
def _narrow(vae: AutoencoderKL) -> None:
    """Start a fresh posterior narrow around its mean."""
    last = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
    assert last.bias is not None  # both kinds of last layer have one
    half = last.bias.shape[0] // 2
    last.weight[half:].zero_()
    last.bias[half:] = NARROW_LOGVAR
