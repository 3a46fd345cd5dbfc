"""The generate story: what is drawn equals what diffusers draws, whatever the batch, and is recorded as it was."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, groupby, product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sdcli import codec, drawing, generate, latent_files
from sdcli.errors import InputError, NumericalError, SdcliWarning, UsageError
from sdcli.generate import ImageRecord
from sdcli.pipeline import known_words, vae
from sdcli.pipeline.adapters import Embedding, write_embedding
from sdcli.pipeline.bundle import ModelBundle, load_bundle
from sdcli.pipeline.images import to_images
from sdcli.plan import plan
from sdcli.specs import CodecSpec, GenerateSpec
from tests import models

Pixels = NDArray[np.int16]

# Name -> class and settings, as `sdcli schedulers` documents them, and the calls of the UNet for N steps.
ORACLES: dict[str, tuple[str, dict[str, Any], Callable[[int], int]]] = {
    "ddim": ("DDIMScheduler", {}, lambda n: n),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, lambda n: n + 1),
    "lms": ("LMSDiscreteScheduler", {}, lambda n: n),
    "heun": ("HeunDiscreteScheduler", {}, lambda n: 2 * n - 1),
    "dpm": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}, lambda n: n),
    "ddpm": ("DDPMScheduler", {}, lambda n: n),
    "euler": ("EulerDiscreteScheduler", {}, lambda n: n),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}, lambda n: n),
    "unipc": ("UniPCMultistepScheduler", {}, lambda n: n),
}
# Further schedulers and options: what the user asks for -> class, settings, and arguments of every step.
CHOICES: dict[str, tuple[dict[str, Any], str, dict[str, Any], dict[str, float]]] = {
    "f-pndm": ({"scheduler": "f-pndm"}, "PNDMScheduler", {"skip_prk_steps": False}, {}),
    "dpm2": ({"scheduler": "dpm2"}, "KDPM2DiscreteScheduler", {}, {}),
    "dpm2-a": ({"scheduler": "dpm2-a"}, "KDPM2AncestralDiscreteScheduler", {}, {}),
    "deis": ({"scheduler": "deis"}, "DEISMultistepScheduler", {}, {}),
    "lcm": ({"scheduler": "lcm"}, "LCMScheduler", {}, {}),
    "tcd": ({"scheduler": "tcd"}, "TCDScheduler", {}, {"eta": 0.3}),  # 0 in diffusers' pipeline
    "tcd-still": ({"scheduler": "tcd", "eta": 0.0}, "TCDScheduler", {}, {"eta": 0.0}),
    "dpm-sde": ({"scheduler": "dpm-sde"}, "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm-single": ({"scheduler": "dpm-single"}, "DPMSolverSinglestepScheduler", {"lower_order_final": True}, {}),
    "dpm-3": ({"scheduler": "dpm", "order": 3}, "DPMSolverMultistepScheduler", {"solver_order": 3}, {}),
    "dpm-1": ({"scheduler": "dpm", "order": 1}, "DPMSolverMultistepScheduler", {"solver_order": 1}, {}),
    "dpm-karras": ({"scheduler": "DPM++ 2M Karras"}, "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
    "euler-beta": ({"scheduler": "euler", "sigmas": "beta"}, "EulerDiscreteScheduler", {"use_beta_sigmas": True}, {}),
    "heun-exponential": (
        {"scheduler": "heun", "sigmas": "exponential"},
        "HeunDiscreteScheduler",
        {"use_exponential_sigmas": True},
        {},
    ),
    "ddim-eta": ({"scheduler": "ddim", "eta": 0.5}, "DDIMScheduler", {}, {"eta": 0.5}),
    "ddim-trailing": (
        {"scheduler": "ddim", "timestep_spacing": "trailing"},
        "DDIMScheduler",
        {"timestep_spacing": "trailing"},
        {},
    ),
    "ddpm-large": (
        {"scheduler": "ddpm", "variance": "fixed-large"},
        "DDPMScheduler",
        {"variance_type": "fixed_large"},
        {},
    ),
}
PROMPT = "a picture of a puppy"
NEGATIVE = "blurry"
SEED = 7
LATENTS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_sd2(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="module")
def parts() -> Callable[[Path], tuple[ModelBundle, StableDiffusionPipeline]]:
    """A model folder as we load it and as diffusers loads it, each once."""
    loaded: dict[Path, tuple[ModelBundle, StableDiffusionPipeline]] = {}

    def load(folder: Path) -> tuple[ModelBundle, StableDiffusionPipeline]:
        if folder not in loaded:
            bundle = load_bundle(folder, device=torch.device("cpu"), dtype=torch.float32)
            loaded[folder] = bundle, models.pipeline(folder)
        return loaded[folder]

    return load


def by_diffusers(
    pipe: StableDiffusionPipeline,
    config: dict[str, Any],
    scheduler: str,
    steps: int,
    guidance: float,
    seeds: list[int],
    **conditions: Any,
) -> tuple[list[Tensor], Pixels]:
    """The latents after every call of the UNet and the pictures, by diffusers' own pipeline."""
    name, settings = ORACLES[scheduler][:2] if scheduler in ORACLES else CHOICES[scheduler][1:3]
    pipe.scheduler = getattr(diffusers, name).from_config(config, **settings)
    latents: list[Tensor] = []

    def remember(_: object, index: int, t: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(values["latents"])
        return {}

    drawn = pipe(
        **{"prompt": PROMPT, "negative_prompt": NEGATIVE} | conditions,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        callback_on_step_end=remember,
    )
    return latents, np.stack([np.asarray(image, dtype=np.int16) for image in drawn.images])


def by_us(
    folder: Path, bundle: ModelBundle, scheduler: str, steps: int, guidance: float, seeds: list[int], **options: Any
) -> tuple[list[Tensor], Pixels]:
    """The same by the parts of our own story."""
    asked_for = CHOICES[scheduler][0] if scheduler in CHOICES else {"scheduler": scheduler}
    how = {"steps": steps, "guidance": guidance, **asked_for, **options}
    decided = plan(GenerateSpec(prompt=PROMPT, model=str(folder), **how))
    latents = [step.latents for step in drawing.draw(bundle, decided, [PROMPT] * len(seeds), NEGATIVE, seeds=seeds)]
    images = to_images(vae.decode_finite(bundle.vae, latents[-1]))
    return latents, np.stack([np.asarray(image, dtype=np.int16) for image in images])


def scheduler_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return config


def assert_same(ours: tuple[list[Tensor], Pixels], theirs: tuple[list[Tensor], Pixels]) -> None:
    assert len(ours[0]) == len(theirs[0])
    assert max(largest(mine - other) for mine, other in zip(ours[0], theirs[0], strict=True)) <= LATENTS_TOLERANCE
    assert largest(ours[1] - theirs[1]) <= 1


def largest(difference: Tensor | Pixels) -> float:
    return float(abs(difference).max())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", [5, 25])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("scheduler", ORACLES)
def test_sd1_gives_the_latents_of_every_step_and_the_pixels_of_diffusers(
    sd1: Path, parts: Any, scheduler: str, guidance: float, steps: int, batch: int
) -> None:
    bundle, pipe = parts(sd1)
    seeds = list(range(SEED, SEED + batch))
    ours = by_us(sd1, bundle, scheduler, steps, guidance, seeds)
    assert_same(ours, by_diffusers(pipe, scheduler_config(sd1), scheduler, steps, guidance, seeds))


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("steps", [5, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 7.5])
@pytest.mark.parametrize("scheduler", [name for name in ORACLES if name != "pndm"])  # diffusers' weighs v: solvers.py
def test_sd2_gives_the_latents_of_every_step_and_the_pixels_of_diffusers(
    sd2: Path, parts: Any, scheduler: str, guidance: float, steps: int, batch: int
) -> None:
    bundle, pipe = parts(sd2)
    seeds = list(range(SEED, SEED + batch))
    ours = by_us(sd2, bundle, scheduler, steps, guidance, seeds)
    assert_same(ours, by_diffusers(pipe, scheduler_config(sd2), scheduler, steps, guidance, seeds))


@pytest.mark.parametrize("steps", [5, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_other_scheduler_and_option_gives_the_latents_and_pixels_of_diffusers(
    sd1: Path, parts: Any, choice: str, steps: int
) -> None:
    bundle, pipe = parts(sd1)
    ours = by_us(sd1, bundle, choice, steps, 7.5, [SEED, SEED + 1])
    assert_same(
        ours, by_diffusers(pipe, scheduler_config(sd1), choice, steps, 7.5, [SEED, SEED + 1], **CHOICES[choice][3])
    )


def test_rescaled_guidance_gives_the_pixels_of_diffusers(sd1: Path, parts: Any) -> None:
    bundle, pipe = parts(sd1)
    ours = by_us(sd1, bundle, "ddim", 5, 7.5, [SEED], guidance_rescale=0.7)
    theirs = by_diffusers(pipe, scheduler_config(sd1), "ddim", 5, 7.5, [SEED], guidance_rescale=0.7)
    assert_same(ours, theirs)
    assert largest(ours[0][-1] - by_us(sd1, bundle, "ddim", 5, 7.5, [SEED])[0][-1]) > 0.01


def test_a_wrong_guidance_or_solver_would_show(sd1: Path, sd2: Path, parts: Any) -> None:
    """The tolerances of the tests above are far below what any mistake would make: the pictures are not faint."""
    for folder in (sd1, sd2):
        bundle, _ = parts(folder)
        drawn = {name: by_us(folder, bundle, name, 5, 7.5, [SEED]) for name in ORACLES}
        for one, other in combinations(drawn, 2):
            assert largest(drawn[one][0][-1] - drawn[other][0][-1]) > 1000 * LATENTS_TOLERANCE, (one, other)
        for name, (latents, pixels) in drawn.items():
            milder = by_us(folder, bundle, name, 5, 6.0, [SEED])
            assert largest(latents[-1] - milder[0][-1]) > 1000 * LATENTS_TOLERANCE
            assert largest(pixels - milder[1]) > 10
            assert pixels.std() > 25


@pytest.mark.parametrize("scheduler", ORACLES)
def test_the_whole_story_writes_the_picture_of_diffusers(sd1: Path, parts: Any, tmp_path: Path, scheduler: str) -> None:
    spec = asked(sd1, tmp_path, scheduler=scheduler, steps=3, count=2)

    records = drawn_by(spec)

    _, expected = by_diffusers(parts(sd1)[1], scheduler_config(sd1), scheduler, 3, 7.5, [SEED, SEED + 1])
    for record, other in zip(records, expected, strict=True):
        assert record.path is not None
        assert largest(read(record.path) - other) <= 1


def test_another_size_gives_the_picture_of_diffusers(sd1: Path, parts: Any, tmp_path: Path) -> None:
    (record,) = drawn_by(asked(sd1, tmp_path, size="48x24"))
    pipe = parts(sd1)[1]
    pipe.scheduler = diffusers.DDIMScheduler.from_config(scheduler_config(sd1))
    expected = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=3,
        width=48,
        height=24,
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).images[0]
    assert largest(read(record.path) - np.asarray(expected, dtype=np.int16)) <= 1


def test_a_size_that_halves_unevenly_inside_the_unet_works(sd1: Path, tmp_path: Path) -> None:
    (record,) = drawn_by(asked(sd1, tmp_path, size="34x38"))  # latents of 17 x 19
    assert read(record.path).shape == (38, 34, 3)


@pytest.mark.parametrize(("scheduler", "guidance"), list(product(ORACLES, (1.0, 7.5))))
def test_evaluations_are_counted_and_guidance_1_makes_no_unconditional_half(
    sd1: Path, tmp_path: Path, scheduler: str, guidance: float
) -> None:
    steps, batch = 4, 2
    with unet_batches() as batches:
        records = drawn_by(asked(sd1, tmp_path, scheduler=scheduler, steps=steps, guidance=guidance, count=batch))
    expected = ORACLES[scheduler][2](steps)
    assert batches == [batch if guidance == 1 else 2 * batch] * expected
    assert [record.facts["evaluations"] for record in records] == [expected] * batch


def test_an_image_does_not_depend_on_its_batch(sd1: Path, tmp_path: Path) -> None:
    """Seed 7 alone, and as the third of the four that start at seed 5, together or one, two, three at a time."""
    for scheduler in ("dpm", "euler-a", "pndm"):
        (alone,) = drawn_by(asked(sd1, tmp_path, scheduler=scheduler, steps=8))
        for size in (None, 1, 2, 3):
            four = drawn_by(asked(sd1, tmp_path, scheduler=scheduler, steps=8, seed=5, count=4, batch_size=size))
            assert [record.facts["seed"] for record in four] == [5, 6, 7, 8]
            assert largest(read(four[2].path) - read(alone.path)) <= 2
            assert largest(read(four[1].path) - read(alone.path)) > 10


def test_a_deterministic_image_is_bit_equal_in_any_batch(sd1: Path, tmp_path: Path) -> None:
    for scheduler in ("dpm", "euler-a"):
        (alone,) = drawn_by(asked(sd1, tmp_path, scheduler=scheduler, deterministic=True))
        for size in (None, 3):
            how = {"scheduler": scheduler, "deterministic": True, "seed": 5, "count": 4, "batch_size": size}
            four = drawn_by(asked(sd1, tmp_path, **how))
            assert largest(read(four[2].path) - read(alone.path)) == 0


def test_a_prompt_does_not_depend_on_its_neighbours(sd1: Path, parts: Any) -> None:
    bundle, _ = parts(sd1)
    decided = plan(GenerateSpec(prompt=PROMPT, model=str(sd1), steps=4))
    prompts = ["a cat", PROMPT, "a cat on a sofa"]  # of equal chunk counts, as all that is drawn together
    together = [s.latents for s in drawing.draw(bundle, decided, prompts, NEGATIVE, seeds=[1, SEED, 3])][-1]
    alone = [s.latents for s in drawing.draw(bundle, decided, [PROMPT], NEGATIVE, seeds=[SEED])][-1]
    other = [s.latents for s in drawing.draw(bundle, decided, ["a cat"], NEGATIVE, seeds=[SEED])][-1]
    assert largest(together[1] - alone[0]) <= 10 * LATENTS_TOLERANCE  # another batch size, another order of additions
    assert largest(other[0] - alone[0]) > 1000 * LATENTS_TOLERANCE


def test_the_negative_prompt_is_heard_and_only_with_guidance(sd1: Path, tmp_path: Path) -> None:
    def pixels(guidance: float, negative: str) -> Pixels:
        return read(drawn_by(asked(sd1, tmp_path, guidance=guidance, negative=negative))[0].path)

    assert largest(pixels(7.5, "blurry") - pixels(7.5, "a sharp photograph")) > 10
    with pytest.warns(SdcliWarning, match="the negative prompt is not used"):
        assert largest(pixels(1.0, "blurry") - pixels(1.0, "a sharp photograph")) == 0


def test_the_largest_seed_is_followed_by_zero(sd1: Path, tmp_path: Path) -> None:
    last, first = drawn_by(asked(sd1, tmp_path, seed=2**64 - 1, count=2))
    (zero,) = drawn_by(asked(sd1, tmp_path, seed=0))
    assert (last.facts["seed"], first.facts["seed"]) == (2**64 - 1, 0)
    assert largest(read(first.path) - read(zero.path)) <= 2


def test_the_same_spec_twice_gives_the_same_bytes(sd1: Path, tmp_path: Path) -> None:
    once = drawn_by(asked(sd1, tmp_path / "a", count=2))
    again = drawn_by(asked(sd1, tmp_path / "b", count=2))
    assert [r.path.read_bytes() for r in once] == [r.path.read_bytes() for r in again]
    assert once[0].path.read_bytes() != once[1].path.read_bytes()


def test_the_record_tells_how_the_picture_was_made(sd1: Path, tmp_path: Path) -> None:
    (record,) = drawn_by(asked(sd1, tmp_path, scheduler="k-heun", steps=3))
    facts = dict(record.facts)
    assert facts.pop("seconds") > 0
    assert len(facts.pop("model_hash")) == 64
    assert facts.pop("sdcli")
    assert facts == {
        "path": str(tmp_path / "a-picture-of-a-puppy-7.png"),
        "prompt": PROMPT,
        "negative": NEGATIVE,
        "model": str(sd1),
        "prediction": "epsilon",
        "seed": SEED,
        "width": models.SIZE,
        "height": models.SIZE,
        "scheduler": "heun",
        "steps": 3,
        "evaluations": 5,
        "guidance": 7.5,
        "tokens": {"kept": 5, "cut": 0, "chunks": 1},
    }


def test_progress_counts_every_step_of_every_image(sd1: Path, tmp_path: Path) -> None:
    spec = asked(sd1, tmp_path, count=3, batch_size=2, steps=4)
    shown = [e for e in generate.run(spec, plan(spec)) if isinstance(e, generate.Progress)]
    assert [e.done for e in shown] == [2, 4, 6, 8, 9, 10, 11, 12]
    assert {e.total for e in shown} == {12}


def test_skip_draws_only_what_is_missing(sd1: Path, tmp_path: Path) -> None:
    spec = asked(sd1, tmp_path, count=3, if_exists="skip")
    whole = {r.path: r.path.read_bytes() for r in drawn_by(spec)}
    paths = list(whole)
    paths[1].unlink()
    paths[2].write_bytes(b"mine")

    records = {record.path: record.facts for record in drawn_by(spec)}

    assert {path for path, facts in records.items() if facts.get("skipped")} == {paths[0], paths[2]}
    assert paths[1].read_bytes() == whole[paths[1]]
    assert paths[2].read_bytes() == b"mine"


def test_nothing_is_loaded_when_all_is_there(sd1: Path, tmp_path: Path) -> None:
    spec = asked(sd1, tmp_path, if_exists="skip")
    (record,) = drawn_by(spec)
    decided = replace(plan(spec), model=replace(plan(spec).model, folder=tmp_path / "none"))
    (again,) = generate.run(spec, decided)
    assert isinstance(again, ImageRecord) and again.path == record.path


def test_a_prompt_that_does_not_fit_is_cut_with_a_warning(sd1: Path, tmp_path: Path) -> None:
    spec = asked(sd1, tmp_path, prompt="dog " * 1205)
    with pytest.warns(SdcliWarning, match="the prompt is too long: the last 5 of 1205 tokens"):
        (record,) = drawn_by(spec)
    assert record.facts["tokens"] == {"kept": 1200, "cut": 5, "chunks": 16}


def test_a_negative_prompt_that_does_not_fit_is_cut_with_a_warning(sd1: Path, tmp_path: Path) -> None:
    spec = asked(sd1, tmp_path, negative="dog " * 1202)
    with pytest.warns(SdcliWarning, match="negative prompt is too long: the last 2 of 1202 tokens"):
        drawn_by(spec)


def test_what_is_cut_of_the_negative_prompt_is_in_the_record_too(sd1: Path, tmp_path: Path) -> None:
    with pytest.warns(SdcliWarning):
        (record,) = drawn_by(asked(sd1, tmp_path, negative="dog " * 1202))
    assert record.facts["negative_tokens"] == {"kept": 1200, "cut": 2, "chunks": 16}
    assert record.facts["tokens"]["cut"] == 0
    (whole,) = drawn_by(asked(sd1, tmp_path, negative="dog " * 1200))
    assert "negative_tokens" not in whole.facts


def test_a_negative_prompt_that_is_not_heard_is_told(sd1: Path, tmp_path: Path) -> None:
    with pytest.warns(SdcliWarning, match="the negative prompt is not used: at guidance 1 nothing leads away from it"):
        drawn_by(asked(sd1, tmp_path, guidance=1.0, negative="{a|b}"))
    drawn_by(asked(sd1, tmp_path, guidance=1.0, negative=" "))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_nearly_the_same_picture(sd2: Path, tmp_path: Path, dtype: str) -> None:
    (exact,) = drawn_by(asked(sd2, tmp_path / "exact"))
    (half,) = drawn_by(asked(sd2, tmp_path / dtype, dtype=dtype))
    assert 0 < np.abs(read(half.path) - read(exact.path)).mean() < {"bfloat16": 8, "float16": 1}[dtype]


def test_a_vae_that_overflows_in_half_precision_decodes_in_float32(sd1: Path, tmp_path: Path) -> None:
    folder = models.copy(sd1, tmp_path / "model")
    models.edit_weights(folder / "vae", lambda w: w | {"decoder.conv_in.weight": w["decoder.conv_in.weight"] * 1e4})
    (exact,) = drawn_by(asked(folder, tmp_path / "exact"))
    with pytest.warns(SdcliWarning, match=r"overflows in torch\.float16"):
        (half,) = drawn_by(asked(folder, tmp_path / "half", dtype="float16"))
    assert read(exact.path).std() > 10
    assert np.abs(read(half.path) - read(exact.path)).mean() < 4


@pytest.mark.parametrize(("part", "key"), [("unet", "conv_out.weight"), ("vae", "decoder.conv_out.weight")])
def test_values_that_are_not_finite_make_no_picture(sd1: Path, tmp_path: Path, part: str, key: str) -> None:
    folder = models.copy(sd1, tmp_path / "model")
    models.edit_weights(folder / part, lambda weights: weights | {key: weights[key] * 1e38 * 1e38})
    models.edit_weights(folder / part, lambda weights: weights | {key: weights[key].nan_to_num()})
    with pytest.raises(NumericalError, match="not finite"):
        drawn_by(asked(folder, tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


# Layers of the text encoder left out.


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_clip_skip_gives_the_pictures_of_diffusers(
    request: pytest.FixtureRequest, parts: Any, tmp_path: Path, kind: str, guidance: float
) -> None:
    """Of its pipeline, which leaves the layers out of the prompt's encoding alone; that of the negative prompt is given
    to it as its own `encode_prompt` makes it: guidance compares like with like, in A1111's program, too."""
    folder = request.getfixturevalue(kind)
    pipe = parts(folder)[1]
    vars(pipe.text_encoder)["text_model"] = pipe.text_encoder  # where diffusers looks, before transformers 5
    away, _ = pipe.encode_prompt(NEGATIVE, "cpu", 1, do_classifier_free_guidance=False, clip_skip=1)
    how: dict[str, Any] = {"negative_prompt": None, "negative_prompt_embeds": away, "clip_skip": 1}
    _, expected = by_diffusers(pipe, scheduler_config(folder), "ddim", 5, guidance, [SEED, SEED + 1], **how)
    spec = asked(folder, tmp_path, steps=5, guidance=guidance, count=2, clip_skip=1)
    records, plain = drawn_by(spec), drawn_by(replace(spec, clip_skip=0, output=tmp_path / "plain"))
    for record, other, without in zip(records, expected, plain, strict=True):
        assert largest(read(record.path) - other) <= 1
        assert largest(read(record.path) - read(without.path)) > 10
        assert record.facts["clip_skip"] == 1 and "clip_skip" not in without.facts


# Prompts that differ by image.

SCENES = "a {red|blue} {dog|cat}{ in a garden, {under|on} a tree|}"


def test_images_of_other_words_are_drawn_together_and_each_as_if_it_were_alone(sd1: Path, tmp_path: Path) -> None:
    how = {"prompt": SCENES, "negative": "{dark|blurry}", "count": 4, "deterministic": True}
    with unet_batches() as batches:
        together = drawn_by(asked(sd1, tmp_path / "together", **how | {"deterministic": False}))
    assert batches == [2 * 4] * 3
    assert len({record.facts["prompt"] for record in together}) > 2
    bit_equal = drawn_by(asked(sd1, tmp_path / "apart", **how))
    for record, same in zip(together, bit_equal, strict=True):
        words = {key: record.facts[key] for key in ("prompt", "negative", "seed")}
        assert words == {key: same.facts[key] for key in words}
        (alone,) = drawn_by(asked(sd1, tmp_path / "alone", **words, deterministic=True))
        assert largest(read(record.path) - read(alone.path)) <= 2
        assert largest(read(same.path) - read(alone.path)) == 0
        assert record.facts["prompt_template"] == SCENES and record.facts["negative_template"] == "{dark|blurry}"
        assert record.facts["tokens"] == alone.facts["tokens"]
        assert "prompt_template" not in alone.facts


def test_images_whose_prompts_have_other_numbers_of_chunks_are_drawn_apart_and_in_order(
    sd1: Path, tmp_path: Path
) -> None:
    spec = asked(sd1, tmp_path, prompt="{a dog|a cat|a dog BREAK on a sofa}", count=8, guidance=1.0)
    chunks = [1 + ("BREAK" in one.prompt) for one in plan(spec).prompts]
    with unet_batches() as batches:
        records = drawn_by(spec)
    assert [record.facts["tokens"]["chunks"] for record in records] == chunks and set(chunks) == {1, 2}
    assert batches == [size for size in (len(list(run)) for _, run in groupby(chunks)) for _ in range(3)]
    (alone,) = drawn_by(asked(sd1, tmp_path / "alone", prompt=records[3].facts["prompt"], seed=SEED + 3, guidance=1.0))
    assert largest(read(records[3].path) - read(alone.path)) <= 2


def test_what_is_cut_of_one_choice_is_told_of_the_image_that_drew_it(sd1: Path, tmp_path: Path) -> None:
    spec = asked(sd1, tmp_path, prompt="{a dog|" + "cat " * 1201 + "}", seed=0, count=4, steps=2)
    with pytest.warns(SdcliWarning, match="the prompt is too long: the last 1 of 1201 tokens") as warned:
        records = drawn_by(spec)
    assert len(warned) == 1
    cut = {record.facts["prompt"][:5]: record.facts["tokens"]["cut"] for record in records}
    assert cut == {"a dog": 0, "cat c": 1}


def test_an_option_for_a_word_that_some_choice_has_is_no_mistake(
    sd1: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    file = write_embedding(tmp_path, Embedding("<my-cat>", torch.ones(1, models.CONTEXT)))[0]
    how = {"embedding": (str(file),), "replace": ("dog=cow",), "steps": 2, "count": 4}
    drawn_by(asked(sd1, tmp_path / "out", prompt="{a <my-cat>|a dog|a cow}", **how))
    assert [str(one.message) for one in recwarn if one.category is SdcliWarning] == []
    with pytest.warns(SdcliWarning) as warned:
        drawn_by(asked(sd1, tmp_path / "out", prompt="{a cat|a cow}", **how))
    assert {str(one.message).split(":")[0] for one in warned} == {f"--embedding {file}", "--replace dog=cow"}


# A model that draws classes, or draws unconditionally.


@pytest.mark.parametrize(("scheduler", "guidance"), [("ddim", 7.5), ("ddim", 1.0), ("euler-a", 3.0), ("pndm", 7.5)])
def test_a_class_gives_the_latents_of_every_step_and_the_pixels_of_diffusers_given_its_row(
    classed: Path, tmp_path: Path, scheduler: str, guidance: float
) -> None:
    (table,) = load_file(models.weight_file(classed / "class_embedder")).values()
    rows = {"prompt_embeds": table[1].view(1, 1, -1), "negative_prompt_embeds": table[-1].view(1, 1, -1)}
    pipe = models.pipeline(classed, text_encoder=None, tokenizer=None)
    theirs = by_diffusers(
        pipe,
        scheduler_config(classed),
        scheduler,
        4,
        guidance,
        [SEED, SEED + 1],
        prompt=None,
        negative_prompt=None,
        **rows,
    )
    records = drawn_by(of_class(classed, tmp_path, "dog", scheduler=scheduler, steps=4, guidance=guidance, count=2))
    for record, expected in zip(records, theirs[1], strict=True):
        assert largest(read(record.path) - expected) <= 1
    bundle = load_bundle(classed, device=torch.device("cpu"), dtype=torch.float32)
    decided = plan(of_class(classed, tmp_path, "1", scheduler=scheduler, steps=4, guidance=guidance))
    steps = drawing.draw(bundle, decided, [1, 1], len(models.CLASSES), seeds=[SEED, SEED + 1])
    for step, expected in zip(steps, theirs[0], strict=True):
        assert largest(step.latents - expected) <= LATENTS_TOLERANCE


def test_an_unconditional_model_gives_the_pixels_of_diffusers_given_its_only_row(
    unconditional: Path, tmp_path: Path
) -> None:
    (table,) = load_file(models.weight_file(unconditional / "class_embedder")).values()
    pipe = models.pipeline(unconditional, text_encoder=None, tokenizer=None)
    _, expected = by_diffusers(
        pipe,
        scheduler_config(unconditional),
        "ddim",
        4,
        1.0,
        [SEED],
        prompt=None,
        negative_prompt=None,
        prompt_embeds=table.view(1, 1, -1),
    )
    with unet_batches() as batches:
        (record,) = drawn_by(asked(unconditional, tmp_path, prompt="", negative="", steps=4))
    assert largest(read(record.path) - expected[0]) <= 1
    assert batches == [1] * 4
    assert record.facts["guidance"] == 1.0
    assert "class" not in record.facts


def test_classes_differ_and_one_does_not_depend_on_its_neighbours(classed: Path, tmp_path: Path) -> None:
    bundle = load_bundle(classed, device=torch.device("cpu"), dtype=torch.float32)
    decided = plan(of_class(classed, tmp_path, "cat", steps=4))
    together = [s.latents for s in drawing.draw(bundle, decided, [0, 3, 0], 4, seeds=[1, SEED, SEED])][-1]
    alone = [s.latents for s in drawing.draw(bundle, decided, [3], 4, seeds=[SEED])][-1]
    assert largest(together[1] - alone[0]) <= 10 * LATENTS_TOLERANCE
    assert largest(together[2] - alone[0]) > 1000 * LATENTS_TOLERANCE


def test_the_record_of_a_class_names_it(classed: Path, tmp_path: Path) -> None:
    (record,) = drawn_by(of_class(classed, tmp_path, "3"))
    assert record.facts["class"] == {"index": 3, "name": "sea urchin, echinoid"}
    assert (record.facts["prompt"], record.facts["negative"]) == ("", "")
    assert record.facts["tokens"] == {"kept": 0, "cut": 0, "chunks": 0}


# A UNet that predicts variances, too.


@pytest.fixture(scope="module")
def cut(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of learned variances with the prediction's channels alone."""
    folder = models.copy(learned, tmp_path_factory.mktemp("cut") / "model")
    models.edit_json(folder / "unet" / "config.json", out_channels=4)
    models.edit_weights(folder / "unet", lambda w: w | {k: w[k][:4] for k in ("conv_out.weight", "conv_out.bias")})
    models.edit_json(folder / "scheduler" / "scheduler_config.json", variance_type=...)
    return folder


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_learned_variances_do_not_change_the_picture_of_a_solver_without_use_for_them(
    learned: Path, cut: Path, parts: Any, scheduler: str
) -> None:
    ours = by_us(learned, parts(learned)[0], scheduler, 5, 7.5, [SEED, SEED + 1])
    assert_same(ours, by_diffusers(parts(cut)[1], scheduler_config(cut), scheduler, 5, 7.5, [SEED, SEED + 1]))


def test_ddpm_draws_with_the_learned_variances(learned: Path, cut: Path, parts: Any) -> None:
    ours = by_us(learned, parts(learned)[0], "ddpm", 5, 7.5, [SEED])
    fixed = by_us(cut, parts(cut)[0], "ddpm", 5, 7.5, [SEED])
    assert largest(ours[0][-1] - fixed[0][-1]) > 1000 * LATENTS_TOLERANCE


# Memory.


def test_what_the_steps_left_free_is_given_back_before_the_vae_works(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(generate, "trim", lambda: done.append("given back"))
    monkeypatch.setattr(generate, "to_images", lambda pixels: done.append("decoded") or to_images(pixels))
    drawn_by(asked(sd1, tmp_path / "out", count=2, batch_size=1))
    assert done == ["given back", "decoded"] * 2


# Learned tokens.


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    """A textual-inversion file of two vectors for `<my-cat>`."""
    vectors = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    return write_embedding(tmp_path, Embedding("<my-cat>", vectors))[0]


def test_a_learned_token_draws_what_it_draws_in_diffusers(sd1: Path, tmp_path: Path, cat: Path) -> None:
    def both(prompt: str, negative: str) -> Pixels:
        spec = asked(sd1, tmp_path / "out", prompt=prompt, negative=negative, embedding=(str(cat),))
        expected = pipe(
            prompt,
            negative_prompt=negative,
            num_inference_steps=3,
            guidance_scale=7.5,
            generator=torch.Generator("cpu").manual_seed(SEED),
        ).images[0]
        pixels = read(drawn_by(spec)[0].path)
        assert largest(pixels - np.asarray(expected, dtype=np.int16)) <= 1
        return pixels

    pipe = models.pipeline(sd1)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(scheduler_config(sd1))
    pipe.load_textual_inversion(str(cat.parent), weight_name=cat.name)
    named = both("a picture of <my-cat>, smiling", "blurry")
    shunned = both("a picture of a dog", "<my-cat>")
    with pytest.warns(SdcliWarning, match=r"no prompt names its token <my-cat>, so it changes nothing"):
        neither = both("a picture of a dog", "blurry")
    assert largest(named - neither) > 10
    assert largest(shunned - neither) > 10


def test_an_embedding_that_no_prompt_names_changes_nothing_but_the_record(sd1: Path, tmp_path: Path, cat: Path) -> None:
    with pytest.warns(SdcliWarning, match="the negative prompt is not used"):
        (plain,) = drawn_by(asked(sd1, tmp_path / "a", guidance=1.0, negative="<my-cat>"))
    spec = asked(sd1, tmp_path / "b", guidance=1.0, negative="<my-cat>", embedding=(str(cat),))
    with pytest.warns(SdcliWarning, match="no prompt names its token <my-cat>"):  # guidance 1 reads no negative prompt
        (given,) = drawn_by(spec)
    assert np.array_equal(read(plain.path), read(given.path))
    own = {"path", "seconds", "embeddings"}
    assert {k: v for k, v in given.facts.items() if k not in own} == {
        k: v for k, v in plain.facts.items() if k not in own
    }
    assert "embeddings" not in plain.facts


def test_the_record_names_the_embeddings_and_counts_their_vectors(sd1: Path, tmp_path: Path, cat: Path) -> None:
    spec = asked(sd1, tmp_path / "out", prompt="a <my-cat>, a <dog>", embedding=(str(cat), f"{cat}:<dog>"))
    (record,) = drawn_by(spec)
    digest = hashlib.sha256(cat.read_bytes()).hexdigest()
    assert record.facts["embeddings"] == [
        {"file": "my-cat.safetensors", "token": "<my-cat>", "sha256": digest},
        {"file": "my-cat.safetensors", "token": "<dog>", "sha256": digest},
    ]
    assert record.facts["tokens"] == {"kept": 7, "cut": 0, "chunks": 1}
    assert record.path is not None
    parameters = Image.open(record.path).text["parameters"]
    assert f'TI hashes: "<my-cat>: {digest[:12]}, <dog>: {digest[:12]}", Version' in parameters


@pytest.mark.skipif(sys.platform != "linux", reason="where a file name may be any bytes")
def test_an_embedding_file_of_any_name_is_recorded(sd1: Path, tmp_path: Path, cat: Path) -> None:
    odd = cat.rename(cat.with_name(os.fsdecode(b"my-\xff-cat")))
    (record,) = drawn_by(asked(sd1, tmp_path / "out", prompt="<my-cat>", embedding=(str(odd),)))
    assert record.facts["embeddings"][0]["file"] == "my-?-cat"


def test_an_embedding_is_refused_before_the_weights_are_read(sd1: Path, tmp_path: Path, cat: Path) -> None:
    folder = models.copy(sd1, tmp_path / "model")
    models.weight_file(folder / "unet").write_bytes(b"no weights")
    spec = asked(folder, tmp_path / "out", embedding=(str(cat), f"{cat}:a\tb"))
    with pytest.raises(InputError, match="no prompt can name the token"):
        drawn_by(spec)


# LoRA.


def test_a_lora_draws_what_it_draws_in_diffusers(sd1: Path, tmp_path: Path) -> None:
    file = models.write_lora(tmp_path / "a.safetensors", sd1, gain=0.5)
    pipe = models.pipeline(sd1)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(scheduler_config(sd1))
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="a")
    pipe.set_adapters("a", 0.5)
    generator = torch.Generator("cpu").manual_seed(SEED)
    words = {"prompt": "a picture of a puppy", "negative_prompt": "blurry"}
    expected = pipe(**words, num_inference_steps=3, guidance_scale=7.5, generator=generator).images[0]
    (record,) = drawn_by(asked(sd1, tmp_path / "out", lora=(f"{file}:0.5",)))
    (plain,) = drawn_by(asked(sd1, tmp_path / "plain"))
    assert largest(read(record.path) - np.asarray(expected, dtype=np.int16)) <= 1
    assert largest(read(record.path) - read(plain.path)) > 10
    assert [(one["file"], one["scale"]) for one in record.facts["loras"]] == [("a.safetensors", 0.5)]
    assert "loras" not in plain.facts


def test_a_model_of_classes_takes_a_lora_of_its_unet(classed: Path, tmp_path: Path) -> None:
    file = models.write_lora(tmp_path / "a.safetensors", classed)
    how = {"prompt": "", "negative": "", "class_name": "cat"}
    (record,) = drawn_by(asked(classed, tmp_path / "out", **how, lora=(str(file),)))
    (plain,) = drawn_by(asked(classed, tmp_path / "plain", **how))
    assert largest(read(record.path) - read(plain.path)) > 10


def test_a_pickled_lora_is_refused_before_the_weights_are_read(sd1: Path, tmp_path: Path) -> None:
    folder = models.copy(sd1, tmp_path / "model")
    unet = models.weight_file(folder / "unet")
    data = unet.read_bytes()
    unet.write_bytes(data[:-4] + b"\xff\xff\xff\xff")  # NaN, which would be told
    torch.save({"lora_unet_strange.alpha": torch.tensor(1.0)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="1 of 1 tensors belong to no layer of the model"):
        drawn_by(asked(folder, tmp_path / "out", lora=(str(tmp_path / "a.pt"),)))


# Latents, out.


def test_saved_latents_decode_to_the_picture(sd1: Path, tmp_path: Path) -> None:
    spec = asked(sd1, tmp_path / "drawn", count=2, save_latents=tmp_path / "latents")
    records = drawn_by(spec)
    saved = [Path(record.facts["saved_latents"]) for record in records]
    assert [path.name for path in saved] == [f"a-picture-of-a-puppy-{SEED + i}.latents.safetensors" for i in (0, 1)]
    assert records[0].path is not None
    inside = Image.open(records[0].path).text
    assert "saved_latents" not in inside["sdcli"]
    codec_spec = CodecSpec(inputs=(tmp_path / "latents",), output=tmp_path / "decoded", model=str(sd1))
    for record, decoded in zip(records, codec.decode(codec_spec), strict=True):
        assert largest(read(record.path) - read(decoded.path)) <= 1
    facts = latent_files.look(saved[1]).metadata
    assert facts.items() >= {"mode": "generate", "seed": str(SEED + 1), "width": "32", "prompt": PROMPT}.items()


def test_saved_latents_are_those_of_each_picture_whatever_the_batch(sd1: Path, tmp_path: Path) -> None:
    (alone,) = drawn_by(asked(sd1, tmp_path / "a", save_latents=tmp_path / "alone.safetensors"))
    drawn_by(asked(sd1, tmp_path / "b", seed=SEED - 2, count=3, batch_size=2, save_latents=tmp_path / "z.safetensors"))
    assert alone.facts["saved_latents"] == str(tmp_path / "alone.safetensors")
    numbered = [
        load_file(tmp_path / name)["latents"] for name in ("z.safetensors", "z-2.safetensors", "z-3.safetensors")
    ]
    assert largest(numbered[2] - load_file(tmp_path / "alone.safetensors")["latents"]) <= LATENTS_TOLERANCE
    assert largest(numbered[1] - numbered[2]) > 0.1


def test_latents_of_a_drawn_picture_are_no_noise_and_said_so(sd1: Path, tmp_path: Path) -> None:
    drawn_by(asked(sd1, tmp_path, save_latents=tmp_path / "z.latents.safetensors"))
    with pytest.warns(SdcliWarning, match="holds a picture, not noise"):
        plan(asked(sd1, tmp_path, latents=tmp_path / "z.latents.safetensors"))


# Prompts with syntax.


def test_a_long_prompt_goes_on_in_a_second_chunk(sd1: Path, tmp_path: Path) -> None:
    (cut,) = drawn_by(asked(sd1, tmp_path / "cut", prompt="dog " * 75))
    (whole,) = drawn_by(asked(sd1, tmp_path / "whole", prompt="dog " * 75 + "on a red ground"))
    assert whole.facts["tokens"] == {"kept": 79, "cut": 0, "chunks": 2}
    assert largest(read(whole.path) - read(cut.path)) > 10


def test_a_weight_is_heard_and_1_changes_nothing(sd1: Path, tmp_path: Path) -> None:
    plain, one, strong = (
        read(drawn_by(asked(sd1, tmp_path / name, prompt=prompt))[0].path)
        for name, prompt in (("plain", "a red dog"), ("one", "a (red:1.0) dog"), ("strong", "a (red:3) dog"))
    )
    assert largest(plain - one) == 0
    assert largest(plain - strong) > 0


# Swapped words.


def test_a_replaced_word_draws_the_picture_of_the_other_and_is_recorded(sd1: Path, tmp_path: Path) -> None:
    (other,) = drawn_by(asked(sd1, tmp_path / "a", prompt="a picture of a cat"))
    (record,) = drawn_by(asked(sd1, tmp_path / "b", replace=("puppy=cat",)))
    (mixed,) = drawn_by(asked(sd1, tmp_path / "c", mix=("puppy=0.5,cat=0.5",)))
    assert largest(read(record.path) - read(other.path)) == 0
    assert largest(read(mixed.path) - read(other.path)) > 0
    assert (record.facts["replace"], record.facts["prompt"]) == (["puppy=cat"], PROMPT)
    assert (mixed.facts["mix"], "replace" in mixed.facts) == (["puppy=0.5,cat=0.5"], False)
    inside = json.loads(texts_of(mixed.path)["sdcli"])
    assert inside["mix"] == ["puppy=0.5,cat=0.5"]
    assert 'Mix: "puppy=0.5,cat=0.5", Version' in texts_of(mixed.path)["parameters"]


def test_a_word_swapped_by_itself_draws_the_same_picture(sd1: Path, tmp_path: Path) -> None:
    (plain,) = drawn_by(asked(sd1, tmp_path / "a"))
    (same,) = drawn_by(asked(sd1, tmp_path / "b", replace=("puppy=puppy",)))
    (sum_,) = drawn_by(asked(sd1, tmp_path / "c", mix=("puppy=0.5,puppy=0.5",)))
    assert largest(read(plain.path) - read(same.path)) == largest(read(plain.path) - read(sum_.path)) == 0


def test_no_word_is_swapped_in_the_negative_prompt(sd1: Path, tmp_path: Path) -> None:
    (plain,) = drawn_by(asked(sd1, tmp_path / "a", negative="a cat"))
    with pytest.warns(SdcliWarning, match="--replace cat=dog: the prompt does not have the word"):
        (same,) = drawn_by(asked(sd1, tmp_path / "b", negative="a cat", replace=("cat=dog",)))
    assert largest(read(plain.path) - read(same.path)) == 0


def test_a_learned_token_may_stand_for_a_word(sd1: Path, tmp_path: Path, cat: Path) -> None:
    embedding = (str(cat),)
    (named,) = drawn_by(asked(sd1, tmp_path / "a", prompt="a <my-cat>", embedding=embedding))
    prompt, replaced = "a red dog", ("red dog=<my-cat>",)
    (record,) = drawn_by(asked(sd1, tmp_path / "b", prompt=prompt, embedding=embedding, replace=replaced))
    assert largest(read(named.path) - read(record.path)) == 0
    mixed = ("red dog=0.5,<my-cat>=0.5",)
    (record,) = drawn_by(asked(sd1, tmp_path / "b", prompt=prompt, embedding=embedding, mix=mixed))
    assert largest(read(named.path) - read(record.path)) > 0


def test_words_that_cannot_be_swapped_are_refused_before_the_weights_are_read(sd1: Path, tmp_path: Path) -> None:
    folder = models.copy(sd1, tmp_path / "model")
    models.weight_file(folder / "unet").write_bytes(b"no weights")
    with pytest.raises(UsageError, match="--replace puppy=hot dog: puppy is 1 token, hot dog is 2 tokens"):
        drawn_by(asked(folder, tmp_path / "out", replace=("puppy=hot dog",)))


def texts_of(path: Path | None) -> dict[str, str]:
    assert path is not None
    with Image.open(path) as image:
        image.load()
        return dict(image.text)


def asked(folder: Path, output: Path, **changes: Any) -> GenerateSpec:
    """A spec for a folder of pictures; what an earlier call drew there is replaced."""
    settings = {
        "prompt": PROMPT,
        "negative": NEGATIVE if changes.get("guidance") != 1 else "",  # where it would be told that nothing hears it
        "seed": SEED,
        "steps": 3,
        "scheduler": "ddim",
        "if_exists": "overwrite",
    }
    output.mkdir(parents=True, exist_ok=True)
    return GenerateSpec(**settings | {"model": str(folder), "output": output} | changes)


def of_class(folder: Path, output: Path, name: str, **changes: Any) -> GenerateSpec:
    return asked(folder, output, **{"prompt": "", "negative": "", "class_name": name} | changes)


def drawn_by(spec: GenerateSpec) -> list[ImageRecord]:
    return [event for event in generate.run(spec, plan(spec)) if isinstance(event, ImageRecord)]


def read(path: Path | None) -> Pixels:
    assert path is not None
    return np.asarray(Image.open(path), dtype=np.int16)


@contextmanager
def unet_batches() -> Iterator[list[int]]:
    """The batch size of every call of any UNet, as torch itself sees them."""
    batches: list[int] = []

    def note(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, UNet2DConditionModel):
            batches.append(len(arguments[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield batches
    finally:
        hook.remove()


# Words that the model never saw.


@pytest.fixture
def telling(sd1: Path, tmp_path: Path) -> Path:
    """A model that says which words it saw."""
    folder = models.copy(sd1, tmp_path / "telling")
    known_words.write(folder, ["a", "puppy"])
    return folder


def test_words_that_the_model_never_saw_are_told_and_recorded(telling: Path, tmp_path: Path) -> None:
    spec = asked(telling, tmp_path, prompt="a (zyzzyva:1.2) puppy", negative="blurry")
    with pytest.warns(SdcliWarning) as warned:
        (record,) = drawn_by(spec)
    assert [str(one.message) for one in warned] == [
        "the prompt has words that this model never saw while it learned: zyzzyva",
        "the negative prompt has words that this model never saw while it learned: blurry",
    ]
    assert (record.facts["unknown_words"], record.facts["negative_unknown_words"]) == (["zyzzyva"], ["blurry"])


def test_of_words_that_it_saw_nothing_is_told(telling: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (record,) = drawn_by(asked(telling, tmp_path, prompt="a puppy", negative=""))
    assert not {"unknown_words", "negative_unknown_words"} & record.facts.keys()
    assert not [one for one in recwarn if one.category is SdcliWarning]


def test_with_a_lora_which_may_know_more_nothing_is_told(telling: Path, tmp_path: Path) -> None:
    lora = models.write_lora(tmp_path / "lora.safetensors", telling)
    (record,) = drawn_by(asked(telling, tmp_path, prompt="a zyzzyva", lora=(str(lora),)))
    assert "unknown_words" not in record.facts
