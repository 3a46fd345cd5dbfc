"""Encoder, bottleneck and decoder as one forward pass: with a posterior (KL) or with a codebook (VQ)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdcli.pipeline import vae as latent
from sdcli.training.losses import kl_divergence
from sdcli.training.order import mixed_seed
from sdcli.training.state import Batch

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vq_model import VQModel

    from sdcli.pipeline.bundle import Vae

COMMITMENT = 0.25  # beta of arXiv:1711.00937, eq. 3
USE_DECAY = 0.99  # of the running share of vectors that each code stands for
DEAD_BELOW = 0.1  # of an equal share
RESTART_EVERY = 20  # steps


class Autoencoder(nn.Module):
    """What train-vae trains: the VAE, and the scale of its errors where that is learned.

    Called with (B, 3, H, W) pixels and (B, C, h, w) standard normal noise, it gives the reconstruction, the terms of
    the bottleneck, means over all values, and what it leaves in the batch, one row a sample.
    """

    def __init__(self, vae: Vae, *, learn_logvar: bool) -> None:
        super().__init__()
        self.vae = vae
        self.logvar = nn.Parameter(torch.zeros(())) if learn_logvar else None


class KlAutoencoder(Autoencoder):
    """With a sample of the posterior between encoder and decoder; its term is `kl`."""

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        mean, logvar = latent.moments(self.vae, pixels)
        z = mean + (0.5 * logvar).exp() * noise
        wide = torch.promote_types(mean.dtype, torch.float32)
        kl = kl_divergence(mean.to(wide), logvar.to(wide)) / pixels.numel()  # a pixel value: the same at any size
        return latent.decode(self.vae, latent.scale(self.vae, z)), {"kl": kl}, {}


class VqAutoencoder(Autoencoder):
    """With the nearest codes between encoder and decoder; its terms are `codebook` and how much of it is in use.

    Source: van den Oord et al. 2017, arXiv:1711.00937; restarts: Dhariwal et al. 2020, arXiv:2005.00341, section 3.
    """

    use: Tensor  # (codes,): running share of vectors a code stands for
    hits: Tensor  # (codes,): vectors a code stood for since evaluation began

    def __init__(self, vae: Vae, seed: int, accelerator: Accelerator, *, learn_logvar: bool) -> None:
        super().__init__(vae, learn_logvar=learn_logvar)
        self.seed, self.accelerator = seed, accelerator
        count = int(vae.config["num_vq_embeddings"])
        self.register_buffer("use", torch.full((count,), 1.0 / count))
        self.register_buffer("hits", torch.zeros(count), persistent=False)

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        z, _ = latent.moments(self.vae, pixels)
        z_q, indices = latent.quantized(cast("VQModel", self.vae), z)
        counts = self._counts(indices)
        if not self.training:
            self.hits += counts
        codebook = (z_q - z.detach()).square().mean() + COMMITMENT * (z - z_q.detach()).square().mean()  # eq. 3
        straight = z + (z_q - z).detach()
        terms = {"codebook": codebook, "perplexity": _perplexity(counts), "codes_used": (~self._dead()).float().mean()}
        return latent.decode_quantized(self.vae, straight), terms, {"vectors": z.detach(), "indices": indices}

    @torch.no_grad()
    def settle(self, portions: Sequence[Batch], step: int, optimizer: torch.optim.Optimizer) -> None:
        """After a step: count which codes stand for something, and now and then restart those that do not.

        A dead code goes onto a vector of this step, drawn by the seed and the step; at the first step all codes do.
        """
        counts = sum((self._counts(portion["indices"]) for portion in portions), torch.zeros_like(self.use))
        counts = self.accelerator.reduce(counts, "sum")
        self.use.lerp_(counts / counts.sum(), 1.0 - USE_DECAY)
        dead = self._dead() | (step == 0)
        if step % RESTART_EVERY or not dead.any():
            return
        own = torch.cat([portion["vectors"] for portion in portions]).movedim(1, -1).flatten(0, -2)
        vectors = self.accelerator.gather(own.contiguous())  # (vectors of all processes, C)
        chance = torch.Generator().manual_seed(mixed_seed(self.seed, "codes", step))
        count = int(dead.sum())
        picked = torch.randint(len(vectors), (count,), generator=chance).to(vectors.device)
        spread = 0.01 * vectors.std() * torch.randn((count, vectors.shape[1]), generator=chance).to(vectors)
        codes = cast("VQModel", self.vae).quantize.embedding.weight
        codes[dead] = (vectors[picked] + spread).to(codes.dtype)
        for name in ("exp_avg", "exp_avg_sq"):  # what AdamW remembers is of the dead code
            if name in optimizer.state.get(codes, {}):
                optimizer.state[codes][name][dead] = 0.0
        self.use[dead] = 1.0 / len(self.use)

    def codebook_use(self) -> dict[str, float]:
        """Over all that was seen since training stopped: share of codes hit, and perplexity."""
        return {"codes_used": float((self.hits > 0).float().mean()), "perplexity": float(_perplexity(self.hits))}

    def train(self, mode: bool = True) -> VqAutoencoder:
        self.hits.zero_()
        super().train(mode)
        return self

    def _counts(self, indices: Tensor) -> Tensor:
        return torch.bincount(indices.flatten(), minlength=len(self.use)).to(self.use.dtype)

    def _dead(self) -> Tensor:
        return self.use < DEAD_BELOW / len(self.use)


def _perplexity(counts: Tensor) -> Tensor:
    """How many codes, equally often used, would say as much."""
    shares = counts / counts.sum()
    return (-(shares * shares.clamp(min=1e-12).log()).sum()).exp()
