"""Stable Diffusion XL in every command that takes a model, as a shell sees it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import models
from tests.commands import Shell

GENERATE = ("generate", "a picture of a puppy", "--steps", 3, "--seed", 7)


@pytest.fixture
def xl(shell: Shell, sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Commands in an empty folder, with the tiny model of XL as the default."""
    monkeypatch.setenv("SDCLI_MODEL", str(sdxl))
    return shell


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


def test_a_prompt_with_all_its_syntax_is_drawn_recorded_and_drawn_again(xl: Shell) -> None:
    words = "a {red|blue} (puppy:1.3) BREAK [in] the snow"
    asked = ("generate", words, "-N", "blurry", "--steps", 2, "--seed", 3, "-n", 2, "--clip-skip", 1)
    drawn = xl(*asked, "--mix", "puppy=0.5,cat=0.5", "--deterministic", "--json")
    records = [json.loads(line) for line in drawn.lines]
    assert drawn.code == 0 and [record["tokens"]["chunks"] for record in records] == [2, 2]
    assert {record["clip_skip"] for record in records} == {1}
    checked = xl("replay", *(record["path"] for record in records), "--check")
    assert (checked.code, checked.stdout.count("byte-equal")) == (0, 2)


def test_different_prompts_of_a_batch_are_what_each_is_alone(xl: Shell) -> None:
    jobs = [
        {"prompt": "a cat", "seed": 1},
        {"prompt": "a red dog", "seed": 2, "negative": "blurry"},
        {"prompt": "a (car:1.2) " * 40, "seed": 3, "negative": "blurry"},
    ]
    Path("jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
    made = xl("batch", "jobs.jsonl", "-o", "out", "--steps", 3, "--json")
    records = [json.loads(line) for line in made.lines]
    assert (made.code, {record["seed"] for record in records}) == (0, {1, 2, 3})
    for record in records:
        (job,) = (one for one in jobs if one["seed"] == record["seed"])
        how = ("-N", job.get("negative", ""), "--seed", job["seed"], "--steps", 3, "-o", "one.png")
        assert xl("generate", job["prompt"], *how, "--if-exists", "overwrite").code == 0
        assert int(abs(pixels("one.png") - pixels(record["path"])).max()) <= 2


@pytest.fixture
def adapters(xl: Shell, sdxl: Path) -> tuple[str, str]:
    """The options for a LoRA of UNet and both encoders, and for a learned pair named `my-cat`."""
    models.write_lora(Path("blue.safetensors"), sdxl)
    chance = torch.Generator().manual_seed(1)
    pair = {"clip_l": models.CONTEXT, "clip_g": models.CONTEXT_2}
    save_file({key: torch.randn(2, width, generator=chance) for key, width in pair.items()}, "my-cat.safetensors")
    return "--lora=blue.safetensors:0.5", "--embedding=my-cat.safetensors"


def test_adapters_are_drawn_with_recorded_and_drawn_with_again(xl: Shell, adapters: tuple[str, str]) -> None:
    asked = ("generate", "a my-cat", "--steps", 2, "--seed", 3, "--json", *adapters)
    dry, drawn = (json.loads(xl(*asked, *more).stdout) for more in (["--dry-run"], ["-o", "a.png"]))
    assert [one["file"] for one in (*dry["loras"], *dry["embeddings"])] == ["blue.safetensors", "my-cat.safetensors"]
    assert [one["scale"] for one in drawn["loras"]] == [0.5] and drawn["tokens"]["kept"] == 3
    assert [(one["file"], one["token"]) for one in drawn["embeddings"]] == [("my-cat.safetensors", "my-cat")]
    assert "a.png: byte-equal" in xl("replay", "a.png", "--check").stdout
    jobs = [{"prompt": "a my-cat", "seed": 3, "lora": ["blue.safetensors:0.5"], "embedding": ["my-cat.safetensors"]}]
    jobs += [{"prompt": "a my-cat", "seed": 3}]
    Path("jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
    with_them, without = xl("batch", "jobs.jsonl", "-o", "out", "--steps", 2).lines
    assert np.array_equal(pixels("a.png"), pixels(with_them)) and not np.array_equal(pixels("a.png"), pixels(without))


def test_bench_draws_with_a_lora(xl: Shell, adapters: tuple[str, str]) -> None:
    how = ("--schedulers", "ddim", "--steps", 2, "--reference-steps", 4, "--prompt", "a cat", "--size", "16x16")
    told = [[json.loads(line) for line in xl("bench", *how, "--json", *more).lines] for more in ([], [adapters[0]])]
    plain, changed = ([row["latent_rmse"] for row in rows if row.get("status") == "done"] for rows in told)
    assert len(plain) == len(changed) == 1 and plain != changed


def test_adapters_of_another_family_make_a_job_a_bad_line(xl: Shell, sd1: Path) -> None:
    models.write_lora(Path("old.safetensors"), sd1)
    save_file({"<cat>": torch.ones(1, models.CONTEXT)}, "cat.safetensors")
    Path("jobs.jsonl").write_text(
        '{"prompt": "a cat", "lora": ["old.safetensors"]}\n{"prompt": "a cat", "embedding": ["cat.safetensors"]}\n',
        encoding="utf-8",
    )
    done = xl("batch", "jobs.jsonl", "-o", "out", "--dry-run")
    assert done.code == 3
    assert "jobs.jsonl:1: old.safetensors: is for a context 16 wide, the model's is 40 wide (Stable" in done.stderr
    assert "jobs.jsonl:2: cat.safetensors: its vectors are 16 wide, the model's 16 and 24 wide (Stable" in done.stderr


def test_a_picture_goes_through_the_codec(xl: Shell) -> None:
    picture = xl(*GENERATE, "-o", "a.png", "--save-latents", "a.safetensors").lines[0]
    assert xl("decode", "a.safetensors", "-o", "back.png").code == 0
    assert np.array_equal(pixels("back.png"), pixels(picture))
    assert xl("encode", picture, "-o", "b.safetensors").code == 0
    assert xl("roundtrip", picture).code == 0
    assert xl("diffuse", picture, "--t", "0,999", "-o", "strip.png").code == 0


def test_bench_compares_schedulers(xl: Shell) -> None:
    how = ("--schedulers", "ddim,dpm", "--steps", 2, "--reference-steps", 4, "--prompt", "a cat", "--size", "16x16")
    done = xl("bench", *how, "--json")
    rows = [json.loads(line) for line in done.lines]
    figures = [row["latent_rmse"] for row in rows if row.get("status") == "done"]
    assert done.code == 0 and len(figures) == 2 and None not in figures


def test_tokens_are_those_of_the_first_tokenizer_and_vectors_those_of_both(xl: Shell) -> None:
    told = xl("tokens", "a cat BREAK a dog", "--embeddings", "e.safetensors", "--mask", "mask.png", "--json")
    facts = json.loads(told.stdout)
    assert (told.code, facts["encoders"]) == (0, ["text_encoder", "text_encoder_2"])
    assert facts["chunks"][0]["ids"][3:6] == [49407, 49407, 49407]  # the second encoder's chunks are filled with 0
    found = {name: tuple(value.shape) for name, value in load_file("e.safetensors").items()}
    assert found["token_embedding"] == (2, 77, 16) and found["token_embedding_2"] == (2, 77, 24)
    assert found["context"] == (1, 154, 40) and found["pooled"] == (1, 20)
    assert xl("tokens", "wow!! " * 30, "--embeddings", "e.png", "--json").code == 0
    assert Image.open("e.png").height > 2 * 77 * 12  # px: two chunks, of which the second encoder has need


def test_models_show_and_verify_tell_of_both_encoders(xl: Shell, sdxl: Path, tmp_path: Path) -> None:
    shown = json.loads(xl("models", "show", sdxl, "--json").stdout)
    assert shown["family"] == "Stable Diffusion XL"
    assert (shown["parameters"]["text_encoder"], shown["parameters"]["text_encoder_2"]) == (800_688, 1_200_432)
    assert xl("models", "verify", sdxl).code == 0
    folder = models.copy(sdxl, tmp_path / "model")
    models.edit_weights(folder / "text_encoder_2", lambda weights: {**weights, "text_projection.weight": torch.ones(3)})
    faulty = xl("models", "verify", folder)
    assert faulty.code == 3 and "text_encoder_2: text_projection.weight has shape (3,)" in faulty.stderr


def test_the_model_of_a_dry_run_is_refused_or_told_of_as_that_of_a_run(xl: Shell, sdxl: Path, tmp_path: Path) -> None:
    told = json.loads(xl(*GENERATE, "--dry-run", "--clip-skip", 1, "--json").stdout)
    assert (told["size"], told["tokens"]["kept"], told["clip_skip"]) == ("32x32", 5, 1)
    folder = models.copy(sdxl, tmp_path / "model", without="*.safetensors")
    models.edit_json(folder / "tokenizer_2" / "vocab.json", zzz=49408)
    refused = xl(*GENERATE, "--dry-run", "-m", folder)
    assert refused.code == 3 and "tokenizer_2: has 49,409 pieces, the text encoder knows 49,408" in refused.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("train-unet",),
        ("train-unet", "--lora-rank", 4),
        ("train-unet", "--dry-run"),
        ("train-embedding", "--token", "<my-cat>", "--init-token", "cat"),
    ],
)
def test_training_is_refused_by_name(xl: Shell, sdxl: Path, pictures: Path, command: tuple[object, ...]) -> None:
    refused = xl(*command, "--data", pictures, "--model", sdxl, "--run", "run")
    said = f"{sdxl}: is a Stable Diffusion XL, of which the VAE alone can be trained"
    assert refused.code == 3 and said in refused.stderr and not Path("run").exists()
