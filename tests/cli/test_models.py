"""`sdcli models` and single files in every command that takes a model, as a shell sees them."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdcli import store
from sdcli.errors import ExitCode
from tests import models, originals
from tests.commands import Shell, tree


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.x, small, in its authors' naming, in float16; to be read only."""
    return originals.write(tmp_path_factory.mktemp("original") / "sd1.safetensors", dtype=torch.float16)


@pytest.fixture
def shell(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shell:
    """Commands in an empty folder, with caches of their own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("SDCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return Shell(capfdbinary, monkeypatch)


def test_a_single_file_is_drawn_with_like_a_folder(shell: Shell, original: Path) -> None:
    drawn = shell("generate", "a cat", "-m", original, "--size", "64x64", "--steps", 2, "--seed", 1, "--json")
    record = json.loads(drawn.stdout)
    assert (drawn.code, record["model"], record["width"]) == (0, str(original), 64)
    assert record["model_hash"] == next(store.hashes([original]))[1]
    dry = shell("generate", "a cat", "-m", original, "--dry-run", "--json")
    assert json.loads(dry.stdout)["size"] == "512x512"  # the size it was trained for


def test_another_prediction_draws_what_the_model_draws_whose_config_says_so(shell: Shell, model: Path) -> None:
    common = ("generate", "a cat", "-m", model, "--steps", 2, "--seed", 1, "--no-metadata", "-o")
    plain = Path(shell(*common, "plain.png").lines[0]).read_bytes()
    asked = shell(*common, "asked.png", "--prediction", "v", "--json")
    models.edit_json(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    said = Path(shell(*common, "said.png").lines[0]).read_bytes()
    assert json.loads(asked.stdout)["prediction"] == "v"
    assert Path("asked.png").read_bytes() == said != plain
    wrong = shell("generate", "a cat", "--prediction", "noise")
    assert (wrong.code, wrong.stderr) == (2, "sdcli: error: --prediction noise: unknown; use one of epsilon, v, x0\n")


def test_another_prediction_has_its_own_native_size(shell: Shell) -> None:
    """Of Stable Diffusion 2.x one file was trained at 768 px and one at 512; they differ in what they predict alone."""
    originals.write(Path("sd2.safetensors"), originals.SD2)
    sizes = {}
    for word in ("v", "epsilon"):
        dry = shell("generate", "a cat", "-m", "sd2.safetensors", "--prediction", word, "--dry-run", "--json")
        sizes[word] = json.loads(dry.stdout)["size"]
    assert sizes == {"v": "768x768", "epsilon": "512x512"}


def test_batch_bench_tokens_and_the_codec_take_a_single_file(shell: Shell, original: Path) -> None:
    picture = shell("generate", "a cat", "-m", original, "--size", "64x64", "--steps", 1, "-o", "a.png").lines[0]
    common = ("-m", original, "--json")
    Path("jobs.txt").write_text("a cat\na dog\n", encoding="utf-8")
    batch = shell("batch", "jobs.txt", "-o", "out", "--size", "64x64", "--steps", 1, *common)
    assert (batch.code, len(batch.lines)) == (0, 2)
    tokens = shell("tokens", "a cat", *common)
    assert json.loads(tokens.stdout)["chunks"][0]["ids"][:3] == [49406, 320, 2368]
    skipped = shell(
        "generate", "a cat", "-m", original, "--clip-skip", 1, "--size", "64x64", "--steps", 1, "-o", "s.png"
    )
    assert skipped.code == 0, skipped.stderr
    assert shell("generate", "a cat", "-m", original, "--clip-skip", 2, "-o", "t.png").code == ExitCode.USAGE
    encoded = shell("encode", picture, "-o", "a.latents.safetensors", *common)
    decoded = shell("decode", "a.latents.safetensors", "-o", "b.png", *common)
    assert (encoded.code, decoded.code, Path("b.png").exists()) == (0, 0, True)
    bench = shell("bench", "--schedulers", "ddim", "--steps", 2, "--reference-steps", 4, "--size", "64x64", *common)
    assert bench.code == 0, bench.stderr


def test_show_says_what_a_file_is(shell: Shell, original: Path) -> None:
    told = json.loads(shell("models", "show", original, "--hash", "--json").stdout)
    assert told["parts"] == ["unet", "vae", "text_encoder"]
    assert (told["size"], told["prediction_type"], told["ema"]) == ("512x512", "epsilon", False)
    assert told["dtypes"] == ["F16"]
    assert told["model_hash"] == next(store.hashes([original]))[1]


def test_a_part_alone_is_shown_and_decodes_but_does_not_draw(shell: Shell, original: Path) -> None:
    vae = {k.removeprefix("first_stage_model."): v for k, v in load_file(original).items() if k.startswith("first_")}
    save_file(vae, "vae.safetensors")
    told = json.loads(shell("models", "show", "vae.safetensors", "--json").stdout)
    assert (told["parts"], told["lacks"]) == (["vae"], ["unet", "text_encoder"])
    shutil.copy(Path(__file__).parents[2] / "sdcli" / "builtin" / "gallery.png", "photo.png")
    encoded = shell("encode", "photo.png", "--size", "64x64", "-m", "vae.safetensors", "-o", "x.latents.safetensors")
    assert encoded.code == 0, encoded.stderr
    drawn = shell("generate", "a cat", "-m", "vae.safetensors")
    assert (drawn.code, drawn.stdout) == (ExitCode.INPUT, "")
    assert drawn.stderr.startswith("sdcli: error: vae.safetensors: holds the VAE alone, no UNet and no text encoder; ")


def test_a_single_file_of_xl_is_shown_verified_and_drawn_with(shell: Shell) -> None:
    whole = originals.weights(originals.SDXL, dtype=torch.float16)
    save_file(whole, "xl.safetensors")
    told = json.loads(shell("models", "show", "xl.safetensors", "--json").stdout)
    assert (told["family"], told["size"], told["scaling_factor"]) == ("Stable Diffusion XL", "1024x1024", 0.13025)
    assert told["parts"] == ["unet", "vae", "text_encoder", "text_encoder_2"]
    drawn = shell("generate", "a cat", "-m", "xl.safetensors", "--size", "64x64", "--steps", 1, "-o", "a.png")
    assert drawn.code == 0, drawn.stderr
    name = "conditioner.embedders.1.model.text_projection"
    save_file(whole | {name: whole[name] * torch.nan}, "bad.safetensors")
    verified = shell("models", "verify", "bad.safetensors")
    assert (verified.code, "text_projection.weight holds NaN or Inf" in verified.stderr) == (ExitCode.NUMERICAL, True)
    save_file({key: one for key, one in whole.items() if not key.startswith("conditioner")}, "part.safetensors")
    told = shell("models", "verify", "part.safetensors").stdout
    assert "model: sound (lacks text encoder, second text encoder)" in told


def test_a_refiner_is_named_and_refused(shell: Shell) -> None:
    whole = originals.weights(originals.SDXL)
    save_file({key.replace("embedders.1", "embedders.0"): value for key, value in whole.items()}, "xl.safetensors")
    told = json.loads(shell("models", "show", "xl.safetensors", "--json").stdout)
    assert told["family"] == "Stable Diffusion XL refiner"
    drawn = shell("generate", "a cat", "-m", "xl.safetensors")
    assert (drawn.code, drawn.stdout) == (ExitCode.INPUT, "")
    assert "xl.safetensors: is a Stable Diffusion XL refiner; only whole models are supported" in drawn.stderr
    verified = shell("models", "verify", "xl.safetensors")
    assert (verified.code, "is a Stable Diffusion XL refiner" in verified.stderr) == (ExitCode.INPUT, True)


def test_tensors_that_are_not_used_are_told(shell: Shell, original: Path) -> None:
    save_file(load_file(original) | {"odd.weight": torch.zeros(1)}, "odd.safetensors")
    outcome = shell("generate", "a cat", "-m", "odd.safetensors", "--dry-run")
    assert "warning: odd.safetensors: 1 of its tensors are not used ('odd.weight', for one)" in outcome.stderr


def test_convert_prints_what_it_wrote(shell: Shell, original: Path) -> None:
    outcome = shell("models", "convert", original, "-o", "folder")
    assert (outcome.code, outcome.stdout) == (0, "folder\n")
    record = json.loads(shell("models", "convert", "folder", "-o", "a.safetensors", "--json").stdout)
    assert (record["path"], record["to"]) == ("a.safetensors", "single-file")
    assert record["bytes"] == Path("a.safetensors").stat().st_size


def test_verify_finds_a_sound_model_sound(shell: Shell, original: Path, sd1: Path) -> None:
    for model in (original, sd1):
        outcome = shell("models", "verify", model, "--json")
        rows = [json.loads(line) for line in outcome.lines]
        assert (outcome.code, outcome.stderr) == (0, "")
        assert [row["what"] for row in rows][:4] == ["vae", "unet", "text_encoder", "model"] or model == original
        assert all(row["faults"] == [] for row in rows)
        assert {"path", "sha256"} <= rows[-1].keys()


Damage = Callable[[Path], object]


def without_a_tensor(model: Path) -> None:
    models.edit_weights(model / "unet", lambda state: {k: v for k, v in state.items() if k != "conv_in.bias"})


def not_a_number(model: Path) -> None:
    models.edit_weights(model / "vae", lambda state: state | {"quant_conv.bias": state["quant_conv.bias"] * torch.nan})


def another_width(model: Path) -> None:
    models.edit_json(model / "unet" / "config.json", cross_attention_dim=24)


def no_schedule(model: Path) -> None:
    models.edit_json(model / "scheduler" / "scheduler_config.json", beta_start=-1)


def two_faults(model: Path) -> None:
    without_a_tensor(model)
    not_a_number(model)


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (without_a_tensor, ExitCode.INPUT, "1 tensors are missing and 0 unexpected (conv_in.bias, for one)"),
        (not_a_number, ExitCode.NUMERICAL, "quant_conv.bias holds NaN or Inf"),
        (two_faults, ExitCode.INPUT, "quant_conv.bias holds NaN or Inf"),
        (another_width, ExitCode.INPUT, "reads context of width 24, the text encoder gives 16"),
        (no_schedule, ExitCode.INPUT, "beta_start"),
    ],
)
def test_verify_names_what_is_wrong_and_looks_on(
    shell: Shell, model: Path, damage: Damage, code: ExitCode, said: str
) -> None:
    damage(model)
    outcome = shell("models", "verify", model, "--json")
    rows = [json.loads(line) for line in outcome.lines]
    assert outcome.code == code
    assert any(said in fault for row in rows for fault in row["faults"])
    assert len(rows) == 7  # three parts, the whole, three files


def test_verify_looks_at_tensors_that_nothing_reads(shell: Shell, original: Path) -> None:
    whole = load_file(original)
    average = {"model_ema.diffusion_modelout2bias": torch.full((4,), torch.nan)}
    others = {"odd.weight": torch.full((2,), torch.inf), "odd.count": torch.ones(1, dtype=torch.int64)}
    mask = {"cond_stage_model.model.attn_mask": torch.full((3, 3), -torch.inf).triu(1)}  # as open_clip has it
    save_file(whole | average | others | mask, "odd.safetensors")
    outcome = shell("models", "verify", "odd.safetensors", "--json")
    (rest,) = [row for row in map(json.loads, outcome.lines) if row["what"] == "the rest"]
    names = ["model_ema.diffusion_modelout2bias", "odd.weight"]
    assert rest["faults"] == [f"{name} holds NaN or Inf" for name in names]
    assert sorted(rest["unused"]) == ["odd.count", "odd.weight"]
    assert outcome.code == ExitCode.NUMERICAL


def test_verify_compares_a_downloaded_file_with_the_name_the_hub_gave_it(
    shell: Shell, sd1: Path, tmp_path: Path
) -> None:
    snapshot = models.hub_cache(sd1, tmp_path / "hub", "owner/tiny")
    assert shell("models", "verify", snapshot).code == 0
    blob = models.weight_file(snapshot / "vae").resolve()
    state = load_file(blob)
    save_file({key: value + 1 for key, value in state.items()}, blob)
    outcome = shell("models", "verify", snapshot)
    assert outcome.code == ExitCode.INPUT
    assert "is damaged: its SHA-256 is not the one it was fetched by" in outcome.stderr
    assert "sdcli models remove and pull get it again" in shell("models", "verify", "owner/tiny").stderr


# Removing.


def test_a_downloaded_model_is_removed_after_saying_what_would_go(shell: Shell, sd1: Path, tmp_path: Path) -> None:
    models.hub_cache(sd1, tmp_path / "hub", "owner/tiny")
    models.hub_cache(sd1, tmp_path / "hub", "owner/other")
    before = tree(tmp_path / "hub")
    asked = shell("models", "remove", "owner/tiny")
    assert (asked.code, asked.stdout, tree(tmp_path / "hub")) == (ExitCode.USAGE, "", before)
    assert "MB in 1 places would go" in asked.stderr and "add --yes" in asked.stderr
    done = shell("models", "remove", "owner/tiny", "--yes", "--json")
    assert (done.code, json.loads(done.stdout)["model"]) == (0, "owner/tiny")
    assert [path.name for path in (tmp_path / "hub").iterdir()] == ["models--owner--other"]


def test_the_files_of_a_repository_may_go_one_by_one(shell: Shell, original: Path, tmp_path: Path) -> None:
    snapshot = models.hub_cache(original.parent, tmp_path / "hub", "owner/files")
    (snapshot / "again.safetensors").symlink_to((snapshot / original.name).readlink())
    blob = (snapshot / original.name).resolve()
    assert "is not in the cache" in shell("models", "remove", "owner/files/none.ckpt", "-y").stderr
    assert shell("models", "remove", f"owner/files/{original.name}", "-y").code == 0
    assert (blob.exists(), [path.name for path in snapshot.iterdir()]) == (True, ["again.safetensors"])
    assert shell("models", "remove", "owner/files/again.safetensors@main", "-y").code == 0
    assert list((tmp_path / "hub").iterdir()) == []


def test_what_repositories_share_stays_until_the_last_of_them_goes(shell: Shell, sd1: Path, tmp_path: Path) -> None:
    snapshots = [models.hub_cache(sd1, tmp_path / "hub", f"owner/{name}") for name in ("one", "two")]
    shared, _ = [models.share(models.weight_file(snapshot / "vae")) for snapshot in snapshots]
    size = shared.stat().st_size
    assert shell("models", "remove", "owner/one@main", "-y").code == 0
    assert shell("models", "verify", "owner/two").code == 0
    removed = json.loads(shell("models", "remove", "owner/two", "-y", "--json").stdout)
    assert removed["bytes"] > size
    assert [path.name for path in shared.parent.iterdir()] == []


def test_a_commit_goes_with_the_names_and_the_remains_of_downloads_that_are_its(
    shell: Shell, sd1: Path, tmp_path: Path
) -> None:
    old = models.hub_cache(sd1, tmp_path / "hub", "owner/tiny", revision="v1")
    new = models.hub_cache(sd1, tmp_path / "hub", "owner/tiny")
    folder = old.parents[1]
    for name in ("refs/also", f"trees/{old.name}.json", f".no_exist/{old.name}/x.json", "blobs/abc.incomplete"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(old.name, encoding="utf-8")
    done = shell("models", "remove", f"owner/tiny@{old.name}", "-y", "--json")
    assert done.code == 0, done.stderr
    assert [path.name for path in (folder / "refs").iterdir()] == ["main"]
    assert list(folder.rglob(f"*{old.name}*")) == list(folder.rglob("*.incomplete")) == []
    assert shell("models", "verify", new).code == 0


def test_a_revision_goes_without_the_files_that_another_uses(shell: Shell, sd1: Path, tmp_path: Path) -> None:
    snapshot = models.hub_cache(sd1, tmp_path / "hub", "owner/tiny", revision="v1")
    other = snapshot.with_name("f" * 40)
    shutil.copytree(snapshot, other, symlinks=True)
    (snapshot / "unet" / "extra.json").symlink_to("../../../blobs/only")
    (snapshot.parents[1] / "blobs" / "only").write_text("{}", encoding="utf-8")
    assert shell("models", "remove", "owner/tiny@v1", "-y").code == 0
    assert not snapshot.exists() and not (snapshot.parents[1] / "blobs" / "only").exists()
    assert shell("models", "verify", other).code == 0


@pytest.mark.parametrize(
    ("ref", "code", "said"),
    [
        ("builtin", ExitCode.USAGE, "comes with sdcli"),
        ("mine.safetensors", ExitCode.USAGE, "is yours, and in no cache"),
        (".", ExitCode.USAGE, "is yours, and in no cache"),
        ("owner/none", ExitCode.INPUT, "is not in the cache"),
        ("../..", ExitCode.USAGE, "is yours"),
        ("a/..", ExitCode.INPUT, "no such model"),
        ("owner/tiny@none", ExitCode.INPUT, "is not in the cache"),
        ("owner/tiny@../../secret", ExitCode.INPUT, ""),
        ("no such thing", ExitCode.INPUT, "no such model"),
    ],
)
def test_nothing_but_what_is_in_a_cache_is_removed(
    shell: Shell, original: Path, sd1: Path, tmp_path: Path, ref: str, code: int, said: str
) -> None:
    models.hub_cache(sd1, tmp_path / "hub", "owner/tiny")
    shutil.copy(original, "mine.safetensors")
    (tmp_path / "hub" / "secret").write_text("x", encoding="utf-8")
    before = tree(tmp_path)
    outcome = shell("models", "remove", ref, "--yes")
    assert (outcome.code, outcome.stdout) == (code, "")
    assert said in outcome.stderr
    assert tree(tmp_path) == before


def test_a_link_out_of_the_cache_is_not_followed(shell: Shell, sd1: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    shutil.copytree(sd1, tmp_path / "mine")
    (tmp_path / "hub" / "models--owner--tiny").symlink_to(tmp_path / "mine")
    outcome = shell("models", "remove", "owner/tiny", "--yes")
    assert outcome.code == ExitCode.USAGE
    assert "leads outside" in outcome.stderr
    assert (tmp_path / "mine" / "model_index.json").exists()


def test_the_copy_of_a_pickled_checkpoint_is_listed_and_removed_and_the_file_stays(
    shell: Shell, original: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "cache" / "checkpoints"
    copies.mkdir(parents=True)
    torch.save({"state_dict": {}}, "sd.ckpt")
    from sdcli import jail

    copy = jail.copy_of(Path("sd.ckpt"), copies)
    shutil.copy(original, copy)
    assert any(str(copy) in line for line in shell("models", "list").lines)
    assert shell("models", "remove", "sd.ckpt", "-y").code == 0
    assert (list(copies.iterdir()), Path("sd.ckpt").exists()) == ([], True)
    assert "has no copy in the cache" in shell("models", "remove", "sd.ckpt", "-y").stderr


# Models of the Hub in records.


def test_a_picture_tells_the_commit_that_drew_it_and_replay_draws_with_that(
    shell: Shell, sd1: Path, tmp_path: Path
) -> None:
    old = models.hub_cache(sd1, tmp_path / "hub", "owner/tiny")
    common = ("a cat", "-m", "owner/tiny", "--steps", 1, "--seed", 3, "--json")
    record = json.loads(shell("generate", *common, "-o", "a.png").stdout)
    assert (record["model"], record["model_revision"]) == ("owner/tiny", old.name)
    planned = json.loads(shell("generate", *common, "--dry-run").stdout)
    shown = json.loads(shell("models", "show", "owner/tiny", "--json").stdout)
    assert planned["model_revision"] == shown["model_revision"] == old.name
    assert "model_revision" not in json.loads(shell("generate", *common, "-m", sd1, "--dry-run").stdout)
    # What is meant by the name from now on is another model.
    other = models.write_sd1(tmp_path / "other", seed=1)
    new = models.hub_cache(other, tmp_path / "hub", "owner/tiny", revision="v2")
    (new.parents[1] / "refs" / "main").write_text(new.name, encoding="utf-8")
    again = json.loads(shell("replay", "a.png", "--check", "--json").stdout)
    assert (again["equal"], again["drift"]) == ("bytes", [])
    assert shell("models", "remove", f"owner/tiny@{old.name}", "--yes").code == 0
    warned = shell("replay", "a.png", "-o", "b.png", "--json")
    assert "model owner/tiny: is another, of hash" in warned.stderr
    assert f"; sdcli models pull owner/tiny@{old.name} fetches that one" in warned.stderr
    assert "fetches that one" not in shell("replay", "a.png", "-o", "c.png", "--model", "owner/tiny").stderr
    assert json.loads(warned.stdout)["model_revision"] == new.name
    assert shell("models", "remove", "owner/tiny", "--yes").code == 0
    lacking = shell("replay", "a.png")
    assert lacking.code == ExitCode.INPUT
    assert f"name one with --model, or sdcli models pull owner/tiny@{old.name}" in lacking.stderr


# Untrusted files.


def test_no_mutation_of_a_header_makes_a_traceback(shell: Shell, tmp_path: Path) -> None:
    """Seeded: bytes of the header turned, removed or doubled, lengths and shapes among them."""
    source = random.Random(7)
    kind = originals.Kind(vocabulary=10)
    data = originals.write(tmp_path / "sound.safetensors", kind, dtype=torch.float16).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, tensors = data[8 : 8 + length], data[8 + length :]
    refused = 0
    for number in range(60):
        text = bytearray(header)
        for _ in range(source.randint(1, 3)):
            at = source.randrange(len(text))
            kind_of_change = source.randrange(3)
            if kind_of_change == 0:
                text[at] = source.choice(b'0123456789[]{},:"eE.-x')
            elif kind_of_change == 1:
                del text[at : at + source.randint(1, 30)]
            else:
                text[at:at] = text[at : at + source.randint(1, 30)]
        stated = len(text) if number % 4 else source.choice([0, 1, 2**63, len(text) - 1, len(text) + 1])
        path = Path("bad.safetensors")
        path.write_bytes(struct.pack("<Q", stated) + text + tensors)
        outcome = shell("models", "show", path)
        assert outcome.code in (ExitCode.OK, ExitCode.INPUT), outcome.stderr
        assert (outcome.code == 0) == (outcome.stderr == "")
        assert len(outcome.stderr.splitlines()) <= 1
        refused += outcome.code != 0
    assert refused > 40


@pytest.mark.parametrize("name", ["folder", "fifo", "empty", "text", "cut"])
def test_what_is_no_checkpoint_is_refused_in_one_line(shell: Shell, original: Path, name: str) -> None:
    import os

    path = Path(name)
    makers: dict[str, Callable[[], object]] = {
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "empty": path.touch,
        "text": lambda: path.write_text("a model", encoding="utf-8"),
        "cut": lambda: path.write_bytes(original.read_bytes()[:-100]),
    }
    makers[name]()
    before = sorted(Path().iterdir())
    for command in (
        ("models", "show", path),
        ("models", "convert", path, "-o", "out"),
        ("generate", "a cat", "-m", path),
    ):
        outcome = shell(*command)
        assert (outcome.code, outcome.stdout, len(outcome.stderr.splitlines())) == (ExitCode.INPUT, "", 1)
    assert sorted(Path().iterdir()) == before


def test_a_pickled_pair_is_shown_as_what_it_is_and_no_copy_of_it_is_made(shell: Shell, tmp_path: Path) -> None:
    torch.save({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "pair.pt")
    shown = shell("models", "show", "pair.pt", "--json")
    assert (shown.code, shown.stderr) == (0, "")
    told = json.loads(shown.stdout)
    assert (told["file"], told["family"], told["width"]) == ("pair.pt", "Stable Diffusion XL", [768, 1280])
    assert not (tmp_path / "cache").exists()


def test_a_lora_and_a_learned_word_are_shown_as_what_they_are(shell: Shell, sd1: Path) -> None:
    models.write_lora(Path("lora.safetensors"), sd1)
    save_file({"<cat>": torch.ones(2, models.CONTEXT)}, "cat.safetensors")
    lora, word = (
        json.loads(shell("models", "show", f"{name}.safetensors", "--json").stdout) for name in ("lora", "cat")
    )
    assert (lora["file"], lora["kind"], word["kind"]) == ("lora.safetensors", "LoRA", "textual inversion")
    Path("broken.safetensors").write_bytes(b"no header")
    assert shell("models", "show", "broken.safetensors").code == ExitCode.INPUT


def test_averages_that_a_folder_does_not_have_are_refused(shell: Shell, sd1: Path) -> None:
    done = shell("models", "convert", sd1, "-o", "x.safetensors", "--ema")
    assert (done.code, "holds no averaged weights (EMA)" in done.stderr) == (ExitCode.INPUT, True)
    assert not Path("x.safetensors").exists()


def test_a_yaml_that_is_written_later_is_seen(shell: Shell) -> None:
    originals.write(Path("m.safetensors"))
    before = json.loads(shell("models", "show", "m.safetensors", "--json").stdout)
    Path("m.yaml").write_text('parameterization: "v"', encoding="utf-8")
    after = json.loads(shell("models", "show", "m.safetensors", "--json").stdout)
    assert (before["prediction_type"], after["prediction_type"]) == ("epsilon", "v_prediction")
