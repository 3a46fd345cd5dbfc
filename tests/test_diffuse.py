"""A picture on its way into the noise: q(x_t | x_0) of diffusers, in pixels and in latents."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sdcli import codec, diffuse
from sdcli.diffuse import DiffuseRecord
from sdcli.errors import InputError, NumericalError, OutputError, SdcliWarning, UsageError
from sdcli.lab.specs import DiffuseSpec
from sdcli.specs import CodecSpec
from tests import models

STEPS = (0, 250, 999)
SIZE = (24, 16)  # px


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)).save(path)
    return path


def noised(model: Path, photo: Path, output: Path, **how: Any) -> list[DiffuseRecord]:
    return list(diffuse.run(DiffuseSpec(input=photo, model=str(model), output=output, **how)))


def array(path: Path) -> Any:
    return np.asarray(Image.open(path), dtype=np.int16)


def by_diffusers(x_0: torch.Tensor, t: int, seed: int) -> torch.Tensor:
    theirs = DDPMScheduler.from_config(models.SD1_SCHEDULER)
    eps = torch.randn(x_0.shape[1:], generator=torch.Generator("cpu").manual_seed(seed))[None]
    return theirs.add_noise(x_0, eps, torch.tensor([t]))


def eight_bit(pixels: torch.Tensor) -> Any:
    return ((pixels[0].permute(1, 2, 0).detach().numpy() / 2 + 0.5).clip(0, 1) * 255).round().astype(np.int16)


@pytest.mark.parametrize("t", STEPS)
def test_pixels_are_noised_as_diffusers_does(sd1: Path, photo: Path, tmp_path: Path, t: int) -> None:
    (record,) = noised(sd1, photo, tmp_path / "out", t=str(t), space="pixels", seed=3)
    assert record.path == tmp_path / "out" / f"photo-{t:04d}-pixels.png"
    pixels = torch.from_numpy(array(photo)).permute(2, 0, 1)[None] / 127.5 - 1
    assert np.abs(array(record.path) - eight_bit(by_diffusers(pixels.float(), t, 3))).max() <= 1


@pytest.mark.parametrize("t", STEPS)
def test_latents_are_noised_as_diffusers_does_and_decoded(sd1: Path, photo: Path, tmp_path: Path, t: int) -> None:
    saved, shown = noised(sd1, photo, tmp_path / "out", t=str(t), space="latents", seed=3, save_latents=tmp_path / "z")
    theirs = AutoencoderKL.from_pretrained(sd1 / "vae", local_files_only=True).requires_grad_(False)
    pixels = torch.from_numpy(array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    x_0 = theirs.encode(pixels).latent_dist.mean * theirs.config.scaling_factor
    expected = by_diffusers(x_0, t, 3)
    torch.testing.assert_close(load_file(saved.path)["latents"], expected, rtol=1e-4, atol=1e-5)
    assert (
        np.abs(array(shown.path) - eight_bit(theirs.decode(expected / theirs.config.scaling_factor).sample)).max() <= 1
    )


def test_saved_latents_decode_to_the_picture_that_is_shown(sd1: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    noised(sd1, photo, out, t="0,250", space="latents", save_latents=out)
    assert sorted(path.name for path in out.iterdir()) == [
        "photo-0000-latents.png",
        "photo-0000.latents.safetensors",
        "photo-0250-latents.png",
        "photo-0250.latents.safetensors",
    ]
    decoded = list(codec.decode(CodecSpec(inputs=(out,), output=tmp_path / "back", model=str(sd1))))
    assert [np.array_equal(array(r.path), array(out / f"{r.path.stem}-latents.png")) for r in decoded] == [True, True]
    with safe_open(out / "photo-0250.latents.safetensors", framework="pt") as file:
        said = file.metadata()
    assert (said["mode"], said["t"], said["seed"], said["scaling_factor"]) == ("diffuse", "250", "0", "0.18215")
    assert (said["width"], said["height"]) == ("24", "16")


def test_the_record_of_a_step_says_how_much_signal_is_left(sd1: Path, photo: Path, tmp_path: Path) -> None:
    (record,) = noised(sd1, photo, tmp_path / "out", t="250", space="pixels", seed=3)
    a = float(DDPMScheduler.from_config(models.SD1_SCHEDULER).alphas_cumprod[250])
    assert record.facts == {
        "path": str(record.path),
        "space": "pixels",
        "t": 250,
        "alpha_bar": pytest.approx(a, rel=1e-5),
        "snr": pytest.approx(a / (1 - a), rel=1e-5),
        "snr_db": pytest.approx(10 * math.log10(a / (1 - a)), abs=1e-3),
        "source": str(photo),
        "model": str(sd1),
        "seed": 3,
    }


def test_where_no_signal_is_left_there_are_no_decibels(model: Path, photo: Path, tmp_path: Path) -> None:
    models.edit_json(model / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    (record,) = noised(model, photo, tmp_path / "out", t="999", space="pixels")
    assert (record.facts["snr"], record.facts["snr_db"]) == (0.0, None)
    assert json.loads(json.dumps(record.facts, allow_nan=False)) == record.facts


def test_by_default_there_are_five_steps_from_the_first_to_the_last(sd1: Path, photo: Path, tmp_path: Path) -> None:
    (record,) = noised(sd1, photo, tmp_path / "strip.png", space="pixels")
    assert [level["t"] for level in record.facts["levels"]] == [0, 250, 500, 749, 999]


# The strip.


def test_a_strip_has_a_row_a_space_and_a_column_a_step(sd1: Path, photo: Path, tmp_path: Path) -> None:
    (record,) = noised(sd1, photo, tmp_path / "strip.png", t="0,250,999")
    assert (record.facts["space"], [level["t"] for level in record.facts["levels"]]) == ("both", [0, 250, 999])
    noised(sd1, photo, tmp_path / "out", t="0,250,999")
    whole, factor = array(record.path), 8  # 16 px are enlarged to the 128 that a label needs
    wide, high = SIZE[0] * factor, SIZE[1] * factor
    for row, space in enumerate(("pixels", "latents")):
        for column, t in enumerate((0, 250, 999)):
            left = diffuse.NAMES + column * (wide + diffuse.MARGIN)
            top = diffuse.LABEL + row * (high + diffuse.MARGIN)
            tile = whole[top : top + high : factor, left : left + wide : factor]
            assert np.array_equal(tile, array(tmp_path / "out" / f"photo-{t:04d}-{space}.png"))
            assert (whole[:top, left : left + wide] < 128).any()  # the label above, or the tile above
        assert (whole[top : top + high, : diffuse.NAMES] < 128).any()  # the name of the row


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(sd1: Path, photo: Path, tmp_path: Path) -> None:
    a, b, c = (noised(sd1, photo, tmp_path / f"{i}.png", t="500", seed=seed)[0] for i, seed in enumerate((1, 1, 2)))
    assert a.path.read_bytes() == b.path.read_bytes() != c.path.read_bytes()


def test_a_step_does_not_depend_on_the_others(sd1: Path, photo: Path, tmp_path: Path) -> None:
    noised(sd1, photo, tmp_path / "many", t="900,250,3")
    noised(sd1, photo, tmp_path / "one", t="250")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


def test_an_odd_size_is_cut_only_where_latents_are_made(sd1: Path, tmp_path: Path) -> None:
    Image.new("RGB", (27, 17), "teal").save(tmp_path / "odd.png")
    (record,) = noised(sd1, tmp_path / "odd.png", tmp_path / "out", t="9", space="pixels")
    assert Image.open(record.path).size == (27, 17)
    with pytest.warns(SdcliWarning, match="27 x 17 px cut to 26 x 16, multiples of 2"):
        records = noised(sd1, tmp_path / "odd.png", tmp_path / "out", t="9")
    assert {Image.open(record.path).size for record in records} == {(26, 16)}
    (fit,) = noised(sd1, tmp_path / "odd.png", tmp_path / "out", t="9", space="latents", size="8x32")
    assert Image.open(fit.path).size == (8, 32)


def test_pixels_alone_need_no_vae(model: Path, photo: Path, tmp_path: Path) -> None:
    models.weight_file(model / "vae").unlink()
    assert noised(model, photo, tmp_path / "strip.png", space="pixels")[0].path.exists()


# What is refused.


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"t": ""}, "--t : is no list of steps; write it as 0,250,500,999"),
        ({"t": "1,,2"}, "is no list of steps"),
        ({"t": "-1"}, "is no list of steps"),
        ({"t": "0.5"}, "is no list of steps"),
        ({"t": "²"}, "is no list of steps"),
        ({"t": "9999999999"}, "is no list of steps"),
        ({"t": "5,250,5"}, "--t 5,250,5: 5 is named twice"),
        ({"space": "time"}, "--space time: unknown; use one of pixels, latents, both"),
        ({"seed": -1}, "--seed -1: out of range"),
        ({"if_exists": "skip"}, "--if-exists skip: unknown"),
        ({"space": "pixels", "save_latents": Path("z")}, "--save-latents with --space pixels"),
    ],
)
def test_options_out_of_range_are_refused(how: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError) as caught:
        DiffuseSpec(**how)
    assert what in str(caught.value)


@pytest.mark.parametrize("t", ["1000", "0,5000"])
def test_a_step_that_the_model_has_not_is_refused_before_anything_is_written(
    sd1: Path, photo: Path, tmp_path: Path, t: str
) -> None:
    with pytest.raises(UsageError, match=r"--t (1000|5000): out of range; this model has the steps 0 to 999"):
        noised(sd1, photo, tmp_path / "out", t=t)
    assert not (tmp_path / "out").exists()


def test_what_is_no_picture_is_refused(sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=r"a\.png: is no picture"):
        noised(sd1, tmp_path / "a.png", tmp_path / "out")
    with pytest.raises(InputError, match="is a folder"):
        noised(sd1, tmp_path, tmp_path / "out")


def test_an_output_that_cannot_be_is_refused(sd1: Path, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.jpg: pictures are written as PNG"):
        noised(sd1, photo, tmp_path / "a.jpg")
    with pytest.raises(OutputError, match=r"photo\.png is a file"):
        noised(sd1, photo, photo / "strip.png")
    with pytest.raises(OutputError, match=r"photo\.png: exists"):
        noised(sd1, photo, photo, if_exists="error")
    with pytest.raises(OutputError, match=r"photo\.png is a file"):
        noised(sd1, photo, tmp_path / "strip.png", save_latents=photo / "z")
    assert not (tmp_path / "strip.png").exists()


@pytest.mark.parametrize("there", ["out/photo-0500-latents.png", "z/photo-0500.latents.safetensors"])
def test_a_file_that_must_not_be_replaced_stops_it_before_the_first_is_written(
    sd1: Path, photo: Path, tmp_path: Path, there: str
) -> None:
    for folder in ("out", "z"):
        (tmp_path / folder).mkdir()
    (tmp_path / there).write_bytes(b"mine")
    with pytest.raises(OutputError, match=f"{Path(there).name}: exists"):
        noised(sd1, photo, tmp_path / "out", t="0,500", save_latents=tmp_path / "z", if_exists="error")
    assert list(tmp_path.glob("*/*")) == [tmp_path / there]


def test_a_name_too_long_once_the_step_is_in_it_is_refused_before_anything_is_written(
    sd1: Path, photo: Path, tmp_path: Path
) -> None:
    long = photo.rename(tmp_path / ("p" * 240 + ".png"))
    with pytest.raises(OutputError, match="has over 255 bytes"):
        noised(sd1, long, tmp_path / "out", t="0", save_latents=tmp_path / "z")
    assert not (tmp_path / "out").exists() and not (tmp_path / "z").exists()


def test_latents_do_not_go_into_a_folder_of_a_files_name(sd1: Path, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--save-latents .*z\.safetensors: is no folder; name one"):
        noised(sd1, photo, tmp_path / "out", t="0,500", save_latents=tmp_path / "z.safetensors")
    assert not (tmp_path / "out").exists()
    (tmp_path / "v1.5").mkdir()  # a folder that is there may have any name
    saved, _ = noised(sd1, photo, tmp_path / "out", t="0", space="latents", save_latents=tmp_path / "v1.5")
    assert saved.path == tmp_path / "v1.5" / "photo-0000.latents.safetensors"


@pytest.mark.slow
def test_pictures_are_not_kept_once_they_are_in_their_files(sd1: Path, photo: Path, tmp_path: Path) -> None:
    spec = DiffuseSpec(input=photo, model=str(sd1), output=tmp_path / "out", t=",".join(map(str, range(40))))
    most = 0
    for _ in diffuse.run(spec):
        most = max(most, sum(type(one) is diffuse._Noised for one in gc.get_objects()))
    assert most <= 2


def test_a_strip_too_large_to_be_read_again_is_refused(sd1: Path, photo: Path, tmp_path: Path) -> None:
    steps = ",".join(str(t) for t in range(1000))
    with pytest.raises(UsageError, match="a strip of 1000 steps of 1024 x 1024 px"):
        noised(sd1, photo, tmp_path / "strip.png", t=steps, size="1024x1024")


def test_a_malformed_noise_schedule_is_refused(model: Path, photo: Path, tmp_path: Path) -> None:
    models.edit_json(model / "scheduler" / "scheduler_config.json", beta_end=2.0)
    with pytest.raises(InputError, match=r"scheduler_config\.json:beta_end"):
        noised(model, photo, tmp_path / "out")
    models.edit_json(model / "scheduler" / "scheduler_config.json", beta_start=1e-20, beta_end=0.02)
    with pytest.raises(InputError, match="no noise at the first timestep"):
        noised(model, photo, tmp_path / "out")


def test_a_vae_that_gives_nothing_finite_makes_no_picture(model: Path, photo: Path, tmp_path: Path) -> None:
    models.edit_weights(model / "vae", lambda weights: weights | {"encoder.conv_out.bias": torch.full((8,), 1e38)})
    with pytest.raises(NumericalError, match="not finite"):
        noised(model, photo, tmp_path / "out", t="5", space="latents")
    assert not (tmp_path / "out").exists()
