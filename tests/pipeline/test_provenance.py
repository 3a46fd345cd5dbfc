"""Whichever program wrote a picture, what it says comes under our names."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from sdcli.errors import SdcliWarning
from sdcli.pipeline.containers import Inside
from sdcli.pipeline.exif import orientation
from sdcli.pipeline.provenance import find_out
from tests.pipeline.test_comfy import FACTS, USUAL

PATH = Path("x.png")
SDCPP = {
    "schema": "sdcpp.image.params/v1",
    "seed": 42,
    "width": 640,
    "height": 384,
    "clip_skip": -1,
    "prompt": {"positive": "a lighthouse", "negative": "blurry"},
    "sampling": {"steps": 33, "method": "heun", "scheduler": "exponential", "guidance": {"txt_cfg": 5.5}},
    "models": {"model": "sd15-q8.gguf"},
}
SDCPP_TEXT = "ignored\nSteps: 1, CFG scale: 9.0, Seed: 1, Size: 8x8, Version: stable-diffusion.cpp, SDCPP: "
A1111 = """a dog
Negative prompt: cat
Steps: 25, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 9, Size: 512x768, Model hash: 6ce0161689, Model: v1-5, \
Denoising strength: 0.5, Clip skip: 2, Version: v1.6.0"""


def exif(comment: bytes = b"", **tags: str) -> bytes:
    """An EXIF block without JPEG's head."""
    block = Image.Exif()
    for name, value in tags.items():
        block[{"description": 0x010E, "make": 0x010F, "model": 0x0110}[name]] = value
    if comment:
        block.get_ifd(0x8769)[0x9286] = comment
    return block.tobytes().removeprefix(b"Exif\0\0")


SPOKEN: list[tuple[str, Inside, dict[str, Any]]] = [
    (
        "sdcli",
        Inside({"sdcli": '{"prompt": "a dog", "seed": 7, "steps": -1, "tokens": {"kept": 2}}', "parameters": "x"}),
        {"prompt": "a dog", "seed": 7, "tokens": {"kept": 2}},
    ),
    ("sdcli", Inside(exif=exif(description='sdcli {"prompt": "a d\\u00f6g"}')), {"prompt": "a dög"}),
    (
        "a1111",
        Inside({"parameters": A1111}),
        {
            "prompt": "a dog", "negative": "cat", "steps": 25, "sampler": "DPM++ 2M Karras", "guidance": 7.0, "seed": 9,
            "width": 512, "height": 768, "model_hash": "6ce0161689", "model": "v1-5", "strength": 0.5, "clip_skip": 1,
        },
    ),
    ("a1111", Inside({"parameters": "only a prompt"}), {"prompt": "only a prompt", "negative": ""}),
    (
        "a1111",
        Inside({"parameters": "a\nSteps: 9, Seed: -1, Size: axb, CFG scale: nan"}),
        {"prompt": "a", "negative": "", "steps": 9},
    ),
    (
        "a1111",
        Inside({"parameters": 'x\nSteps: 2, Seed: 3, Hashes: {"model": "abc"}, Version: f1'}),
        {"prompt": "x", "negative": "", "steps": 2, "seed": 3, "model_hash": "abc"},
    ),
    (
        "stable-diffusion.cpp",
        Inside({"parameters": SDCPP_TEXT + json.dumps(SDCPP)}),
        {
            "prompt": "a lighthouse", "negative": "blurry", "steps": 33, "sampler": "heun", "schedule": "exponential",
            "guidance": 5.5, "seed": 42, "width": 640, "height": 384, "model": "sd15-q8.gguf",
        },
    ),
    (
        "stable-diffusion.cpp",
        Inside({"COM": "parameters\0x\nSteps: 2, Seed: 3, Sampler: euler_a karras, Version: stable-diffusion.cpp"}),
        {"prompt": "x", "negative": "", "steps": 2, "seed": 3, "sampler": "euler_a karras"},
    ),
    (
        "stable-diffusion.cpp",
        Inside(xmp='<d sdcpp:parameters="x &lt;3&#10;Steps: 2, Seed: 3, Sampler: a, Version: stable-diffusion.cpp"/>'),
        {"prompt": "x <3", "negative": "", "steps": 2, "seed": 3, "sampler": "a"},
    ),
    ("comfyui", Inside({"prompt": json.dumps(USUAL), "workflow": "{}"}), FACTS | {"guidance": 8.0, "strength": 1.0}),
    ("comfyui", Inside(exif=exif(make="prompt:" + json.dumps(USUAL))), FACTS | {"guidance": 8.0, "strength": 1.0}),
    ("comfyui", Inside({"workflow": '{"nodes": []}'}), {}),
    (
        "invokeai",
        Inside({"invokeai_metadata": json.dumps({
            "positive_prompt": "a dog", "negative_prompt": "cat", "seed": 5, "steps": 30, "cfg_scale": 7.5,
            "scheduler": "dpmpp_2m_k", "width": 512, "height": 512, "clip_skip": 2,
            "model": {"key": "k", "hash": "blake3:00", "name": "dreamshaper"},
        })}),
        {
            "prompt": "a dog", "negative": "cat", "seed": 5, "steps": 30, "guidance": 7.5, "sampler": "dpmpp_2m_k",
            "width": 512, "height": 512, "clip_skip": 2, "model": "dreamshaper", "model_hash": "blake3:00",
        },
    ),
    (
        "mflux",
        Inside(exif=exif(b'ASCII\0\0\0{"mflux_version": "1", "prompt": "dog", "seed": 3, "steps": 4, "guidance": 0}')),
        {"prompt": "dog", "seed": 3, "steps": 4, "guidance": 0.0},
    ),
    (
        "imaginairy",
        Inside(exif=exif(b'{"prompt": {"prompt_text": "dog", "seed": 3, "sampler_type": "a", "prompt_strength": 7}}')),
        {"prompt": "dog", "seed": 3, "sampler": "a", "guidance": 7.0},
    ),
    (
        "kohya",
        Inside({"prompt": "dog", "negative-prompt": "no", "seed": "3", "steps": "20", "scale": "7.5", "sampler": "a"}),
        {"prompt": "dog", "negative": "no", "seed": 3, "steps": 20, "guidance": 7.5, "sampler": "a"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("source", "inside", "facts"), SPOKEN)
def test_what_a_program_says_comes_under_our_names(source: str, inside: Inside, facts: dict[str, Any]) -> None:
    said = find_out(inside, PATH)
    assert said.source == source
    assert said.facts == facts
    assert said.raw and all(text in said.raw.values() for text in inside.texts.values())


REST: list[tuple[Inside, dict[str, Any]]] = [
    (Inside({"sdcli": '{"prompt": "a dog", "freeze": 3}'}), {}),  # all of ours are facts
    (Inside({"parameters": A1111 + ", ENSD: 31337, RNG: CPU"}), {"Version": "v1.6.0", "ENSD": "31337", "RNG": "CPU"}),
    (
        Inside({"parameters": SDCPP_TEXT + json.dumps(SDCPP | {"rng": "cuda", "loras": [1], "vae": {"a": {"b": 2}}})}),
        {"rng": "cuda", "loras": [1], "vae.a.b": 2},
    ),
    (Inside({"prompt": json.dumps(USUAL)}), {"LoraLoader": "x"}),
    (Inside({"invokeai_metadata": '{"positive_prompt": "a", "rand_device": "cpu"}'}), {"rand_device": "cpu"}),
    (Inside(exif=exif(b'{"mflux_version": "1", "prompt": "dog"}')), {"mflux_version": "1"}),
    (Inside({"prompt": "dog", "seed": "3", "clip-prompt": "x"}), {"clip-prompt": "x"}),
]


@pytest.mark.parametrize(("inside", "rest"), REST)
def test_what_has_no_name_of_ours_is_kept_in_the_programs_own_words(inside: Inside, rest: dict[str, Any]) -> None:
    assert find_out(inside, PATH).rest == rest


def test_json_nested_beyond_all_sense_is_taken_apart_only_so_far() -> None:
    deep: Any = 1
    for _ in range(400):
        deep = {"a": deep}
    said = find_out(Inside({"parameters": SDCPP_TEXT + json.dumps(SDCPP | {"deep": deep})}), PATH)
    assert list(said.rest) == ["deep.a.a.a"]


@pytest.mark.parametrize(
    "inside",
    [
        Inside(),
        Inside({"Software": "GIMP"}),
        Inside({"COM": "Created with GIMP", "prompt": "words"}),
        Inside({"sdcli": "[1]", "prompt": "{}"}),
        Inside({"sdcli": '{"prompt": 1}'}),
        Inside(exif=exif(b"ASCII\0\0\0Taken on a sunny day", description="sdcli is fine", make="Canon", model="EOS")),
        Inside(xmp="<x:xmpmeta/>"),
        Inside(exif=b"no exif"),
    ],
)
def test_what_says_nothing_of_a_making_has_no_source(inside: Inside) -> None:
    assert find_out(inside, PATH).source is None


XMP_FORMS = [
    ("<sdcpp:parameters>a &lt;b&gt;\n</sdcpp:parameters><sdcpp:parameters>c</sdcpp:parameters>", "a <b>\n"),
    ("<sdcpp:parameters></sdcpp:parameters>", ""),
    ('<d sdcpp:parameters="a &quot;b&quot;" other="c"/>', 'a "b"'),
    ('<sdcpp:parameters>open <d sdcpp:parameters="a"/>', "a"),
    (f'<d sdcpp:parameters="&#{"9" * 5000};"/>', f"&#{'9' * 5000};"),
]


@pytest.mark.parametrize(("xmp", "text"), XMP_FORMS, ids=["element", "empty", "attribute", "both", "number"])
def test_parameters_stand_in_xmp_as_element_or_as_attribute(xmp: str, text: str) -> None:
    assert find_out(Inside(xmp=xmp), PATH).raw == {"parameters": text}


@pytest.mark.parametrize("opener", ["<sdcpp:parameters>", 'sdcpp:parameters="'])
def test_openers_without_end_are_passed_over_at_once(opener: str) -> None:
    began = time.process_time()
    find_out(Inside(xmp=opener * 100_000), PATH)
    assert time.process_time() - began < 2


TEXT = "ein 小狗 🐶\nSteps: 2, Seed: 3, Sampler: Euler"


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + TEXT.encode("utf-16-be"),
        b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + b"\xff\xfe" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + b"\xfe\xff" + TEXT.encode("utf-16-be"),
        b"ASCII\0\0\0" + TEXT.encode(),
        b"\0" * 8 + TEXT.encode(),
        TEXT.encode(),
    ],
)
def test_a_comment_is_read_in_any_encoding_it_may_have(comment: bytes) -> None:
    said = find_out(Inside(exif=exif(comment)), PATH)
    assert said.source == "a1111"
    assert said.facts == {"prompt": "ein 小狗 🐶", "negative": "", "steps": 2, "seed": 3, "sampler": "Euler"}


@pytest.mark.parametrize(
    ("comment", "name"), [(b"UNICODE\0a", "UTF-16-BE"), (b"UNICODE\0\xd8\0\0a", "UTF-16-BE"), (b"\xff\xff", "UTF-8")]
)
def test_a_comment_that_is_no_text_is_told_and_shown_as_far_as_it_goes(comment: bytes, name: str) -> None:
    with pytest.warns(SdcliWarning, match=rf"x\.png: its EXIF comment is no {name}"):
        said = find_out(Inside(exif=exif(comment)), PATH)
    assert "\ufffd" in said.raw["UserComment"]


@given(st.binary(max_size=200), st.binary(max_size=60))
@pytest.mark.filterwarnings("ignore::sdcli.errors.SdcliWarning", "ignore:Corrupt EXIF")
def test_any_exif_is_read(block: bytes, comment: bytes) -> None:
    for one in (block, b"MM\0*\0\0\0\x08" + block, exif(comment), exif(comment)[: len(block)]):
        assert find_out(Inside(exif=one), PATH).raw is not None
        assert 1 <= orientation(one) <= 8


KEYS = ["sdcli", "parameters", "prompt", "workflow", "invokeai_metadata", "seed", "steps", "COM"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "model", "nodes", "1"]), inner),
)


@given(st.dictionaries(st.sampled_from(KEYS), st.text(max_size=20) | JSON.map(json.dumps)))
def test_any_texts_are_read_and_facts_have_our_types(texts: dict[str, str]) -> None:
    facts = find_out(Inside(texts), PATH).facts
    assert all(type(facts[name]) is int and facts[name] >= 0 for name in ("seed", "steps", "width") if name in facts)
    assert all(isinstance(facts.get(name, ""), str) for name in ("prompt", "sampler", "schedule"))
    json.dumps(facts, allow_nan=False)


def test_no_number_of_our_own_record_is_beyond_all_measure() -> None:
    facts = find_out(Inside({"sdcli": '{"prompt": "a", "eta": 1e999, "tokens": {"kept": [-1e999]}}'}), PATH).facts
    assert facts == {"prompt": "a", "eta": None, "tokens": {"kept": [None]}}


@given(st.binary(max_size=64), st.integers(0, 200))
def test_exif_of_any_bytes_says_something_or_nothing(junk: bytes, at: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription], exif[ExifTags.Base.Orientation] = "a dog", 6
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0a cat"
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    damaged = block[:at] + junk + block[at + len(junk) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        find_out(Inside(exif=damaged), PATH)
    assert 1 <= orientation(damaged) <= 8


def test_memory_that_runs_out_in_exif_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Exif, "load", full)
    with pytest.raises(MemoryError):
        orientation(b"MM")
