"""The batch story: every image exactly once and as generate draws it, whatever is drawn beside it or breaks it off."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel

from sdcli import batch, generate
from sdcli.batch import Failed, Summary
from sdcli.errors import ExitCode, InputError, OutputError, PartialError, SdcliWarning, Stopped, UsageError
from sdcli.files import sha256
from sdcli.jobs import finish
from sdcli.jobs.finish import Finished
from sdcli.jobs.lines import MAX_LINE_BYTES
from sdcli.jobs.plan import plan_batch
from sdcli.jobs.stdin import BLOCK_BYTES
from sdcli.pipeline import vae
from sdcli.pipeline.bundle import load_bundle
from sdcli.pipeline.contexts import contexts
from sdcli.pipeline.metadata import read_record
from sdcli.plan import plan
from sdcli.specs import BatchSpec, GenerateSpec
from tests import models
from tests.forks import Ended, Forks

PROMPTS = ("a cat", "a dog", "a red apple", "a cat, " * 30)
LONG = ("a picture of a (penguin:1.2) in the corner, " * 9) + "blue"


def jobs_of(count: int, *, steps: Sequence[int] = (2, 3)) -> list[dict[str, Any]]:
    """Jobs over a few prompts and settings, with and without seeds, the last ones equal."""
    jobs = [{"prompt": PROMPTS[i % 4], "steps": steps[i % 2], "seed": i} for i in range(count - 3)]
    return [*jobs, *[{"prompt": "a penguin"}] * 3]


class Folder:
    """An output folder and its job file, for the tiny model."""

    def __init__(self, path: Path, model: Path) -> None:
        self.path, self.model, self.out = path, model, path / "out"

    def write(self, jobs: Iterable[dict[str, Any]]) -> Path:
        path = self.path / "jobs.jsonl"
        path.write_text("".join(f"{json.dumps(job)}\n" for job in jobs), encoding="utf-8")
        return path

    def spec(self, jobs: Iterable[dict[str, Any]], *, how: Any = None, **own: Any) -> BatchSpec:
        settings = {"model": str(self.model), "output": self.out, "if_exists": "error", "steps": 2, **own}
        return BatchSpec(jobs=self.write(jobs), defaults=GenerateSpec(**settings), **(how or {}))

    def run(self, jobs: Iterable[dict[str, Any]], **options: Any) -> list[Any]:
        return events(self.spec(jobs, **options))

    def run_on(self, jobs: list[dict[str, Any]], change: Callable[[], object]) -> list[Any]:
        """Run jobs of which the first is done, with something that happens when all are looked at and none is drawn."""
        self.run(jobs[:1])
        spec = self.spec(jobs)
        told = batch.run(spec, plan_batch(spec), [])
        assert isinstance(next(told), batch.Progress)  # of the one that is done
        change()
        return heard(told)

    def made(self, jobs: Iterable[dict[str, Any]], **options: Any) -> list[Finished]:
        return [event for event in self.run(jobs, **options) if isinstance(event, Finished)]

    def pictures(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.out.glob("*.png")}

    def ledger(self) -> list[dict[str, Any]]:
        """Every line of the ledger, each of which must be JSON."""
        path = self.out / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def check_whole(self, count: int) -> None:
        """Every image once, in the ledger and on the disk, and nothing else."""
        pictures, rows = self.pictures(), self.ledger()
        assert sorted(row["path"] for row in rows) == sorted(pictures)
        assert len({row["key"] for row in rows}) == len(rows) == count
        assert {path.name for path in self.out.iterdir()} - set(pictures) <= {"ledger.jsonl", ".lock"}


@pytest.fixture
def folder(tmp_path: Path, sd1: Path) -> Folder:
    return Folder(tmp_path, sd1)


def events(spec: BatchSpec, stop: Sequence[int] = ()) -> list[Any]:
    """All that a run tells; what it raises at the end of a batch with failures is the last."""
    return heard(batch.run(spec, plan_batch(spec), stop))


def heard(told: Iterator[Any]) -> list[Any]:
    found: list[Any] = []
    try:
        while (event := next(told, None)) is not None:
            found.append(event)
    except (PartialError, Stopped) as error:
        found.append(error)
    return found


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def pixels(path: Path) -> NDArray[np.int16]:
    return np.asarray(Image.open(path), dtype=np.int16)


def by_generate(folder: Folder, job: dict[str, Any], **own: Any) -> NDArray[np.int16]:
    spec = GenerateSpec(model=str(folder.model), output=folder.path / "single", if_exists="overwrite", **{**job, **own})
    (record,) = (event for event in generate.run(spec, plan(spec)) if isinstance(event, generate.ImageRecord))
    assert record.path is not None
    return pixels(record.path)


def test_each_picture_is_that_of_generate_and_says_so(folder: Folder) -> None:
    jobs = [{"prompt": prompt, "seed": i, "steps": 2 + i % 2} for i, prompt in enumerate([*PROMPTS, LONG])]
    made = folder.made(jobs)
    assert len(made) == len(jobs)
    for event in made:
        job = jobs[event.job.line - 1]
        assert abs(pixels(event.job.target) - by_generate(folder, job)).max() <= 2
        record = read_record(event.job.target) or {}
        assert {key: record[key] for key in job} == job
        assert record["job"] == event.job.key
        assert {**event.facts, "path": 0, "seconds": 0} == {**record, "path": 0, "seconds": 0}
    folder.check_whole(len(jobs))


def test_jobs_with_and_without_loras_of_several_scales_are_those_of_generate(folder: Folder, sd1: Path) -> None:
    file = models.write_lora(folder.path / "a.safetensors", sd1)
    loras = [[f"{file}:0.5"], [], [str(file)], [f"{file}:-0.25", str(file)], [], [f"{file}:0"]]
    jobs = [{"prompt": "a cat", "seed": 7, "id": i, "lora": lora} for i, lora in enumerate(loras)]
    folder.made([*jobs, {"prompt": "a cat", "seed": 7, "id": 6}], deterministic=True)
    pictures = [pixels(folder.out / f"{i}.png") for i in range(7)]
    for i, lora in enumerate(loras):
        alone = by_generate(folder, {"prompt": "a cat", "seed": 7}, lora=tuple(lora), steps=2, deterministic=True)
        assert np.array_equal(pictures[i], alone)
    assert all(np.array_equal(pictures[1], pictures[i]) for i in (4, 5, 6))  # bit by bit, whatever was drawn between
    assert len({one.tobytes() for one in pictures}) == 4
    assert "loras" not in (read_record(folder.out / "1.png") or {})
    assert [one["scale"] for one in (read_record(folder.out / "3.png") or {})["loras"]] == [-0.25, 1.0]


@pytest.mark.parametrize("scheduler", ["dpm", "euler-a"])
def test_deterministic_pictures_are_bit_equal_in_any_company_and_those_of_generate(
    folder: Folder, scheduler: str
) -> None:
    jobs = [{"prompt": prompt, "seed": i, "id": i, "scheduler": scheduler} for i, prompt in enumerate([*PROMPTS, LONG])]
    folder.made(jobs, deterministic=True)
    first = folder.pictures()
    turned = Folder(folder.path, folder.model)
    turned.out = folder.path / "turned"
    turned.made([*reversed(jobs), {"prompt": "another"}], deterministic=True, batch_size=3)
    assert {name: turned.pictures()[name] for name in first} == first
    for job in jobs:
        alone = {key: value for key, value in job.items() if key != "id"}
        drawn = by_generate(folder, alone, steps=2, deterministic=True, batch_size=2)
        assert (drawn == pixels(folder.out / f"{job['id']}.png")).all()


@pytest.mark.parametrize("kind", ["alone", "from a picture", "in a part of one", "by a model for that"])
def test_deterministic_pictures_are_those_of_generate_of_shares_and_of_what_a_resumed_batch_makes(
    folder: Folder, forks: Forks, inpainting: Path, kind: str
) -> None:
    photo, mask = folder.path / "photo.png", folder.path / "mask.png"
    Image.effect_noise((models.SIZE, models.SIZE), 60).convert("RGB").save(photo)
    Image.linear_gradient("L").resize((models.SIZE, models.SIZE)).save(mask)
    start: dict[str, Any] = {} if kind == "alone" else {"init_image": photo, "strength": 0.6}
    start |= {"mask": mask} if kind.startswith(("in", "by")) else {}
    folder.model = inpainting if kind.startswith("by") else folder.model
    own = {"steps": 3, "scheduler": "euler-a", "deterministic": True, **start}
    jobs = [{"prompt": prompt, "seed": i, "id": i} for i, prompt in enumerate((*PROMPTS[1:], LONG))]
    folder.made(jobs, **own)
    whole = folder.pictures()
    for job in jobs[::2]:
        drawn = by_generate(folder, {"prompt": job["prompt"], "seed": job["seed"]}, **own, batch_size=3)
        assert (drawn == pixels(folder.out / f"{job['id']}.png")).all()
    (folder.out / "1.png").unlink()
    folder.made(jobs, **own)
    assert folder.pictures() == whole
    given = [word for name, value in start.items() for word in (f"--{name.replace('_', '-')}", value)]
    given += ["--model", folder.model, "--steps", 3, "--scheduler", "euler-a", "--deterministic"]
    made = []
    for name, shares in (
        ("whole", ["1/1"]),
        ("shared", ["2/2", "1/2"]),
    ):  # by processes of one kind
        folder.out = folder.path / name
        for share in shares:
            command = ["batch", folder.write(reversed(jobs)), "-o", folder.out, *given, "--shard", share]
            ended = forks.sdcli(*command)
            assert ended.code == 0, ended.stderr
        made.append(folder.pictures())
    assert made[0] == made[1] and made[0].keys() == whole.keys()


def test_jobs_of_equal_settings_are_drawn_together_and_a_prompt_is_encoded_once(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    encoded: list[int] = []
    unet, encoder = UNet2DConditionModel.forward, CLIPTextModel.forward

    def counted_unet(self: Any, sample: Any, *arguments: Any, **named: Any) -> Any:
        batches.append(len(sample))
        return unet(self, sample, *arguments, **named)

    def counted_encoder(self: Any, *arguments: Any, **named: Any) -> Any:
        encoded.append(1)
        return encoder(self, *arguments, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted_unet)
    monkeypatch.setattr(CLIPTextModel, "forward", counted_encoder)
    jobs = [{"prompt": PROMPTS[i % 3], "seed": i, "steps": 2 + i % 2} for i in range(12)]
    folder.run([*jobs, {"prompt": LONG}], batch_size=4, scheduler="ddim")
    # Six jobs of two steps in batches of 4 and 2, six of three likewise, the one of two chunks alone; all guided.
    assert sorted(batches) == [2] * 2 + [4] * 5 + [8] * 5
    assert len(encoded) == 3 + 1 + 2  # the prompts, the negative one in one chunk and in two, the long prompt


def test_jobs_with_wildcards_are_what_generate_draws_of_the_words_they_drew(folder: Folder) -> None:
    jobs = [{"prompt": "a {red|blue} {dog|cat}", "negative": "{dark|}", "seed": seed} for seed in range(3)]
    made = folder.made([*jobs, {"prompt": "a red dog", "seed": 1}], deterministic=True)
    assert len({one.facts["prompt"] for one in made}) > 2
    for one in made[:3]:
        assert one.facts["prompt_template"] == "a {red|blue} {dog|cat}" and one.facts["negative_template"] == "{dark|}"
        words = {key: one.facts[key] for key in ("prompt", "negative", "seed")}
        alone = by_generate(folder, words, steps=2, deterministic=True)
        assert (alone == pixels(one.job.target)).all()
    folder.check_whole(4)
    assert folder.made(jobs, deterministic=True) == []


def test_jobs_may_leave_out_other_numbers_of_layers(folder: Folder) -> None:
    jobs = [{"prompt": "a cat", "seed": seed, "clip_skip": skip} for seed in (1, 2) for skip in (0, 1)]
    made = folder.made(jobs)
    for one in made:
        job = jobs[one.job.line - 1]
        assert one.facts.get("clip_skip", 0) == job["clip_skip"]
        other = job | {"clip_skip": 1 - int(str(job["clip_skip"]))}
        assert abs(pixels(one.job.target) - by_generate(folder, job, steps=2)).max() <= 2
        assert abs(pixels(one.job.target) - by_generate(folder, other, steps=2)).max() > 10
    folder.check_whole(4)


def test_a_job_may_start_from_a_picture_of_which_another_makes_another_job(folder: Folder) -> None:
    size, photo, mask = (models.SIZE, models.SIZE), folder.path / "photo.png", folder.path / "mask.png"
    Image.linear_gradient("L").resize(size).convert("RGB").save(photo)
    Image.linear_gradient("L").resize(size).save(mask)
    started = {"prompt": "a cat", "seed": 1, "init_image": str(photo), "strength": 0.5}
    jobs = [
        {**started, "id": "a"},
        {**started, "mask": str(mask), "id": "b"},
        {"prompt": "a cat", "seed": 1, "id": "c"},
    ]
    made = {event.job.target.stem: event for event in folder.made(jobs)}
    for job in jobs:
        own = {
            key: Path(value) if key in ("init_image", "mask") else value for key, value in job.items() if key != "id"
        }
        alone = by_generate(folder, own, steps=2)
        assert abs(pixels(made[str(job["id"])].job.target) - alone).max() <= 2
    assert made["a"].facts["strength"] == 0.5 and "init_image" not in made["c"].facts
    assert len({event.job.key for event in made.values()}) == 3
    assert folder.made(jobs) == []
    Image.new("RGB", size, "blue").save(photo)
    assert [event.how for event in folder.made(jobs[:1], if_exists="overwrite")] == ["made"]


def test_the_same_batch_again_does_nothing_and_a_picture_that_is_gone_is_made_again(folder: Folder) -> None:
    jobs = jobs_of(6)
    made = folder.made(jobs)
    before = folder.pictures()
    assert [e for e in folder.run(jobs) if isinstance(e, Summary)] == [Summary(0, 0, 6, 0)]
    made[2].job.target.unlink()
    assert [event.job.key for event in folder.made(jobs)] == [made[2].job.key]
    assert folder.pictures().keys() == before.keys()


def test_a_picture_without_a_record_is_adopted_by_what_it_says_of_itself(folder: Folder) -> None:
    jobs = jobs_of(5)
    folder.run(jobs)
    before = folder.pictures()
    (folder.out / "ledger.jsonl").unlink()
    again = folder.made(jobs)
    assert [event.how for event in again] == ["adopted"] * 5
    assert folder.pictures() == before
    folder.check_whole(5)


@pytest.mark.parametrize("form", ["webp", "jpg"])
def test_other_formats_are_written_and_adopted_as_well(folder: Folder, form: str) -> None:
    jobs = [{"prompt": "a cat", "id": "x"}, {"prompt": "a dog"}]
    made = folder.made(jobs, format=form)
    assert [event.job.target.suffix for event in made] == [f".{form}"] * 2
    (folder.out / "ledger.jsonl").unlink()
    assert [event.how for event in folder.made(jobs, format=form)] == ["adopted"] * 2


@pytest.mark.parametrize("form", ["png", "webp", "jpg"])
def test_a_picture_that_is_cut_short_is_not_adopted(folder: Folder, form: str) -> None:
    (made,) = folder.made([{"prompt": "a cat", "id": "x"}], format=form)
    target = made.job.target
    target.write_bytes(target.read_bytes()[:-40])
    (folder.out / "ledger.jsonl").unlink()
    assert Summary(0, 0, 0, 1) in folder.run([{"prompt": "a cat", "id": "x"}], format=form)


def test_a_picture_of_something_else_is_not_touched_unless_asked(folder: Folder) -> None:
    folder.run([{"prompt": "a cat", "id": "x"}])
    before = folder.pictures()
    changed = [{"prompt": "a dog", "id": "x"}, {"prompt": "a dog", "id": "y"}]
    told = folder.run(changed)
    assert isinstance(told[-1], PartialError)
    (failed,) = (event for event in told if isinstance(event, Failed))
    assert (failed.line, type(failed.error)) == (1, OutputError)
    assert folder.pictures()["x.png"] == before["x.png"] and "y.png" in folder.pictures()
    assert Summary(0, 0, 2, 0) in folder.run(changed, if_exists="skip")
    assert folder.pictures()["x.png"] == before["x.png"]
    assert Summary(1, 0, 1, 0) in folder.run(changed, if_exists="overwrite")
    assert folder.pictures()["x.png"] != before["x.png"]
    assert isinstance(folder.run([{"prompt": "a cat", "id": "x"}])[-1], PartialError)  # what is there is a dog now


def test_equal_jobs_of_one_seed_are_one_picture(folder: Folder) -> None:
    assert Summary(1, 0, 2, 0) in folder.run([{"prompt": "a cat", "seed": 1}] * 3)
    folder.check_whole(1)


def test_two_shares_make_what_one_run_makes(folder: Folder) -> None:
    jobs = jobs_of(9)
    folder.run(jobs, deterministic=True)
    whole = folder.pictures()
    folder.out = folder.path / "shared"
    first = folder.made(jobs, deterministic=True, how={"shard": "1/2"})
    second = folder.made(jobs, deterministic=True, how={"shard": "2/2"})
    assert (len(first), len(second)) == (5, 4)
    assert folder.pictures() == whole
    assert len(folder.ledger()) == 9


def test_launched_processes_make_what_one_makes(folder: Folder, forks: Forks) -> None:
    jobs, settings = folder.write(jobs_of(7)), ("--model", folder.model, "--steps", 2, "--deterministic")
    assert forks.sdcli("batch", jobs, "-o", folder.out, *settings).code == 0
    whole = folder.pictures()
    folder.out = folder.path / "launched"
    command = ["batch", jobs, "-o", folder.out, *settings]
    code = "import os, sys; os.environ.update(WORLD_SIZE='2', RANK=arguments.pop(), LOCAL_RANK='0')\n"
    code += "from sdcli.cli import app; sys.exit(app.run(arguments))"
    for rank in ("0", "1"):
        ended = forks.python(code, [*map(str, command), rank])
        assert ended.code == 0, ended.stderr
    assert folder.pictures() == whole
    assert len(folder.ledger()) == 7


def _killed_again_and_again(folder: Folder, forks: Forks, count: int, kills: int) -> None:
    jobs = jobs_of(count, steps=(1, 2))
    source = folder.write(jobs)

    def run(out: Path, **how: Any) -> Ended:
        command = ["batch", source, "-o", out, "--model", folder.model, "--steps", 1, "--deterministic", "--quiet"]
        return forks.sdcli(*command, in_all_threads=True, **how)

    straight = Folder(folder.path, folder.model)
    straight.out = folder.path / "straight"
    whole = run(straight.out)
    assert whole.code == 0, whole.stderr
    straight.check_whole(count)
    chance = random.Random(5)
    for _ in range(kills):
        ended = run(folder.out, at=chance.randrange(1, 2 * whole.writes // kills), send=signal.SIGKILL)
        assert ended.code in (-signal.SIGKILL, 0), ended.stderr
        assert {row["path"] for row in folder.ledger()} <= folder.pictures().keys()
        for name, data in folder.pictures().items():
            assert straight.pictures()[name] == data
    for part in folder.out.glob(".*.part"):  # those of the last minute are left to processes that may be alive
        os.utime(part, (0, 0))
    assert run(folder.out).code == 0
    folder.check_whole(count)
    assert folder.pictures() == straight.pictures()


def test_killed_at_random_moments_and_run_again_every_image_is_there_once_and_the_same(
    folder: Folder, forks: Forks
) -> None:
    _killed_again_and_again(folder, forks, 8, 4)


@pytest.mark.slow
def test_two_hundred_jobs_killed_ten_times(folder: Folder, forks: Forks) -> None:
    _killed_again_and_again(folder, forks, 200, 10)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_images_in_flight(folder: Folder, forks: Forks, number: int, code: int) -> None:
    command = ["batch", folder.write({"prompt": "a cat", "seed": i} for i in range(14)), "-o", folder.out]
    command += ["--model", folder.model, "--steps", 2, "--batch-size", 1]
    other = [folder.path / "other" if one == folder.out else one for one in command]
    at = forks.sdcli(*other, in_all_threads=True).writes // 6  # in the first third, and some are on their way
    ended = forks.sdcli(*command, in_all_threads=True, at=at, send=number)
    assert ended.code == code
    assert "the same command again makes what is missing" in ended.stderr
    there = len(folder.pictures())
    assert 0 < there < 14
    folder.check_whole(there)
    assert forks.sdcli(*command).code == 0
    folder.check_whole(14)


def test_a_gallery_shows_what_there_is_after_failures_and_after_a_signal(folder: Folder) -> None:
    how = {"keep_going": True, "gallery": True}
    with pytest.warns(SdcliWarning, match="promt: unknown key"):
        *_, page, error = events(folder.spec([{"promt": "?"}, *jobs_of(5)], how=how))
    assert isinstance(error, PartialError) and page == batch.Gallery(folder.out / "gallery.html", 5, 0)
    folder.out = folder.path / "other"
    *_, page, error = events(folder.spec(jobs_of(14), how=how), stop=[signal.SIGTERM])
    assert isinstance(error, Stopped) and isinstance(page, batch.Gallery)
    assert page.pictures == len(folder.pictures()) < 14


def test_a_gallery_has_the_pictures_of_all_shares_in_the_order_of_the_jobs_whenever_they_were_made(
    folder: Folder,
) -> None:
    jobs = [{"prompt": f"a {n}", "id": f"{9 - n}", "steps": 1 + n % 2} for n in range(6)]
    for share in ("2/2", "1/2"):
        folder.run(jobs, how={"shard": share})
    before = folder.pictures()
    *_, page = folder.run(jobs, how={"gallery": True})
    assert page == batch.Gallery(folder.out / "gallery.html", 6, 0) and folder.pictures() == before
    assert re.findall(r'href="./(\d).png"', page.path.read_text(encoding="utf-8")) == ["9", "8", "7", "6", "5", "4"]


def test_of_launched_processes_every_one_writes_the_gallery_and_the_first_tells_it(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    jobs, told = jobs_of(3), []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        told += [one.pictures for one in folder.run(jobs, how={"gallery": True}) if isinstance(one, batch.Gallery)]
    assert told == [2]
    page = (folder.out / "gallery.html").read_text(encoding="utf-8")
    assert len(set(re.findall(r'href="\./([^"]+\.png)"', page))) == 3


def test_what_is_written_below_the_jobs_meanwhile_is_for_the_next_call(folder: Folder) -> None:
    spec = folder.spec(jobs_of(4), how={"gallery": True})
    told = batch.run(spec, plan_batch(spec), [])
    with spec.jobs.open("a", encoding="utf-8") as stream:
        stream.write('{"prompt": "one more", "steps": 1}\n{"prompt": "hal')
    *_, page = told
    assert page.pictures == len(folder.pictures()) == len(folder.ledger()) == 4


def test_a_signal_before_the_first_image_is_in_flight_draws_none(folder: Folder) -> None:
    told = events(folder.spec([{"prompt": "a cat"}]), stop=[signal.SIGTERM])
    assert isinstance(told[-1], Stopped) and folder.pictures() == {}


def test_a_full_disk_ends_the_batch_and_spoils_nothing(folder: Folder, forks: Forks) -> None:
    command = ["batch", folder.write(jobs_of(14)), "--model", folder.model, "--steps", 1, "-o"]
    assert forks.sdcli(*command, folder.path / "whole").code == 0
    largest = max(path.stat().st_size for path in (folder.path / "whole").glob("*.png"))
    ended = forks.sdcli(*command, folder.out, file_limit=largest + 500)  # room for each picture, not for the ledger
    assert (ended.code, ended.stderr.count("error:")) == (ExitCode.OUTPUT, 1)
    assert 0 < len(folder.ledger()) < 14
    assert forks.sdcli(*command, folder.out).code == 0
    folder.check_whole(14)


def test_a_job_that_fails_leaves_the_others_alone_and_is_tried_again(folder: Folder) -> None:
    bad = folder.path / "bad.safetensors"
    save_file({"latents": torch.full((1, *models.LATENTS), 3e38)}, bad, {"mode": "noise"})
    broken = models.copy(folder.model, folder.path / "broken")
    models.weight_file(broken / "unet").write_bytes(b"")
    jobs = [{"prompt": "a cat"}, {"prompt": "a cat", "latents": str(bad)}, {"prompt": "a cat", "model": str(broken)}]
    for made in (1, 0):
        told = folder.run([*jobs, {"prompt": "a dog", "latents": str(bad)}] if made else jobs)
        assert isinstance(told[-1], PartialError)
        failures = {event.line: event.error.exit_code for event in told if isinstance(event, Failed)}
        assert failures[2] == ExitCode.NUMERICAL and failures[3] == ExitCode.INPUT
        assert sum(isinstance(event, Finished) for event in told) == made
    folder.check_whole(1)
    told = folder.run(jobs, how={"max_failures": 1})
    assert "--max-failures 1" in str(told[-1])
    assert sum(isinstance(event, Failed) for event in told) == 1


def test_a_picture_file_that_turns_out_bad_while_drawing_fails_its_own_jobs_alone(folder: Folder) -> None:
    photo = folder.path / "photo.png"
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(photo)
    jobs = [{"prompt": "a cat", "init_image": str(photo), "strength": 1, "seed": i} for i in range(3)]
    found = folder.run_on([{"prompt": "a dog"}, *jobs, {"prompt": "a dog", "steps": 3}], lambda: cut(photo))
    assert Summary(1, 0, 1, 3) in found and isinstance(found[-1], PartialError)
    failed = [event for event in found if isinstance(event, Failed)]
    assert {(event.line, event.error.exit_code) for event in failed} == {(i, ExitCode.INPUT) for i in (2, 3, 4)}


def test_a_file_that_is_replaced_while_the_batch_runs_is_not_drawn_from_under_the_hash_of_the_other(
    folder: Folder,
) -> None:
    size, photo = (models.SIZE, models.SIZE), folder.path / "photo.png"
    Image.new("RGB", size, "red").save(photo)
    job = {"prompt": "a cat", "init_image": str(photo), "strength": 1}
    found = folder.run_on([{"prompt": "a dog"}, job], lambda: Image.new("RGB", size, "blue").save(photo))
    (failed,) = (event for event in found if isinstance(event, Failed))
    assert "was changed while the batch ran" in str(failed.error)
    assert len(folder.pictures()) == 1
    assert [event.how for event in folder.made([job])] == ["made"]


def test_a_lora_that_is_replaced_while_the_batch_runs_is_not_drawn_with_under_the_hash_of_the_other(
    folder: Folder,
) -> None:
    file = models.write_lora(folder.path / "a.safetensors", folder.model)
    jobs = [{"prompt": "a dog"}, {"prompt": "a cat", "lora": [str(file)]}]
    found = folder.run_on(jobs, lambda: models.write_lora(file, folder.model, gain=0.5))
    (failed,) = (event for event in found if isinstance(event, Failed))
    assert (failed.line, "a.safetensors: was changed while" in str(failed.error)) == (2, True)
    assert [event.how for event in folder.made(jobs[1:])] == ["made"]


def test_memory_that_runs_out_while_decoding_costs_only_the_image_that_is_too_large(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(coder: Any, latents: torch.Tensor) -> torch.Tensor:
        if len(latents) > 1 or latents.shape[-1] > 16:
            raise MemoryError
        return decoded(coder, latents)

    decoded = vae.decode_finite
    monkeypatch.setattr(vae, "decode_finite", small)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SdcliWarning)  # tiles, of which it has one, would not help
        told = folder.run([*[{"prompt": "a cat", "seed": i} for i in range(3)], {"prompt": "a dog", "size": "64x64"}])
    assert Summary(3, 0, 0, 1) in told
    (failed,) = (event for event in told if isinstance(event, Failed))
    assert (failed.line, failed.error.exit_code) == (4, ExitCode.RESOURCES)


def test_an_output_folder_that_is_removed_in_the_middle_ends_the_batch(folder: Folder) -> None:
    jobs = [{"prompt": "a cat", "seed": i} for i in range(6)]
    with pytest.raises(OutputError, match="was removed or replaced while the batch ran"):
        folder.run_on(jobs, lambda: shutil.rmtree(folder.out))
    assert Summary(6, 0, 0, 0) in folder.run(jobs)
    folder.check_whole(6)


def test_a_link_that_leads_nowhere_is_another_picture(folder: Folder) -> None:
    folder.out.mkdir()
    (folder.out / "x.png").symlink_to(folder.path / "nowhere.png")
    jobs = [{"prompt": "a cat", "id": "x"}, {"prompt": "a cat", "id": "y"}]
    assert Summary(1, 0, 0, 1) in folder.run(jobs)
    assert not (folder.path / "nowhere.png").exists()


@pytest.mark.parametrize("is_there", [False, True])
def test_a_picture_that_says_nothing_of_itself_is_known_by_its_record_even_if_the_process_ends_at_once(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    class Ended(BaseException):
        pass

    def ending(*paths: Path) -> None:
        if is_there:
            link(*paths)
        raise Ended

    link = os.link
    monkeypatch.setattr(os, "link", ending)
    with pytest.raises(Ended):
        folder.run([{"prompt": "a cat", "id": "x"}], no_metadata=True)
    monkeypatch.undo()
    assert len(folder.pictures()) == is_there
    assert Summary(not is_there, 0, is_there, 0) in folder.run([{"prompt": "a cat", "id": "x"}], no_metadata=True)
    assert read_record(folder.out / "x.png") is None


def test_a_picture_that_another_process_made_meanwhile_is_no_failure_unless_it_is_another(folder: Folder) -> None:
    (made,) = folder.made([{"prompt": "a cat", "id": "x"}])
    error = OutputError("exists")
    assert isinstance(finish._made_meanwhile(made.job, error), Finished)
    assert isinstance(finish._made_meanwhile(replace(made.job, key="0" * 16), error), Failed)


def test_bad_lines_are_no_failures_of_those_that_stop_a_batch(folder: Folder) -> None:
    jobs = [{"promt": "a"}, {"prompt": "a cat"}, {"prompt": "a dog"}]
    with pytest.warns(SdcliWarning):
        told = folder.run(jobs, how={"keep_going": True, "max_failures": 1}, batch_size=1)
    assert Summary(2, 0, 0, 1) in told and isinstance(told[-1], PartialError)


def test_a_faulty_model_of_the_command_line_ends_the_batch_at_once(folder: Folder) -> None:
    folder.model = models.copy(folder.model, folder.path / "broken")
    models.weight_file(folder.model / "unet").write_bytes(b"")
    with pytest.raises(InputError):
        folder.run([{"prompt": "a cat"}] * 3)


def test_a_number_that_overflows_costs_only_its_own_image(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one image of a micro-batch is not finite, the others are drawn without it."""
    forward = UNet2DConditionModel.forward

    def spoiled(self: Any, sample: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        context = named["encoder_hidden_states"]
        found = forward(self, sample, *arguments, **named)[0]
        is_bad = (context - spoils).abs().amax((1, 2)) < 1e-6
        return (torch.where(is_bad[:, None, None, None], torch.nan, found),)

    spoils = torch.zeros(())
    jobs = [{"prompt": prompt, "seed": i} for i, prompt in enumerate(PROMPTS[:3])]
    bundle = load_bundle(folder.model, device=torch.device("cpu"), dtype=torch.float32)
    spoils = contexts(bundle.conditioner, ["a dog"], None)[0].hidden
    monkeypatch.setattr(UNet2DConditionModel, "forward", spoiled)
    told = folder.run(jobs)
    assert [event.line for event in told if isinstance(event, Failed)] == [2]
    assert sum(isinstance(event, Finished) for event in told) == 2


class Pipe:
    """Stdin as a script writes it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        reader, writer = os.pipe()
        self.stdin, self.end = os.fdopen(reader, "rb"), os.fdopen(writer, "wb", buffering=0)
        patch.setattr(sys, "stdin", self.stdin)

    def write(self, line: object) -> None:
        self.end.write(f"{line if isinstance(line, str) else json.dumps(line)}\n".encode())


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    pipe = Pipe(monkeypatch)
    yield pipe
    pipe.stdin.close()
    pipe.end.close()


def stream(folder: Folder, stop: Sequence[int] = ()) -> Iterator[Any]:
    spec = BatchSpec(jobs=Path("-"), defaults=folder.spec([{}]).defaults)
    for event in batch.run(spec, plan_batch(spec), stop):
        if not isinstance(event, batch.Progress):
            yield event


def test_of_stdin_each_record_goes_out_before_the_next_line_is_there(folder: Folder, pipe: Pipe) -> None:
    told = stream(folder)
    for number, prompt in enumerate(("a cat", "a dog", "a cat")):
        pipe.write({"prompt": prompt})
        event = next(told)
        assert (event.job.line, event.facts["prompt"]) == (number + 1, prompt)
        assert Path(event.facts["path"]).exists() and len(folder.ledger()) == number + 1
    pipe.write("nonsense")
    event = next(told)
    assert isinstance(event, Failed) and event.line == 4 and event.job is None
    pipe.write({"prompt": "a penguin", "id": "last"})
    assert next(told).facts["id"] == "last"
    pipe.end.close()
    assert next(told) == Summary(4, 0, 0, 1)
    with pytest.raises(PartialError, match="1 of 5 jobs failed"):
        next(told)
    folder.check_whole(4)


def test_of_stdin_a_job_done_before_is_answered_with_its_record(folder: Folder, pipe: Pipe) -> None:
    folder.run([{"prompt": "a cat", "id": "x"}])
    told = stream(folder)
    for _ in range(2):
        pipe.write({"prompt": "a cat", "id": "x"})
        event = next(told)
        assert (event.how, event.facts["skipped"], event.facts["prompt"]) == ("done", True, "a cat")
    for _ in range(2):
        pipe.write({"prompt": "a dog", "id": "y"})
    assert [next(told).how for _ in range(2)] == ["made", "done"]
    told.close()


def test_of_stdin_a_picture_that_was_removed_is_made_again(folder: Folder, pipe: Pipe) -> None:
    told = stream(folder)
    for _ in range(2):
        pipe.write({"prompt": "a cat", "id": "x"})
        event = next(told)
        assert event.how == "made"
        event.job.target.unlink()
    told.close()


def test_of_stdin_a_file_that_was_written_anew_is_read_anew(folder: Folder, pipe: Pipe) -> None:
    photo, keys = folder.path / "photo.png", set()
    told = stream(folder)
    for colour in ("red", "blue"):
        Image.new("RGB", (models.SIZE, models.SIZE), colour).save(photo)
        pipe.write({"prompt": "a cat", "seed": 1, "init_image": str(photo), "strength": 0.5})
        event = next(told)
        assert (event.how, event.facts["init_image"]["sha256"]) == ("made", sha256(photo, max_bytes=1 << 20))
        keys.add(event.job.key)
    told.close()
    assert len(keys) == 2


def test_of_stdin_a_learned_word_that_was_written_anew_is_read_anew(folder: Folder, pipe: Pipe) -> None:
    file = folder.path / "word.safetensors"
    told, drawn = stream(folder), []
    for sign in (-1, 1):
        save_file({"<x>": sign * torch.linspace(-5, 5, models.CONTEXT)[None]}, file)
        pipe.write({"prompt": "a <x>", "seed": 1, "embedding": str(file)})
        event = next(told)
        assert isinstance(event, Finished), event
        drawn.append(pixels(event.job.target))
    told.close()
    assert abs(drawn[0] - drawn[1]).max() > 2


def test_of_stdin_a_last_line_that_is_too_long_and_has_no_end_is_told(folder: Folder, pipe: Pipe) -> None:
    told = stream(folder)
    writer = Thread(target=lambda: (pipe.end.write(b"x" * (MAX_LINE_BYTES + BLOCK_BYTES)), pipe.end.close()))
    writer.start()
    event = next(told)
    writer.join()
    assert (event.line, "has over 1,048,576 bytes" in str(event.error)) == (1, True)
    told.close()


def test_of_stdin_a_signal_ends_the_waiting(folder: Folder, pipe: Pipe) -> None:
    stop: list[int] = []
    told = stream(folder, stop)
    pipe.write({"prompt": "a cat"})
    assert next(told).how == "made"
    stop.append(signal.SIGTERM)
    assert isinstance(next(told), Summary)
    with pytest.raises(Stopped) as caught:
        next(told)
    assert caught.value.exit_code == ExitCode.TERMINATED


def test_stdin_may_be_of_any_form(folder: Folder, pipe: Pipe) -> None:
    pipe.end.write(b'\xef\xbb\xbf{"prompt": "a cat", "steps": 1}\r\n\n')
    pipe.end.write(b'{"prompt": "a dog", "steps": 1}')  # without an end
    pipe.end.close()
    told = list(stream(folder))
    assert [event.facts["prompt"] for event in told[:-1]] == ["a cat", "a dog"]


def test_stdin_has_no_shares(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process reads it"):
        next(stream(folder))
