"""The autoencoder's adversary, and the weight that balances it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as exact_kl

from sdcli.errors import UsageError
from sdcli.training.losses import (
    ADAPTIVE_DELTA,
    ADAPTIVE_MAX,
    PatchDiscriminator,
    adaptive_weight,
    check_patches,
    hinge,
    kl_divergence,
    vanilla,
)


def test_kl_is_that_of_torchs_distributions_and_0_for_a_standard_normal() -> None:
    mean, logvar = torch.randn(2, 3, 4, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = exact_kl(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)
    assert float(kl_divergence(torch.zeros(3), torch.zeros(3))) == 0.0


def test_hinge_stops_pushing_verdicts_that_are_clear_enough() -> None:
    verdicts = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])
    of_real, of_fake = hinge(verdicts, verdicts)
    assert float(of_real) == pytest.approx((3 + 2 + 1 + 0 + 0) / 5)
    assert float(of_fake) == pytest.approx((0 + 0 + 1 + 2 + 4) / 5)


def test_vanilla_is_the_cross_entropy_of_real_and_fake() -> None:
    real, fake = torch.tensor([0.3, -1.2]), torch.tensor([2.0, 0.1])
    of_real, of_fake = vanilla(real, fake)
    entropy = nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(of_real, entropy(real, torch.ones(2)))
    torch.testing.assert_close(of_fake, entropy(fake, torch.zeros(2)))


@pytest.mark.parametrize(("layers", "resolution", "side"), [(3, 64, 6), (2, 64, 14), (1, 16, 6), (3, 32, 2)])
def test_the_discriminator_judges_patches(layers: int, resolution: int, side: int) -> None:
    critic = PatchDiscriminator(layers, 16)
    assert critic(torch.zeros(2, 3, resolution, resolution)).shape == (2, 1, side, side)


def test_a_verdict_does_not_depend_on_the_neighbours_in_the_batch() -> None:
    torch.manual_seed(0)
    critic, pixels = PatchDiscriminator(2, 16).double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(critic(pixels)[2:3], critic(pixels[2:3]), rtol=1e-10, atol=1e-12)


def test_what_a_patch_sees_ends_where_its_field_ends() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(2, 16)
    for module in critic.modules():  # group norm looks at the whole picture: out of the way
        if isinstance(module, nn.ModuleList) and isinstance(module[0], nn.GroupNorm):
            for i in range(len(module)):
                module[i] = nn.Identity()
    pixels = torch.zeros(1, 3, 64, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(critic(pixels)[0, 0, 7, 7], pixels)
    rows = grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == 34  # 70 px for three layers, 34 for two: Isola et al. 2017, appendix 6.1.2


@pytest.mark.parametrize(("layers", "least"), [(1, 6), (2, 12), (3, 24), (5, 96)])
def test_pictures_too_small_to_be_judged_are_refused_with_the_least_size(layers: int, least: int) -> None:
    check_patches(layers, least)
    PatchDiscriminator(layers, 16)(torch.zeros(1, 3, least, least))
    with pytest.raises(UsageError, match=f"--disc-layers {layers}: pictures of {least - 2} px") as caught:
        check_patches(layers, least - 2)
    assert f"--resolution {least} and above" in (caught.value.hint or "")


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 2, bias=False).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    y = last(first(x))
    pull, push = y.square().mean(), y.sum() * 0.1
    found = adaptive_weight(*(torch.autograd.grad(term, last.weight, retain_graph=True)[0] for term in (pull, push)))
    h = first(x).detach()

    def norm(of_y: Tensor) -> float:  # of d term / d W = (d term / d y)^T h
        return math.sqrt(float((of_y.T @ h).square().sum()))

    by_hand = norm(2 * y.detach() / y.numel()) / (norm(torch.full((5, 2), 0.1, dtype=torch.float64)) + ADAPTIVE_DELTA)
    assert float(found) == pytest.approx(by_hand, rel=1e-12)
    assert not found.requires_grad


@pytest.mark.parametrize(("pull", "push", "weight"), [(1.0, 0.0, ADAPTIVE_MAX), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)])
def test_the_adaptive_weight_is_finite_whatever_the_gradients(pull: float, push: float, weight: float) -> None:
    assert float(adaptive_weight(torch.tensor([pull]), torch.tensor([push]))) == pytest.approx(weight)
