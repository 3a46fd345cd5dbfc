"""Pictures to latent files and back: equal to diffusers' own VAE, files of another kind refused before the work."""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdcli import codec, drawing, latent_files, store
from sdcli.errors import ExitCode, InputError, NumericalError, OutputError, SdcliWarning, UsageError
from sdcli.lab.specs import RoundtripSpec
from sdcli.pipeline import features, images, measures
from sdcli.pipeline.bundle import load_bundle
from sdcli.plan import plan
from sdcli.specs import CodecSpec, GenerateSpec
from tests import models

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def theirs(sd1: Path) -> Any:
    return AutoencoderKL.from_pretrained(sd1 / "vae", local_files_only=True).requires_grad_(False)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def latents(sd1: Path, photo: Path, tmp_path: Path) -> Path:
    """A latent file as `encode` makes it."""
    return encoded(sd1, photo, tmp_path / "photo.latents.safetensors").path


def encoded(sd1: Path, source: Path, output: Path, **how: Any) -> codec.CodecRecord:
    (record,) = records(CodecSpec(inputs=(source,), output=output, model=str(sd1), **how))
    return record


def records(spec: CodecSpec) -> list[codec.CodecRecord]:
    return [event for event in codec.encode(spec) if isinstance(event, codec.CodecRecord)]


def decoded(sd1: Path, source: Path, output: Path, **how: Any) -> codec.CodecRecord:
    (record,) = codec.decode(CodecSpec(inputs=(source,), output=output, model=str(sd1), **how))
    return record


def pixels_of(path: Path) -> torch.Tensor:
    array = np.asarray(Image.open(path), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1


def tensor(path: Path) -> torch.Tensor:
    return load_file(path)["latents"]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_encode_is_the_mean_of_diffusers_times_the_scaling_factor(
    sd1: Path, photo: Path, theirs: Any, latents: Path
) -> None:
    expected = theirs.encode(pixels_of(photo)).latent_dist.mean * theirs.config.scaling_factor
    assert tensor(latents).shape == (1, 4, 8, 12) and tensor(latents).dtype == torch.float32
    assert torch.allclose(tensor(latents), expected, rtol=0, atol=TOLERANCE)


def test_encode_can_sample_by_seed_as_diffusers_does(sd1: Path, photo: Path, theirs: Any, tmp_path: Path) -> None:
    path = encoded(sd1, photo, tmp_path / "a.safetensors", sample=True, seed=7).path
    posterior = theirs.encode(pixels_of(photo)).latent_dist
    expected = posterior.sample(torch.Generator("cpu").manual_seed(7)) * theirs.config.scaling_factor
    assert torch.allclose(tensor(path), expected, rtol=0, atol=TOLERANCE)
    assert (metadata(path)["mode"], metadata(path)["seed"]) == ("sample", "7")
    other = encoded(sd1, photo, tmp_path / "b.safetensors", sample=True, seed=8).path
    assert not torch.allclose(tensor(path), tensor(other), atol=1e-3)


def test_decode_is_that_of_diffusers(sd1: Path, theirs: Any, tmp_path: Path) -> None:
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    save_file({"latents": noise}, tmp_path / "a.safetensors")
    path = decoded(sd1, tmp_path / "a.safetensors", tmp_path / "a.png").path
    expected = theirs.decode(noise / theirs.config.scaling_factor).sample[0].permute(1, 2, 0).numpy()
    eight_bit = ((expected / 2 + 0.5).clip(0, 1) * 255).round()
    assert np.abs(np.asarray(Image.open(path), dtype=np.int16) - eight_bit).max() <= 1


def test_a_latent_file_says_what_it_needs_to_be_decoded(sd1: Path, latents: Path) -> None:
    assert metadata(latents) == {
        "model": str(sd1),
        "scaling_factor": "0.18215",
        "height": "16",
        "width": "24",
        "mode": "mean",
    }


def test_the_record_says_what_was_made_of_what(sd1: Path, photo: Path, tmp_path: Path) -> None:
    record = encoded(sd1, photo, tmp_path / "out")
    assert record.path == tmp_path / "out" / "photo.latents.safetensors"
    assert record.facts == {
        "path": str(record.path),
        "source": str(photo),
        "shape": [1, 4, 8, 12],
        "model": str(sd1),
        "scaling_factor": 0.18215,
        "height": 16,
        "width": 24,
        "mode": "mean",
        "seed": None,
    }
    back = decoded(sd1, record.path, tmp_path / "out")
    assert back.path == tmp_path / "out" / "photo.png"
    assert back.facts == {
        "path": str(back.path),
        "source": str(record.path),
        "width": 24,
        "height": 16,
        "model": str(sd1),
    }


def test_the_same_command_gives_the_same_bytes_for_the_order_of_the_metadata_is_fixed(latents: Path) -> None:
    """The safetensors library orders metadata by a hash that differs from process to process."""
    data = latents.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header) == ["__metadata__", "latents"]
    assert list(header["__metadata__"]) == ["height", "mode", "model", "scaling_factor", "width"]


def test_the_tensor_of_a_latent_file_is_aligned(latents: Path) -> None:
    assert int.from_bytes(latents.read_bytes()[:8], "little") % 8 == 0


def test_a_size_that_is_no_multiple_is_cut_at_the_edges_with_a_warning(sd1: Path, theirs: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (17, 27, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "odd.png")
    Image.fromarray(noise[:16, :26]).save(tmp_path / "even.png")
    with pytest.warns(SdcliWarning, match="27 x 17 px cut to 26 x 16, multiples of 2"):
        odd = encoded(sd1, tmp_path / "odd.png", tmp_path)
    assert torch.equal(tensor(odd.path), tensor(encoded(sd1, tmp_path / "even.png", tmp_path).path))


def test_a_picture_smaller_than_one_latent_is_refused(sd1: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: is 1 x 9 px; at least 2 x 2"):
        encoded(sd1, tmp_path / "a.png", tmp_path)


def test_a_picture_is_scaled_to_the_size_asked_for(sd1: Path, photo: Path, tmp_path: Path) -> None:
    assert tensor(encoded(sd1, photo, tmp_path / "out", size="8x32").path).shape == (1, 4, 16, 4)


def test_a_size_asked_for_that_is_no_multiple_is_a_usage_error(sd1: Path, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="width 33 px: is no multiple of 2") as caught:
        encoded(sd1, photo, tmp_path / "out", size="33x32")
    assert caught.value.exit_code == ExitCode.USAGE


def test_an_animation_is_told_once(sd1: Path, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(SdcliWarning) as told:
        encoded(sd1, tmp_path / "a.gif", tmp_path)
    assert [str(w.message) for w in told] == [f"{tmp_path / 'a.gif'}: only the first of 2 frames is used"]


# Several files, and where they go.


def test_a_folder_of_pictures_becomes_a_file_each_and_back(sd1: Path, photo: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    for name in ("b.png", "a.JPG", ".hidden.png"):
        Image.open(photo).save(inputs / name)
    (inputs / "notes.txt").write_text("no picture")

    there = records(CodecSpec(inputs=(inputs, photo), output=tmp_path / "z", model=str(sd1)))
    back = list(codec.decode(CodecSpec(inputs=(tmp_path / "z",), output=tmp_path / "back", model=str(sd1))))

    assert [record.path.name for record in there] == [f"{stem}.latents.safetensors" for stem in ("a", "b", "photo")]
    assert [record.path.name for record in back] == ["a.png", "b.png", "photo.png"]
    assert all(Image.open(record.path).size == (24, 16) for record in back)


def test_inputs_of_one_name_are_numbered_or_refused(sd1: Path, photo: Path, tmp_path: Path) -> None:
    Image.open(photo).save(tmp_path / "photo.bmp")
    inputs = (photo, tmp_path / "photo.bmp")
    made = records(CodecSpec(inputs=inputs, output=tmp_path / "z", model=str(sd1)))
    assert [record.path.name for record in made] == ["photo.latents.safetensors", "photo-2.latents.safetensors"]
    for if_exists in ("overwrite", "skip", "error"):
        spec = CodecSpec(inputs=inputs, output=tmp_path / if_exists, model=str(sd1), if_exists=if_exists)
        with pytest.raises(UsageError, match=r"photo\.latents\.safetensors: would be the result of two inputs"):
            list(codec.encode(spec))
        assert not (tmp_path / if_exists).exists()


@pytest.mark.parametrize("if_exists", ["number", "skip", "overwrite", "error"])
@pytest.mark.parametrize("command", ["encode", "decode"])
def test_a_file_that_is_there_is_kept_unless_asked(
    sd1: Path, photo: Path, latents: Path, tmp_path: Path, command: str, if_exists: str
) -> None:
    source, name = (photo, "x.safetensors") if command == "encode" else (latents, "x.png")
    target = tmp_path / name
    target.write_bytes(b"mine")
    make = encoded if command == "encode" else decoded

    if if_exists == "error":
        with pytest.raises(OutputError, match=f"{name}: exists") as caught:
            make(tmp_path / "no model is looked for", source, target, if_exists=if_exists)
        assert caught.value.exit_code == ExitCode.OUTPUT
    else:
        record = make(sd1, source, target, if_exists=if_exists)
        assert record.path.name == (name if if_exists != "number" else name.replace("x.", "x-2."))
        assert record.facts.get("skipped", False) == (if_exists == "skip")

    assert (target.read_bytes() == b"mine") == (if_exists != "overwrite")


@pytest.mark.parametrize(("command", "name"), [("encode", "x.png"), ("decode", "x.safetensors"), ("decode", "x.bmp")])
def test_a_result_is_not_written_under_the_name_of_another_kind(
    sd1: Path, photo: Path, latents: Path, tmp_path: Path, command: str, name: str
) -> None:
    make, source = (encoded, photo) if command == "encode" else (decoded, latents)
    with pytest.raises(
        UsageError, match=rf"--output .*{name}: (the result is a \.safetensors file|is of no kind of picture)"
    ):
        make(sd1, source, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_name_too_long_once_its_ending_is_on_it_is_refused_before_any_work(
    sd1: Path, photo: Path, tmp_path: Path
) -> None:
    long = photo.rename(tmp_path / ("p" * 245 + ".png"))
    with pytest.raises(OutputError, match="has over 255 bytes"):
        records(CodecSpec(inputs=(long,), output=tmp_path / "out", model="nowhere/"))


def test_two_results_do_not_go_into_one_file(sd1: Path, photo: Path, tmp_path: Path) -> None:
    spec = CodecSpec(inputs=(photo, photo), output=tmp_path / "x.safetensors", model=str(sd1))
    with pytest.raises(UsageError, match="is one file for 2 results"):
        list(codec.encode(spec))


def test_a_name_longer_than_file_systems_take_is_refused(sd1: Path, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="has over 255 bytes"):
        encoded(sd1, photo, tmp_path / ("ü" * 130 + ".safetensors"))
    with pytest.raises(InputError, match="name too long"):
        encoded(sd1, tmp_path / ("x" * 300), tmp_path)


# What is refused, before anything is made.


def test_a_bad_picture_stops_it_before_the_first_is_encoded(sd1: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "z.png").write_bytes(photo.read_bytes()[:200])
    with pytest.raises(InputError, match=r"z\.png"):
        list(codec.encode(CodecSpec(inputs=(photo, tmp_path / "z.png"), output=tmp_path / "out", model=str(sd1))))
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_refused(sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no file to read"):
        encoded(sd1, tmp_path / "empty", tmp_path)


def test_a_bad_latent_file_stops_it_before_the_first_is_decoded(sd1: Path, latents: Path, tmp_path: Path) -> None:
    (tmp_path / "z.safetensors").write_bytes(latents.read_bytes()[:-1])
    spec = CodecSpec(inputs=(latents, tmp_path / "z.safetensors"), output=tmp_path / "out", model=str(sd1))
    with pytest.raises(InputError, match=r"z\.safetensors: is no latent file"):
        list(codec.decode(spec))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"latents": torch.zeros(1, 16, 8, 8)}, r"shape \(1, 16, 8, 8\); this model needs \(1, 4, h, w\)"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"shape \(2, 4, 8, 8\)"),
        ({"latents": torch.zeros(4, 8, 8)}, r"shape \(4, 8, 8\)"),
        ({"latents": torch.zeros(1, 4, 0, 8)}, r"shape \(1, 4, 0, 8\)"),
        ({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.int32)}, "latents of type 'I32'"),
        ({"latents": torch.zeros(1, 4, 6000, 6000, dtype=torch.float8_e4m3fn)}, "give 144,000,000 pixels"),
        ({"conv_in.weight": torch.zeros(4)}, "is no latent file"),
        ({}, "is no latent file"),
    ],
)
def test_latents_that_fit_no_vae_of_this_kind_are_refused(
    sd1: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], what: str
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=rf"a\.safetensors: .*{what}") as caught:
        decoded(sd1, tmp_path / "a.safetensors", tmp_path / "a.png")
    assert caught.value.exit_code == ExitCode.INPUT


def test_latents_of_a_model_with_another_scaling_factor_are_refused(
    latents: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, sd1: Path
) -> None:
    other = models.write_sd1(tmp_path_factory.mktemp("other"), scaling_factor=0.5)
    with pytest.raises(
        InputError, match=rf"scaling factor 0\.18215, this model has 0\.5; decode it with --model {sd1}"
    ):
        decoded(other, latents, tmp_path / "a.png")


def test_latents_may_be_of_as_many_pixels_as_pictures_that_are_read() -> None:
    assert latent_files.MAX_PIXELS == images.MAX_PIXELS


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"dtype": "F32", "shape": "x", "data_offsets": [0, 0]}, "makes no sense: latents is"),
        ({"dtype": "F32", "shape": [1, True], "data_offsets": [0, 0]}, "makes no sense: latents is"),
        ([], "makes no sense: latents has no dtype"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(sd1: Path, tmp_path: Path, header: object, why: str) -> None:
    text = json.dumps({"latents": header}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match=rf"a\.safetensors: is no latent file \(.*{why}"):
        decoded(sd1, tmp_path / "a.safetensors", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("written", "is_taken"), [("0.182150", True), ("1.8215e-1", True), ("0.2", False), ("x", False)]
)
def test_scaling_factors_are_compared_as_numbers(sd1: Path, tmp_path: Path, written: str, is_taken: bool) -> None:
    save_file({"latents": torch.zeros(1, 4, 8, 8)}, tmp_path / "a.safetensors", {"scaling_factor": written})
    if is_taken:
        decoded(sd1, tmp_path / "a.safetensors", tmp_path / "a.png")
    else:
        with pytest.raises(InputError, match="scaling factor"):
            decoded(sd1, tmp_path / "a.safetensors", tmp_path / "a.png")


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_latents_that_are_not_finite_are_refused(sd1: Path, tmp_path: Path, bad: float) -> None:
    save_file({"latents": torch.full((1, 4, 8, 8), bad)}, tmp_path / "a.safetensors")
    with pytest.raises(NumericalError, match=r"a\.safetensors.*not finite") as caught:
        decoded(sd1, tmp_path / "a.safetensors", tmp_path / "a.png")
    assert caught.value.exit_code == ExitCode.NUMERICAL
    assert not (tmp_path / "a.png").exists()


def test_half_precision_latents_of_others_are_decoded(sd1: Path, tmp_path: Path) -> None:
    save_file({"latents": torch.zeros(1, 4, 8, 8, dtype=torch.float16)}, tmp_path / "a.safetensors")
    assert Image.open(decoded(sd1, tmp_path / "a.safetensors", tmp_path / "a.png").path).size == (16, 16)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_without_waiting_for_it(sd1: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="no regular file"):
        encoded(sd1, tmp_path / "a.png", tmp_path / "out")


# Inversion: the noise that draws a picture.


def drawn_again(model: Path, noise: Path, output: Path, steps: int, prompt: str = "a dog") -> torch.Tensor:
    """The latents that DDIM draws from a file of noise."""
    asked = GenerateSpec(prompt=prompt, model=str(model), scheduler="ddim", steps=steps, guidance=1.0, latents=noise)
    decided = plan(replace(asked, output=output))
    bundle = load_bundle(model, device=torch.device("cpu"), dtype=torch.float32)
    return [step.latents for step in drawing.draw(bundle, decided, [prompt], "", seeds=[0])][-1]


def test_what_is_drawn_from_the_noise_of_a_picture_is_the_picture_and_more_so_with_more_steps(
    sd1: Path, photo: Path, latents: Path, tmp_path: Path
) -> None:
    wanted, errors = tensor(latents), []
    for steps in (5, 20, 80):
        noise = encoded(sd1, photo, tmp_path / f"{steps}.safetensors", invert="a dog", steps=steps).path
        back = drawn_again(sd1, noise, tmp_path, steps)
        errors.append(float((back - wanted).square().mean().sqrt()))
        assert tensor(noise).shape == wanted.shape and tensor(noise).dtype == torch.float32
        assert not torch.allclose(tensor(noise), wanted, atol=0.1)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3  # that it is no small one is the random UNet's, which denoises nothing


def test_the_embedded_model_draws_a_drawing_again_from_its_noise(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=(250, 200, 40), outline=(80, 50, 20), width=3)
    image.save(tmp_path / "drawing.png")
    builtin, errors = store.BUILTIN_FOLDER, []
    wanted = tensor(encoded(builtin, tmp_path / "drawing.png", tmp_path / "drawing.safetensors").path)
    for steps in (5, 20):
        how: dict[str, Any] = {"invert": "a smiling face", "steps": steps}
        noise = encoded(builtin, tmp_path / "drawing.png", tmp_path / f"{steps}.safetensors", **how).path
        back = drawn_again(builtin, noise, tmp_path, steps, "a smiling face")
        errors.append(float((back - wanted).square().mean().sqrt() / wanted.std()))
    assert errors[1] < errors[0] < 1 and errors[1] < 0.2


def test_the_prompt_of_an_inversion_counts_and_so_does_guidance(sd1: Path, photo: Path, tmp_path: Path) -> None:
    how: list[dict[str, Any]] = [
        {"invert": "a dog"},
        {"invert": "a cat"},
        {"invert": ""},
        {"invert": "a dog", "clip_skip": 1},
        {"invert": "a dog", "guidance": 2.0},
        {"invert": "a dog", "guidance": 2.0, "negative": "a cat"},
    ]
    noises = [tensor(encoded(sd1, photo, tmp_path / f"{i}.safetensors", steps=3, **h).path) for i, h in enumerate(how)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(noises, 2))


def test_a_file_of_noise_says_how_it_was_made(sd1: Path, photo: Path, tmp_path: Path) -> None:
    record = encoded(sd1, photo, tmp_path / "a.safetensors", invert="a dog", negative="blurry", steps=3, guidance=2.0)
    how = {"mode": "invert", "scheduler": "ddim", "steps": 3, "guidance": 2.0, "prompt": "a dog", "negative": "blurry"}
    assert how.items() <= record.facts.items()
    assert {key: str(value) for key, value in how.items()}.items() <= metadata(record.path).items()
    plain = encoded(sd1, photo, tmp_path / "b.safetensors", invert="a dog")
    assert plain.facts["steps"] == 25 and "negative" not in plain.facts and "seed" not in metadata(plain.path)


def test_noise_of_an_inversion_with_layers_left_out_is_to_be_drawn_from_with_the_same(
    sd1: Path, photo: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    skipping = encoded(sd1, photo, tmp_path / "a.safetensors", invert="a dog", steps=3, clip_skip=1)
    assert skipping.facts["clip_skip"] == 1 and metadata(skipping.path)["clip_skip"] == "1"
    plain = encoded(sd1, photo, tmp_path / "b.safetensors", invert="a dog", steps=3)
    asked = GenerateSpec(prompt="a dog", model=str(sd1), scheduler="ddim", steps=3, guidance=1.0, output=tmp_path)
    for path, skip in ((skipping.path, 1), (plain.path, 0)):
        plan(replace(asked, latents=path, clip_skip=skip))
    assert [str(one.message) for one in recwarn if one.category is SdcliWarning] == []
    for path, skip, said in (
        (skipping.path, 0, "with --clip-skip 1; with --clip-skip 0 it draws another"),
        (plain.path, 1, "with no --clip-skip; with --clip-skip 1 it draws another"),
    ):
        with pytest.warns(SdcliWarning, match=said):
            plan(replace(asked, latents=path, clip_skip=skip))


def test_an_inversion_with_a_lora_is_of_the_model_that_it_makes(sd1: Path, photo: Path, tmp_path: Path) -> None:
    lora = models.write_lora(tmp_path / "lora.safetensors", sd1, gain=0.5)
    how: list[dict[str, Any]] = [{}, {"lora": (str(lora),)}, {"lora": (f"{lora}:0",)}]
    made = [encoded(sd1, photo, tmp_path / f"{i}.safetensors", invert="a dog", steps=3, **h) for i, h in enumerate(how)]
    plain, changed, unchanged = (tensor(one.path) for one in made)
    assert torch.equal(plain, unchanged) and not torch.allclose(plain, changed, atol=0.01)
    asked = GenerateSpec(prompt="a dog", model=str(sd1), scheduler="ddim", steps=3, guidance=1.0, output=tmp_path)
    with pytest.warns(SdcliWarning, match="inversion with other LoRAs"):
        plan(replace(asked, latents=made[1].path))
    plan(replace(asked, latents=made[1].path, lora=(str(lora),)))  # a warning would be an error
    (said,) = json.loads(metadata(made[1].path)["loras"])
    assert (said["file"], said["scale"]) == ("lora.safetensors", 1.0)


def test_what_the_unet_predicts_can_be_said_of_an_inversion_and_is_to_be_said_again(
    sd1: Path, model: Path, photo: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    how: dict[str, Any] = {"invert": "a dog", "steps": 3}
    asked = encoded(sd1, photo, tmp_path / "a.safetensors", prediction="v", **how)
    plain = encoded(sd1, photo, tmp_path / "b.safetensors", **how)
    models.edit_json(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    said = encoded(model, photo, tmp_path / "c.safetensors", **how)
    assert torch.equal(tensor(asked.path), tensor(said.path))
    assert not torch.equal(tensor(asked.path), tensor(plain.path))
    assert [metadata(one.path)["prediction"] for one in (asked, plain, said)] == ["v", "epsilon", "v"]
    drawing = GenerateSpec(prompt="a dog", model=str(sd1), scheduler="ddim", steps=3, guidance=1.0, output=tmp_path)
    plan(replace(drawing, latents=asked.path, prediction="v"))
    assert [str(one.message) for one in recwarn if one.category is SdcliWarning] == []
    with pytest.warns(SdcliWarning, match="with --prediction v; with --prediction epsilon it draws another"):
        plan(replace(drawing, latents=asked.path))


def test_the_steps_are_the_models_own_where_none_are_asked_for(model: Path, photo: Path, tmp_path: Path) -> None:
    (model / "sdcli.json").write_text('{"steps": 4}')
    assert encoded(model, photo, tmp_path / "a.safetensors", invert="a dog").facts["steps"] == 4


def test_progress_counts_the_steps_of_all_pictures(sd1: Path, photo: Path, tmp_path: Path) -> None:
    spec = CodecSpec(inputs=(photo, photo), output=tmp_path / "out", model=str(sd1), invert="a dog", steps=2)
    shown = [event for event in codec.encode(spec) if isinstance(event, codec.Progress)]
    assert [(event.done, event.total) for event in shown] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_model_of_classes_inverts_with_a_class(classed: Path, photo: Path, tmp_path: Path) -> None:
    cat = encoded(classed, photo, tmp_path / "cat.safetensors", invert="cat", steps=3)
    dog = encoded(classed, photo, tmp_path / "dog.safetensors", invert="1", steps=3)
    assert (cat.facts["class"], dog.facts["class"]) == ("cat", "dog")
    assert not torch.equal(tensor(cat.path), tensor(dog.path))


def test_an_unconditional_model_inverts_with_nothing(unconditional: Path, photo: Path, tmp_path: Path) -> None:
    record = encoded(unconditional, photo, tmp_path / "a.safetensors", invert="", steps=3)
    assert record.facts["prompt"] == ""


@pytest.mark.parametrize(
    ("kind", "how", "what"),
    [
        ("classed", {"invert": "a dog"}, "--invert 'a dog': this model has no such class"),
        ("classed", {"invert": "9"}, "--invert '9': out of range"),
        ("classed", {"invert": ""}, "--invert: this model draws classes, and none is named; name one of cat, dog"),
        ("classed", {"invert": "cat", "negative": "x", "guidance": 2.0}, "--negative 'x': this model reads no text"),
        ("unconditional", {"invert": "a dog"}, "--invert 'a dog': this model is unconditional"),
        ("unconditional", {"invert": "", "guidance": 2.0}, "--guidance 2: this model is unconditional"),
        ("sd1", {"invert": "\udcff"}, "is no valid text"),
        ("sd1", {"invert": "a (dog:99)"}, "99"),
        ("sd1", {"invert": "a {dog|cat}"}, "--invert 'a {dog|cat}': has a wildcard, and no image's seed to draw it"),
        ("sd1", {"invert": "a dog", "guidance": 2.0, "negative": "{a|b}"}, "--negative '{a|b}': has a wildcard"),
        ("sd1", {"invert": "a dog", "clip_skip": 2}, "--clip-skip 2: this model's text encoder has 2 layers"),
        ("classed", {"invert": "dog", "clip_skip": 1}, "--clip-skip 1: this model reads no prompts"),
        ("sd1", {"invert": "a dog", "steps": 1000}, "scheduler ddim cannot do 1000 steps"),
    ],
)
def test_what_a_model_cannot_invert_is_refused(
    request: pytest.FixtureRequest, photo: Path, tmp_path: Path, kind: str, how: dict[str, Any], what: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(what)):
        encoded(request.getfixturevalue(kind), photo, tmp_path / "a.safetensors", **how)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"invert": "a dog", "sample": True}, "--sample and --invert exclude each other"),
        ({"steps": 5}, "--steps without --invert"),
        ({"guidance": 2.0}, "--guidance without --invert"),
        ({"negative": "x"}, "--negative without --invert"),
        ({"clip_skip": 1}, "--clip-skip without --invert"),
        ({"lora": ("x",)}, "--lora without --invert"),
        ({"prediction": "v"}, "--prediction without --invert"),
        ({"invert": "a dog", "prediction": "noise"}, "--prediction noise: unknown"),
        ({"invert": "a dog", "negative": "x"}, "--negative at --guidance 1: guidance is off"),
        ({"invert": "a dog", "seed": 4}, "--seed 4 without --sample: nothing is drawn"),
        ({"seed": 4}, "--seed 4 without --sample: nothing is drawn; leave it out, or add --sample"),
        ({"invert": "a dog", "guidance": 0.5}, "--guidance 0.5: out of range"),
        ({"invert": "a dog", "steps": 0}, "--steps 0: out of range"),
    ],
)
def test_options_of_an_inversion_that_make_no_sense_are_refused(how: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        CodecSpec(**how)


def test_a_model_whose_parts_do_not_fit_is_refused_before_its_weights_are_read(
    model: Path, photo: Path, tmp_path: Path
) -> None:
    models.edit_json(model / "unet" / "config.json", in_channels=9)
    models.weight_file(model / "unet").unlink()
    with pytest.raises(InputError, match="in_channels is 9"):
        encoded(model, photo, tmp_path / "a.safetensors", invert="a dog")


def test_a_prompt_that_does_not_fit_is_told(sd1: Path, photo: Path, tmp_path: Path) -> None:
    with pytest.warns(
        SdcliWarning, match=r"the prompt of --invert is too long: the last \d+ of \d+ tokens are not used"
    ):
        encoded(sd1, photo, tmp_path / "a.safetensors", invert="a dog " * 900, steps=2)


def test_an_inpainting_model_inverts_nothing(inpainting: Path, pictures: Path, tmp_path: Path) -> None:
    spec = CodecSpec(inputs=(pictures / "disc.png",), output=tmp_path, model=str(inpainting), invert="a disc", steps=2)
    with pytest.raises(InputError, match=r"in_channels is 9.*an inpainting model can but generate, with --mask"):
        list(codec.encode(spec))


def tripped(sd1: Path, *sources: Path, **how: Any) -> list[codec.CodecRecord]:
    return list(codec.roundtrip(RoundtripSpec(inputs=sources, model=str(sd1), **how)))


def test_a_round_trip_measures_what_encode_and_decode_leave_of_a_picture(
    sd1: Path, photo: Path, latents: Path, tmp_path: Path
) -> None:
    back = images.to_pixels(Image.open(decoded(sd1, latents, tmp_path / "back.png").path))
    pixels = pixels_of(photo)
    (record,) = tripped(sd1, photo)
    squared = (pixels - back).square().mean().item()
    assert record.facts["psnr"] == pytest.approx(10 * np.log10(4 / squared), abs=0.01)
    assert record.facts["ssim"] == pytest.approx(measures.ssim(pixels, back).item(), abs=1e-4)
    with torch.no_grad():
        assert record.facts["perceptual"] == pytest.approx(features.embedded()(pixels, back).item(), abs=1e-4)
    assert record.facts["network"] == features.EMBEDDED


def test_a_round_trip_tells_the_sizes_of_pixels_and_latents(sd1: Path, photo: Path) -> None:
    (record,) = tripped(sd1, photo)
    assert record.facts["pixels"] == {"shape": [3, 16, 24], "bytes": 3 * 16 * 24}
    assert record.facts["latents"] == {"shape": [4, 8, 12], "bytes": 4 * 8 * 12 * 4}
    assert record.facts["ratio"] == 0.75
    assert list(photo.parent.iterdir()) == [photo]  # figures alone


def test_the_picture_stands_to_the_left_of_what_the_vae_gives_back(
    sd1: Path, photo: Path, latents: Path, tmp_path: Path
) -> None:
    back = decoded(sd1, latents, tmp_path / "back.png").path
    (record,) = tripped(sd1, photo, output=tmp_path / "pair.png")
    pair = np.asarray(Image.open(tmp_path / "pair.png"))
    assert record.facts["path"] == str(tmp_path / "pair.png")
    assert np.array_equal(pair, np.concatenate([np.asarray(Image.open(p)) for p in (photo, back)], axis=1))


def test_a_sampled_round_trip_differs_by_seed_and_says_so(sd1: Path, photo: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        (record,) = tripped(sd1, photo, sample=True, seed=seed, output=tmp_path / f"{seed}.png")
        assert (record.facts["mode"], record.facts["seed"]) == ("sample", seed)
    assert (tmp_path / "1.png").read_bytes() != (tmp_path / "2.png").read_bytes()


def test_a_picture_too_small_for_the_network_has_no_perceptual_distance(sd1: Path, tmp_path: Path) -> None:
    Image.new("RGB", (12, 20), "red").save(tmp_path / "small.png")
    (record,) = tripped(sd1, tmp_path / "small.png")
    assert "psnr" in record.facts and "perceptual" not in record.facts


def test_a_vae_with_a_codebook_has_nothing_to_sample(model: Path, photo: Path) -> None:
    models.edit_json(model / "vae" / "config.json", _class_name="VQModel")
    with pytest.raises(UsageError, match="has a codebook and no posterior"):
        tripped(model, photo, sample=True)


def test_a_bad_picture_stops_a_round_trip_before_the_first(sd1: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "z.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"z\.png: is no picture"):
        tripped(sd1, photo, tmp_path / "z.png", output=tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()
