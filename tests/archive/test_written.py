"""Whole texts of other programs, in the files that they write: what is drawn of each, and each thing that cannot be."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from sdcli.archive.foreign import others
from sdcli.archive.reading import said_in
from tests.archive import written

LIGHTHOUSE = {"prompt": "a lighthouse on a cliff", "negative": "", "seed": 1, "steps": 20, "guidance": 7.0}
LIGHTHOUSE |= {"width": 512, "height": 512}
BOTTLE = {"prompt": "a glass bottle", "negative": "bad hands", "steps": 20, "guidance": 8.0, "scheduler": "euler"}
BOTTLE |= {"width": 512, "height": 768}
FOX = {"prompt": "a fox", "negative": "blurry", "seed": 42, "steps": 30, "guidance": 7.5, "width": 512, "height": 768}
TOWER = {"prompt": "a lighthouse, Seed: 9", "negative": "blurry", "seed": 16124, "steps": 28, "guidance": 5.0}
TOWER |= {"width": 512, "height": 768, "scheduler": "dpm", "sigmas": "karras"}

# By program and version, what is asked of generate, and about what there are remarks.
READ: dict[tuple[str, str], tuple[dict[str, Any], list[str]]] = {
    ("a1111", "1.5"): (
        LIGHTHOUSE
        | {"prompt": "a lighthouse on a cliff,", "negative": "easynegative, lowres", "seed": 965400086, "height": 768}
        | {"scheduler": "dpm", "sigmas": "karras", "clip_skip": 1},
        ["network", "noise", "VAE", "ENSD", "Hires", "Lora hashes", "TI hashes"],
    ),
    ("a1111", "1.6"): (
        LIGHTHOUSE
        | {"negative": "lowres", "seed": 3101814372, "steps": 30, "guidance": 6.5, "width": 1024, "height": 1024}
        | {"scheduler": "dpm-sde", "sigmas": "karras"},
        ["VAE", "Refiner"],
    ),
    ("a1111", "1.7"): (
        LIGHTHOUSE | {"scheduler": "euler-a"},
        ["Eta", "noise", "Token", "NGMS", "Downcast alphas_cumprod"],
    ),
    ("a1111", "1.8"): (
        LIGHTHOUSE | {"scheduler": "dpm-sde", "sigmas": "exponential", "order": 3, "strength": 0.7},
        ["Mask blur", "Inpaint area", "Masked area padding"],
    ),
    ("a1111", "1.9"): (
        LIGHTHOUSE
        | {"prompt": "a lighthouse on a cliff\nBREAK\non a rock", "negative": "lowres,\nblurry"}
        | {"scheduler": "dpm", "sigmas": "karras"},
        ["ControlNet"],
    ),
    ("a1111", "1.10"): (LIGHTHOUSE | {"scheduler": "euler", "timestep_spacing": "trailing"}, ["Emphasis", "Hires"]),
    ("comfyui", "default"): (BOTTLE | {"seed": 8566257}, []),
    ("comfyui", "lora"): (BOTTLE | {"seed": 7}, ["LoraLoader"]),
    ("comfyui", "base and refiner"): (BOTTLE | {"seed": 721897303308196}, ["KSamplerAdvanced", "samplers"]),
    ("invokeai", "3"): (FOX | {"scheduler": "dpm", "sigmas": "karras"}, ["loras", "vae"]),
    ("invokeai", "4"): (FOX | {"scheduler": "euler"}, []),
    ("invokeai", "5"): (FOX | {"scheduler": "dpm", "order": 3, "sigmas": "karras"}, []),
    ("stable-diffusion.cpp", "old"): (
        {"prompt": "a lighthouse", "negative": "blurry", "seed": 42, "steps": 20, "guidance": 7.0, "width": 512}
        | {"height": 512, "scheduler": "euler-a"},
        ["noise"],
    ),
    ("stable-diffusion.cpp", "text"): (TOWER, ["noise"]),
    ("stable-diffusion.cpp", "json"): (TOWER, ["noise", "models.vae", "loras"]),
    ("mflux", "0.9"): (
        {"prompt": "a fox", "negative": "", "seed": 42, "steps": 20, "guidance": 3.5, "width": 1024, "height": 576},
        ["noise", "quantize"],
    ),
}
TEXTS: dict[tuple[str, str], dict[str, str]] = {
    **{("a1111", version): {"parameters": text} for version, text in written.A1111.items()},
    **{("comfyui", name): {"prompt": json.dumps(graph), "workflow": "{}"} for name, graph in written.COMFY.items()},
    **{("invokeai", name): {"invokeai_metadata": json.dumps(one)} for name, one in written.INVOKE.items()},
    ("stable-diffusion.cpp", "old"): {"parameters": written.SDCPP_OLD},
    ("stable-diffusion.cpp", "text"): {"parameters": written.SDCPP_TEXT},
    ("stable-diffusion.cpp", "json"): {"parameters": f"{written.SDCPP_TEXT}, SDCPP: {json.dumps(written.SDCPP)}"},
}
COMMENTS = {
    **{("a1111", version): b"UNICODE\0" + text.encode("utf-16-be") for version, text in written.A1111.items()},
    ("mflux", "0.9"): b"ASCII\0\0\0" + json.dumps(written.MFLUX).encode(),
}


def png(texts: dict[str, str]) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    return saved("PNG", pnginfo=chunks)


def commented(form: str, comment: bytes) -> bytes:
    """A picture with an EXIF UserComment."""
    block = Image.Exif()
    block.endian = ">"
    block.get_ifd(0x8769)[0x9286] = comment
    return saved(form, exif=block.tobytes())


def saved(form: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format=form, **how)
    return stream.getvalue()


def check(data: bytes, name: tuple[str, str]) -> None:
    said = said_in(data, Path("x"))
    settings, _, remarks = others(said, frozenset())
    assert said.source == name[0]
    assert (settings, [remark.about for remark in remarks]) == READ[name]


@pytest.mark.parametrize("name", TEXTS, ids=" ".join)
def test_the_texts_of_a_png_are_heard_and_what_cannot_be_honoured_is_told(name: tuple[str, str]) -> None:
    check(png(TEXTS[name]), name)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("name", COMMENTS, ids=" ".join)
def test_a_comment_in_exif_is_heard_alike_in_every_format(name: tuple[str, str], form: str) -> None:
    check(commented(form, COMMENTS[name]), name)


@pytest.mark.parametrize("name", [name for name in TEXTS if name[0] == "stable-diffusion.cpp"], ids=" ".join)
def test_a_comment_of_a_jpeg_is_heard_as_stable_diffusion_cpp_writes_it(name: tuple[str, str]) -> None:
    content = b"parameters\0" + TEXTS[name]["parameters"].encode()
    jpeg = saved("JPEG")
    check(jpeg[:2] + struct.pack(">2sH", b"\xff\xfe", 2 + len(content)) + content + jpeg[2:], name)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (("comfyui", "lora"), "LoraLoader detail.safetensors"),
        (("invokeai", "3"), "loras "),
        (("stable-diffusion.cpp", "json"), "loras "),
    ],
    ids=["comfyui", "invokeai", "sdcpp"],
)
def test_a_lora_of_any_program_is_asked_for_with_the_option_that_names_one(name: tuple[str, str], texts: str) -> None:
    said = said_in(png(TEXTS[name]), Path("x"))
    (remark,) = [one.text for one in others(said, frozenset())[2] if one.text.startswith(texts)]
    assert remark.endswith("is not honoured, name its file with --lora")
    assert not [one for one in others(said, frozenset({"lora"}))[2] if one.text.startswith(texts)]
