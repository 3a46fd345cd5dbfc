"""What a picture says about its making: readable by A1111's own grammar, complete as JSON, nothing of this machine."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from sdcli.errors import SdcliWarning
from sdcli.pipeline.metadata import A1111_SAMPLERS, a1111_parameters, picture_bytes, png_bytes, read_record
from sdcli.schedulers import BUILT_IN

RECORD: dict[str, Any] = {
    "path": "/home/me/pictures/puppy.png",
    "prompt": "a picture of a puppy",
    "negative": "blurry, dark",
    "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "model_hash": "0123456789abcdef" * 4,
    "seed": 7,
    "width": 512,
    "height": 768,
    "scheduler": "dpm",
    "steps": 25,
    "evaluations": 25,
    "guidance": 7.5,
    "seconds": 12.345,
    "tokens": {"kept": 5, "cut": 0},
    "sdcli": "0.1.0",
}
PROMPTS = [
    "a picture of a puppy",
    "naïve café",
    "小狗的照片 🐶",
    "two\nlines, (weighted:1.2) [x:y:0.5] <lora:a:1>",
    'quotes "inside", back\\slash: and colons',
    "\x00\x01\x1b[31m control",
    "x" * 100_000,
]
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # A1111's modules/infotext_utils.py


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def texts(png: bytes) -> dict[str, str]:
    with Image.open(io.BytesIO(png)) as opened:
        opened.load()
        return dict(opened.text)


def parse(parameters: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and pairs, as A1111 reads them back."""
    *lines, last = parameters.strip().split("\n")
    pairs = {key: json.loads(value) if value.startswith('"') else value for key, value in PAIR.findall(last)}
    assert len(pairs) >= 3
    starts = [i for i, line in enumerate(lines) if line.startswith("Negative prompt:")]
    at = starts[0] if starts else len(lines)
    negative = "\n".join([lines[at][len("Negative prompt:") :].strip(), *lines[at + 1 :]]) if starts else ""
    return "\n".join(lines[:at]), negative, pairs


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_record_comes_back_whole_but_for_path_and_seconds(image: Image.Image, prompt: str) -> None:
    inside = json.loads(texts(png_bytes(image, RECORD | {"prompt": prompt}))["sdcli"])
    assert inside == {k: v for k, v in (RECORD | {"prompt": prompt}).items() if k not in ("path", "seconds")}


def test_the_parameters_are_in_the_form_that_galleries_read() -> None:
    assert a1111_parameters(RECORD) == (
        "a picture of a puppy\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 25, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 512x768, Model hash: 0123456789, "
        "Model: stable-diffusion-v1-5, RNG: CPU, Version: sdcli 0.1.0"
    )


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", ["", "blurry, dark", "zwei\nZeilen"])
def test_the_parameters_are_read_back_by_the_grammar_of_a1111(image: Image.Image, prompt: str, negative: str) -> None:
    png = png_bytes(image, RECORD | {"prompt": prompt, "negative": negative, "model": "my, odd: model"})
    read_prompt, read_negative, pairs = parse(texts(png)["parameters"])
    assert read_prompt == prompt.replace("\0", "")
    assert read_negative == negative
    assert pairs == {
        "Steps": "25",
        "Sampler": "DPM++ 2M",
        "CFG scale": "7.5",
        "Seed": "7",
        "Size": "512x768",
        "Model hash": "0123456789",
        "Model": "my, odd: model",
        "RNG": "CPU",
        "Version": "sdcli 0.1.0",
    }


@pytest.mark.parametrize("template", ["{a|b}", '"{a|b}"', " {a|b} ", "{(a:1.2)|b,\nc} \\", '{"a"|1}, Steps: 3'])
def test_templates_stand_among_the_pairs_where_a1111_looks_for_no_more_lines(image: Image.Image, template: str) -> None:
    """Dynamic prompts writes them below the settings, which A1111 itself then takes for a part of the prompt."""
    drawn = {"prompt": "a", "prompt_template": template, "negative_template": template}
    prompt, negative, pairs = parse(texts(png_bytes(image, RECORD | drawn))["parameters"])
    assert (prompt, negative, pairs["Seed"]) == ("a", "blurry, dark", "7")
    assert pairs["Template"] == pairs["Negative Template"] == template


def test_a_class_stands_among_the_pairs_and_an_empty_prompt_is_no_line(image: Image.Image) -> None:
    drawn = {"prompt": "", "negative": "", "class": {"index": 391, "name": "coho, silver salmon"}}
    inside = texts(png_bytes(image, RECORD | drawn))
    assert json.loads(inside["sdcli"])["class"] == drawn["class"]
    assert inside["parameters"].startswith("Steps: 25, ")
    prompt, negative, pairs = parse(inside["parameters"])
    assert (prompt, negative) == ("", "")
    assert (pairs["Class"], pairs["Class index"], pairs["Seed"]) == ("coho, silver salmon", "391", "7")


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"scheduler": "dpm", "sigmas": "karras"}, {"Sampler": "DPM++ 2M", "Schedule type": "Karras"}),
        ({"scheduler": "dpm", "sigmas": "model"}, {"Sampler": "DPM++ 2M"}),
        ({"scheduler": "dpm-sde", "order": 3}, {"Sampler": "DPM++ 3M SDE"}),
        ({"scheduler": "ddim", "clip_skip": 1}, {"Sampler": "DDIM", "Clip skip": "2"}),
        ({"scheduler": "ddim", "eta": 0.5}, {"Sampler": "DDIM", "Eta": "0.5"}),
        ({"scheduler": "dpm2-a"}, {"Sampler": "DPM2 a"}),
    ],
)
def test_what_was_chosen_for_the_sampler_stands_as_a1111_writes_it(
    choices: dict[str, object], expected: dict[str, str]
) -> None:
    pairs = parse(a1111_parameters(RECORD | choices))[2]
    assert {key: pairs.get(key) for key in ("Sampler", "Schedule type", "Eta", "Clip skip") if key in pairs} == expected


def test_embeddings_stand_in_the_parameters_as_a1111_writes_them() -> None:
    embeddings = [
        {"file": "cat.pt", "token": "<my-cat>", "sha256": "abcdef0123456789" * 4},
        {"file": "style.pt", "token": 'my "style"', "sha256": "0123456789abcdef" * 4},
    ]
    written = a1111_parameters(RECORD | {"embeddings": embeddings})
    assert ', RNG: CPU, TI hashes: "<my-cat>: abcdef012345, ' in written
    _, _, pairs = parse(written)
    assert pairs["TI hashes"] == '<my-cat>: abcdef012345, my "style": 0123456789ab'
    assert pairs["Version"] == "sdcli 0.1.0"


def test_loras_stand_in_the_parameters_as_a1111_writes_them() -> None:
    loras = [
        {"file": "my lora.v2.safetensors", "sha256": "", "scale": 0.75, "a1111_hash": "abcdef012345"},
        {"file": "a:<b>,c.pt", "sha256": "", "scale": -1.0, "a1111_hash": "012345abcdef"},
    ]
    written = a1111_parameters(RECORD | {"loras": loras, "prompt": "a cat"})
    assert written.startswith("a cat <lora:my lora.v2:0.75> <lora:abc:-1>\n")
    assert parse(written)[2]["Lora hashes"] == "my lora.v2: abcdef012345, abc: 012345abcdef"
    assert a1111_parameters(RECORD | {"loras": loras[:1], "prompt": ""}).startswith("<lora:my lora.v2:0.75>\n")


def test_every_scheduler_has_the_name_that_galleries_know() -> None:
    assert A1111_SAMPLERS.keys() == {scheduler.name for scheduler in BUILT_IN}


def test_a_scheduler_of_others_keeps_its_own_name() -> None:
    assert "Sampler: gentle," in a1111_parameters(RECORD | {"scheduler": "gentle"})


@pytest.mark.parametrize("guidance", [1.0, 7.5, 12.25])
def test_guidance_is_written_without_needless_digits(guidance: float) -> None:
    assert f"CFG scale: {guidance:.10g}," in a1111_parameters(RECORD | {"guidance": guidance})


@pytest.mark.parametrize(("prompt", "chunk"), [("café", b"tEXt"), ("小狗", b"iTXt")])
def test_text_is_latin_1_where_that_is_enough_else_unicode(image: Image.Image, prompt: str, chunk: bytes) -> None:
    png = png_bytes(image, RECORD | {"prompt": prompt})
    assert png.count(chunk) == 2


def test_no_text_chunk_holds_nul_which_png_forbids(image: Image.Image) -> None:
    png = png_bytes(image, RECORD | {"prompt": "a\0b"})
    start = png.index(b"tEXtparameters\0") + len(b"tEXtparameters\0")
    length = int.from_bytes(png[start - 19 : start - 15], "big")
    assert b"\0" not in png[start : start + length - len("parameters") - 1]


def test_the_same_record_gives_the_same_bytes_wherever_and_whenever(image: Image.Image) -> None:
    elsewhere = RECORD | {"path": "/tmp/other.png", "seconds": 99.0}
    assert png_bytes(image, RECORD) == png_bytes(image, elsewhere)
    assert b"/home/me" not in png_bytes(image, RECORD)


def test_without_a_record_there_is_the_picture_alone(image: Image.Image) -> None:
    png = png_bytes(image, None)
    assert texts(png) == {}
    assert [png[i : i + 4] for i in chunk_starts(png)] == [b"IHDR", b"IDAT", b"IEND"]


def test_the_pixels_are_kept(image: Image.Image) -> None:
    for record in (None, RECORD):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(image, record)))), np.asarray(image))


# WebP and JPEG.


def exif(data: bytes) -> dict[int, Any]:
    """Description and comment, as Pillow reads them."""
    with Image.open(io.BytesIO(data)) as opened:
        found = opened.getexif()
        return dict(found) | dict(found.get_ifd(ExifTags.IFD.Exif))


def without_offset(data: bytes) -> dict[int, Any]:
    """The same without the place of the second directory."""
    return {tag: value for tag, value in exif(data).items() if tag != ExifTags.IFD.Exif}


@pytest.mark.parametrize("form", ["webp", "jpg"])
@pytest.mark.parametrize("prompt", PROMPTS[:-1])
def test_exif_holds_the_record_and_the_parameters_as_a1111_encodes_them(
    image: Image.Image, form: str, prompt: str
) -> None:
    found = exif(picture_bytes(image, RECORD | {"prompt": prompt}, form))
    name, _, text = found[ExifTags.Base.ImageDescription].partition(" ")
    inside = {k: v for k, v in (RECORD | {"prompt": prompt}).items() if k not in ("path", "seconds")}
    assert (name, json.loads(text)) == ("sdcli", inside)
    comment = found[ExifTags.Base.UserComment]
    assert comment.startswith(b"UNICODE\0")
    assert comment[8:].decode("utf-16-be") == a1111_parameters(inside).replace("\0", "")


@pytest.mark.parametrize("form", ["webp", "jpg"])
def test_exif_survives_that_pillow_opens_and_saves_the_picture_in_another_format(image: Image.Image, form: str) -> None:
    data = picture_bytes(image, RECORD, form)
    for other in ("JPEG", "WEBP", "PNG"):
        again = io.BytesIO()
        with Image.open(io.BytesIO(data)) as opened:
            opened.save(again, format=other, exif=opened.getexif())
        assert without_offset(again.getvalue()) == without_offset(data)


@pytest.mark.parametrize("form", ["webp", "jpg"])
def test_without_a_record_there_is_no_exif(image: Image.Image, form: str) -> None:
    assert exif(picture_bytes(image, None, form)) == {}


@pytest.mark.parametrize(("form", "letters", "left"), [("jpg", 30_000, {270}), ("jpg", 70_000, set())])
def test_what_jpeg_cannot_hold_is_left_out_with_a_warning(
    image: Image.Image, form: str, letters: int, left: set[int]
) -> None:
    with pytest.warns(SdcliWarning, match=r"into the 65,533 bytes .* left out; PNG holds any"):
        data = picture_bytes(image, RECORD | {"prompt": "x" * letters}, form)
    assert exif(data).keys() == left
    assert len(exif(picture_bytes(image, RECORD | {"prompt": "x" * letters}, "webp"))) == 3


def test_webp_at_quality_100_loses_nothing_and_less_takes_fewer_bytes() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    whole = picture_bytes(noise, None, "webp", 100)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(whole))), np.asarray(noise))
    for form in ("webp", "jpg"):
        sizes = [len(picture_bytes(noise, None, form, quality)) for quality in (10, 50, 90)]
        assert sizes == sorted(set(sizes))
        assert picture_bytes(noise, None, form) == picture_bytes(noise, None, form, 90)


def chunk_starts(png: bytes) -> list[int]:
    """Where the chunk names stand (PNG specification, section 5.3)."""
    starts, at = [], 8
    while at < len(png):
        starts.append(at + 4)
        at += 12 + int.from_bytes(png[at : at + 4], "big")
    return starts


@pytest.mark.parametrize("form", ["png", "webp", "jpg"])
def test_a_damaged_picture_has_its_record_or_none(image: Image.Image, tmp_path: Path, form: str) -> None:
    path, whole = tmp_path / f"x.{form}", picture_bytes(image, RECORD, form)
    chance = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 20)):
            data[min(chance.randrange(len(data)), chance.randrange(len(data)))] = chance.choice((0, 1, 8, 127, 255))
        path.write_bytes(data[: chance.choice((len(data), chance.randrange(len(data))))])
        assert isinstance(read_record(path), dict | None)
    path.write_bytes(picture_bytes(image, RECORD, form))
    assert (read_record(path) or {})["seed"] == 7


def test_a_record_nested_too_deeply_is_none_and_memory_that_ran_out_is_told(
    image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("sdcli", "[" * 100_000)
    image.save(tmp_path / "x.png", pnginfo=chunks)
    assert read_record(tmp_path / "x.png") is None
    assert read_record(tmp_path / "gone.png") is None

    def full(*given: Any, **named: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        read_record(tmp_path / "x.png")
