"""The `parameters` of A1111 and of all that write like it are taken apart by A1111's own rules, and then some."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcli.pipeline.metadata import a1111_parameters
from sdcli.pipeline.parameters import MAX_LENGTH, read_json, read_parameters

A1111_1_10 = """a picture of a puppy, (fluffy:1.2) <lora:detailer:0.8>
Negative prompt: blurry, lowres
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x512, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, VAE hash: 735e4c3a44, VAE: vae-ft-mse-840000.safetensors, \
Denoising strength: 0.5, Clip skip: 2, RNG: CPU, Hires upscale: 2, Hires upscaler: Latent, \
Lora hashes: "detailer: a1b2c3d4e5f6, other: 0123", TI hashes: "easynegative: c74b4e810b03", Version: v1.10.1"""


def test_a_text_of_version_1_10_is_taken_apart() -> None:
    read = read_parameters(A1111_1_10)
    assert read.prompt == "a picture of a puppy, (fluffy:1.2) <lora:detailer:0.8>"
    assert read.negative == "blurry, lowres"
    assert read.pairs["Sampler"] == "DPM++ 2M" and read.pairs["Schedule type"] == "Karras"
    assert read.pairs["Lora hashes"] == "detailer: a1b2c3d4e5f6, other: 0123"
    assert (read.pairs["Seed"], read.pairs["Size"], read.pairs["Version"]) == ("965400086", "512x512", "v1.10.1")


@pytest.mark.parametrize(
    ("text", "prompt", "negative", "pairs"),
    [
        ("a dog", "a dog", "", {}),
        ("", "", "", {}),
        ("a dog\nSteps: 2, Seed: 3", "a dog\nSteps: 2, Seed: 3", "", {}),  # two pairs are prompt
        ("Steps: 2, Seed: 3, CFG scale: 4", "", "", {"Steps": "2", "Seed": "3", "CFG scale": "4"}),
        ("two\nlines\nNegative prompt: no\nand no\nSteps: 2, Seed: 3, A b: c", "two\nlines", "no\nand no", None),
        ("Negative prompt: only\nSteps: 2, Seed: 3, A b: c", "", "only", None),
        ("a: b, c: d, e: f\nplain words", "a: b, c: d, e: f\nplain words", "", {}),
        # Templates of dynamic prompts follow the settings.
        (
            "a cat\nSteps: 2, Seed: 3, Size: 1x1\nTemplate: a {cat|\ndog}: x\nNegative Template: {x|y}",
            "a cat",
            "",
            {"Steps": "2", "Seed": "3", "Size": "1x1", "Template": "a {cat|\ndog}: x", "Negative Template": "{x|y}"},
        ),
        # A value may be the rest of a line without a comma, empty, or in JSON.
        ("x\nSteps: 2, Model: , Seed: 3", "x", "", {"Steps": "2", "Model": "", "Seed": "3"}),
        ('x\nSteps: 2, A b: "q, \\"r\\": s", Seed: 3', "x", "", {"Steps": "2", "A b": 'q, "r": s', "Seed": "3"}),
        ('x\nSteps: 2, A b: "open, Seed: 3, C d: e', "x", "", {"Steps": "2", "A b": '"open', "Seed": "3", "C d": "e"}),
        (
            'x\nSteps: 2, Seed: 3, Hashes: {"model": "abc", "lora:d": "e"}, Version: 1',
            "x",
            "",
            {"Steps": "2", "Seed": "3", "Hashes": {"model": "abc", "lora:d": "e"}, "Version": "1"},
        ),
        ("x\r\nNegative prompt: y\r\nSteps: 2, Seed: 3, Size: 1x1\r\n", "x", "y", None),
    ],
)
def test_prompt_negative_and_settings_are_told_apart(
    text: str, prompt: str, negative: str, pairs: dict[str, Any] | None
) -> None:
    read = read_parameters(text)
    assert (read.prompt, read.negative) == (prompt, negative)
    assert read.pairs == pairs if pairs is not None else len(read.pairs) >= 3


def test_the_json_of_stable_diffusion_cpp_is_cut_off_whatever_its_prompt_repeats() -> None:
    record = {
        "schema": "sdcpp.image.params/v1",
        "prompt": {"positive": "x, SDCPP: {} Seed: 9", "negative": ""},
        "seed": 7,
    }
    text = "x, SDCPP: {} Seed: 9\nSteps: 20, CFG scale: 7.000000, Seed: 7, Sampler: euler_a karras, SDCPP: "
    read = read_parameters(text + json.dumps(record))
    assert read.sdcpp == record
    assert read.prompt == "x, SDCPP: {} Seed: 9"
    assert read.pairs == {"Steps": "20", "CFG scale": "7.000000", "Seed": "7", "Sampler": "euler_a karras"}


@given(st.text(alphabet=st.sampled_from('ab1 :,"\\{}[]\nNegative prompt: Steps: 2') | st.characters(), max_size=200))
def test_every_text_is_read(text: str) -> None:
    read = read_parameters(text)
    assert "\n" not in "".join(read.pairs)
    assert len(read.prompt) + len(read.negative) <= len(text)


TEMPLATE = st.text(st.sampled_from('{a|b}, :"\\\n') | st.characters(codec="utf-8"))
LINE = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp", "Zs")), max_size=30)


@given(
    LINE,
    LINE,
    st.integers(0, 2**64 - 1),
    LINE,
    TEMPLATE,
)
def test_what_we_write_is_read_back(prompt: str, negative: str, seed: int, model: str, template: str) -> None:
    settings = {"model": f"x/m{model}".replace("/", ""), "model_hash": "ab" * 32, "width": 8, "height": 9}
    record = {"scheduler": "dpm", "steps": 2, "guidance": 7.5, "seed": seed, "sdcli": "1", **settings}
    templates = {"prompt_template": "{" + template, "negative_template": template + "|}"}
    read = read_parameters(a1111_parameters(record | {"prompt": "p" + prompt, "negative": negative} | templates))
    assert (read.pairs["Template"], read.pairs["Negative Template"]) == tuple(templates.values())
    assert (read.prompt, read.negative) == ("p" + prompt, negative)
    assert (read.pairs["Seed"], read.pairs["Size"], read.pairs["Model"]) == (str(seed), "8x9", settings["model"])


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a ",
        'ab: "',
        "ab: {",
        'ab: {"',
        "ab: [",
        "\n",
        "ab: ",
        '"\\',
        "SDCPP: {",
        "a, b: c",
        'a b: {"a": ',
        "ab: {,",
    ],
)
def test_no_text_takes_long(text: str) -> None:
    long = text * (MAX_LENGTH // len(text))
    began = time.process_time()
    read_parameters(long)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("space", [" ", "\t", "\u3000", "a: b," + 99 * " "])
def test_a_long_run_of_spaces_is_passed_over_at_once(space: str) -> None:
    text = "x" + space * (MAX_LENGTH // len(space) - 1) + "x"
    began = time.process_time()
    assert read_parameters(text).prompt in (text, "")
    assert time.process_time() - began < 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "{", "1" * 10_000, '"\\ud800'])
def test_json_that_is_none_or_too_deep_is_none(text: str) -> None:
    assert read_json(text) is None


def test_not_a_number_is_null_as_comfyui_writes_it() -> None:
    assert read_json('{"is_changed": [NaN, Infinity]}') == {"is_changed": [None, None]}


def test_numbers_beyond_all_measure_are_null_wherever_json_stands() -> None:
    assert read_json("[1e999, -1e999, 1.5]") == [None, None, 1.5]
    read = read_parameters('x\nSteps: 2, Seed: 3, Hashes: {"a": 1e999, "b": NaN, "c": 2.5}')
    assert read.pairs["Hashes"] == {"a": None, "b": None, "c": 2.5}
