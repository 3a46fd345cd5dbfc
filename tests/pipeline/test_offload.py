"""A model whose parts come to the device as they work draws what it draws without, and nothing stays there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdcli import generate
from sdcli.errors import UsageError
from sdcli.pipeline import vae
from sdcli.pipeline.bundle import ModelBundle, TextEncoder, load_bundle
from sdcli.pipeline.device import computing_device, let_go, unhooked
from sdcli.pipeline.offload import brought_home, home, is_at_hand, is_offloaded, placed
from sdcli.plan import plan
from sdcli.specs import GenerateSpec
from tests import models

CPU, META, NOWHERE = torch.device("cpu"), torch.device("meta"), torch.device("cuda:99")
WAYS = ("model", "sequential")


def load(folder: Path) -> ModelBundle:
    return load_bundle(folder, device=CPU, dtype=torch.float32)


def picture(folder: Path, target: Path, **how: Any) -> bytes:
    spec = GenerateSpec(**{"model": str(folder), "output": target, "steps": 2, "seed": 3, "device": "cpu", **how})
    for _ in generate.run(spec, plan(spec)):
        pass
    return target.read_bytes()


def devices(module: nn.Module) -> set[str]:
    return {weight.device.type for weight in module.parameters()}


def called(bundle: ModelBundle) -> dict[str, nn.Module]:
    assert isinstance(bundle.conditioner, TextEncoder)
    return {"text": bundle.conditioner.model, "unet": bundle.unet, **dict(bundle.vae.named_children())}


def predicted(bundle: ModelBundle) -> Tensor:
    x, context = torch.ones(1, *models.LATENTS), torch.ones(1, 77, models.CONTEXT)
    answer: Tensor = bundle.unet(x, torch.tensor(10), encoder_hidden_states=context).sample
    return answer


@pytest.mark.parametrize("way", WAYS)
def test_the_picture_is_the_same_to_the_bit(sd1: Path, tmp_path: Path, way: str) -> None:
    """With adapters merged, and started from a picture, so that every part of the model works."""
    lora = str(models.write_lora(tmp_path / "a.safetensors", sd1))
    first = {"prompt": "a cat", "lora": (lora,)}
    plain = picture(sd1, tmp_path / "plain.png", **first)
    assert picture(sd1, tmp_path / "other.png", **first, offload=way) == plain
    second = {"prompt": "a dog", "init_image": tmp_path / "plain.png"}
    again = picture(sd1, tmp_path / "again.png", **second)
    assert picture(sd1, tmp_path / "once-more.png", **second, offload=way) == again


@pytest.mark.parametrize("way", WAYS)
def test_both_text_encoders_of_xl_and_its_projection_are_offloaded(tmp_path: Path, way: str) -> None:
    folder, how = models.write_sdxl(tmp_path / "xl"), {"prompt": "a cat"}
    assert picture(folder, tmp_path / "a.png", **how, offload=way) == picture(folder, tmp_path / "b.png", **how)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_models_of_classes_are_offloaded_likewise(classed: Path, tmp_path: Path, way: str) -> None:
    how = {"class_name": "dog"}
    assert picture(classed, tmp_path / "a.png", **how, offload=way) == picture(classed, tmp_path / "b.png", **how)


@pytest.mark.parametrize("way", WAYS)
def test_the_model_that_was_given_stays_as_it_is_and_shares_its_weights(sd1: Path, way: str) -> None:
    plain = load(sd1)
    before = {name: weight.data_ptr() for name, weight in plain.unet.named_parameters()}
    offloaded = placed(plain, CPU, way)
    assert torch.equal(predicted(offloaded), predicted(plain))
    assert is_offloaded(offloaded) and not is_offloaded(plain)
    assert {name: weight.data_ptr() for name, weight in plain.unet.named_parameters()} == before
    copied = {name: weight.data_ptr() for name, weight in unhooked(offloaded.unet).named_parameters()}
    assert copied.keys() == before.keys() and not set(copied.values()) & set(before.values())
    if way == "model":
        assert {name: weight.data_ptr() for name, weight in offloaded.unet.named_parameters()} == before


def test_one_part_at_a_time_is_on_the_device(sd1: Path) -> None:
    """On a device without memory, where every part computes nothing."""
    offloaded = placed(load(sd1), META, "model")
    parts, moments = called(offloaded), []

    def look() -> None:
        moments.append([name for name, part in parts.items() if devices(part) == {"meta"}])

    look()
    predicted(offloaded)
    look()
    offloaded.vae.decoder(torch.ones(1, *models.LATENTS))
    look()
    parts["text"](input_ids=torch.ones(1, 77, dtype=torch.int64))
    look()
    assert moments == [[], ["unet"], ["decoder"], ["text"]]
    assert computing_device(offloaded.unet) == computing_device(offloaded.vae) == META


@torch.no_grad()
def test_a_tiled_vae_has_the_device_to_itself_likewise(sd1: Path) -> None:
    offloaded = placed(load(sd1), META, "model")
    tiled = vae.tiled(offloaded.vae)
    predicted(offloaded)
    assert devices(offloaded.unet) == {"meta"}
    vae.decode(tiled, torch.ones(1, *models.LATENTS))
    assert devices(offloaded.unet) == devices(tiled.encoder) == {"cpu"} and devices(tiled.decoder) == {"meta"}
    assert vae.is_tiled(tiled) and not vae.is_tiled(offloaded.vae)


def test_of_a_sequence_of_layers_none_stays(sd1: Path) -> None:
    offloaded = placed(load(sd1), CPU, "sequential")
    predicted(offloaded)
    for part in called(offloaded).values():
        assert devices(part) == {"meta"}
        assert computing_device(part) == CPU


def test_a_part_that_does_not_fit_is_home_again(sd1: Path) -> None:
    offloaded = placed(load(sd1), META, "model")
    hook: Any = offloaded.unet._hf_hook
    hook._stage.device = NOWHERE
    with pytest.raises((RuntimeError, AssertionError)):
        predicted(offloaded)
    assert devices(offloaded.unet) == {"cpu"}
    hook._stage.device = CPU
    hook.execution_device = CPU
    assert torch.equal(predicted(offloaded), predicted(load(sd1)))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_vae_that_overflows_is_decoded_with_in_float32_all_the_same(sd1: Path, way: str) -> None:
    plain = load_bundle(sd1, device=CPU, dtype=torch.float16)
    plain.vae.decoder.conv_out.weight.mul_(6e4)
    latents = torch.ones(1, *models.LATENTS)
    with pytest.warns(match="decoded again in float32"):
        expected = vae.decode_finite(plain.vae, latents)
    with pytest.warns(match="decoded again in float32"):
        assert torch.equal(vae.decode_finite(placed(plain, CPU, way).vae, latents), expected)


def test_a_model_that_is_brought_home_is_told_from_one_at_hand(sd1: Path) -> None:
    bundle = load_bundle(sd1, device=CPU, dtype=torch.float32)
    assert is_at_hand(brought_home(bundle))
    assert not is_at_hand(dataclasses.replace(bundle, device=META))
    assert home(META, "auto") == META and home(META, "model") == home(META, "sequential") == CPU


def test_weights_that_are_let_go_are_there_again_when_asked_for(sd1: Path) -> None:
    mapped, computed = load(sd1), nn.Linear(300, 300)
    before = [weight.clone() for weight in (*mapped.unet.parameters(), *computed.parameters())]
    let_go(mapped.unet)
    let_go(computed)
    after = (*mapped.unet.parameters(), *computed.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_what_is_compiled_is_not_offloaded() -> None:
    with pytest.raises(UsageError, match="--compile with --offload model"):
        GenerateSpec(prompt="a cat", compile=True, offload="model")


@pytest.fixture
def used() -> Iterator[None]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_on_a_gpu_the_picture_is_the_same_in_less_memory(tmp_path: Path, way: str, used: None) -> None:
    how = {"prompt": "a puppy", "device": "cuda", "dtype": "float16"}
    plain = picture(Path("builtin"), tmp_path / "a.png", **how)
    all_at_once = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert picture(Path("builtin"), tmp_path / "b.png", **how, offload=way) == plain
    assert torch.cuda.max_memory_allocated() < all_at_once
