"""Figures that compare pictures, and sets of pictures: PSNR, SSIM and the Frechet distance. No networks here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdcli.errors import InputError, NumericalError

DATA_RANGE = 2.0  # pixels span [-1, 1]
LEAST_SQUARED_ERROR = 1e-10  # what PSNR takes for nothing: equal pictures have 106 dB
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # px; this and the next line: Wang et al. 2004, section III-C
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures, in dB; 106 for equal ones.

    a, b: (B, 3, H, W) pixels in [-1, 1]. Returns (B,), in float32 or what is wider.
    """
    x, y = _wide(a, b)
    squared_error = (x - y).square().mean(dim=(1, 2, 3)).clamp(min=LEAST_SQUARED_ERROR)
    return 10 * (DATA_RANGE**2 / squared_error).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of pictures, 1 for equal ones: the mean over channels and all places of a whole window.

    a, b: (B, C, H, W) pixels in [-1, 1]. Returns (B,), in float32 or what is wider.
    The window has 11 x 11 px; in a picture with a shorter side it is cut to the largest odd number that fits.
    Source: Wang et al. 2004, Image Quality Assessment: From Error Visibility to Structural Similarity, eq. 13-17.
    """
    x, y = _wide(a, b)
    w = _gaussian_window(min(SSIM_WINDOW, *x.shape[-2:])).to(x)
    mu_x, mu_y = _blur(x, w), _blur(y, w)  # eq. 14, (B, C, H - K + 1, W - K + 1)
    variance_x = _blur(x * x, w) - mu_x**2  # eq. 15
    variance_y = _blur(y * y, w) - mu_y**2
    covariance = _blur(x * y, w) - mu_x * mu_y  # eq. 16
    c_1, c_2 = (SSIM_K1 * DATA_RANGE) ** 2, (SSIM_K2 * DATA_RANGE) ** 2
    luminance = (2 * mu_x * mu_y + c_1) / (mu_x**2 + mu_y**2 + c_1)
    structure = (2 * covariance + c_2) / (variance_x + variance_y + c_2)
    return (luminance * structure).mean(dim=(1, 2, 3))  # eq. 13, 17


def _wide(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their types, float32 at least: squares of half-precision errors would be lost."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


def _gaussian_window(side: int) -> Tensor:
    """A row of odd length, `side` or one less, that sums to 1; float64."""
    reach = (side - 1) // 2
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    w = torch.exp(-0.5 * (places / SSIM_SIGMA) ** 2)
    return w / w.sum()


def _blur(x: Tensor, w: Tensor) -> Tensor:
    """Weighted means over all windows that lie inside the picture, each channel for itself."""
    channels = x.shape[1]
    x = F.conv2d(x, w.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(x, w.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution of feature vectors: mean (D,) and covariance (D, D), float64 on the CPU."""

    mean: Tensor
    covariance: Tensor


class RunningGaussian:
    """The Gaussian of feature vectors that come batch by batch; its memory does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros((), dtype=torch.float64)
        self._scatter = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in one vector a picture: (B, D), B at least 1. Raises NumericalError when they are not finite.

        Source: Chan, Golub and LeVeque 1979, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances.
        """
        x = features.detach().cpu().double()
        if not x.isfinite().all():
            raise NumericalError("the features of a picture are not finite", "check the pictures and the network")
        n, m = len(x), self.count
        mean = x.mean(dim=0)
        centred, apart = x - mean, mean - self._mean
        self._scatter = self._scatter + centred.T @ centred + torch.outer(apart, apart) * (n * m / (n + m))
        self._mean = self._mean + apart * (n / (n + m))
        self.count += n

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance of what was added; one vector has covariance 0.

        Raises InputError when nothing was added.
        """
        if self.count == 0:
            raise InputError("a Frechet distance needs pictures", "give at least one on each side")
        return Gaussian(self._mean, self._scatter / max(self.count - 1, 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """How far two sets of pictures are apart, as Gaussians of their features: 0 for equal ones, squared units.

    Sets of fewer pictures than the features have dimensions work; but the figure falls with their number, so only
    figures of equal numbers can be compared.
    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6.
    """
    means = (a.mean - b.mean).square().sum()
    # With C = R R^T, tr (C_a C_b)^(1/2) is the sum of the singular values of R_a^T R_b: real for any covariances,
    # and without the square root of a product's rounding errors.
    cross = torch.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)).sum()
    return max(0.0, float(means + a.covariance.trace() + b.covariance.trace() - 2 * cross))


def _root(covariance: Tensor) -> Tensor:
    """R with covariance = R R^T, by its eigenvalues, of which rounding may have made some negative."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root
