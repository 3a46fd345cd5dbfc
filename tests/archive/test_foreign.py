"""What other programs say becomes our settings, and nothing of the rest is dropped in silence."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from sdcli.archive.foreign import others
from sdcli.archive.reading import said_in
from sdcli.pipeline.provenance import Provenance
from sdcli.pipeline.wildcards import template
from tests.pipeline.test_comfy import USUAL, changed
from tests.pipeline.test_provenance import SDCPP, SDCPP_TEXT

NOTHING: frozenset[str] = frozenset()
USUAL_A1111 = {"CFG scale": 7, "Seed": 9, "Size": "512x768", "RNG": "CPU"}
SETTINGS = {
    "prompt": "a dog", "negative": "cat", "steps": 25, "guidance": 7.0, "seed": 9, "width": 512, "height": 768,
    "scheduler": "dpm",
}  # fmt: skip
INVOKE = {
    "positive_prompt": "a dog", "negative_prompt": "cat", "seed": 9, "steps": 25, "cfg_scale": 7, "width": 512,
    "height": 768, "scheduler": "dpmpp_2m_k", "generation_mode": "txt2img", "rand_device": "cpu",
    "cfg_rescale_multiplier": 0, "strength": 0.75, "app_version": "5.0", "loras": [], "seamless_x": False,
}  # fmt: skip


def said(**texts: str) -> Provenance:
    """What is read of a picture with these texts."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_itxt(key, text)
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format="PNG", pnginfo=chunks)
    return said_in(stream.getvalue(), Path("x.png"))


def a1111(prompt: str = "a dog", **pairs: Any) -> Provenance:
    """A text of A1111's with these settings, `_` in a name for a space."""
    named = {name.replace("_", " "): value for name, value in pairs.items()}
    told = {"Steps": 25, "Sampler": "DPM++ 2M", **USUAL_A1111, **named}
    line = ", ".join(f"{key}: {value}" for key, value in told.items() if value is not None)
    return said(parameters=f"{prompt}\nNegative prompt: cat\n{line}")


def settings(told: Provenance) -> dict[str, Any]:
    return others(told, NOTHING)[0]


def remarks(told: Provenance, *given: str) -> list[str]:
    return [remark.text for remark in others(told, frozenset(given))[2]]


@pytest.mark.parametrize(
    ("version", "pairs"),
    [
        ("v1.5.2", {"Sampler": "DPM++ 2M Karras"}),
        ("v1.6.1", {"Sampler": "DPM++ 2M Karras", "Clip_skip": 1}),
        ("v1.8.0", {"Sampler": "DPM++ 2M Karras", "Hashes": '{"model": "6ce0161689"}'}),
        ("v1.9.4", {"Schedule_type": "Karras", "Model_hash": "6ce0161689", "Model": "v1-5"}),
        ("v1.10.1", {"Schedule_type": "Karras", "CFG scale": "7.0"}),
        ("f2.0.1v1.10.1", {"Schedule_type": "Karras", "User": "me", "Denoising_strength": 1}),
    ],
)
def test_a1111_from_1_5_to_1_10_says_the_same_settings(version: str, pairs: dict[str, Any]) -> None:
    told = a1111(**pairs, Version=version)
    assert settings(told) == SETTINGS | {"sigmas": "karras"}
    assert remarks(told) == []


@pytest.mark.parametrize(
    ("told", "remark"),
    [
        (a1111(RNG=None), "noise: its noise is drawn on a GPU unless it says RNG: CPU, here on the CPU by torch"),
        (a1111(RNG="NV"), "noise (nv): its noise is drawn on a GPU"),
        (a1111(ENSD=31337), "ENSD 31337: is not honoured"),
        (a1111(Variation_seed=3, Variation_seed_strength=0.2), "Variation seed 3, Variation seed strength 0.2: is not"),
        (a1111(Denoising_strength=0.5, Hires_upscale=2, Hires_steps=9), "Hires upscale 2, Hires steps 9: is not"),
        (a1111(VAE="x.pt", VAE_hash="abc"), "VAE x.pt, VAE hash abc: is not honoured"),
        (a1111(Lora_hashes='"detail: a1b2"'), "Lora hashes detail: a1b2: is not honoured"),
        (a1111(TI_hashes='"easy: a1b2"'), "TI hashes easy: a1b2: is not honoured, name its file with --embedding"),
        (a1111(Face_restoration="GFPGAN"), "Face restoration GFPGAN: is not honoured"),
        (a1111(Tiling="True"), "Tiling True: is not honoured"),
        (a1111(Unheard_of="yes"), "Unheard of yes: is not honoured"),
        (a1111(Sampler="DPM adaptive"), "sampler DPM adaptive: there is none like it, the model's own draws"),
        (a1111(Schedule_type="Turbo"), "schedule Turbo: dpm has none like it, its usual one is used"),
        (a1111(Sampler="Euler a", Schedule_type="Karras"), "schedule Karras: euler-a has none like it"),
        (a1111(Eta=0.5), "Eta 0.5: this scheduler takes none"),
        (a1111(**{"CFG scale": 0.5}), "guidance 0.5: becomes 1, which is none"),
        (a1111("a dog <lora:detail:0.8>"), "<lora:detail:0.8>: is left out"),
        (a1111("a dog <hypernet:x:1>, <hypernet:x:1>"), "<hypernet:x:1>: is left out"),
        (said(prompt=json.dumps(USUAL)), "LoraLoader x: is not honoured"),
        (
            said(prompt=json.dumps(USUAL | {"6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (b:1.2)"}}})),
            "weights in the prompt: are read as A1111 means them, not as comfyui does",
        ),
        (said(invokeai_metadata=json.dumps(INVOKE | {"rand_device": "cuda"})), "noise (cuda): its noise was drawn on"),
        (said(invokeai_metadata=json.dumps(INVOKE | {"seamless_x": True})), "seamless_x true: is not honoured"),
        (
            said(invokeai_metadata=json.dumps(INVOKE | {"loras": [{"model": {"name": "detail"}}]})),
            'loras [{"model": {"name": "detail"}}]: is not honoured',
        ),
        (
            said(invokeai_metadata=json.dumps(INVOKE | {"positive_prompt": "a dog++ and (a cat)1.2"})),
            "weights in the prompt: are read as A1111 means them, not as invokeai does",
        ),
        (said(parameters=SDCPP_TEXT + json.dumps(SDCPP)), "noise: its noise is that of its own generators"),
        (
            said(parameters=SDCPP_TEXT + json.dumps(SDCPP | {"rng": "cpu", "hires": {"enabled": True, "scale": 2}})),
            "hires.enabled true, hires.scale 2: is not honoured",
        ),
        (
            said(parameters=SDCPP_TEXT + json.dumps(SDCPP | {"rng": "cpu", "loras": [{"name": "x"}]})),
            'loras [{"name": "x"}]: is not honoured',
        ),
    ],
)
def test_what_cannot_be_honoured_is_named_in_one_line(told: Provenance, remark: str) -> None:
    found = remarks(told)
    assert any(one.startswith(remark) for one in found), found
    assert all("\n" not in one and len(one) < 200 for one in found)


@pytest.mark.parametrize(
    "told",
    [
        a1111(Version="v1.10.1", Template='"x: y"', Created_Date="today", Image_CFG_scale=1.5),
        said(invokeai_metadata=json.dumps(INVOKE)),
        said(parameters=SDCPP_TEXT + json.dumps(SDCPP | {
            "rng": "cpu", "strength": 0.75, "hires": {"enabled": False, "scale": 2}, "loras": [],
        })),
        said(prompt=json.dumps({name: node for name, node in changed(model=["4", 0]).items() if name != "10"})),
    ],
    ids=["a1111", "invokeai", "sdcpp", "comfyui"],
)  # fmt: skip
def test_what_says_nothing_of_the_picture_is_not_remarked_on(told: Provenance) -> None:
    assert remarks(told) == []


def test_what_the_user_says_instead_is_not_remarked_on() -> None:
    told = a1111(Sampler="DPM adaptive", TI_hashes='"easy: a1b2"')
    assert len(remarks(told)) == 2
    assert remarks(told, "scheduler", "embedding") == []


def test_networks_are_taken_out_of_the_prompt_and_prompts_may_be_of_them_alone() -> None:
    assert settings(a1111("a dog <lora:x:1>, <lora:y:.5:2> (cat:1.2)"))["prompt"] == "a dog ,  (cat:1.2)"
    assert settings(a1111("<lora:x:1>"))["prompt"] == ""


def test_braces_in_prompts_of_others_are_no_wildcards_of_ours() -> None:
    for text in ("a {red|blue} cat", r"a \{red|blue} cat {x|y}", "a {{plain}} | bars"):
        told = settings(a1111(text))["prompt"]
        assert not template(told).has_wildcards
        assert told.replace("\\", "") == text.replace("\\", "")


def test_layers_of_clip_that_are_left_out_are_an_option_of_ours() -> None:
    assert settings(a1111(Clip_skip=2))["clip_skip"] == 1
    assert "clip_skip" not in settings(a1111(Clip_skip=1))
    assert settings(said(invokeai_metadata=json.dumps(INVOKE | {"clip_skip": 2})))["clip_skip"] == 2


def test_the_strength_of_a_second_pass_is_none_of_ours() -> None:
    assert settings(a1111(Denoising_strength=0.5))["strength"] == 0.5
    assert "strength" not in settings(a1111(Denoising_strength=0.5, Hires_upscale=2))
    assert "strength" not in settings(said(invokeai_metadata=json.dumps(INVOKE)))
    image = INVOKE | {"generation_mode": "img2img", "init_image": {"image_name": "a.png"}}
    found, name, _ = others(said(invokeai_metadata=json.dumps(image)), NOTHING)
    assert (found["strength"], name) == (0.75, "a.png")


def test_the_picture_that_comfyui_started_from_is_named() -> None:
    graph = changed(latent_image=["20", 0], denoise=0.6) | {
        "20": {"class_type": "VAEEncode", "inputs": {"pixels": ["21", 0]}},
        "21": {"class_type": "LoadImage", "inputs": {"image": "photo.png", "upload": "image"}},
    }
    found, name, _ = others(said(prompt=json.dumps(graph)), NOTHING)
    assert (found["strength"], name) == (0.6, "photo.png")


def test_eta_and_rescaling_are_options_of_ours() -> None:
    assert settings(a1111(Sampler="DDIM", Eta=0.5))["eta"] == 0.5
    rescaled = said(invokeai_metadata=json.dumps(INVOKE | {"cfg_rescale_multiplier": 0.7}))
    assert settings(rescaled)["guidance_rescale"] == 0.7
    assert remarks(rescaled) == []


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
KEYS = st.sampled_from(["hires.enabled", "Hires steps", "rng", "RNG", "Eta", "Class", "Mix", "clip_skip", "LoadImage"])


@given(
    st.sampled_from(["a1111", "comfyui", "invokeai", "mflux", "stable-diffusion.cpp", "kohya", "json", "sdcli"]),
    st.dictionaries(KEYS | st.text(max_size=8), VALUES | st.lists(VALUES, max_size=2)),
)
def test_whatever_else_is_told_is_honoured_or_remarked_on(source: str, rest: dict[str, Any]) -> None:
    facts = {"prompt": "x", "scheduler": "ddim", "strength": 0.5}
    found, _, told = others(Provenance(source, facts, rest | {"Unheard of": 1}), NOTHING)
    assert found["prompt"] == "x"
    assert "Unheard of 1: is not honoured, there is nothing like it here" in [remark.text for remark in told]
