"""`sdcli bench`: what is counted and compared, what a folder keeps, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdcli import bench, store
from sdcli.errors import ExitCode, InputError, SdcliWarning, UsageError
from sdcli.lab.plan import PROMPTS, plan_bench
from sdcli.lab.specs import BenchSpec
from sdcli.lab.table import COLUMNS
from sdcli.pipeline import frechet
from sdcli.pipeline.adapters import Embedding, write_embedding
from sdcli.pipeline.images import fit, load_image, to_pixels
from sdcli.pipeline.measures import RunningGaussian, frechet_distance
from sdcli.schedulers import find, names
from tests import models
from tests.commands import Shell, tree
from tests.forks import Forks
from tests.schedulers.test_schedulers import install

QUICK = ("--prompt", "a cat", "--reference-steps", 8, "--device", "cpu")


def records(lines: list[str]) -> list[dict[str, Any]]:
    """The rows among the JSON lines of a call."""
    return [row for row in map(json.loads, lines) if "scheduler" in row]


def rows_of(model: Path, run: Path, **how: Any) -> list[dict[str, Any]]:
    spec = BenchSpec(model=str(model), run=run, prompt=how.pop("prompt", ("a cat",)), device="cpu", **how)
    return [event.facts for event in bench.run(spec, plan_bench(spec)) if isinstance(event, bench.Row)]


def test_a_row_a_scheduler_and_number_of_steps_with_the_evaluations_that_were_made(sd1: Path, tmp_path: Path) -> None:
    rows = rows_of(sd1, tmp_path, schedulers="ddim,plms,heun", steps="5,3", reference_steps=4)
    made = [(row["scheduler"], row["steps"], row["evaluations"]) for row in rows]
    assert made == [("ddim", 3, 3), ("ddim", 5, 5), ("pndm", 3, 4), ("pndm", 5, 6), ("heun", 3, 5), ("heun", 5, 9)]
    for row in rows:
        assert (row["status"], row["note"], row["pictures"]) == ("done", "", 1)
        assert row["latent_rmse"] > 0 and 0 < row["psnr_db"] <= 106
        assert 0 < row["seconds_per_step"] < row["seconds_per_image"]
        assert row["memory"] == "rss growth" and 0 <= row["memory_bytes"] < 50 << 20
        assert row["frechet_distance"] is None


@pytest.fixture(params=["sd1", "sd2"])
def smooth(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model that does not look at t: untrained, it would answer every timestep in another way."""
    folder = {"sd1": models.write_sd1, "sd2": models.write_sd2}[request.param](tmp_path / "smooth")
    models.edit_weights(
        folder / "unet", lambda w: {k: v * 0 if k.startswith("time_embedding.linear_2") else v for k, v in w.items()}
    )
    return Path(folder)


def test_solvers_come_to_the_reference_as_their_steps_grow(smooth: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"schedulers": "ddim,dpm,heun,lms", "guidance": 1.0, "reference_steps": 40}
    rows = rows_of(smooth, tmp_path / "run", steps="5,50", **how)
    few = {row["scheduler"]: row["latent_rmse"] for row in rows if row["steps"] == 5}
    many = {row["scheduler"]: row["latent_rmse"] for row in rows if row["steps"] == 50}
    assert all(many[name] < few[name] / 5 for name in few)
    assert max(many["dpm"], many["heun"], many["lms"]) < many["ddim"] / 2


def test_the_reference_is_of_float64_and_says_how_far_half_its_steps_are(smooth: Path, tmp_path: Path) -> None:
    tmp_path /= "run"
    how: dict[str, Any] = {"schedulers": "ddim", "steps": "2", "guidance": 1.0, "reference_steps": 40}
    spec = BenchSpec(model=str(smooth), run=tmp_path, device="cpu", **how)
    (facts,) = [event.facts for event in bench.run(spec, plan_bench(spec)) if isinstance(event, bench.Solved)]
    assert (facts["steps"], facts["evaluations"], facts["dtype"]) == (40, 79, "float64")
    assert 0 < facts["error"] < 0.03
    assert load_file(tmp_path / "reference.safetensors")["latents"].shape == (len(PROMPTS), *models.LATENTS)


def test_schedulers_that_draw_noise_have_no_distance_to_the_solution(sd1: Path, tmp_path: Path) -> None:
    for row in rows_of(sd1, tmp_path, schedulers="euler-a,ddpm", steps="3"):
        assert (row["latent_rmse"], row["psnr_db"]) == (None, None)
        assert "draws noise" in row["note"]
        assert row["evaluations"] == 3
    assert not (tmp_path / "reference.safetensors").exists()


def test_a_scheduler_that_ends_above_sigma_0_is_not_compared(sd1: Path, tmp_path: Path) -> None:
    ddim, dpm = rows_of(sd1, tmp_path, schedulers="ddim,dpm", steps="7", reference_steps=4)  # 1000 // 7 * 7 is 994
    assert "another sigma than the reference" in ddim["note"] and ddim["latent_rmse"] is None
    assert dpm["latent_rmse"] is not None


def test_frechet_distances_name_the_network_and_the_numbers(sd1: Path, pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(sd1, tmp_path, schedulers="ddim,euler-a", steps="2", data=pictures, seeds=3, reference_steps=4)
    for row in rows:
        assert (row["features"], row["pictures"], row["data_pictures"]) == ("sdcli-perceptual", 3, 6)
        assert row["feature_dimensions"] > 6 and row["frechet_distance"] > 0


def test_a_person_is_told_what_looked_at_how_many_pictures_and_that_they_are_few(shell: Shell, pictures: Path) -> None:
    ended = shell("bench", "--schedulers", "euler-a", "--steps", "1,2", *QUICK, "--data", pictures)
    assert ended.code == 0
    assert ended.stderr.count("Frechet distance: sdcli-perceptual, ") == 1
    assert "features; 1 pictures drawn, 6 of the data" in ended.stderr
    assert ended.stderr.count("sdcli: warning: the Frechet distance is of fewer pictures (1) than features (") == 1


def test_pictures_of_a_prompt_differ_in_seed_and_batches_change_nothing(sd1: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"schedulers": "ddim", "steps": "3", "seeds": 3, "reference_steps": 4}
    (whole,) = rows_of(sd1, tmp_path / "whole", **how)
    (parts,) = rows_of(sd1, tmp_path / "parts", batch_size=2, **how)
    assert (whole["evaluations"], parts["evaluations"]) == (3, 3)
    assert whole["latent_rmse"] == pytest.approx(parts["latent_rmse"], rel=1e-4)
    latents = load_file(tmp_path / "parts" / "reference.safetensors")["latents"]
    assert latents.dtype == torch.float64
    assert not torch.allclose(latents[0], latents[1], atol=0.1)


def test_a_reference_that_was_left_in_the_folder_is_not_that_of_other_settings(sd1: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"schedulers": "ddim", "steps": "2", "reference_steps": 4}
    rows_of(sd1, tmp_path / "a", **how)
    (tmp_path / "a" / "ledger.jsonl").unlink()
    other = how | {"prompt": ("a dog",), "seed": 77}
    (left,), (fresh,) = rows_of(sd1, tmp_path / "a", **other), rows_of(sd1, tmp_path / "b", **other)
    assert left["latent_rmse"] == pytest.approx(fresh["latent_rmse"], rel=1e-6)


def test_a_lora_is_measured_as_the_model_it_makes(shell: Shell, sd1: Path, tmp_path: Path) -> None:
    lora = models.write_lora(tmp_path / "lora.safetensors", sd1, gain=0.5)
    how: dict[str, Any] = {"schedulers": "ddim", "steps": "2", "reference_steps": 4}
    (plain,), (changed,) = rows_of(sd1, tmp_path / "a", **how), rows_of(sd1, tmp_path / "b", lora=(str(lora),), **how)
    assert plain["latent_rmse"] != pytest.approx(changed["latent_rmse"], rel=1e-3)
    command = ("bench", "--model", sd1, "--schedulers", "ddim", "--steps", "2", "--prompt", "a cat", *QUICK)
    ended = shell(*command, "--run", tmp_path / "a", "--lora", lora)
    assert ended.code == ExitCode.INPUT and "loras was" in ended.stderr


def test_a_learned_word_is_measured_where_a_prompt_has_it(sd1: Path, tmp_path: Path) -> None:
    (file, *_) = write_embedding(tmp_path, Embedding("<my-cat>", torch.ones(2, models.CONTEXT)))
    how: dict[str, Any] = {"schedulers": "ddim", "steps": "2", "reference_steps": 4, "embedding": (str(file),)}
    (named,) = rows_of(sd1, tmp_path / "a", prompt=("a <my-cat>",), **how)
    with pytest.warns(
        SdcliWarning, match=r"my-cat\.safetensors: no prompt names its token <my-cat>, so it changes noth"
    ):
        (plain,) = rows_of(sd1, tmp_path / "b", **how)
    assert named["latent_rmse"] != pytest.approx(plain["latent_rmse"], rel=1e-3)
    with pytest.raises(InputError, match="embeddings was"):
        rows_of(sd1, tmp_path / "a", prompt=("a <my-cat>",), **how | {"embedding": (f"{file}:<my-cat>",)})


def test_what_the_unet_predicts_can_be_said_and_makes_another_run(model: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"schedulers": "ddim", "steps": "2", "reference_steps": 4}
    asked = rows_of(model, tmp_path / "asked", prediction="v", **how)
    plain = rows_of(model, tmp_path / "plain", **how)
    models.edit_json(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    said = rows_of(model, tmp_path / "said", **how)
    assert asked[0]["latent_rmse"] == said[0]["latent_rmse"] != plain[0]["latent_rmse"]
    with pytest.raises(InputError, match="scheduler_config"):
        rows_of(model, tmp_path / "asked", prediction="epsilon", **how)


def test_models_of_classes_and_without_any_are_compared_too(
    classed: Path, unconditional: Path, learned: Path, tmp_path: Path
) -> None:
    for number, model in enumerate((classed, unconditional, learned)):
        (row,) = rows_of(model, tmp_path / str(number), prompt=(), schedulers="dpm", steps="3", reference_steps=4)
        assert row["pictures"] == (1 if model is unconditional else 4)
        assert row["latent_rmse"] > 0
    spec = BenchSpec(model=str(classed), class_name=("dog", "3"), steps="2")
    assert plan_bench(spec).subjects == ("dog", "sea urchin, echinoid")
    with pytest.raises(UsageError, match="reads no text"):
        plan_bench(BenchSpec(model=str(classed), prompt=("a dog",)))


def test_json_tells_the_settings_then_the_reference_then_a_line_a_row(shell: Shell, sd1: Path) -> None:
    ended = shell(
        "bench", "--schedulers", "ddim", "--steps", "2,4", *QUICK, "--csv", "t.csv", "--plot", "t.png", "--json"
    )
    assert (ended.code, ended.stderr) == (0, "")
    settings, reference, *rows, table, figure = map(json.loads, ended.lines)
    assert settings["subjects"] == ["a cat"] and (settings["seed"], settings["seeds"]) == (0, 1)
    assert (settings["done"], settings["rows"]) == (0, 2)
    assert len(settings["model_hash"]) == 64 and settings["scheduler_config"]["timestep_spacing"] == "trailing"
    assert reference["reference"]["steps"] == 8
    assert [list(row) for row in rows] == [list(COLUMNS)] * 2
    assert (table, figure) == ({"path": "t.csv"}, {"path": "t.png"})
    read = list(csv.DictReader(io.StringIO(Path("t.csv").read_text(encoding="utf-8"))))
    assert [list(row) for row in read] == [list(COLUMNS)] * 2
    assert [float(row["latent_rmse"]) for row in read] == [row["latent_rmse"] for row in rows]
    assert read[0]["frechet_distance"] == ""
    assert Image.open("t.png").size == (1200, 750)


def test_a_person_reads_a_table_and_the_rest_on_stderr(shell: Shell) -> None:
    names = "ddim,euler-a,dpm:sigmas=exponential:order=3"
    ended = shell("bench", "--schedulers", names, "--steps", "2", *QUICK, "--run", "r")
    head, ddim, euler, dpm = ended.lines
    assert dpm.startswith("dpm sigmas=exponential order=3 ")
    assert len({line.index(word) + len(word) for line, word in ((head, "steps"), (ddim, " 2"), (dpm, "  2"))}) == 1
    assert head.split()[:3] == ["scheduler", "steps", "evaluations"]
    assert ddim.split()[:3] == ["ddim", "2", "2"] and euler.split()[5:8] == ["-", "-", "-"]
    assert ended.stderr.splitlines()[0] == "run folder r: 0 of 3 rows are there already"
    assert "reference: 8 Heun steps in float64, 15 evaluations" in ended.stderr


def test_the_same_command_measures_only_what_is_missing(shell: Shell) -> None:
    command = ("bench", "--steps", "2", *QUICK, "--run", "r", "--csv", "t.csv", "--json")
    first = shell(*command, "--schedulers", "ddim")
    assert first.code == 0
    again = shell(*command, "--schedulers", "ddim,dpm", "--if-exists", "overwrite")
    assert again.code == 0
    assert json.loads(again.lines[0])["done"] == 1
    ddim, dpm = records(again.lines)
    assert [ddim] == records(first.lines)
    assert dpm["scheduler"] == "dpm"
    before = tree(Path("r")) | tree(Path())
    third = shell(*command, "--schedulers", "ddim,dpm")
    assert records(third.lines) == [ddim, dpm]
    assert json.loads(third.lines[-1]) == {"path": "t.csv"}
    assert third.lines[1] == first.lines[1], "what the rows were compared with is told again"
    assert tree(Path("r")) | tree(Path()) == before, "a table that says the same stays as it is"
    skipped = shell(*command, "--schedulers", "dpm", "--if-exists", "skip")
    assert json.loads(skipped.lines[-1]) == {"path": "t.csv", "skipped": True}
    assert tree(Path("r")) | tree(Path()) == before


def test_a_row_that_failed_is_tried_again_and_one_that_somebody_edited_measured_again(shell: Shell) -> None:
    command = ("bench", "--schedulers", "ddim,dpm", "--steps", "2", *QUICK, "--run", "r", "--json")
    first = records(shell(*command).lines)
    ledger = Path("r/ledger.jsonl")
    ddim, dpm = map(json.loads, ledger.read_text(encoding="utf-8").splitlines())
    edited = [ddim | {"status": "failed", "note": "of another day", "latent_rmse": None}, dpm | {"evaluations": "x"}]
    ledger.write_text("".join(f"{json.dumps(row)}\n" for row in edited), encoding="utf-8")
    again = shell(*command)
    assert again.code == 0 and "ledger.jsonl:2: is no row of this run" in again.stderr
    assert json.loads(again.lines[0])["done"] == 0
    for before, after in zip(first, records(again.lines), strict=True):
        assert (after["status"], after["note"], after["evaluations"]) == ("done", "", 2)
        assert after["latent_rmse"] == pytest.approx(before["latent_rmse"], rel=1e-5)
    third = shell(*command)
    assert (json.loads(third.lines[0])["done"], third.stderr) == (2, "")


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_killed_and_run_again_every_row_is_there_once(forks: Forks, sd1: Path, tmp_path: Path, share: float) -> None:
    command = ("bench", "--model", sd1, "--schedulers", "ddim,dpm,heun", "--steps", "2,3", *QUICK, "--json")
    straight = forks.sdcli(*command, "--run", tmp_path / "straight")
    assert straight.code == 0, straight.stderr
    run = tmp_path / "run"
    killed = forks.sdcli(*command, "--run", run, at=int(straight.writes * share), send=signal.SIGKILL)
    assert killed.code == -signal.SIGKILL
    kept = (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines() if (run / "ledger.jsonl").exists() else []
    again = forks.sdcli(*command, "--run", run)
    assert again.code == 0, again.stderr
    rows = records(again.stdout.splitlines())
    keys = [json.loads(line)["key"] for line in (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(keys) == len(set(keys)) == len(rows) == 6
    assert (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()[: len(kept)] == kept
    distances = [row["latent_rmse"] for row in records(straight.stdout.splitlines())]
    assert [row["latent_rmse"] for row in rows] == pytest.approx(distances, rel=1e-5)


def test_interrupted_it_ends_with_130_and_keeps_its_rows(forks: Forks, sd1: Path, tmp_path: Path) -> None:
    command = ("bench", "--model", sd1, "--schedulers", "ddim,dpm", "--steps", "2", *QUICK, "--run", tmp_path / "run")
    straight = forks.sdcli(*command[:-1], tmp_path / "straight")
    stopped = forks.sdcli(*command, at=straight.writes, send=signal.SIGINT)
    assert stopped.code == 130
    assert stopped.stderr.splitlines()[-1] == "sdcli: error: stopped"
    again = forks.sdcli(*command)
    assert again.code == 0 and "rows are there already" in again.stderr
    assert not again.stderr.startswith(f"run folder {tmp_path / 'run'}: 0 of")


def test_other_settings_in_the_same_folder_are_refused_and_elsewhere_begin_anew(shell: Shell) -> None:
    command = ("bench", "--schedulers", "ddim", "--steps", "2", *QUICK)
    assert shell(*command, "--run", "r").code == 0
    before = tree(Path("r"))
    other = shell(*command, "--seed", 5, "--run", "r")
    assert (other.code, other.stdout) == (ExitCode.INPUT, "")
    assert "seed was 0 and is 5 now; repeat the first command to resume" in other.stderr
    assert tree(Path("r")) == before
    assert shell(*command).code == shell(*command, "--seed", 5).code == 0
    assert len(list(Path("runs").glob("bench-*"))) == 2


def flipped(data: bytes) -> bytes:
    """The same with another lowest bit in the last value but one: a number as good as any."""
    return data[:-16] + bytes([data[-16] ^ 1]) + data[-15:]


@pytest.mark.parametrize("damage", [lambda data: data[:-100], flipped, lambda _: b""], ids=["cut", "flipped", "empty"])
def test_a_damaged_reference_is_computed_again_with_a_warning(
    sd1: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    (first,) = rows_of(sd1, tmp_path, schedulers="ddim", steps="2", reference_steps=8)
    path = tmp_path / "reference.safetensors"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(SdcliWarning, match="damaged and left aside"):
        _, second = rows_of(sd1, tmp_path, schedulers="ddim,dpm", steps="2", reference_steps=8)
    assert second["scheduler"] == "dpm"
    assert torch.equal(load_file(path)["latents"], load_file_of(whole, tmp_path)["latents"])
    assert first["latent_rmse"] > 0


def load_file_of(data: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "whole.safetensors").write_bytes(data)
    return load_file(folder / "whole.safetensors")


def test_of_all_those_that_cannot_are_told_and_the_others_go_on(shell: Shell, model: Path) -> None:
    models.edit_json(model / "scheduler" / "scheduler_config.json", prediction_type="sample")
    models.edit_json(model / "sdcli.json") if (model / "sdcli.json").exists() else None
    ended = shell("bench", "--model", model, "--steps", "2", *QUICK, "--json")
    assert (ended.code, ended.stderr) == (0, "")
    rows = {row["scheduler"]: row for row in records(ended.lines)}
    assert set(rows) == set(names())
    assert rows["dpm2"]["status"] == "skipped" and "cannot sample this model" in rows["dpm2"]["note"]
    assert rows["ddim"]["status"] == "done"
    named = shell("bench", "--model", model, "--schedulers", "ddim,dpm2", "--steps", "2", *QUICK)
    assert named.code == ExitCode.USAGE and "dpm2 cannot sample this model" in named.stderr


def test_a_scheduler_of_another_package_is_measured_and_a_broken_one_an_error_only_when_chosen(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "from sdcli.schedulers import Scheduler, find\nimport dataclasses\nGENTLE = dataclasses.replace(find('heun'))\n"
    )
    install(tmp_path, "gentle_bench", {"gentle": "gentle_bench:GENTLE", "bursts": "gentle_bench:MISSING"}, source)
    monkeypatch.syspath_prepend(str(tmp_path))
    gentle = shell("bench", "--schedulers", "gentle,heun", "--steps", "2", *QUICK, "--json")
    assert (gentle.code, gentle.stderr) == (0, "")
    ours, theirs = records(gentle.lines)
    assert ours["scheduler"] == "gentle" and ours["evaluations"] == 3
    assert ours["latent_rmse"] == theirs["latent_rmse"]
    broken = shell("bench", "--schedulers", "bursts", "--steps", "2", *QUICK)
    assert broken.code == ExitCode.USAGE and "its plug-in does not load" in broken.stderr
    notes = plan_bench(BenchSpec(steps="2")).notes
    assert len(notes) == 1 and notes[0].startswith("scheduler bursts: its plug-in does not load")
    sys.modules.pop("gentle_bench", None)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--steps", "5,x"], ExitCode.USAGE, "--steps 5,x: are no numbers of steps; write them as 5,10,20,50"),
        (["--steps", "0"], ExitCode.USAGE, "--steps 0: out of range"),
        (["--schedulers", "ddmi"], ExitCode.USAGE, "scheduler 'ddmi' is unknown; did you mean"),
        (["--schedulers", "ddim,,dpm"], ExitCode.USAGE, "one is empty"),
        (["--schedulers", "ddim", "--steps", "501"], ExitCode.USAGE, "ddim cannot do 501 steps"),
        (["--reference-steps", "3"], ExitCode.USAGE, "--reference-steps 3: out of range"),
        (["--csv", "table.txt"], ExitCode.USAGE, "--csv table.txt: is no .csv file"),
        (["--plot", "figure.jpg"], ExitCode.USAGE, "--plot figure.jpg: is no .png file"),
        (["--plot", "a.png", "--plot-quality", "frechet"], ExitCode.USAGE, "--plot-quality frechet without --data"),
        (["--plot-quality", "psnr"], ExitCode.USAGE, "--plot-quality without --plot"),
        (["--plot-over", "steps"], ExitCode.USAGE, "--plot-over without --plot"),
        (["--features", "broken/a.png"], ExitCode.USAGE, "--features without --data"),
        (
            ["--plot", "a.png", "--schedulers", "euler-a,ddpm"],
            ExitCode.USAGE,
            "none of these rows will have a distance",
        ),
        (["--plot", "a.png", "--schedulers", "deis", "--steps", "5"], ExitCode.USAGE, "none of these rows"),
        (["--csv", "/proc/t.csv"], ExitCode.OUTPUT, "/proc: cannot be written"),
        (["--schedulers", "lms:order"], ExitCode.USAGE, "--schedulers lms:order: 'order' is no option"),
        (["--schedulers", "lms:order=x"], ExitCode.USAGE, "--schedulers lms:order=x: 'order=x' is no option"),
        (["--schedulers", "ddim:timestep-spacing=leading"], ExitCode.USAGE, "there are order, sigmas, eta, variance"),
        (["--schedulers", "dpm:eta=1"], ExitCode.USAGE, "--eta 1.0: scheduler dpm takes no --eta"),
        (["--schedulers", "lms:order=9"], ExitCode.USAGE, "--order 9: scheduler lms does not take it"),
        (["--class", "cat"], ExitCode.USAGE, "this model draws from a prompt"),
        (["--class", "cat", "--prompt", "dog"], ExitCode.USAGE, "--prompt and --class exclude each other"),
        (["--guidance", "0.5"], ExitCode.USAGE, "--guidance 0.5: out of range"),
        (["--prompt", "a {dog|cat}"], ExitCode.USAGE, "--prompt 'a {dog|cat}': has a wildcard"),
        (["--data", "nowhere"], ExitCode.INPUT, "--data nowhere: is no folder"),
        (["--data", "empty"], ExitCode.INPUT, "--data empty: holds no picture"),
        (["--data", "broken"], ExitCode.INPUT, "broken/a.png: is no picture"),
        (["--data", "pipes"], ExitCode.INPUT, "pipes/a.png: is no regular file"),
        (["--data", "broken", "--features", "nowhere.pth"], ExitCode.INPUT, "nowhere.pth: no such file"),
        (["--model", "nowhere"], ExitCode.INPUT, "nowhere: no such model"),
        (["--run", "broken"], ExitCode.INPUT, "broken: holds a.png but no bench"),
        (["--csv", "there.csv", "--if-exists", "error"], ExitCode.OUTPUT, "there.csv: exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(
    shell: Shell, arguments: list[str], code: ExitCode, words: str
) -> None:
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"no picture")
    Path("there.csv").touch()
    Path("pipes").mkdir()
    os.mkfifo("pipes/a.png")
    before = tree(Path())
    ended = shell("bench", *arguments)
    assert (ended.code, ended.stdout) == (code, "")
    assert words in ended.stderr
    assert tree(Path()) == before, "no folder is made, and nothing is left in one that was there"


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_start": 1e-20, "beta_end": 0.02, "beta_schedule": "linear"},
        {"num_train_timesteps": 1},
        {"num_train_timesteps": 5, "trained_betas": [0.1, 0.2, 1e-20, 0.2, 0.2]},
        {"num_train_timesteps": 30, "trained_betas": [1 - 1e-15] * 21 + [0.9] * 9},
    ],
    ids=["no noise at first", "one timestep", "equal levels", "nothing but noise"],
)
def test_noise_schedules_without_levels_to_solve_between_are_refused(
    shell: Shell, model: Path, changes: dict[str, Any]
) -> None:
    models.edit_json(model / "scheduler" / "scheduler_config.json", steps_offset=0, **changes)
    ended = shell("bench", "--model", model, "--schedulers", "ddim", "--steps", "1", *QUICK)
    assert (ended.code, ended.stdout) == (ExitCode.INPUT, ""), ended.stderr
    assert tree(Path()) == {}


def test_the_model_s_own_scheduler_and_steps_refuse_nothing(model: Path) -> None:
    models.edit_json(model / "scheduler" / "scheduler_config.json", num_train_timesteps=20)
    (model / "sdcli.json").write_text('{"scheduler": "f-pndm", "steps": 3}', encoding="utf-8")
    plan = plan_bench(BenchSpec(model=str(model), schedulers="ddim", steps="1,20"))
    assert [cell.steps for cell in plan.cells] == [1, 20]


def test_epsilon_at_zero_terminal_snr_has_no_solution_to_compare_with(shell: Shell, model: Path) -> None:
    models.edit_json(
        model / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    ended = shell("bench", "--model", model, "--schedulers", "dpm")
    assert ended.code == ExitCode.USAGE and "predicts epsilon at zero terminal SNR" in ended.stderr


def test_v_at_zero_terminal_snr_is_compared(model: Path, tmp_path: Path) -> None:
    changes = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    models.edit_json(model / "scheduler" / "scheduler_config.json", **changes)
    rows = rows_of(model, tmp_path / "run", schedulers="ddim,dpm,euler", steps="5,50", reference_steps=20, guidance=1.0)
    few, many = ([row["latent_rmse"] for row in rows if row["steps"] == steps] for steps in (5, 50))
    assert all(b < a / 4 for a, b in zip(few, many, strict=True))


def test_the_plan_of_all_schedulers_takes_the_registry_and_rising_steps() -> None:
    plan = plan_bench(BenchSpec(steps="20,5,5"))
    assert [(cell.scheduler.name, cell.steps) for cell in plan.cells] == [(n, s) for n in names() for s in (5, 20)]
    assert len({cell.key for cell in plan.cells}) == len(plan.cells)
    optional = plan_bench(BenchSpec(schedulers="ddim:eta=1,ddim,lms:order=2,dpm:order=3:sigmas=karras", steps="5"))
    assert [cell.label for cell in optional.cells] == [
        "ddim eta=1.0",
        "ddim",
        "lms order=2",
        "dpm sigmas=karras order=3",
    ]
    assert [cell.scheduler.is_stochastic for cell in optional.cells] == [True, False, False, False]
    assert len({cell.key for cell in optional.cells}) == 4
    chosen = plan_bench(BenchSpec(schedulers="dpm,DPM++ 2M Karras,lms,dpmpp_2m_karras", steps="5"))
    assert [cell.label for cell in chosen.cells] == ["dpm", "dpm sigmas=karras", "lms"]
    assert plan.subjects == PROMPTS
    assert find(plan.cells[0].scheduler.name) == plan.cells[0].scheduler


def test_frechet_of_the_drawn_pictures_to_themselves_is_0(sd1: Path, pictures: Path) -> None:
    network = frechet.extractor("builtin", torch.device("cpu"))
    files, drawn = RunningGaussian(), RunningGaussian()
    paths = frechet.pictures(pictures)
    assert list(frechet.look_at_files(network, paths, (32, 32), files)) == [6]
    pixels = torch.cat([to_pixels(fit(load_image(path), 32, 32)) for path in paths])
    for some in pixels.split(4):
        frechet.look_at_drawn(network, some + 1e-3, drawn)  # less than half of one of 255 values: the file is the same
    assert frechet_distance(files.gaussian(), drawn.gaussian()) == pytest.approx(0.0, abs=1e-6)
    darker = RunningGaussian()
    frechet.look_at_drawn(network, pixels - 0.5, darker)
    assert frechet_distance(files.gaussian(), darker.gaussian()) > 1e-4


def test_folders_are_no_pictures_whatever_their_names_and_an_animation_is_told_once(
    sd1: Path, own_pictures: Path, tmp_path: Path
) -> None:
    (own_pictures / "folder.png").mkdir()
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(own_pictures / "folder.png" / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(SdcliWarning, match="only the first of 2 frames") as told:
        (row,) = rows_of(sd1, tmp_path / "r", schedulers="euler-a", steps="1", data=own_pictures)
    assert row["data_pictures"] == 7
    assert sum(issubclass(one.category, SdcliWarning) for one in told) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guidance", "closer"), [(1.0, ["s-pndm", "f-pndm", "pndm", "dpm", "heun"]), (3.0, ["s-pndm", "dpm"])]
)
def test_on_the_embedded_model_higher_orders_end_closer_to_the_solution_than_ddim(
    tmp_path: Path, guidance: float, closer: list[str]
) -> None:
    how: dict[str, Any] = {"prompt": ("a picture of a puppy", "an apple on a blue background"), "reference_steps": 60}
    chosen = ",".join(["ddim", *closer])
    rows = rows_of(store.BUILTIN_FOLDER, tmp_path, schedulers=chosen, steps="10,20,50", guidance=guidance, **how)
    apart = {(row["scheduler"], row["steps"]): row["latent_rmse"] for row in rows}
    for steps in (10, 20, 50):
        for name in closer:
            assert apart[name, steps] < apart["ddim", steps]
