"""Weights that stay in half precision compute as if they had been widened on loading, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdcli.drawing import read_adapters
from sdcli.pipeline import narrow, text, vae
from sdcli.pipeline.bundle import ModelBundle, TextEncoder, TextPair, load_bundle
from sdcli.pipeline.device import unhooked
from sdcli.pipeline.lora import merged
from sdcli.plan.lora_files import lora_file
from tests import models

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16])
def half(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = models.write_sd1(tmp_path_factory.mktemp("half"))
    for part in ("vae", "unet", "text_encoder"):
        models.edit_weights(folder / part, lambda state: {key: value.to(request.param) for key, value in state.items()})
    return folder


@pytest.fixture
def pair(half: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelBundle, ModelBundle]:
    """A model with every weight that can be narrow, and one that is wide."""
    monkeypatch.setattr(narrow, "LEAST_PART", 0)
    monkeypatch.setattr(narrow, "LEAST_WEIGHT", 0)
    lean, wide = (load_bundle(half, device=CPU, dtype=torch.float32, is_lean=is_lean) for is_lean in (True, False))
    return lean, wide


def narrow_weights(module: nn.Module) -> list[str]:
    return [name for name, weight in module.named_parameters() if weight.dtype != torch.float32]


@torch.no_grad()
def answers(bundle: ModelBundle) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    assert isinstance(bundle.conditioner, TextEncoder)
    context = text.encode_chunks(bundle.conditioner, [text.read(bundle.conditioner, "a small dog")])
    latents, pixels = torch.randn(1, *models.LATENTS, generator=chance), torch.rand(1, 3, 32, 32, generator=chance)
    predicted = bundle.unet(latents.to(context.dtype), torch.tensor(500), encoder_hidden_states=context).sample
    return {"context": context, "unet": predicted} | {
        "decoded": vae.decode(bundle.vae, latents),
        "encoded": vae.encode(bundle.vae, pixels),
    }


def test_narrow_weights_give_the_bits_of_wide_ones(pair: tuple[ModelBundle, ModelBundle]) -> None:
    lean, wide = pair
    for part in (lean.unet, lean.vae):
        assert len(narrow_weights(part)) > 20
    assert not narrow_weights(wide.unet)
    expected = answers(wide)
    assert all(torch.equal(found, expected[name]) for name, found in answers(lean).items())


def test_adapters_are_merged_without_rounding_to_the_narrow_type(
    pair: tuple[ModelBundle, ModelBundle], half: Path, tmp_path: Path
) -> None:
    file = lora_file(str(models.write_lora(tmp_path / "a.safetensors", half)))
    lean, wide = (merged(one, read_adapters([file], half)) for one in pair)
    expected = answers(wide)
    assert all(torch.equal(found, expected[name]) for name, found in answers(lean).items())
    assert not torch.equal(expected["unet"], answers(pair[1])["unet"])
    assert narrow_weights(lean.unet)


def test_the_projection_of_xl_is_merged_without_rounding_likewise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "LEAST_PART", 0)
    monkeypatch.setattr(narrow, "LEAST_WEIGHT", 0)
    folder = models.write_sdxl(tmp_path / "xl")
    models.edit_weights(folder / "text_encoder_2", lambda state: {key: value.half() for key, value in state.items()})
    bundles = [load_bundle(folder, device=CPU, dtype=torch.float32, is_lean=is_lean) for is_lean in (True, False)]
    assert isinstance(bundles[0].conditioner, TextPair)
    assert bundles[0].conditioner.projection.weight.dtype == torch.float16
    (out, width), layer = bundles[0].conditioner.projection.weight.shape, "lora_te2_text_projection"
    chance = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, width, generator=chance), torch.randn(out, 2, generator=chance)
    tensors = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapters = read_adapters([lora_file(str(tmp_path / "a.safetensors"))], folder)
    lean, wide = (merged(one, adapters).conditioner for one in bundles)
    assert isinstance(lean, TextPair) and isinstance(wide, TextPair)
    assert torch.equal(lean.projection.weight, wide.projection.weight)


def test_a_copy_in_another_type_computes_in_that_type(pair: tuple[ModelBundle, ModelBundle]) -> None:
    lean, wide = (nn.Module.to(unhooked(one.unet), torch.float64) for one in pair)
    x, context = torch.ones(1, *models.LATENTS).double(), torch.ones(1, 7, models.CONTEXT).double()
    expected = wide(x, torch.tensor(1), encoder_hidden_states=context).sample
    assert expected.dtype == torch.float64
    assert torch.equal(lean(x, torch.tensor(1), encoder_hidden_states=context).sample, expected)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: load_bundle(folder, device=CPU, dtype=torch.float32, is_lean=True),  # too small to pay
        lambda folder: load_bundle(folder, device=CPU, dtype=torch.float32),  # which may be trained
    ],
)
def test_small_models_and_those_that_may_be_trained_are_widened_on_loading(
    half: Path, load: Callable[[Path], ModelBundle]
) -> None:
    loaded = load(half)
    assert not narrow_weights(loaded.unet) + narrow_weights(loaded.vae)


def test_one_place_is_enough_for_all_weights_of_a_type() -> None:
    weights = [torch.randn(3, 5).half(), torch.randn(2, 7).half()]
    places = {narrow.widened(weight, torch.float32).data_ptr() for weight in weights}
    assert len(places) == 1
    assert torch.equal(narrow.widened(weights[1], torch.float32), weights[1].float())
    assert narrow.widened(weights[0], torch.float16) is weights[0]
