"""Pictures to latent files and back: equal to diffusers' own VAE, files of another kind refused before the work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdcli import codec, latent_files
from sdcli.errors import ExitCode, InputError, NumericalError, OutputError, SdcliWarning, UsageError
from sdcli.pipeline import images
from sdcli.specs import CodecSpec
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
    (record,) = codec.encode(CodecSpec(inputs=(source,), output=output, model=str(sd1), **how))
    return record


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

    there = list(codec.encode(CodecSpec(inputs=(inputs, photo), output=tmp_path / "z", model=str(sd1))))
    back = list(codec.decode(CodecSpec(inputs=(tmp_path / "z",), output=tmp_path / "back", model=str(sd1))))

    assert [record.path.name for record in there] == [f"{stem}.latents.safetensors" for stem in ("a", "b", "photo")]
    assert [record.path.name for record in back] == ["a.png", "b.png", "photo.png"]
    assert all(Image.open(record.path).size == (24, 16) for record in back)


def test_inputs_of_one_name_are_numbered_or_refused(sd1: Path, photo: Path, tmp_path: Path) -> None:
    Image.open(photo).save(tmp_path / "photo.bmp")
    inputs = (photo, tmp_path / "photo.bmp")
    made = list(codec.encode(CodecSpec(inputs=inputs, output=tmp_path / "z", model=str(sd1))))
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


@pytest.mark.parametrize(("command", "name"), [("encode", "x.png"), ("decode", "x.safetensors"), ("decode", "x.jpg")])
def test_a_result_is_not_written_under_the_name_of_another_kind(
    sd1: Path, photo: Path, latents: Path, tmp_path: Path, command: str, name: str
) -> None:
    make, source = (encoded, photo) if command == "encode" else (decoded, latents)
    with pytest.raises(UsageError, match=rf"--output .*{name}: the result is a \.(png|safetensors) file"):
        make(sd1, source, tmp_path / name)
    assert not (tmp_path / name).exists()


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
        ({"dtype": "F32", "shape": "x", "data_offsets": [0, 0]}, "it holds no latents"),
        ({"dtype": "F32", "shape": [1, True], "data_offsets": [0, 0]}, "its shape is"),
        ([], "header cannot be read"),
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
