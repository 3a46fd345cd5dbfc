"""The bottleneck with a codebook: gradients through it, codes in use, dead ones restarted."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor

from sdcli.pipeline import vae as latent
from sdcli.pipeline.bundle import build
from sdcli.training.autoencoders import COMMITMENT, VqAutoencoder
from sdcli.training.parts import preset

CODES = 8


def model_of(seed: int = 0) -> VqAutoencoder:
    torch.manual_seed(seed)
    kept = {k: v for k, v in preset("tiny")["vae"].items() if not k.startswith("_") and k != "shift_factor"}
    config = {"_class_name": "VQModel", **kept, "num_vq_embeddings": CODES, "vq_embed_dim": kept["latent_channels"]}
    vae = cast("VQModel", build(config))
    return VqAutoencoder(vae, 0, Accelerator(cpu=True), learn_logvar=False).train()


def pixels_of(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def codes(model: VqAutoencoder) -> Tensor:
    return cast("VQModel", model.vae).quantize.embedding.weight


def test_every_vector_becomes_its_nearest_code() -> None:
    model = model_of()
    z = torch.randn(2, codes(model).shape[1], 3, 5, generator=torch.Generator().manual_seed(2))
    z_q, indices = latent.quantized(cast("VQModel", model.vae), z)
    for b in range(2):
        for y in range(3):
            for x in range(5):
                nearest = int((codes(model) - z[b, :, y, x]).square().sum(dim=1).argmin())
                assert int(indices[b, y, x]) == nearest
                assert torch.equal(z_q[b, :, y, x], codes(model)[nearest])


def test_gradients_go_straight_through_to_the_encoder_and_the_codes_learn_by_their_own_term() -> None:
    model = model_of()
    reconstruction, terms, _ = model(pixels_of(), torch.zeros(0))
    last = cast("VQModel", model.vae).encoder.conv_out.weight
    (grad,) = torch.autograd.grad(reconstruction.square().sum(), last, retain_graph=True)
    assert float(grad.abs().sum()) > 0
    (of_codes,) = torch.autograd.grad(reconstruction.square().sum(), codes(model), retain_graph=True, allow_unused=True)
    assert of_codes is None
    (of_codes,) = torch.autograd.grad(terms["codebook"], codes(model))
    assert float(of_codes.abs().sum()) > 0


def test_the_codebook_term_is_the_distance_both_ways_the_encoders_by_beta() -> None:
    model = model_of().eval()
    _, terms, _ = model(pixels_of(), torch.zeros(0))
    z, _ = latent.moments(model.vae, pixels_of())
    z_q, _ = latent.quantized(cast("VQModel", model.vae), z)
    expected = (1 + COMMITMENT) * (z - z_q).square().mean()
    torch.testing.assert_close(terms["codebook"].detach(), expected.detach())


def settled(model: VqAutoencoder, step: int) -> torch.optim.Optimizer:
    """The codebook after a step, and AdamW with moments of 1 for every code."""
    optimizer = torch.optim.AdamW([codes(model)])
    ones = torch.ones_like(codes(model))
    optimizer.state[codes(model)] = {"step": torch.tensor(1.0), "exp_avg": ones.clone(), "exp_avg_sq": ones.clone()}
    _, _, left = model(pixels_of(), torch.zeros(0))
    halves = [{name: rows[part] for name, rows in left.items()} for part in (slice(0, 1), slice(1, 3))]
    model.settle(halves, step, optimizer)
    return optimizer


def test_after_the_first_step_every_code_stands_on_a_vector_of_its_batch() -> None:
    model = model_of()
    before = codes(model).detach().clone()
    settled(model, 0)
    z, _ = latent.moments(model.vae, pixels_of())
    vectors = z.detach().movedim(1, -1).flatten(0, -2)
    apart = torch.cdist(codes(model).detach(), vectors).min(dim=1).values
    assert not torch.equal(codes(model), before)
    assert float(apart.max()) < 0.1 * float(vectors.std()) * vectors.shape[1] ** 0.5


def test_dead_codes_are_restarted_with_nothing_remembered_and_living_ones_stay() -> None:
    model = model_of()
    model(pixels_of(), torch.zeros(0))
    model.use.copy_(torch.tensor([0.5, 0.5] + [0.0] * (CODES - 2)))
    with torch.no_grad():
        codes(model)[2:] = 100.0  # far from every vector
    before = codes(model).detach().clone()
    optimizer = settled(model, 20)
    assert torch.equal(codes(model)[:2], before[:2])
    assert float(codes(model).detach()[2:].max()) < 50
    moments = optimizer.state[codes(model)]["exp_avg"]
    assert (moments[:2] == 1).all() and (moments[2:] == 0).all()
    model.use.copy_(torch.tensor([0.5, 0.5] + [0.0] * (CODES - 2)))
    again = codes(model).detach().clone()
    settled(model, 21)  # between two restarts
    assert torch.equal(codes(model), again)


def test_the_running_use_moves_towards_the_shares_of_the_step() -> None:
    model = model_of()
    _, _, left = model(pixels_of(), torch.zeros(0))
    shares = torch.bincount(left["indices"].flatten(), minlength=CODES) / left["indices"].numel()
    expected = 0.99 / CODES + 0.01 * shares
    settled(model, 1)
    torch.testing.assert_close(model.use, expected)


def test_use_and_perplexity_count_what_was_hit() -> None:
    model = model_of().eval()
    z, _ = latent.moments(model.vae, pixels_of())
    _, indices = latent.quantized(cast("VQModel", model.vae), z)
    shares = torch.bincount(indices.flatten(), minlength=CODES) / indices.numel()
    perplexity = float(torch.distributions.Categorical(shares).entropy().exp())
    _, terms, _ = model(pixels_of(), torch.zeros(0))
    assert float(terms["perplexity"]) == pytest.approx(perplexity, rel=1e-5)
    model(pixels_of(), torch.zeros(0))
    found = model.codebook_use()
    assert found["codes_used"] == float((shares > 0).float().mean())
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-5)
