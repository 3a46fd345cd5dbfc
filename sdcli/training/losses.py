"""The terms of the autoencoder's objective: KL, the PatchGAN discriminator and the weight that balances it.

Source: Esser et al. 2021, arXiv:2012.09841 (adaptive weight, eq. 7); Rombach et al. 2022, arXiv:2112.10752, appendix G.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, relu, softplus

from sdcli.errors import UsageError

NORM_GROUPS = 16
SLOPE = 0.2  # of the leaky ReLU, Isola et al. 2017
ADAPTIVE_DELTA = 1e-4  # arXiv:2012.09841 eq. 7 has 1e-6, its code and latent diffusion's 1e-4
ADAPTIVE_MAX = 1e4


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, I)) of posterior moments, summed over all their values, in nats.

    Source: Kingma and Welling 2013, arXiv:1312.6114, appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum()


class PatchDiscriminator(nn.Module):
    """Judges every patch of a picture: above 0 for real, below 0 for reconstructed.

    Isola et al. 2017, arXiv:1611.07004, with group instead of batch norm: a picture's verdict does not depend on its
    neighbours, so splitting a batch over processes or portions changes nothing.
    """

    def __init__(self, layers: int = 3, width: int = 64) -> None:
        """layers: of stride 2. width: channels of the first, a multiple of 16; they double up to 8 times."""
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        self.first = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        strides = [2] * (layers - 1) + [1]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=stride, padding=1, bias=False)
            for a, b, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(NORM_GROUPS, b) for b in widths[1:])
        self.last = nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels -> (B, 1, h, w) verdicts."""
        h = leaky_relu(self.first(pixels), SLOPE)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = leaky_relu(norm(convolution(h)), SLOPE)
        verdicts: Tensor = self.last(h)
        return verdicts


def check_patches(layers: int, resolution: int) -> None:
    """Raise UsageError when pictures of `resolution` px are too small to be judged through so many layers."""
    left = resolution // 2**layers - 2  # two convolutions of 4 with stride 1 and padding 1 at the end
    if left < 1:
        raise UsageError(
            f"--disc-layers {layers}: pictures of {resolution} px are too small for them",
            f"use fewer, or --resolution {3 * 2**layers} and above",
        )


def hinge(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """The discriminator's hinge loss on its verdicts of real and of reconstructed pictures; it lowers their mean."""
    return relu(1.0 - real).mean(), relu(1.0 + fake).mean()


def vanilla(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """The discriminator's cross-entropy on its verdicts of real and of reconstructed pictures."""
    return softplus(-real).mean(), softplus(fake).mean()


DISCRIMINATOR_LOSSES = {"hinge": hinge, "vanilla": vanilla}


def adaptive_weight(reconstruction_grad: Tensor, adversarial_grad: Tensor) -> Tensor:
    """lambda = |grad L_rec| / (|grad L_adv| + delta): what makes the adversarial term pull as hard as the rest.

    Both gradients are those at the decoder's last layer, averaged over all processes. Computed in float32 or better.
    Source: arXiv:2012.09841, eq. 7.
    """
    wide = torch.promote_types(reconstruction_grad.dtype, torch.float32)
    pull, push = (torch.linalg.vector_norm(grad.to(wide)) for grad in (reconstruction_grad, adversarial_grad))
    weight: Tensor = pull / (push + ADAPTIVE_DELTA)
    return weight.clamp(0.0, ADAPTIVE_MAX).detach()
