"""Latent files as what a picture is drawn from: the noise in one is that of the picture, or the file is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdcli import generate, latent_files
from sdcli.errors import InputError, NumericalError, SdcliWarning, UsageError
from sdcli.plan import Plan, plan
from sdcli.specs import GenerateSpec
from tests import models

SEED = 7


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """What generate starts from at seed 7, as a file."""
    return written(tmp_path / "noise.safetensors", torch.randn(models.LATENTS, generator=seeded(SEED))[None])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def written(path: Path, latents: torch.Tensor, **metadata: str) -> Path:
    save_file({"latents": latents}, path, metadata)
    return path


def asked(model: Path, output: Path, **values: Any) -> GenerateSpec:
    start: dict[str, Any] = {"prompt": "a puppy", "model": str(model), "output": output, "seed": SEED, "steps": 3}
    return GenerateSpec(**start | values)


def drawn(spec: GenerateSpec, decided: Plan | None = None) -> tuple[Any, dict[str, Any]]:
    """The pixels of the picture, and its record."""
    events = list(generate.run(spec, decided if decided is not None else plan(spec)))
    (record,) = [event for event in events if isinstance(event, generate.ImageRecord)]
    assert record.path is not None
    return np.asarray(Image.open(record.path)), dict(record.facts)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "euler-a"])
def test_the_noise_of_a_seed_from_a_file_draws_the_picture_of_that_seed(
    sd1: Path, noise: Path, tmp_path: Path, scheduler: str
) -> None:
    by_seed, _ = drawn(asked(sd1, tmp_path / "seed.png", scheduler=scheduler))
    by_file, _ = drawn(asked(sd1, tmp_path / "file.png", scheduler=scheduler, latents=noise))
    assert np.array_equal(by_seed, by_file)


def test_only_the_file_counts_where_nothing_more_is_drawn(sd1: Path, noise: Path, tmp_path: Path) -> None:
    by_seven, _ = drawn(asked(sd1, tmp_path / "a.png", scheduler="ddim", latents=noise))
    by_eight, _ = drawn(asked(sd1, tmp_path / "b.png", scheduler="ddim", latents=noise, seed=8))
    assert np.array_equal(by_seven, by_eight)


def test_the_record_and_the_picture_name_the_file_by_its_hash(sd1: Path, noise: Path, tmp_path: Path) -> None:
    _, facts = drawn(asked(sd1, tmp_path / "a.png", latents=noise))
    digest = hashlib.sha256(noise.read_bytes()).hexdigest()
    assert facts["latents"] == {"file": "noise.safetensors", "sha256": digest}
    inside = Image.open(tmp_path / "a.png").info
    assert json.loads(inside["sdcli"])["latents"] == facts["latents"]
    assert f"Latents hash: {digest[:10]}, " in inside["parameters"]


def test_the_size_is_that_of_the_noise(sd1: Path, tmp_path: Path) -> None:
    wide = written(tmp_path / "wide.safetensors", torch.randn(1, 4, 8, 24, generator=seeded(0)))
    decided = plan(asked(sd1, tmp_path / "a.png", latents=wide))
    assert (decided.width, decided.height) == (48, 16)
    assert decided.describe()["latents"] == str(wide)
    pixels, facts = drawn(asked(sd1, tmp_path / "a.png", latents=wide))
    assert pixels.shape == (16, 48, 3)
    assert (facts["width"], facts["height"]) == (48, 16)


@pytest.mark.parametrize("values", [{"size": "16x48"}, {"width": 16}, {"height": 48}])
def test_another_size_is_refused_and_the_same_is_not(sd1: Path, tmp_path: Path, values: Any) -> None:
    wide = written(tmp_path / "wide.safetensors", torch.zeros(1, 4, 8, 24))
    with pytest.raises(UsageError, match=r"gives 48 x 16 px, asked for are (16|48) x (16|48); leave the size out"):
        plan(asked(sd1, tmp_path / "a.png", latents=wide, **values))
    assert plan(asked(sd1, tmp_path / "a.png", latents=wide, size="48x16")).width == 48


def test_one_file_is_one_image() -> None:
    with pytest.raises(UsageError, match="--count 2 with --latents"):
        GenerateSpec(prompt="a puppy", latents=Path("noise.safetensors"), count=2)


@pytest.mark.parametrize(
    ("shape", "metadata", "what"),
    [
        ((1, 16, 8, 8), {}, r"shape \(1, 16, 8, 8\); this model needs \(1, 4, h, w\)"),
        ((2, 4, 8, 8), {}, r"shape \(2, 4, 8, 8\)"),
        ((4, 8, 8), {}, r"shape \(4, 8, 8\)"),
        ((1, 4, 2, 8), {}, "give 16 x 4 px; sides of 8 to 16384 px"),
        ((1, 4, 8, 8), {"scaling_factor": "0.5"}, "scaling factor 0.5, this model has 0.18215"),
    ],
)
def test_noise_of_another_model_or_shape_is_refused_before_the_weights_are_read(
    sd1: Path, tmp_path: Path, shape: tuple[int, ...], metadata: dict[str, str], what: str
) -> None:
    file = written(tmp_path / "a.safetensors", torch.zeros(shape), **metadata)
    with pytest.raises(InputError, match=rf"a\.safetensors: .*{what}"):
        plan(asked(sd1, tmp_path / "a.png", latents=file))


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", b"\0" * 64])
def test_what_is_no_latent_file_is_refused(sd1: Path, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "a.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.safetensors: "):
        plan(asked(sd1, tmp_path / "a.png", latents=file))


def test_noise_that_is_not_finite_makes_no_picture(sd1: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", torch.full((1, *models.LATENTS), float("nan")))
    with pytest.raises(NumericalError, match=r"a\.safetensors: holds values that are not finite"):
        drawn(asked(sd1, tmp_path / "a.png", latents=file))
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("mode", latent_files.PICTURES)
def test_a_picture_in_place_of_noise_is_told(sd1: Path, tmp_path: Path, mode: str) -> None:
    file = written(tmp_path / "a.safetensors", torch.zeros(1, *models.LATENTS), mode=mode)
    with pytest.warns(SdcliWarning, match=r"a\.safetensors: holds a picture, not noise"):
        plan(asked(sd1, tmp_path / "a.png", latents=file))


def test_a_half_noised_picture_in_place_of_noise_is_told(sd1: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", torch.zeros(1, *models.LATENTS), mode="diffuse", t="250")
    with pytest.warns(SdcliWarning, match=r"a\.safetensors: holds a picture noised to t = 250 of 999, not noise"):
        plan(asked(sd1, tmp_path / "a.png", latents=file))


@pytest.mark.parametrize("t", ["999", "soon", "nan", ""])
def test_a_picture_noised_to_the_last_step_is_noise(
    sd1: Path, tmp_path: Path, t: str, recwarn: pytest.WarningsRecorder
) -> None:
    file = written(tmp_path / "a.safetensors", torch.zeros(1, *models.LATENTS), mode="diffuse", t=t)
    plan(asked(sd1, tmp_path / "a.png", latents=file))
    assert len(recwarn) == 0


INVERTED = {"mode": "invert", "scheduler": "ddim", "steps": "3", "guidance": "1.0", "prompt": "a dog"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scheduler": "dpm"}, "--scheduler ddim; with --scheduler dpm it draws"),
        ({"steps": 5, "guidance": 3.0}, "--steps 3, --guidance 1.0; with --steps 5, --guidance 3.0 it draws"),
        ({"eta": 0.5}, "no --eta; with --eta 0.5 it draws another picture"),
        ({"timestep_spacing": "trailing"}, "no --timestep-spacing; with --timestep-spacing trailing it draws"),
    ],
)
def test_one_warning_names_what_differs_from_the_settings_of_an_inversion(
    sd1: Path, tmp_path: Path, values: dict[str, Any], said: str, recwarn: pytest.WarningsRecorder
) -> None:
    file = written(tmp_path / "a.safetensors", torch.zeros(1, *models.LATENTS), **INVERTED)
    plan(asked(sd1, tmp_path / "a.png", latents=file, **{"scheduler": "ddim", "guidance": 1.0, **values}))
    (note,) = [str(warning.message) for warning in recwarn]
    assert note.startswith(f"{file}: is the noise of an inversion with {said}")


@pytest.mark.parametrize("values", [{}, {"prompt": "a cat"}, {"eta": 0.0}, {"timestep_spacing": "leading"}])
def test_the_settings_of_an_inversion_are_no_reason_to_warn_nor_is_another_prompt(
    sd1: Path, tmp_path: Path, values: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    file = written(tmp_path / "a.safetensors", torch.zeros(1, *models.LATENTS), **INVERTED)
    plan(asked(sd1, tmp_path / "a.png", latents=file, **{"scheduler": "ddim", "guidance": 1.0, **values}))
    assert len(recwarn) == 0
