"""LoRA and learned words for Stable Diffusion XL: what they change is what the same does in diffusers, and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdcli import drawing
from sdcli.errors import InputError
from sdcli.pipeline import text
from sdcli.pipeline.bundle import ModelBundle, TextPair, load_bundle
from sdcli.pipeline.lora import merged, read_adapter
from sdcli.pipeline.lora_names import Layers, model_layers, original_names
from sdcli.plan import plan
from sdcli.specs import GenerateSpec
from tests import models
from tests.pipeline.test_lora import Low, lows
from tests.test_generate_xl import Drawn, assert_same, by_diffusers, by_us

CPU = torch.device("cpu")
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.1"
ATTENTION = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_v", f"{BLOCK}.attn2.to_out.0")
UNET = (*ATTENTION, "up_blocks.0.attentions.1.proj_in", "down_blocks.0.resnets.0.conv1", "mid_block.resnets.1.conv2")
TEXT = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj")
ENCODERS = ("text_encoder", "text_encoder_2")

Changes = Mapping[str, Mapping[str, Low]]  # part -> layer -> its change
Write = Callable[[Changes, Layers], dict[str, Tensor]]


@pytest.fixture(scope="module")
def bundle(sdxl: Path) -> ModelBundle:
    return load_bundle(sdxl, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def layers(sdxl: Path) -> Layers:
    return model_layers(sdxl)


@pytest.fixture(scope="module")
def pipe(sdxl: Path) -> Any:
    return models.pipeline_xl(sdxl)


@pytest.fixture(scope="module")
def plain(sdxl: Path, bundle: ModelBundle) -> Drawn:
    return by_us(sdxl, bundle, "euler")


# The dialects.


def kohya(changes: Changes, layers: Layers, naming: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    found = {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    for part, prefix in prefixes.items():
        for name, low in changes[part].items():
            stem = prefix + (naming or {}).get(name, name).replace(".", "_")
            found |= {f"{stem}.lora_down.weight": low.down, f"{stem}.lora_up.weight": low.up}
            found[f"{stem}.alpha"] = torch.tensor(low.alpha)
    return found


def original(changes: Changes, layers: Layers) -> dict[str, Tensor]:
    return kohya(changes, layers, original_names(layers["unet"]))


def peft(changes: Changes, layers: Layers) -> dict[str, Tensor]:
    found = {}
    for part, named in changes.items():
        for name, low in named.items():
            stem = f"{part}.{'text_model.' if part in ENCODERS else ''}{name}"
            found |= {f"{stem}.lora_A.weight": low.down, f"{stem}.lora_B.weight": low.up}
    return found


def old(changes: Changes, layers: Layers) -> dict[str, Tensor]:
    found = {}
    for part, named in changes.items():
        for name, low in named.items():
            block, _, last = name.removesuffix(".0").rpartition(".")
            is_text = part in ENCODERS
            stem = f"{part}.text_model.{name}.lora_linear_layer" if is_text else f"unet.{block}.processor.{last}_lora"
            found |= {f"{stem}.down.weight": low.down, f"{stem}.up.weight": low.up}
    return found


def comfy(changes: Changes, layers: Layers) -> dict[str, Tensor]:
    found, naming = {}, original_names(layers["unet"])
    prefixes = {"unet": "diffusion_model."} | {
        part: f"text_encoders.{name}.transformer.text_model."
        for part, name in zip(ENCODERS, ("clip_l", "clip_g"), strict=True)
    }
    for part, prefix in prefixes.items():
        for name, low in changes[part].items():
            stem = prefix + (naming[name] if part == "unet" else name)
            found |= {f"{stem}.lora_down.weight": low.down, f"{stem}.lora_up.weight": low.up}
    return found


DIALECTS = {"kohya": kohya, "kohya, original naming": original, "PEFT": peft, "attention processors": old}


def changes_of(layers: Layers, write: Write) -> Changes:
    """Changes that a dialect can say, with an alpha where it has one, else the rank."""
    unet = ATTENTION if write is old else UNET
    found = {"unet": lows(layers["unet"], unet), **{part: lows(layers[part], TEXT) for part in ENCODERS}}
    if write in (kohya, original):
        return found
    return {part: {name: Low(low.down, low.up, 2.0) for name, low in some.items()} for part, some in found.items()}


def by_hand(folder: Path, changes: Changes, scale: float) -> Path:
    """Add changes to the weights of a model folder, in the order of the formula: W + scale (alpha / r) B A."""
    for part, named in changes.items():
        weights = load_file(models.weight_file(folder / part))
        for name, low in named.items():
            (key,) = (key for key in weights if key.removeprefix("text_model.") == f"{name}.weight")
            added = low.alpha / 2 * (low.up.flatten(1) @ low.down.flatten(1))
            weights[key] = weights[key] + scale * added.reshape(weights[key].shape)
        save_file(weights, models.weight_file(folder / part))
    return folder


def state(bundle: ModelBundle) -> dict[str, Tensor]:
    """All weights that an adapter could change."""
    pair = bundle.conditioner
    assert isinstance(pair, TextPair)
    modules = {"unet": bundle.unet, "1": pair.first.model, "2": pair.second.model, "projection": pair.projection}
    return {f"{part}.{name}": one for part, module in modules.items() for name, one in module.state_dict().items()}


@pytest.mark.parametrize("write", [*DIALECTS.values(), comfy], ids=[*DIALECTS, "ComfyUI"])  # diffusers does not read it
def test_each_dialect_is_the_same_delta_added_by_hand_to_the_bit(
    sdxl: Path, bundle: ModelBundle, layers: Layers, tmp_path: Path, write: Write
) -> None:
    changes, before = changes_of(layers, write), {name: one.clone() for name, one in state(bundle).items()}
    save_file(write(changes, layers), tmp_path / "a.safetensors")
    found = state(merged(bundle, [read_adapter(tmp_path / "a.safetensors", layers, 0.8)]))
    folder = by_hand(models.copy(sdxl, tmp_path / "model"), changes, 0.8)
    expected = state(load_bundle(folder, device=CPU, dtype=torch.float32))
    assert expected.keys() == found.keys()
    assert [name for name, one in expected.items() if not torch.equal(one, found[name])] == []
    changed = {name for name, one in expected.items() if not torch.equal(one, before[name])}
    assert len(changed) == sum(map(len, changes.values()))
    assert all(torch.equal(one, before[name]) for name, one in state(bundle).items())  # without it, the plain model


@pytest.mark.parametrize("write", DIALECTS.values(), ids=DIALECTS)
def test_each_dialect_draws_what_it_draws_in_diffusers(
    sdxl: Path, bundle: ModelBundle, layers: Layers, pipe: Any, plain: Drawn, tmp_path: Path, write: Write
) -> None:
    save_file(write(changes_of(layers, write), layers), tmp_path / "a.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="a")
    pipe.set_adapters("a", 0.5)
    theirs = by_diffusers(pipe, "euler")
    pipe.unload_lora_weights()
    ours = by_us(sdxl, bundle, "euler", lora=(f"{tmp_path / 'a.safetensors'}:0.5",))
    assert_same(ours, theirs)
    assert abs(ours[1] - plain[1]).max() > 10
    assert np.array_equal(by_us(sdxl, bundle, "euler")[1], plain[1])


def test_the_projection_of_the_summary_is_a_layer_of_the_second_encoder(
    bundle: ModelBundle, layers: Layers, tmp_path: Path
) -> None:
    (low,) = lows(layers["text_encoder_2"], ("text_projection",)).values()
    stem = "lora_te2_text_projection"
    save_file({f"{stem}.lora_down.weight": low.down, f"{stem}.lora_up.weight": low.up}, tmp_path / "a.safetensors")
    before, found = state(bundle), state(merged(bundle, [read_adapter(tmp_path / "a.safetensors", layers)]))
    changed = {name for name, one in before.items() if not torch.equal(one, found[name])}
    assert changed == {"projection.weight"}
    assert torch.equal(found["projection.weight"], before["projection.weight"] + low.up @ low.down)


def test_several_files_and_one_given_twice_add_up_by_their_scales(
    sdxl: Path, bundle: ModelBundle, layers: Layers, tmp_path: Path
) -> None:
    one, other = (tmp_path / f"{name}.safetensors" for name in ("one", "other"))
    save_file(kohya(changes_of(layers, kohya), layers), one)
    save_file(peft(changes_of(layers, old), layers), other)  # of some layers, with another alpha

    def drawn(*lora: str) -> Drawn:
        return by_us(sdxl, bundle, "euler", lora=lora)

    both = drawn(f"{one}:0.5", f"{other}:-0.25")
    assert_same(both, drawn(f"{other}:-0.25", f"{one}:0.5"))
    assert_same(drawn(f"{one}:0.25", f"{one}:0.25"), drawn(f"{one}:0.5"))
    assert min(abs(both[1] - drawn(f"{name}")[1]).max() for name in (f"{one}:0.5", f"{other}:-0.25")) > 3
    assert np.array_equal(drawn(f"{one}:0")[1], by_us(sdxl, bundle, "euler")[1])


# Learned words.


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    """The pair of three vectors each for `my-cat`, as pickled by kohya's trainer."""
    chance = torch.Generator().manual_seed(1)
    widths = {"clip_l": models.CONTEXT, "clip_g": models.CONTEXT_2}
    torch.save({key: torch.randn(3, width, generator=chance) for key, width in widths.items()}, tmp_path / "my-cat.pt")
    return tmp_path / "my-cat.pt"


def test_a_learned_word_draws_what_it_draws_in_diffusers_with_both_encoders(
    sdxl: Path, bundle: ModelBundle, cat: Path
) -> None:
    pipe, pair = models.pipeline_xl(sdxl), torch.load(cat, weights_only=True)
    # The published config names a wrong end mark: diffusers then takes the summary at the learned word, whose id is the
    # greatest, not at the end, where all that the word does would be in it (huggingface/transformers, issue 24650).
    assert pipe.text_encoder_2.text_model.eos_token_id == 2
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    for key, ending in (("clip_l", ""), ("clip_g", "_2")):
        parts = {name: getattr(pipe, f"{name}{ending}") for name in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion({"<cat>": pair[key]}, token="<cat>", **parts)

    def both(prompt: str, negative: str) -> Drawn:
        files = (f"{cat}:<cat>",) if "<cat>" in prompt + negative else ()
        ours = by_us(sdxl, bundle, "euler", prompt=prompt, negative=negative, embedding=files)
        assert_same(ours, by_diffusers(pipe, "euler", prompt=prompt, negative=negative))
        return ours

    named = both("a picture of <cat>, smiling", "blurry")
    shunned = both("a picture of a dog", "a <cat>")
    neither = both("a picture of a dog", "blurry")
    assert abs(shunned[1] - neither[1]).max() > 3 and abs(named[1] - neither[1]).max() > 3


def test_each_encoder_is_fed_its_own_vectors_and_weights_count(sdxl: Path, bundle: ModelBundle, cat: Path) -> None:
    decided = plan(GenerateSpec(prompt="my-cat", model=str(sdxl), embedding=(str(cat),)))
    pair = drawing.equipped(bundle, drawing.read_words(decided)).conditioner
    assert isinstance(pair, TextPair)
    walk = text.walk_through(pair, "a my-cat")
    for name, key in (("token_embedding", "clip_l"), ("token_embedding_2", "clip_g")):
        assert torch.equal(walk[name][0, 2:5], torch.load(cat, weights_only=True)[key])
    with torch.no_grad():
        one, same, heavy = (
            text.encode_prompts(pair, [words], 1).hidden for words in ("a my-cat", "a (MY-CAT:1.0)", "a (my-cat:1.5)")
        )
    assert torch.equal(one, same) and not torch.allclose(one, heavy, atol=0.01)


def test_a_file_for_the_other_family_is_refused_by_its_widths(sdxl: Path, sd1: Path, cat: Path, tmp_path: Path) -> None:
    save_file({"<cat>": torch.ones(1, models.CONTEXT)}, tmp_path / "one.safetensors")
    for model, file, said in (
        (
            sdxl,
            tmp_path / "one.safetensors",
            "its vectors are 16 wide, the model's 16 and 24 wide (Stable Diffusion XL)",
        ),
        (sd1, cat, "its vectors are 16 and 24 wide (Stable Diffusion XL), the model's 16 wide; use one that was made"),
    ):
        with pytest.raises(InputError) as caught:  # a pickled one is read when it is needed
            drawing.read_words(plan(GenerateSpec(prompt="a cat", model=str(model), embedding=(str(file),))))
        assert said in str(caught.value)
    with pytest.raises(InputError, match=r"one\.safetensors: its vectors are 16 wide, the model's 16 and 24 wide"):
        plan(GenerateSpec(prompt="a cat", model=str(sdxl), embedding=(str(tmp_path / "one.safetensors"),)))
