"""A model goes into a single file and out of it again without losing a bit, and plain diffusers reads both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdcli import convert, generate, layout
from sdcli.errors import InputError, NumericalError, OutputError, SdcliError, UsageError
from sdcli.model_specs import ConvertSpec
from sdcli.pipeline import known_words
from sdcli.pipeline.bundle import build_part, part_config
from sdcli.pipeline.vocabulary import load_tokenizer
from sdcli.pipeline.weights import read_state
from sdcli.plan import plan
from sdcli.specs import GenerateSpec
from tests import models, originals
from tests.commands import tree


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.x, small, in its authors' naming; to be read only."""
    return originals.write(tmp_path_factory.mktemp("original") / "sd1.safetensors")


@pytest.fixture(scope="module")
def original2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 2.x of v prediction, likewise."""
    path = tmp_path_factory.mktemp("original2") / "sd2.safetensors"
    return originals.write(path, originals.SD2, metadata={"modelspec.prediction_type": "v"})


@pytest.fixture(scope="module")
def original_xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion XL, likewise."""
    return originals.write(tmp_path_factory.mktemp("original_xl") / "sdxl.safetensors", originals.SDXL)


def converted(source: Path, target: Path, **how: object) -> Path:
    convert.run(ConvertSpec(model=str(source), output=target, **how))  # type: ignore[arg-type]
    return target


def assert_same_weights(one: Path, other: Path) -> None:
    for part in layout.parts(one):
        first, second = read_state(one, part), read_state(other, part)
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert value.dtype == second[key].dtype
            assert torch.equal(value, second[key]), key


@pytest.mark.parametrize(
    ("write", "dtype"),
    [
        (models.write_sd1, torch.float32),
        (models.write_sd2, torch.bfloat16),
        (models.write_inpainting, torch.float16),
        (models.write_learned, torch.float16),
        (models.write_sdxl, torch.float16),
    ],
)
def test_a_folder_comes_back_from_a_single_file_bit_by_bit(
    tmp_path: Path, write: Callable[[Path], Path], dtype: torch.dtype
) -> None:
    folder = write(tmp_path / "model")
    for part in layout.parts(folder):
        models.edit_weights(folder / part, lambda state: {key: value.to(dtype) for key, value in state.items()})
    single = converted(folder, tmp_path / "single.safetensors")
    back = converted(single, tmp_path / "back")
    assert_same_weights(folder, single)
    assert_same_weights(folder, back)
    assert layout.config(back, "scheduler") == layout.config(folder, "scheduler")
    for part in layout.parts(folder):
        assert part_config(build_part(back, part)) == part_config(build_part(folder, part))
    for encoder in layout.encoders(folder):
        assert load_tokenizer(layout.tokenizer(back, encoder)).pad_token == (
            load_tokenizer(layout.tokenizer(folder, encoder)).pad_token
        )


def test_a_folder_keeps_the_words_that_its_model_saw_unless_it_gets_another_text_encoder(
    sd1: Path, tmp_path: Path
) -> None:
    folder = models.copy(sd1, tmp_path / "model")
    known_words.write(folder, ["a", "puppy"])
    assert known_words.read(converted(folder, tmp_path / "same")) == {"a", "puppy"}
    other = converted(folder, tmp_path / "other", text_encoder=str(sd1))
    assert known_words.read(other) is None


def test_the_same_model_gives_the_same_bytes(sd1: Path, tmp_path: Path) -> None:
    one, other = converted(sd1, tmp_path / "a" / "m.safetensors"), converted(sd1, tmp_path / "b" / "m.safetensors")
    assert one.read_bytes() == other.read_bytes()
    folders = converted(one, tmp_path / "one"), converted(one, tmp_path / "other")
    assert tree(folders[0]) == tree(folders[1])


def test_a_single_file_in_its_authors_naming_has_exactly_their_names(
    original: Path, original2: Path, original_xl: Path, tmp_path: Path
) -> None:
    for source, kind in ((original, originals.SD1), (original2, originals.SD2), (original_xl, originals.SDXL)):
        again = converted(converted(source, tmp_path / f"d{kind.version}"), tmp_path / f"{kind.version}.safetensors")
        found, before = load_file(again), load_file(source)
        unread = "cond_stage_model.model.transformer.resblocks.23."
        assert found.keys() == {key for key in originals.shapes(kind) if not key.startswith(unread)}
        assert all(torch.equal(value, before[key]) for key, value in found.items())


def drawn(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, seed: int, guidance: float = 4.0) -> Image.Image:
    pipe.set_progress_bar_config(disable=True)
    source = torch.Generator().manual_seed(seed)
    size = {"height": 64, "width": 64}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe("a red apple", num_inference_steps=3, guidance_scale=guidance, generator=source, **size).images[0]


def our_picture(model: Path, target: Path, seed: int) -> Image.Image:
    spec = GenerateSpec(
        prompt="a red apple",
        model=str(model),
        steps=3,
        scheduler="ddim",
        guidance=4.0,
        seed=seed,
        size="64x64",
        output=target,
    )
    for _ in generate.run(spec, plan(spec)):
        pass
    return Image.open(target)


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_a_picture_from_a_single_file_is_that_of_diffusers_from_the_file_and_from_the_folder(
    original: Path, original2: Path, original_xl: Path, tmp_path: Path, kind: int
) -> None:
    source = {1: original, 2: original2, 3: original_xl}[kind]
    folder = converted(source, tmp_path / "folder")
    ours = np.asarray(our_picture(source, tmp_path / "ours.png", 5), dtype=int)
    assert ours.std() > 5  # something to compare
    assert np.array_equal(ours, np.asarray(our_picture(folder, tmp_path / "folder.png", 5)))
    pipe = StableDiffusionXLPipeline if kind == 3 else StableDiffusionPipeline
    options = {"local_files_only": True, **({"add_watermarker": False} if kind == 3 else {"safety_checker": None})}
    from_file = drawn(pipe.from_single_file(str(source), config=str(folder), **options), 5)
    from_folder = drawn(pipe.from_pretrained(folder, **options), 5)
    assert np.abs(ours - np.asarray(from_file, dtype=int)).max() <= 1
    assert np.abs(ours - np.asarray(from_folder, dtype=int)).max() <= 1


def test_what_convert_writes_is_a_single_file_to_diffusers(sd1: Path, tmp_path: Path) -> None:
    single = converted(sd1, tmp_path / "single.safetensors")
    pipe = StableDiffusionPipeline.from_single_file(
        str(single), config=str(sd1), local_files_only=True, safety_checker=None
    )
    for part, module in (("unet", pipe.unet), ("vae", pipe.vae), ("text_encoder", pipe.text_encoder)):
        expected = read_state(sd1, part)
        found = module.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_picture_from_the_file_is_to_the_bit_that_of_the_folder(sd1: Path, tmp_path: Path) -> None:
    single = converted(sd1, tmp_path / "single.safetensors")
    one, other = our_picture(sd1, tmp_path / "a.png", 3), our_picture(single, tmp_path / "b.png", 3)
    assert np.array_equal(np.asarray(one), np.asarray(other))


def test_parts_that_a_file_lacks_come_from_another_model(original: Path, tmp_path: Path) -> None:
    whole = load_file(original)
    unet = {key: value for key, value in whole.items() if key.startswith("model.diffusion_model.")}
    vae = {
        key.removeprefix("first_stage_model."): value for key, value in whole.items() if key.startswith("first_stage")
    }
    save_file(unet, tmp_path / "unet.safetensors")
    save_file(vae, tmp_path / "vae.safetensors")
    folder = converted(original, tmp_path / "folder")
    together = converted(
        tmp_path / "unet.safetensors",
        tmp_path / "together.safetensors",
        vae=str(tmp_path / "vae.safetensors"),
        text_encoder=str(folder),
    )
    assert_same_weights(original, together)
    with pytest.raises(InputError, match=r"unet\.safetensors: holds the UNet alone, no VAE and no text encoder"):
        converted(tmp_path / "unet.safetensors", tmp_path / "other")


def test_xl_without_its_text_encoders_takes_both_of_another(tmp_path: Path) -> None:
    whole = originals.weights(replace(originals.SDXL, of_size=256))  # as published: no shape of the UNet alone tells
    save_file(whole, tmp_path / "whole.safetensors")
    folder = converted(tmp_path / "whole.safetensors", tmp_path / "folder")
    alone = {key.removeprefix("first_stage_model."): whole[key] for key in whole if key.startswith("first_stage_")}
    save_file(alone, tmp_path / "vae.safetensors")
    save_file({key: whole[key] for key in whole if key.startswith("model.diff")}, tmp_path / "unet.safetensors")
    parts = {"vae": str(tmp_path / "vae.safetensors"), "text_encoder": str(folder)}
    together = converted(tmp_path / "unet.safetensors", tmp_path / "together", **parts)
    assert_same_weights(folder, together)
    # A VAE alone is shaped like that of 1.x, whose latents have another scale.
    assert layout.config(tmp_path / "vae.safetensors", "vae")["scaling_factor"] == 0.18215
    assert layout.config(together, "vae")["scaling_factor"] == 0.13025
    with pytest.raises(InputError, match="no VAE and no text encoder and no second text encoder"):
        converted(tmp_path / "unet.safetensors", tmp_path / "other")


def test_what_xl_predicts_is_marked_as_other_programs_know_it(original_xl: Path, tmp_path: Path) -> None:
    target = converted(original_xl, tmp_path / "v.safetensors", prediction="v")
    assert load_file(target)["v_pred"].numel() == 0
    assert layout.config(target, "scheduler")["prediction_type"] == "v_prediction"
    folder = converted(target, tmp_path / "folder")
    models.edit_json(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    again = converted(folder, tmp_path / "zero.safetensors")
    assert {"v_pred", "ztsnr"} < load_file(again).keys()


def test_what_an_empty_prompt_of_xl_is_goes_along(sdxl: Path, tmp_path: Path) -> None:
    folder = models.copy(sdxl, tmp_path / "model")
    models.edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    single = converted(folder, tmp_path / "m.safetensors")
    assert not layout.is_empty_zero(single)
    assert not layout.is_empty_zero(converted(single, tmp_path / "back"))


def test_averages_type_and_prediction_are_as_asked(original: Path, tmp_path: Path) -> None:
    whole = load_file(original)
    save_file(whole | originals.averages(whole), tmp_path / "ema.safetensors")
    target = converted(tmp_path / "ema.safetensors", tmp_path / "m", ema=True, dtype="float16", prediction="v")
    state = read_state(target, "unet")
    for key, before in read_state(original, "unet").items():
        assert torch.equal(state[key], (0.5 * before).half()), key
    assert layout.config(target, "scheduler")["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ({"dtype": "float8"}, UsageError, "--dtype float8: unknown"),
        ({"to": "onnx"}, UsageError, "--to onnx: unknown"),
        ({"to": "single-file"}, UsageError, "--to single-file with --output"),
        ({"prediction": "noise"}, UsageError, "--prediction noise: unknown"),
        ({"vae": "/none"}, InputError, "/none: no such model"),
        ({"ema": True}, InputError, "holds no averaged weights"),
    ],
)
def test_options_that_cannot_be_are_refused_and_nothing_is_written(
    original: Path, tmp_path: Path, how: dict[str, object], kind: type[SdcliError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        converted(original, tmp_path / "out" / "model", **how)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_no_library_could_open_is_refused() -> None:
    with pytest.raises(UsageError, match="is no UTF-8, and the libraries that read models open no such path"):
        ConvertSpec(model="builtin", output=Path(os.fsdecode(b"caf\xe9.safetensors")))


def test_what_is_there_is_not_touched(sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"mine")
    (tmp_path / "m").mkdir()
    for target in (tmp_path / "m.safetensors", tmp_path / "m"):
        with pytest.raises(OutputError, match="exists"):
            converted(sd1, target)
    assert tree(tmp_path) == {"m.safetensors": b"mine", "m": None}


@pytest.mark.parametrize("name", ["out", "out.safetensors", "new/folder/out", "new/folder/out.safetensors"])
def test_weights_that_are_not_finite_leave_nothing_behind(model: Path, tmp_path: Path, name: str) -> None:
    models.edit_weights(model / "unet", lambda state: state | {"conv_out.bias": state["conv_out.bias"] * torch.nan})
    before = tree(tmp_path)
    with pytest.raises(NumericalError, match="is not finite"):
        converted(model, tmp_path / name)
    assert tree(tmp_path) == before


def test_parts_that_do_not_fit_are_refused_before_anything_is_written(original: Path, tmp_path: Path) -> None:
    other = originals.write(tmp_path / "other.safetensors", replace(originals.SD1, context=24, vocabulary=100))
    before = tree(tmp_path)
    with pytest.raises(InputError, match="reads context of width 16, the text encoder gives 24"):
        converted(original, tmp_path / "m", text_encoder=str(other))
    assert tree(tmp_path) == before


def test_models_that_a_single_file_cannot_hold_are_refused(classed: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without a text encoder"):
        converted(classed, tmp_path / "m.safetensors")
    words = (model / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    (model / "tokenizer" / "merges.txt").write_text("\n".join(words), encoding="utf-8")
    vocabulary = layout.read_json(model / "tokenizer" / "vocab.json")
    layout.write_json(
        model / "tokenizer" / "vocab.json", vocabulary | {"a</w>": vocabulary["b</w>"], "b</w>": vocabulary["a</w>"]}
    )
    with pytest.raises(InputError, match="its tokenizer is not CLIP's"):
        converted(model, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def test_a_text_encoder_without_its_tokenizer_is_refused(original: Path, sd1: Path, tmp_path: Path) -> None:
    shutil.copytree(sd1 / "text_encoder", tmp_path / "text" / "text_encoder")
    with pytest.raises(InputError, match=r"tokenizer/vocab\.json"):
        converted(original, tmp_path / "m", text_encoder=str(tmp_path / "text"))
    assert not (tmp_path / "m").exists()


def test_a_model_of_classes_goes_into_a_folder(classed: Path, tmp_path: Path) -> None:
    target = converted(classed, tmp_path / "m", dtype="float16")
    assert layout.classes(target) == models.CLASSES
    assert {value.dtype for value in read_state(target, "unet").values()} == {torch.float16}


def test_metadata_tell_other_programs_what_the_file_is(sd1: Path, tmp_path: Path) -> None:
    with safe_open(converted(sd1, tmp_path / "m.safetensors"), framework="pt") as file:
        said = file.metadata()
    assert said["modelspec.prediction_type"] == "epsilon"
    assert said["modelspec.resolution"] == "32x32"
