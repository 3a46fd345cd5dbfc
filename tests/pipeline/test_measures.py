"""PSNR, SSIM and the Frechet distance, against hand computations and slow, plain ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sdcli.errors import InputError, NumericalError
from sdcli.pipeline.measures import Gaussian, RunningGaussian, frechet_distance, psnr, ssim


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def gaussian_of(features: Tensor) -> Gaussian:
    running = RunningGaussian()
    running.add(features)
    return running.gaussian()


def gaussian(mean: list[float], covariance: list[list[float]]) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))


def test_psnr_is_that_of_each_picture() -> None:
    a = random_pixels(3, 3, 8, 8)
    off = torch.tensor([0.2, 0.02, 0.0], dtype=torch.float64).view(3, 1, 1, 1)
    assert psnr(a, a + off).tolist() == pytest.approx([20.0, 40.0, 10 * math.log10(4e10)])


def slow_ssim(a: np.ndarray, b: np.ndarray, side: int) -> float:
    """SSIM of one channel by its definition: a loop over places, a loop over the window."""
    reach = side // 2
    weight = {
        (i, j): math.exp(-(i * i + j * j) / (2 * 1.5**2))
        for i in range(-reach, reach + 1)
        for j in range(-reach, reach + 1)
    }
    whole = sum(weight.values())
    height, width = a.shape
    c_1, c_2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    values = []
    for row in range(reach, height - reach):
        for column in range(reach, width - reach):
            window = [(w / whole, a[row + i, column + j], b[row + i, column + j]) for (i, j), w in weight.items()]
            mean_a, mean_b = sum(w * x for w, x, _ in window), sum(w * y for w, _, y in window)
            variance_a = sum(w * (x - mean_a) ** 2 for w, x, _ in window)
            variance_b = sum(w * (y - mean_b) ** 2 for w, _, y in window)
            covariance = sum(w * (x - mean_a) * (y - mean_b) for w, x, y in window)
            above = (2 * mean_a * mean_b + c_1) * (2 * covariance + c_2)
            values.append(above / ((mean_a**2 + mean_b**2 + c_1) * (variance_a + variance_b + c_2)))
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("height", "width", "side"), [(13, 14, 11), (11, 11, 11), (7, 9, 7), (9, 6, 5), (2, 20, 1), (1, 1, 1)]
)
def test_ssim_is_its_definition_with_the_largest_odd_window_up_to_eleven(height: int, width: int, side: int) -> None:
    a, b = random_pixels(2, 3, height, width, seed=1), random_pixels(2, 3, height, width, seed=2)
    b = 0.7 * a + 0.3 * b
    for one_a, one_b, value in zip(a.numpy(), b.numpy(), ssim(a, b), strict=True):
        channels = [slow_ssim(x, y, side) for x, y in zip(one_a, one_b, strict=True)]
        assert float(value) == pytest.approx(sum(channels) / 3, rel=1e-9)


def test_ssim_in_half_precision_is_computed_in_float32() -> None:
    a, b = random_pixels(2, 3, 16, 16, seed=1).half(), random_pixels(2, 3, 16, 16, seed=2).half()
    assert ssim(a, b).dtype == torch.float32
    assert ssim(a, b).tolist() == pytest.approx(ssim(a.double(), b.double()).tolist(), abs=1e-5)


def test_ssim_of_equal_pictures_is_one_and_falls_with_noise() -> None:
    a = random_pixels(1, 3, 24, 24)
    noise = random_pixels(1, 3, 24, 24, seed=3)
    values = [float(ssim(a, a + strength * noise)) for strength in (0.0, 0.1, 0.3, 1.0)]
    assert values[0] == pytest.approx(1.0, abs=1e-12)
    assert values == sorted(values, reverse=True) and len(set(values)) == 4


def test_frechet_distance_of_diagonal_gaussians_is_that_of_their_means_and_deviations() -> None:
    a = gaussian([1.0, 2.0, 3.0], [[4.0, 0, 0], [0, 9.0, 0], [0, 0, 0]])
    b = gaussian([1.0, 0.0, 6.0], [[1.0, 0, 0], [0, 25.0, 0], [0, 0, 16.0]])
    # (0^2 + 2^2 + 3^2) + (2 - 1)^2 + (3 - 5)^2 + (0 - 4)^2
    assert frechet_distance(a, b) == pytest.approx(13 + 1 + 4 + 16)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    c_a, c_b = [[2.0, 0.5], [0.5, 1.0]], [[1.0, -0.8], [-0.8, 3.0]]
    # For a 2 x 2 matrix M with eigenvalues >= 0, tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)); here M = C_a C_b:
    # tr M = 2*1 + 0.5*(-0.8) + 0.5*(-0.8) + 1*3 = 4.2, det M = 1.75 * 2.36 = 4.13
    expected = 0.09 + 0.16 + 3 + 4 - 2 * math.sqrt(4.2 + 2 * math.sqrt(4.13))
    assert frechet_distance(gaussian([0, 0], c_a), gaussian([0.3, -0.4], c_b)) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_drawn_samples_comes_to_that_of_their_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.tensor([[1.0, 0.0], [0.7, 0.5]], dtype=torch.float64)
    x = torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(20_000, 2, generator=generator, dtype=torch.float64) @ factor.T + 1.0
    covariance = (factor @ factor.T).tolist()
    expected = frechet_distance(gaussian([0, 0], [[1, 0], [0, 1]]), gaussian([1, 1], covariance))
    assert frechet_distance(gaussian_of(x), gaussian_of(y)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("count", [1, 2, 10, 300])
def test_frechet_distance_of_a_set_to_itself_is_zero(count: int, scale: float) -> None:
    features = random_pixels(count, 128) * scale
    own = gaussian_of(features)
    assert frechet_distance(own, own) <= 1e-6 * max(1.0, scale**2)


def test_few_pictures_in_many_dimensions_give_a_distance_that_is_symmetric() -> None:
    a, b = gaussian_of(random_pixels(3, 64, seed=1)), gaussian_of(random_pixels(2, 64, seed=2) + 1)
    there, back = frechet_distance(a, b), frechet_distance(b, a)
    assert there == pytest.approx(back, rel=1e-12)
    assert there > float((a.mean - b.mean).square().sum())


def test_single_pictures_are_apart_by_their_squared_distance() -> None:
    a, b = random_pixels(1, 5, seed=1), random_pixels(1, 5, seed=2)
    assert frechet_distance(gaussian_of(a), gaussian_of(b)) == pytest.approx(float((a - b).square().sum()))


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [7, 20, 1, 22]])
def test_statistics_taken_in_batches_are_those_of_the_whole(sizes: list[int]) -> None:
    features = random_pixels(50, 6) @ random_pixels(6, 6, seed=1) + 1e4  # far from 0: sums of squares would lose it
    running = RunningGaussian()
    for part in features.split(sizes):
        running.add(part)
    found = running.gaussian()
    assert running.count == 50
    np.testing.assert_allclose(found.mean, features.numpy().mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(features.numpy().T), atol=1e-9)
    assert (found.mean.shape, found.covariance.shape) == ((6,), (6, 6))


def test_nothing_measured_is_refused() -> None:
    with pytest.raises(InputError, match="needs pictures; give at least one"):
        RunningGaussian().gaussian()


def test_features_that_are_not_finite_are_refused_and_leave_what_was_measured() -> None:
    running = RunningGaussian()
    running.add(random_pixels(4, 3))
    before = running.gaussian()
    with pytest.raises(NumericalError, match="not finite"):
        running.add(torch.tensor([[1.0, float("nan"), 0.0]]))
    assert running.count == 4
    assert torch.equal(running.gaussian().covariance, before.covariance)
