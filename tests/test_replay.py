"""Pictures drawn again from their own record are the pictures they were; what is not honoured is said."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from sdcli import batch, generate, replay
from sdcli.archive.specs import ReplaySpec
from sdcli.errors import InputError, PartialError, SdcliWarning, UsageError
from sdcli.jobs.plan import plan_batch
from sdcli.pipeline import vae
from sdcli.pipeline.adapters import Embedding, write_embedding
from sdcli.pipeline.metadata import read_record
from sdcli.plan import plan
from sdcli.specs import BatchSpec, GenerateSpec
from tests import models
from tests.pipeline.test_comfy import USUAL

PROMPT = "a picture of a puppy"
A1111 = """a dog
Negative prompt: cat
Steps: 2, Sampler: Euler, CFG scale: 3, Seed: 9, Size: 32x32, Model hash: 6ce0161689, Model: v1-5, RNG: CPU, \
Version: v1.10.1"""

# What is asked of generate besides two steps at seed 7: the model by its fixture, and options.
TABLE: list[tuple[str, dict[str, Any]]] = [
    ("sd1", {"prompt": "(small:1.2) puppy", "negative": "a cat", "guidance": 3.0, "size": "32x24"}),
    ("sd1", {"prompt": PROMPT, "width": 24, "height": 40}),
    ("sd1", {"prompt": PROMPT, "scheduler": "dpm", "order": 3, "sigmas": "karras", "steps": 3}),
    ("sd1", {"prompt": PROMPT, "scheduler": "ddim", "eta": 0.5, "timestep_spacing": "trailing"}),
    ("sd1", {"prompt": PROMPT, "scheduler": "tcd", "eta": 0.7}),
    ("learned", {"prompt": PROMPT, "scheduler": "ddpm", "variance": "fixed-large"}),
    ("sd1", {"prompt": PROMPT, "scheduler": "dpm2-a", "guidance_interval": "0.25:0.75", "guidance_rescale": 0.7}),
    ("sd1", {"prompt": PROMPT, "scheduler": "lms", "seed": 2**64 - 1, "guidance": 1.0}),
    ("sd1", {"prompt": PROMPT, "replace": ("puppy=cat",), "mix": ("picture=0.5,photo=0.5",)}),
    ("sd1", {"prompt": "naïve <w> 小狗\nof two lines", "embedding": ("wordling.safetensors:<w>",)}),
    ("sd1", {"prompt": PROMPT, "lora": ("style.safetensors:0.5",)}),
    ("sd1", {"prompt": PROMPT, "clip_skip": 1}),
    ("sd1", {"prompt": PROMPT, "prediction": "v"}),
    ("sd1", {"prompt": "a {red|green|blue} {cat|dog}, \\{x|y\\}", "negative": "{a|b}", "guidance": 2.0}),
    ("sd1", {"prompt": PROMPT, "latents": "noise.safetensors"}),
    ("sd1", {"prompt": PROMPT, "init_image": "disc.png", "strength": 0.5, "scheduler": "euler-a"}),
    ("sd1", {"prompt": PROMPT, "init_image": "disc.png", "mask": "mask.png", "strength": 1.0}),
    ("inpainting", {"prompt": PROMPT, "init_image": "disc.png", "mask": "mask.png"}),
    ("classed", {"class_name": "sea urchin, echinoid", "guidance": 2.0}),
    ("classed", {"class_name": "0"}),
    ("unconditional", {}),
    ("sd1", {"prompt": PROMPT, "dtype": "bfloat16"}),
]
# What changes no pixel, or is told by other fields (the model by its hash, too).
UNTOLD = BatchSpec.OF_THE_RUN - {"dtype"} | {"model", "count", "steps"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: Path, sd1: Path) -> Path:
    """A working folder with a picture, a mask, a learned word, a LoRA and noise in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(pictures / "disc.png", tmp_path)
    Image.linear_gradient("L").resize((32, 32)).save("mask.png")
    source = torch.Generator().manual_seed(0)
    write_embedding(tmp_path, Embedding("wordling", torch.randn(2, models.CONTEXT, generator=source)))
    models.write_lora(tmp_path / "style.safetensors", sd1)
    save_file({"latents": torch.randn(1, *models.LATENTS, generator=source)}, "noise.safetensors")
    return tmp_path


def drawn(model: Path, output: Path | str = "x.png", **how: Any) -> Path:
    """One picture of generate."""
    paths = {name: Path(how[name]) for name in ("init_image", "mask", "latents") if name in how}
    given: dict[str, Any] = {"steps": 2, "seed": 7, **how, **paths}
    spec = GenerateSpec(model=str(model), output=Path(output), **given)
    (record,) = [event for event in generate.run(spec, plan(spec)) if isinstance(event, generate.ImageRecord)]
    assert record.path is not None
    return record.path


def told(path: Path, **texts: str) -> Path:
    """A black picture of 32 x 32 with these texts."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_itxt(key, text)
    Image.new("RGB", (32, 32)).save(path, pnginfo=chunks)
    return path


def events(*paths: Path, **how: Any) -> list[replay.Event]:
    return list(replay.run(ReplaySpec(inputs=paths, **how)))


def checked(path: Path, **how: Any) -> replay.Replayed:
    """What a check says of a picture, which need not be within the tolerance."""
    found: list[replay.Replayed] = []
    try:
        for event in replay.run(ReplaySpec(inputs=(path,), check=True, **how)):
            found += [event] if isinstance(event, replay.Replayed) else []
    except PartialError:
        assert not found[0].comparison.is_within  # type: ignore[union-attr]
    (one,) = found
    return one


def unheeded(path: Path, **how: Any) -> list[str]:
    return [event.remark.text for event in events(path, **how) if isinstance(event, replay.Unheeded)]


@pytest.mark.parametrize(("fixture", "how"), TABLE)
def test_every_picture_of_generate_is_drawn_again_to_the_bit(
    request: pytest.FixtureRequest, folder: Path, fixture: str, how: dict[str, Any]
) -> None:
    path = drawn(request.getfixturevalue(fixture), **how)
    found = checked(path, output=folder / "again")
    told = ("prediction: v there, the model here says epsilon",) if how.get("prediction") else ()
    assert (found.comparison.equal, found.drift) == ("bytes", told)  # type: ignore[union-attr]
    assert (folder / "again" / "x.png").read_bytes() == path.read_bytes()


def test_the_table_has_every_setting_that_a_picture_tells() -> None:
    asked = {name for _, how in TABLE for name in how}
    assert {one.name for one in dataclasses.fields(GenerateSpec)} - UNTOLD - asked == set()


@pytest.mark.parametrize(("form", "quality"), [("jpg", 90), ("jpg", 35), ("webp", 77), ("webp", 100)])
def test_a_lossy_picture_is_compared_with_what_its_format_leaves_of_the_one_drawn(
    sd1: Path, folder: Path, form: str, quality: int
) -> None:
    found = checked(drawn(sd1, f"x.{form}", prompt=PROMPT, quality=quality))
    assert found.comparison is not None
    assert found.comparison.equal == "bytes"
    assert found.comparison.encoded == (None if quality == 100 else f"{form} quality {quality}")


def test_a_picture_of_a_batch_is_drawn_again_with_its_job_and_within_the_tolerance(sd1: Path, folder: Path) -> None:
    (folder / "jobs.jsonl").write_text(
        '{"prompt": "a cat", "seed": 1, "id": "one"}\n{"prompt": "a dog", "count": 2, "seed": 2}\n', encoding="utf-8"
    )
    defaults = GenerateSpec(model=str(sd1), steps=2, output=folder / "out", if_exists="error", deterministic=True)
    spec = BatchSpec(jobs=folder / "jobs.jsonl", defaults=defaults)
    list(batch.run(spec, plan_batch(spec), ()))
    found = [event for event in events(folder / "out", check=True) if isinstance(event, replay.Replayed)]
    assert [one.comparison.equal for one in found] == ["bytes"] * 3  # type: ignore[union-attr]


def test_the_model_stays_loaded_from_picture_to_picture(
    sd1: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        drawn(sd1, f"out/{seed}.png", prompt=PROMPT, seed=seed)
    loads = []
    load = replay.load_bundle
    monkeypatch.setattr(replay, "load_bundle", lambda *a, **k: loads.append(a) or load(*a, **k))
    found = events(folder / "out", check=True)
    assert len(loads) == 1
    assert [(e.done, e.total) for e in found if isinstance(e, replay.Progress)] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_option_takes_the_place_of_what_is_told_and_is_named_as_drift(sd1: Path, folder: Path) -> None:
    path = drawn(sd1, prompt=PROMPT, scheduler="dpm", order=3, sigmas="karras", steps=3)
    found = checked(path, seed=8, scheduler="euler", size="16x16")
    assert found.comparison is not None and found.comparison.largest is None
    assert "seed: 7 there, 8 here" in found.drift
    assert {"scheduler: dpm there, euler here", "order: 3 there, nothing here"} <= set(found.drift)
    assert "size: 32 x 32 px there, 16 x 16 here" in found.drift
    assert not any("puppy" in one for one in found.drift)
    (again,) = [e for e in events(path, prompt="a cat", output=Path("y.png")) if isinstance(e, replay.Replayed)]
    assert again.facts["prompt"] == "a cat" and again.facts["sigmas"] == "karras"


@pytest.mark.parametrize("given", [{"replace": ("puppy=dog",)}, {"mix": ("picture=0.5,photo=0.5",)}])
def test_words_that_are_swapped_take_the_place_of_those_that_were(
    sd1: Path, folder: Path, given: dict[str, tuple[str, ...]]
) -> None:
    path = drawn(sd1, prompt=PROMPT, replace=("puppy=cat",), mix=("picture=0.2,photo=0.8",))
    other = {"replace": ("puppy=cat",), "mix": ("picture=0.2,photo=0.8",)} | given
    events(path, output=Path("again.png"), **given)
    assert Path("again.png").read_bytes() == drawn(sd1, "same.png", prompt=PROMPT, **other).read_bytes()


def test_a_picture_that_was_painted_over_differs_by_as_much(sd1: Path, folder: Path) -> None:
    path = drawn(sd1, prompt=PROMPT)
    image = Image.open(path)
    texts = PngImagePlugin.PngInfo()
    for key, text in image.text.items():  # type: ignore[attr-defined]
        texts.add_itxt(key, text)
    pixels = np.array(image)
    pixels[0, 0, 0] ^= 0x10
    Image.fromarray(pixels).save(path, pnginfo=texts)
    found = checked(path)
    assert found.comparison is not None
    assert (found.comparison.equal, found.comparison.largest) == (None, 16)
    assert found.comparison.mean == pytest.approx(16 / pixels.size, abs=1e-4)
    assert found.comparison.psnr == pytest.approx(10 * np.log10(255**2 * pixels.size / 16**2), abs=0.01)
    assert found.drift == (replay.UNEXPLAINED,)


def test_another_version_and_another_setting_are_named(sd1: Path, folder: Path) -> None:
    path = drawn(sd1, prompt=PROMPT)
    record = json.loads(Image.open(path).text["sdcli"])  # type: ignore[attr-defined]
    pixels = Image.open(path).convert("RGB")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("sdcli", json.dumps(record | {"sdcli": "0.0.1", "freeze": 3}))
    pixels.save(path, pnginfo=chunks)
    found = checked(path)
    assert found.comparison is not None and found.comparison.equal == "pixels"
    assert found.drift[0] == "freeze 3: this sdcli knows no such setting"
    assert any(one.startswith("sdcli: 0.0.1 there, ") for one in found.drift)


def test_another_model_is_told_and_with_check_refused(sd1: Path, folder: Path) -> None:
    path = drawn(sd1, prompt=PROMPT)
    other = models.write_sd1(folder / "other", seed=1)
    (remark,) = unheeded(path, model=str(other), output=Path("y.png"))
    assert remark.startswith(f"model {other}: is another, of hash ")
    with pytest.raises(InputError, match="is another, of hash"):
        events(path, model=str(other), check=True)
    moved = Path(shutil.copytree(sd1, folder / "moved"))
    assert checked(path, model=str(moved)).comparison.equal == "pixels"  # type: ignore[union-attr]


def test_a_model_whose_config_was_edited_draws_what_it_drew_and_that_is_told(sd1: Path, folder: Path) -> None:
    model = models.copy(sd1, folder / "model")
    path = drawn(model, prompt=PROMPT)
    assert json.loads(Image.open(path).text["sdcli"])["prediction"] == "epsilon"  # type: ignore[attr-defined]
    models.edit_json(model / "scheduler" / "scheduler_config.json", prediction_type="sample")
    told = "prediction: epsilon there, the model here says x0"
    found = checked(path)
    assert (found.comparison.equal, found.drift) == ("bytes", (told,))  # type: ignore[union-attr]
    found = checked(path, model=str(models.copy(model, folder / "moved")))  # the same weights by another name
    assert (found.comparison.equal, found.drift) == ("pixels", (told,))  # type: ignore[union-attr]


def test_another_model_predicts_what_it_predicts_unless_an_option_says(sd1: Path, folder: Path) -> None:
    path = drawn(sd1, prompt=PROMPT)
    other = models.write_sd1(folder / "other", seed=1)
    models.edit_json(other / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    for given, expected in ((None, "v"), ("epsilon", "epsilon"), ("x0", "x0")):
        how = {"model": str(other), "prediction": given}
        (again,) = [e for e in events(path, output=Path("y.png"), **how) if isinstance(e, replay.Replayed)]
        assert again.facts["prediction"] == expected
    assert "prediction: epsilon there, v here" in checked(path, prediction="v").drift


def test_a_model_that_is_not_here_has_to_be_named(sd1: Path, folder: Path) -> None:
    model = Path(shutil.copytree(sd1, folder / "gone"))
    path = drawn(model, prompt=PROMPT)
    shutil.rmtree(model)
    with pytest.raises(InputError, match=r"gone, which is not here by that name") as caught:
        events(path)
    assert caught.value.hint == "name one with --model"
    with pytest.raises(InputError, match="with the model v1-5, which is not here"):
        events(told(folder / "a.png", parameters=A1111))


@pytest.mark.parametrize("field", ["init_image", "mask", "latents", "embedding"])
def test_a_file_that_is_gone_or_another_is_asked_for_and_one_that_is_given_is_taken(
    sd1: Path, folder: Path, field: str
) -> None:
    how: dict[str, dict[str, Any]] = {
        "latents": {"latents": "noise.safetensors"},
        "embedding": {"prompt": "a wordling", "embedding": ("wordling.safetensors",)},
    }
    usual = {"init_image": "disc.png", "mask": "mask.png"}
    path = drawn(sd1, "out/x.png", **{"prompt": PROMPT, **how.get(field, usual)})
    file = Path({"embedding": "wordling.safetensors", "latents": "noise.safetensors"}.get(field, usual.get(field, "")))
    kept = Path(shutil.copy(file, folder / "out" / file.name))  # beside the picture
    file.unlink()
    assert checked(path).comparison.equal == "bytes"  # type: ignore[union-attr]
    option = "--" + field.replace("_", "-")
    elsewhere = kept.rename(folder / f"else{kept.suffix}")
    with pytest.raises(InputError, match=f"was made with '{file.name}', which is not beside it") as caught:
        events(path)
    assert caught.value.hint == f"name it with {option}"
    file.write_bytes(b"another")
    with pytest.raises(InputError, match=f"and {file.name} is another file"):
        events(path)
    given = (f"{elsewhere}:wordling",) if field == "embedding" else elsewhere
    assert checked(path, **{field: given}).comparison.equal in ("bytes", "pixels")  # type: ignore[union-attr]


def test_a_file_that_is_given_and_is_another_is_told(sd1: Path, folder: Path, pictures: Path) -> None:
    path = drawn(sd1, prompt=PROMPT, init_image="disc.png")
    found = checked(path, init_image=pictures / "ring.png")
    assert found.drift[0] == "--init-image: is another file than disc.png, with which it was made (SHA-256)"


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", ".hidden", "..", "a\\..\\secret.png"])
def test_what_a_picture_names_leads_to_no_other_folder(sd1: Path, folder: Path, name: str) -> None:
    (folder / "in").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "secret.png")
    record = {"prompt": "x", "model": str(sd1), "strength": 0.5, "init_image": {"file": name, "sha256": "0"}}
    path = told(folder / "in" / "x.png", sdcli=json.dumps(record))
    with pytest.raises(InputError, match=r"is not beside it|is another file"):
        events(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({}, "says nothing about its making"),
        ({"sdcli": '{"prompt": "x"}'}, "does not say which model drew it"),
        ({"sdcli": '{"prompt": "x", "model": "nowhere"}'}, "with the model nowhere, which is not here"),
        ({"sdcli": '{"prompt": "x", "order": "three"}'}, "its record has order three"),
        ({"sdcli": '{"prompt": "x", "scheduler": 3}'}, "its record has scheduler 3"),
        ({"sdcli": '{"prompt": "x", "replace": [3]}'}, r"its record has replace \[3\]"),
        ({"sdcli": '{"prompt": "x", "latents": "n.safetensors"}'}, "its record has latents n.safetensors"),
        ({"sdcli": '{"prompt": "x", "embeddings": [{"file": "a"}]}'}, "its record has embeddings"),
        ({"sdcli": '{"prompt": "x", "model": "builtin", "steps": 5000}'}, "steps 5000: out of range"),
        ({"sdcli": '{"prompt": "x", "model": "builtin", "scheduler": "magic"}'}, "scheduler 'magic' is unknown"),
        ({"sdcli": '{"prompt": "x", "model": "builtin", "width": 33}'}, "width 33 px: is no multiple"),
        ({"sdcli": '{"prompt": "x", "model": "nobody/nothing"}'}, "nobody/nothing, which is not here"),
        ({"parameters": "Steps: 2, Seed: 3, Sampler: Euler"}, "a1111 tells no prompt"),
    ],
)
def test_what_says_nothing_or_nonsense_is_refused_with_the_pictures_name(
    folder: Path, text: dict[str, str], words: str
) -> None:
    path = told(folder / "x.png", **text)
    with pytest.raises(InputError, match=rf"x\.png: .*{words}"):
        events(path)


def test_a_bad_file_among_several_leaves_the_others_alone(sd1: Path, folder: Path) -> None:
    good, silent = drawn(sd1, "in/a.png", prompt=PROMPT), told(folder / "in" / "b.png")
    (folder / "in" / "c.png").write_bytes(b"no picture")
    found: list[replay.Event] = []
    with pytest.raises(PartialError, match="of 4 pictures 3 could not be drawn again"):
        found.extend(replay.run(ReplaySpec(inputs=(Path("in"), folder / "none.png"), output=Path("again"))))
    assert [one.source for one in found if isinstance(one, replay.Replayed)] == [good]
    failed = [one.source.name for one in found if isinstance(one, replay.Failed)]
    assert failed == [silent.name, "c.png", "none.png"]
    assert [path.name for path in (folder / "again").iterdir()] == ["a.png"]


def test_a_check_writes_nothing_but_with_an_output(sd1: Path, folder: Path) -> None:
    path = drawn(sd1, prompt=PROMPT)
    before = sorted(folder.iterdir())
    checked(path)
    assert sorted(folder.iterdir()) == before
    found = checked(path, output=Path("y.webp"))
    assert found.path == Path("y.webp") and Image.open("y.webp").format == "WEBP"
    assert found.comparison is not None and found.comparison.equal == "bytes"  # of what the picture is, not of y.webp


def test_two_pictures_of_one_name_are_numbered_or_refused(sd1: Path, folder: Path) -> None:
    paths = [drawn(sd1, f"{place}/x.png", prompt=PROMPT) for place in ("a", "b")]
    events(*paths, output=Path("out"))
    assert sorted(path.name for path in Path("out").iterdir()) == ["x-2.png", "x.png"]
    with pytest.raises(UsageError, match="would be the result of two inputs"):
        events(*paths, output=Path("other"), if_exists="overwrite")
    skipped = [e for e in events(paths[0], output=Path("out"), if_exists="skip") if isinstance(e, replay.Replayed)]
    assert skipped[0].facts == {"path": "out/x.png", "source": "a/x.png", "skipped": True}


def test_settings_of_a1111_are_drawn_with_as_far_as_they_can(sd1: Path, folder: Path) -> None:
    path = told(folder / "a.png", parameters=A1111)
    (remark,) = unheeded(path, model=str(sd1), output=Path("again.png"))
    assert remark.startswith("model hash 6ce0161689: is of a file in another program")
    same = drawn(sd1, "same.png", prompt="a dog", negative="cat", scheduler="euler", guidance=3.0, seed=9)
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open(same)))


def test_a_graph_of_comfyui_is_drawn_with_as_far_as_it_can(sd1: Path, folder: Path) -> None:
    path = told(folder / "c.png", prompt=json.dumps(USUAL))
    remarks = unheeded(path, model=str(sd1), size="32x32", steps=2, output=Path("again.png"))
    assert remarks == [
        "LoraLoader x: is not honoured, name its file with --lora",
        f"model {sd1}: it may be another, the picture tells no hash",
    ]
    how = {"prompt": "a glass bottle", "negative": "text, watermark", "seed": 156680208700286, "guidance": 8.0}
    same = drawn(sd1, "same.png", scheduler="dpm", sigmas="karras", **how)
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open(same)))


def test_a_picture_whose_record_is_gone_is_drawn_from_our_text_for_other_programs(classed: Path, folder: Path) -> None:
    path = drawn(classed, class_name="dog", scheduler="ddim", eta=0.5)
    texts = Image.open(path).text  # type: ignore[attr-defined]
    bare = told(folder / "bare.png", parameters=texts["parameters"])
    events(bare, model=str(classed), output=Path("again.png"))
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open(path)))


def test_a_prompt_that_is_cut_is_told_again(sd1: Path, folder: Path) -> None:
    with pytest.warns(SdcliWarning):
        path = drawn(sd1, prompt="word " * 2000)
    with pytest.warns(SdcliWarning, match="tokens"):
        assert checked(path).comparison.equal == "bytes"  # type: ignore[union-attr]


def test_a_picture_in_tiles_is_drawn_again_in_tiles(sd1: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "TILE", 8)
    monkeypatch.setattr(vae, "OVERLAP", 4)
    tiled, plain = (drawn(sd1, f"{word}.png", prompt=PROMPT, tiling=word == "tiled") for word in ("tiled", "plain"))
    assert (read_record(tiled) or {})["tiling"] is True and "tiling" not in (read_record(plain) or {})
    for path in (tiled, plain):
        (found,) = (event for event in events(path, check=True) if isinstance(event, replay.Replayed))
        assert found.comparison is not None and found.comparison.equal == "bytes"


def test_a_picture_for_which_memory_does_not_suffice_leaves_the_others_alone(
    sd1: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of others may ask for sizes beyond any memory."""
    large, small = (drawn(sd1, f"{side}.png", prompt=PROMPT, width=side) for side in (40, 32))
    decode = vae.decode_finite

    def scarce(coder: Any, latents: torch.Tensor) -> torch.Tensor:
        if latents.shape[-1] > 16:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return decode(coder, latents)

    monkeypatch.setattr(vae, "decode_finite", scarce)
    found: list[replay.Event] = []
    with pytest.raises(PartialError, match="of 2 pictures 1 could not be drawn again"):
        found.extend(replay.run(ReplaySpec(inputs=(large, small), check=True)))
    (failed,) = [event for event in found if isinstance(event, replay.Failed)]
    assert failed.source == large and "out of memory" in failed.error.message
    assert [event.source for event in found if isinstance(event, replay.Replayed)] == [small]
