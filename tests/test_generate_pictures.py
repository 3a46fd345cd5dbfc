"""Image to image and inpainting: what is drawn equals what diffusers draws, what is kept is kept, all is recorded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, VQModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sdcli import drawing, generate
from sdcli.errors import InputError, SdcliWarning, UsageError
from sdcli.generate import ImageRecord, run
from sdcli.pipeline import init, vae
from sdcli.pipeline.bundle import ModelBundle, load_bundle
from sdcli.pipeline.images import to_images
from sdcli.plan import plan
from sdcli.schedulers import find
from sdcli.specs import GenerateSpec
from tests import models
from tests.test_generate import CHOICES, LATENTS_TOLERANCE, NEGATIVE, ORACLES, PROMPT, SEED, unet_batches

Drawn = tuple[list[Tensor], NDArray[np.int16]]

# What starts in the middle as diffusers has it; pndm, lms and our own do not, see tests/pipeline/test_start.py.
LIKE_DIFFUSERS = [name for name in (*ORACLES, *CHOICES) if name not in ("pndm", "lms", "f-pndm")]
PIPELINES = {"picture": StableDiffusionImg2ImgPipeline, "mask": StableDiffusionInpaintPipeline}


@pytest.fixture(scope="module")
def loaded() -> Any:
    """A model folder as we load it, and diffusers' pipeline of a kind over it, each once."""
    bundles: dict[Path, ModelBundle] = {}
    pipes: dict[tuple[Path, str], Any] = {}

    def load(folder: Path, kind: str) -> tuple[ModelBundle, Any]:
        if folder not in bundles:
            bundles[folder] = load_bundle(folder, device=torch.device("cpu"), dtype=torch.float32)
        if (folder, kind) not in pipes:
            pipe = PIPELINES[kind](**models.pipeline(folder).components, requires_safety_checker=False)
            pipe.set_progress_bar_config(disable=True)
            pipes[folder, kind] = pipe
        return bundles[folder], pipes[folder, kind]

    return load


def by_us(
    folder: Path, bundle: ModelBundle, picture_files: Path, scheduler: str, seeds: Sequence[int], **options: Any
) -> Drawn:
    """The latents after every call of the UNet and the pictures, before anything is pasted in."""
    asked_for = CHOICES[scheduler][0] if scheduler in CHOICES else {"scheduler": scheduler}
    how = {"steps": 6, "guidance": 7.5, **asked_for, **options}
    decided = plan(GenerateSpec(prompt=PROMPT, model=str(folder), init_image=picture_files / "picture.png", **how))
    assert decided.initial is not None
    picture = init.load(decided.initial.path, decided.initial.mask, size=decided.initial.size, factor=models.FACTOR)
    steps = list(drawing.draw(bundle, decided, [PROMPT] * len(seeds), NEGATIVE, seeds=seeds, picture=picture))
    assert steps[-1].index == decided.evaluations
    images = to_images(vae.decode_finite(bundle.vae, steps[-1].latents))
    return [step.latents for step in steps], np.stack([np.asarray(image, dtype=np.int16) for image in images])


def by_diffusers(pipe: Any, picture_files: Path, scheduler: str, seeds: Sequence[int], **options: Any) -> Drawn:
    name, settings = ORACLES[scheduler][:2] if scheduler in ORACLES else CHOICES[scheduler][1:3]
    pipe.scheduler = getattr(diffusers, name).from_config(models.SD1_SCHEDULER, **settings)
    latents: list[Tensor] = []

    def remember(_: object, index: int, t: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(values["latents"])
        return {}

    more = CHOICES[scheduler][3] if scheduler in CHOICES else {}
    options = {"num_inference_steps": 6, "guidance_scale": 7.5, **more, **options}
    if isinstance(pipe, StableDiffusionInpaintPipeline):
        options |= {"mask_image": Image.open(picture_files / "mask.png"), "width": 32, "height": 32}
    drawn = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        image=Image.open(picture_files / "picture.png"),
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        callback_on_step_end=remember,
        **options,
    )
    return latents, np.stack([np.asarray(image, dtype=np.int16) for image in drawn.images])


def assert_same(ours: Drawn, theirs: Drawn) -> None:
    assert len(ours[0]) == len(theirs[0])
    for mine, other in zip(ours[0], theirs[0], strict=True):
        # From pure noise the random UNet's latents grow to 90: there float32 rounds in steps of 1e-5.
        tolerance = max(LATENTS_TOLERANCE, 1e-5 * float(other.abs().max()))
        assert float((mine - other).abs().max()) <= tolerance
    assert int(abs(ours[1] - theirs[1]).max()) <= 1


@pytest.mark.parametrize(("guidance", "batch"), [(1.0, 1), (7.5, 3)])
@pytest.mark.parametrize("scheduler", LIKE_DIFFUSERS)
def test_image_to_image_gives_the_latents_of_every_step_and_the_pixels_of_diffusers(
    sd1: Path, loaded: Any, picture_files: Path, scheduler: str, guidance: float, batch: int
) -> None:
    bundle, pipe = loaded(sd1, "picture")
    seeds = range(SEED, SEED + batch)
    ours = by_us(sd1, bundle, picture_files, scheduler, seeds, strength=0.7, guidance=guidance)
    theirs = by_diffusers(pipe, picture_files, scheduler, seeds, strength=0.7, guidance_scale=guidance)
    assert_same(ours, theirs)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "heun", "dpm2-a", "euler-a", "lcm", "tcd", "dpm-single"])
def test_every_strength_starts_where_diffusers_starts(
    sd1: Path, loaded: Any, picture_files: Path, scheduler: str, strength: float
) -> None:
    bundle, pipe = loaded(sd1, "picture")
    ours = by_us(sd1, bundle, picture_files, scheduler, [SEED], strength=strength)
    assert_same(ours, by_diffusers(pipe, picture_files, scheduler, [SEED], strength=strength))


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("kind", ["sd1", "inpainting"])
@pytest.mark.parametrize("scheduler", LIKE_DIFFUSERS)
def test_inpainting_by_ordinary_and_by_its_own_unets_gives_what_diffusers_gives(
    request: pytest.FixtureRequest, loaded: Any, picture_files: Path, scheduler: str, kind: str, strength: float
) -> None:
    folder: Path = request.getfixturevalue(kind)
    bundle, pipe = loaded(folder, "mask")
    ours = by_us(folder, bundle, picture_files, scheduler, [SEED], strength=strength, mask=picture_files / "mask.png")
    assert_same(ours, by_diffusers(pipe, picture_files, scheduler, [SEED], strength=strength))


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("kind", ["sd1", "inpainting"])
def test_an_inpainted_image_is_in_a_batch_what_diffusers_draws_of_it_alone(
    request: pytest.FixtureRequest, loaded: Any, picture_files: Path, kind: str, guidance: float
) -> None:
    """In a batch, diffusers gives every image the first one's sample of the posterior; alone, its own."""
    folder: Path = request.getfixturevalue(kind)
    bundle, pipe = loaded(folder, "mask")
    how: dict[str, Any] = {"strength": 0.7, "guidance": guidance, "mask": picture_files / "mask.png"}
    latents, pixels = by_us(folder, bundle, picture_files, "euler-a", range(SEED, SEED + 3), **how)
    for i in range(3):
        theirs = by_diffusers(pipe, picture_files, "euler-a", [SEED + i], strength=0.7, guidance_scale=guidance)
        assert_same(([step[i : i + 1] for step in latents], pixels[i : i + 1]), theirs)


def test_a_wrong_strength_mask_or_seed_would_show(sd1: Path, loaded: Any, picture_files: Path) -> None:
    bundle, _ = loaded(sd1, "picture")
    plain = by_us(sd1, bundle, picture_files, "dpm", [SEED], strength=0.7)
    others = [
        by_us(sd1, bundle, picture_files, "dpm", [SEED], strength=0.5),
        by_us(sd1, bundle, picture_files, "dpm", [SEED + 1], strength=0.7),
        by_us(sd1, bundle, picture_files, "dpm", [SEED], strength=0.7, mask=picture_files / "mask.png"),
    ]
    for latents, pixels in others:
        assert float((plain[0][-1] - latents[-1]).abs().max()) > 1000 * LATENTS_TOLERANCE
        assert int(abs(plain[1] - pixels).max()) > 10


@pytest.mark.parametrize("scheduler", [*ORACLES, "f-pndm", "s-pndm"])
def test_every_scheduler_starts_from_a_picture_and_counts_its_evaluations(
    sd1: Path, loaded: Any, picture_files: Path, scheduler: str
) -> None:
    bundle, _ = loaded(sd1, "picture")
    for strength, made in ((0.5, 4), (1.0, 8)):
        latents, pixels = by_us(sd1, bundle, picture_files, scheduler, [SEED], strength=strength, steps=8)
        assert len(latents) == find(scheduler).evaluations(made)
        assert pixels.std() > 10


# The whole story.


def asked(folder: Path, output: Path, picture_files: Path, **options: Any) -> GenerateSpec:
    how = {"steps": 4, "scheduler": "ddim", "seed": SEED, "init_image": picture_files / "picture.png", **options}
    return GenerateSpec(prompt=PROMPT, model=str(folder), output=output, **how)


def drawn_by(spec: GenerateSpec) -> list[ImageRecord]:
    return [event for event in generate.run(spec, plan(spec)) if isinstance(event, ImageRecord)]


def read(path: Path | None) -> NDArray[np.int16]:
    assert path is not None
    return np.asarray(Image.open(path), dtype=np.int16)


@pytest.mark.parametrize("kind", ["sd1", "inpainting"])
def test_what_the_mask_keeps_is_the_picture_to_the_bit(
    request: pytest.FixtureRequest, tmp_path: Path, picture_files: Path, kind: str
) -> None:
    folder: Path = request.getfixturevalue(kind)
    records = drawn_by(asked(folder, tmp_path, picture_files, mask=picture_files / "mask.png", count=2))
    white = np.asarray(Image.open(picture_files / "mask.png")) == 255
    original = read(picture_files / "picture.png")
    for record in records:
        assert np.array_equal(read(record.path)[~white], original[~white])
        assert abs(read(record.path)[white] - original[white]).max() > 10


def test_a_black_mask_gives_the_picture_back_with_a_warning_and_a_white_one_keeps_nothing(
    sd1: Path, tmp_path: Path, picture_files: Path
) -> None:
    Image.new("L", (32, 32), 0).save(tmp_path / "black.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "white.png")
    with pytest.warns(SdcliWarning, match="is black: nothing is repainted"):
        (kept,) = drawn_by(asked(sd1, tmp_path / "out", picture_files, mask=tmp_path / "black.png"))
    assert np.array_equal(read(kept.path), read(picture_files / "picture.png"))
    (all_drawn,) = drawn_by(asked(sd1, tmp_path / "out", picture_files, mask=tmp_path / "white.png", strength=0.5))
    (plain,) = drawn_by(asked(sd1, tmp_path / "out", picture_files, strength=0.5))
    assert abs(read(all_drawn.path) - read(plain.path)).max() <= 1


def test_strength_0_is_the_picture_through_the_vae_without_a_call_of_the_unet(
    sd1: Path, tmp_path: Path, picture_files: Path, loaded: Any
) -> None:
    (record,) = drawn_by(asked(sd1, tmp_path, picture_files, strength=0.0))
    assert record.facts["evaluations"] == 0 and record.facts["strength"] == 0
    coder = loaded(sd1, "picture")[0].vae
    pixels = torch.from_numpy(read(picture_files / "picture.png")).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(coder, pixels, [torch.Generator().manual_seed(SEED)])
        (expected,) = to_images(vae.decode(coder, latents))
    assert abs(read(record.path) - np.asarray(expected, dtype=np.int16)).max() <= 1


def test_strength_is_075_unless_said_and_1_for_an_inpainting_unet(
    sd1: Path, inpainting: Path, picture_files: Path
) -> None:
    spec = {"output": Path(), "picture_files": picture_files, "steps": 8}
    for folder, mask, strength, made in (
        (sd1, None, 0.75, 6),
        (sd1, picture_files / "mask.png", 0.75, 6),
        (inpainting, picture_files / "mask.png", 1.0, 8),
    ):
        initial = plan(asked(folder, **spec, mask=mask)).initial  # type: ignore[arg-type]
        assert initial is not None and (initial.strength, initial.steps) == (strength, made)


def test_the_record_says_what_it_was_drawn_from_and_nothing_of_this_machine(
    sd1: Path, tmp_path: Path, picture_files: Path
) -> None:
    (record,) = drawn_by(asked(sd1, tmp_path, picture_files, mask=picture_files / "mask.png", strength=0.5))
    digests = {
        name: hashlib.sha256((picture_files / f"{name}.png").read_bytes()).hexdigest() for name in ("picture", "mask")
    }
    expected = {
        "strength": 0.5,
        "init_image": {"file": "picture.png", "sha256": digests["picture"]},
        "mask": {"file": "mask.png", "sha256": digests["mask"]},
    }
    assert record.facts.items() >= expected.items()
    assert (record.facts["steps"], record.facts["evaluations"]) == (4, 2)
    assert record.path is not None
    inside = Image.open(record.path).text
    assert json.loads(inside["sdcli"]).items() >= expected.items()
    assert "Denoising strength: 0.5, Init image hash: " + digests["picture"][:10] in inside["parameters"]
    assert "Mask hash: " + digests["mask"][:10] in inside["parameters"]
    assert str(picture_files) not in inside["sdcli"]


def test_an_image_does_not_depend_on_its_batch(sd1: Path, tmp_path: Path, picture_files: Path) -> None:
    how: dict[str, Any] = {"scheduler": "euler-a", "mask": picture_files / "mask.png", "strength": 0.8}
    (alone,) = drawn_by(asked(sd1, tmp_path, picture_files, **how))
    four = drawn_by(asked(sd1, tmp_path, picture_files, **{**how, "seed": SEED - 2}, count=4, batch_size=3))
    assert abs(read(four[2].path) - read(alone.path)).max() <= 2
    assert abs(read(four[1].path) - read(alone.path)).max() > 10


@pytest.mark.parametrize("size", [None, "48x24", "16x16"])
def test_a_picture_is_drawn_at_its_own_size_or_fitted_to_the_one_asked_for(
    sd1: Path, tmp_path: Path, picture_files: Path, size: str | None
) -> None:
    (record,) = drawn_by(asked(sd1, tmp_path, picture_files, size=size, mask=picture_files / "mask.png"))
    width, height = (int(side) for side in (size or "32x32").split("x"))
    assert read(record.path).shape == (height, width, 3)
    assert (record.facts["width"], record.facts["height"]) == (width, height)


def test_a_picture_that_is_turned_by_its_exif_is_drawn_as_it_is_seen(sd1: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (37, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    spec = GenerateSpec(prompt=PROMPT, model=str(sd1), steps=2, init_image=tmp_path / "turned.jpg", output=tmp_path)
    with pytest.warns(SdcliWarning, match="20 x 37 px cut to 20 x 36"):
        (record,) = drawn_by(spec)
    assert read(record.path).shape == (36, 20, 3)


def test_a_class_is_drawn_into_a_picture(classed: Path, tmp_path: Path, picture_files: Path) -> None:
    spec = GenerateSpec(
        class_name="dog",
        model=str(classed),
        output=tmp_path,
        steps=3,
        init_image=picture_files / "picture.png",
        mask=picture_files / "mask.png",
    )
    (record,) = drawn_by(spec)
    assert record.facts["class"]["name"] == "dog" and record.facts["evaluations"] == 2


def test_a_vae_of_codes_has_no_posterior_and_draws_nothing_of_the_seed(
    model: Path, tmp_path: Path, picture_files: Path
) -> None:
    shutil.rmtree(model / "vae")
    torch.manual_seed(0)
    coder = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=models.LATENTS[0],
        norm_num_groups=2,
        num_vq_embeddings=16,
    )
    coder.save_pretrained(model / "vae")
    still = [drawn_by(asked(model, tmp_path, picture_files, strength=0.0, seed=seed))[0] for seed in (1, 2)]
    assert np.array_equal(read(still[0].path), read(still[1].path))
    records = drawn_by(asked(model, tmp_path, picture_files, mask=picture_files / "mask.png", count=2))
    assert abs(read(records[0].path) - read(records[1].path)).max() > 10


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm"])
def test_a_model_of_learned_variance_draws_into_a_picture(
    learned: Path, tmp_path: Path, picture_files: Path, scheduler: str
) -> None:
    how = {"scheduler": scheduler, "steps": 5, "strength": 0.6}
    (record,) = drawn_by(asked(learned, tmp_path, picture_files, mask=picture_files / "mask.png", **how))
    assert record.facts["evaluations"] == 3


def test_the_guidance_interval_counts_the_steps_that_are_made(sd1: Path, tmp_path: Path, picture_files: Path) -> None:
    """Of the four steps made of eight, the first two are guided."""
    how: dict[str, Any] = {"steps": 8, "strength": 0.5, "guidance_interval": "0:0.5"}
    with unet_batches() as batches:
        drawn_by(asked(sd1, tmp_path, picture_files, **how))
    assert batches == [2, 2, 1, 1]


# Refusals, before any weights are read.


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"steps": 4, "strength": 0.2}, "--strength 0.2: leaves 0 of 4 steps, scheduler ddim needs 1"),
        ({"steps": 3, "strength": 0.2}, r"scheduler ddim needs 1; use more steps, or a strength from 0\.34 on"),
        ({"steps": 8, "strength": 0.4, "scheduler": "f-pndm"}, "leaves 3 of 8 steps, scheduler f-pndm needs 4"),
        ({"size": "31x32"}, "width 31 px: is no multiple of 2"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    sd1: Path, picture_files: Path, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(UsageError, match=what):
        plan(asked(sd1, Path(), picture_files, **options))


@pytest.mark.parametrize("with_picture", [False, True])
def test_an_inpainting_model_without_a_mask_is_refused_with_what_to_do(
    inpainting: Path, picture_files: Path, with_picture: bool
) -> None:
    with pytest.raises(UsageError, match="is for inpainting") as caught:
        plan(asked(inpainting, Path(), picture_files, **({} if with_picture else {"init_image": None})))
    assert "--init-image" in str(caught.value) and "--mask" in str(caught.value)


@pytest.mark.parametrize("size", [(7, 40), (40, 6)])
def test_a_picture_too_small_to_be_drawn_is_refused(sd1: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "picture.png")
    with pytest.raises(InputError, match=rf"picture\.png: is {size[0]} x {size[1]} px"):
        plan(asked(sd1, Path(), tmp_path))


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
@pytest.mark.parametrize("option", ["init_image", "mask"])
def test_a_file_that_is_no_picture_is_named_before_the_weights_are_read(
    model: Path, tmp_path: Path, picture_files: Path, option: str, content: bytes | None
) -> None:
    models.weight_file(model / "unet").write_bytes(b"no weights")
    if content is not None:
        (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.png"):
        drawn_by(asked(model, tmp_path / "out", picture_files, **{option: tmp_path / "bad.png"}))
    assert not (tmp_path / "out").exists()


def test_a_picture_much_larger_than_the_model_draws_is_a_warning(sd1: Path, tmp_path: Path) -> None:
    Image.new("RGB", (80, 64)).save(tmp_path / "picture.png")
    with pytest.warns(SdcliWarning, match="drawn at its own 80 x 64 px, this model draws 32 x 32; --size"):
        plan(asked(sd1, Path(), tmp_path))


def test_a_record_tells_the_type_of_the_weights_where_it_is_not_float32(sd1: Path, tmp_path: Path) -> None:
    told = {}
    for dtype in ("float32", "bfloat16"):
        spec = GenerateSpec(prompt="x", model=str(sd1), steps=1, seed=0, dtype=dtype, output=tmp_path)
        (record,) = [event for event in run(spec, plan(spec)) if isinstance(event, ImageRecord)]
        told[dtype] = record.facts.get("dtype")
    assert told == {"float32": None, "bfloat16": "bfloat16"}
