"""Stable Diffusion XL: what is drawn equals what diffusers' pipelines for it draw, whatever it starts from."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sdcli import codec, drawing
from sdcli.drawing.reading import Reader
from sdcli.pipeline import text, vae
from sdcli.pipeline.bundle import ModelBundle, TextPair, load_bundle
from sdcli.pipeline.images import to_images
from sdcli.pipeline.sampling import guided_prediction
from sdcli.pipeline.wildcards import Prompts
from sdcli.plan import plan
from sdcli.specs import CodecSpec, GenerateSpec
from tests import models

Drawn = tuple[list[Tensor], NDArray[np.int16]]

PROMPT = "a picture of a puppy"
SEEDS = (7, 8)
CLASSES = {
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
TOLERANCE = 1e-4  # of latents, relative where they are above 10


@pytest.fixture(scope="module")
def bundle(sdxl: Path) -> ModelBundle:
    return load_bundle(sdxl, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def pipe(sdxl: Path) -> Any:
    return models.pipeline_xl(sdxl)


def by_us(
    folder: Path, bundle: ModelBundle, scheduler: str, *, negative: str = "", prompt: str = PROMPT, **options: Any
) -> Drawn:
    """The latents after every call of the UNet and the pictures, before anything is pasted in."""
    how = {"steps": 4, "guidance": 5.0, "scheduler": scheduler, **options}
    decided = plan(GenerateSpec(prompt=prompt, negative=negative, model=str(folder), **how))
    words = drawing.read_words(decided)
    bundle = drawing.equipped(bundle, words, drawing.read_adapters(decided.loras, folder))
    picture = drawing.read_picture(decided)
    reader = Reader(bundle.conditioner, words.embeddings)
    context, away = reader.contexts([reader.read(Prompts(prompt, negative), decided)] * len(SEEDS))
    steps = list(drawing.draw_from(bundle, decided, context, away, seeds=SEEDS, picture=picture))
    images = to_images(vae.decode_finite(bundle.vae, steps[-1].latents))
    return [step.latents for step in steps], np.stack([np.asarray(image, dtype=np.int16) for image in images])


def by_diffusers(pipe: Any, scheduler: str, *, negative: str | None = None, **options: Any) -> Drawn:
    """The same by diffusers; of several images, each alone: in a batch it draws all of the first one's picture."""
    latents: list[Tensor] = []

    def remember(_: object, index: int, t: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(values["latents"])
        return {}

    drawn = []
    for seed in SEEDS:
        pipe.scheduler = getattr(diffusers, CLASSES[scheduler]).from_config(models.SDXL_SCHEDULER)
        how = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 5.0, **options}
        chance = torch.Generator("cpu").manual_seed(seed)
        drawn += pipe(**how, negative_prompt=negative, generator=chance, callback_on_step_end=remember).images
    count = len(latents) // len(SEEDS)
    steps = [torch.cat(latents[i::count]) for i in range(count)]
    return steps, np.stack([np.asarray(image, dtype=np.int16) for image in drawn])


def assert_same(ours: Drawn, theirs: Drawn) -> None:
    assert len(ours[0]) == len(theirs[0])
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert float((mine - other).abs().max()) <= TOLERANCE * max(1.0, float(other.abs().max()) / 10)
    assert int(abs(ours[1] - theirs[1]).max()) <= 1


@pytest.mark.parametrize(
    ("scheduler", "guidance", "negative", "size"),
    [
        ("euler", 5.0, "", (32, 32)),
        ("euler", 1.0, "", (32, 32)),
        ("dpm", 5.0, "blurry", (48, 32)),
        ("ddim", 7.5, "", (32, 48)),
        ("heun", 5.0, "blurry", (32, 32)),
        ("euler-a", 5.0, "", (32, 32)),
    ],
)
def test_text_to_image_gives_the_latents_of_every_step_and_the_pixels_of_diffusers(
    sdxl: Path,
    bundle: ModelBundle,
    pipe: Any,
    scheduler: str,
    guidance: float,
    negative: str,
    size: tuple[int, int],
) -> None:
    width, height = size
    shape = {"width": width, "height": height}
    ours = by_us(sdxl, bundle, scheduler, guidance=guidance, negative=negative, **shape)
    assert ours[1].shape == (2, height, width, 3)
    assert_same(ours, by_diffusers(pipe, scheduler, guidance_scale=guidance, negative=negative or None, **shape))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_gives_what_diffusers_gives(
    sdxl: Path, bundle: ModelBundle, pipe: Any, picture_files: Path, strength: float
) -> None:
    theirs = quiet(StableDiffusionXLImg2ImgPipeline, pipe)
    ours = by_us(sdxl, bundle, "euler", init_image=picture_files / "picture.png", strength=strength)
    image = Image.open(picture_files / "picture.png")
    assert_same(ours, by_diffusers(theirs, "euler", image=image, strength=strength))


@pytest.mark.parametrize(("channels", "strength"), [(4, 0.5), (4, 1.0), (9, 0.5)])
def test_inpainting_by_ordinary_and_by_its_own_unets_gives_what_diffusers_gives(
    sdxl: Path, pipe: Any, bundle: ModelBundle, picture_files: Path, tmp_path: Path, channels: int, strength: float
) -> None:
    folder = sdxl
    if channels == 9:
        folder = models.write_sdxl(tmp_path, in_channels=9)
        pipe, bundle = models.pipeline_xl(folder), load_bundle(folder, device=torch.device("cpu"), dtype=torch.float32)
    theirs = quiet(StableDiffusionXLInpaintPipeline, pipe)
    picture = {"init_image": picture_files / "picture.png", "mask": picture_files / "mask.png"}
    ours = by_us(folder, bundle, "euler", negative="blurry", strength=strength, **picture)
    opened = {"image": Image.open(picture_files / "picture.png"), "mask_image": Image.open(picture_files / "mask.png")}
    size = {"width": 32, "height": 32}
    assert_same(ours, by_diffusers(theirs, "euler", negative="blurry", strength=strength, **opened, **size))


def test_layers_are_left_out_as_diffusers_leaves_them_out(sdxl: Path, bundle: ModelBundle, pipe: Any) -> None:
    ours = by_us(sdxl, bundle, "euler", clip_skip=1)
    assert_same(ours, by_diffusers(pipe, "euler", clip_skip=1))
    assert not np.array_equal(ours[1], by_us(sdxl, bundle, "euler")[1])


def test_an_empty_negative_prompt_is_encoded_where_the_model_does_not_ask_for_zeros(
    sdxl: Path, pipe: Any, tmp_path: Path
) -> None:
    folder = models.copy(sdxl, tmp_path / "model")
    models.edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    loaded = load_bundle(folder, device=torch.device("cpu"), dtype=torch.float32)
    ours = by_us(folder, loaded, "euler")
    assert_same(ours, by_diffusers(pipe, "euler", negative=""))  # diffusers encodes what is given
    assert not np.array_equal(ours[1], by_diffusers(pipe, "euler")[1])


def test_a_picture_is_inverted_as_by_diffusers_inverse_ddim(sdxl: Path, pipe: Any, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), (200, 80, 40)).save(tmp_path / "a.png")
    common = {"inputs": (tmp_path / "a.png",), "model": str(sdxl)}
    how: dict[str, Any] = {"invert": PROMPT, "steps": 10, "guidance": 2.0}
    for name, more in (("latents", {}), ("noise", how)):
        list(codec.encode(CodecSpec(**common, output=tmp_path / f"{name}.safetensors", **more)))
    x, noise = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in ("latents", "noise"))
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=True)
    sizes = torch.tensor([[32.0, 48, 0, 0, 32, 48]] * 2)
    told = {"text_embeds": torch.cat([negative_pooled, pooled]), "time_ids": sizes}
    theirs = DDIMInverseScheduler(**models.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    theirs.set_timesteps(10)
    for t in theirs.timesteps:
        with torch.no_grad():
            answers = pipe.unet(torch.cat([x, x]), t, torch.cat([negative, embeds]), added_cond_kwargs=told).sample
        x = theirs.step(answers[:1] + 2 * (answers[1:] - answers[:1]), t, x).prev_sample
    assert float((x - noise).abs().max()) <= TOLERANCE * max(1.0, float(x.abs().max()) / 10)


def test_the_prediction_hangs_on_the_summary_and_on_the_sizes(bundle: ModelBundle) -> None:
    """Else the equality with diffusers would say nothing of them."""
    assert isinstance(bundle.conditioner, TextPair)
    with torch.no_grad():
        puppy, car = (
            text.encode_prompts(bundle.conditioner, [words], 1).of_size(32, 32) for words in (PROMPT, "a red car")
        )
        x = torch.randn(1, *models.LATENTS, generator=torch.Generator().manual_seed(0))
        given = puppy, replace(puppy, pooled=car.pooled), puppy.of_size(48, 32), puppy.of_size(32, 48)
        found = [guided_prediction(bundle.unet, x, torch.tensor(500), one, guidance=1.0) for one in given]
    for one, other in combinations(found, 2):
        assert float((one - other).abs().max()) > 100 * TOLERANCE


def quiet(kind: Any, pipe: Any) -> Any:
    """Another of diffusers' pipelines over the parts of one."""
    made = kind(**pipe.components, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made
