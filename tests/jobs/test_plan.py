"""Lines become images: each has a seed, a hash and a name that depend on what is asked for and on nothing else."""

from __future__ import annotations

import gc
import inspect
import json
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from sdcli.cli.batch import batch
from sdcli.errors import InputError, OutputError, SdcliWarning, UsageError
from sdcli.jobs.inputs import FILES_AND_MORE, PATHS
from sdcli.jobs.plan import Checked, Job, good_jobs, plan_batch, share
from sdcli.pipeline import wildcards
from sdcli.specs import BatchSpec, GenerateSpec
from tests import models

CAT = {"prompt": "a cat"}


class Folder:
    """A folder with a job file for the tiny model."""

    def __init__(self, path: Path, model: Path) -> None:
        self.path, self.model = path, model

    def spec(self, lines: Iterable[dict[str, Any] | str], *, own: Any = None, **options: Any) -> BatchSpec:
        text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
        (self.path / "jobs.jsonl").write_text(text, encoding="utf-8")
        settings = {"model": str(self.model), "output": self.path / "out", "if_exists": "error", **(own or {})}
        return BatchSpec(jobs=self.path / "jobs.jsonl", defaults=GenerateSpec(**settings), **options)

    def jobs(self, lines: Iterable[dict[str, Any] | str], **how: Any) -> list[Job]:
        return list(good_jobs(self.spec(lines, **how), (1, 1)))

    def check(self, lines: Iterable[dict[str, Any] | str], **how: Any) -> Checked:
        return plan_batch(self.spec(lines, **how))

    def keys(self, *lines: dict[str, Any], **own: Any) -> list[str]:
        return [job.key for job in self.jobs(lines, own=own)]


@pytest.fixture
def folder(tmp_path: Path, sd1: Path) -> Folder:
    return Folder(tmp_path, sd1)


def test_a_seed_that_is_not_given_comes_from_the_job_and_its_count_among_equal_ones(folder: Folder) -> None:
    seeds = [job.seed for job in folder.jobs([CAT, CAT, {"prompt": "a dog"}, CAT])]
    assert len(set(seeds)) == 4
    assert [job.seed for job in folder.jobs([{"prompt": "a dog"}, CAT])] == [seeds[2], seeds[0]]
    assert [job.seed for job in folder.jobs([CAT, {"steps": 3, **CAT}])][1] not in seeds
    assert {job.seed for job in folder.jobs([CAT, CAT], own={"seed": 5})} == {5}


def test_an_id_gives_the_name_and_a_seed_of_its_own(folder: Folder) -> None:
    one, other = folder.jobs([{**CAT, "id": "one"}, {**CAT, "id": 2}])
    assert (one.target.name, other.target.name) == ("one.png", "2.png")
    assert one.seed != other.seed
    same = folder.jobs([{**CAT, "id": "one", "seed": 1}, {**CAT, "id": "two", "seed": 1}])
    assert same[0].key != same[1].key


def test_the_key_is_of_what_is_drawn(folder: Folder, tmp_path: Path) -> None:
    first = {**CAT, "seed": 3}
    (key,) = folder.keys(first)
    differing = [
        {"prompt": "a dog"},
        {"negative": "blue"},
        {"seed": 4},
        {"steps": 9},
        {"guidance": 2},
        {"scheduler": "euler"},
        {"sigmas": "karras"},
        {"size": "48x32"},
        {"guidance_rescale": 0.5},
        {"clip_skip": 1},
        {"guidance_interval": "0:0.5"},
        {"id": "x"},
    ]
    keys = folder.keys(*({**first, **one} for one in differing))
    assert len({key, *keys}) == len(differing) + 1
    same = [{"seed": 3, **CAT}, *({**first, **one} for one in ({"count": 1}, {"width": 32}, {"steps": 25}))]
    assert folder.keys(*same) == [key] * 4
    assert folder.keys(first, batch_size=3, deterministic=True, dtype="bfloat16", device="cpu") == [key]
    (other_model,) = Folder(folder.path, models.write_sd1(tmp_path / "other", seed=1)).keys(first)
    assert other_model != key


def test_every_file_that_a_job_may_name_is_known_as_one() -> None:
    def metavar(annotation: Any) -> str:
        return next((str(getattr(one, "metavar", "")) for one in get_args(annotation)[1:]), "")

    options = inspect.signature(batch).parameters
    named = {name for name, one in options.items() if "FILE" in metavar(one.annotation) and name != "jobs"}
    assert named == {*PATHS, *FILES_AND_MORE}


def test_what_a_line_says_wins_over_the_command_line(folder: Folder) -> None:
    jobs = folder.jobs(
        [CAT, {**CAT, "steps": 4, "width": 48}, {**CAT, "size": "16x16"}], own={"steps": 9, "size": "32x64"}
    )
    plans = [job.settings.plan for job in jobs]
    assert [(plan.steps, plan.width, plan.height) for plan in plans] == [(9, 32, 64), (4, 48, 32), (9, 16, 16)]


def test_a_count_makes_images_of_seeds_and_names_in_a_row(folder: Folder) -> None:
    jobs = folder.jobs([{**CAT, "count": 3, "seed": 2**64 - 1, "id": "cat"}])
    assert [job.seed for job in jobs] == [2**64 - 1, 0, 1]
    assert [job.target.name for job in jobs] == ["cat.png", "cat-2.png", "cat-3.png"]
    assert folder.check([{**CAT, "count": 3}, CAT]).images == 4


COLOURS = {"prompt": "a {red|blue|green|pink} cat", "negative": "{x|y}"}


def test_the_seed_of_a_job_draws_its_wildcards_wherever_the_job_stands(folder: Folder) -> None:
    jobs = folder.jobs([{**COLOURS, "seed": seed} for seed in range(20)])
    assert {job.prompts.prompt for job in jobs} == {f"a {one} cat" for one in ("red", "blue", "green", "pink")}
    assert {job.prompts.negative for job in jobs} == {"x", "y"}
    for job in jobs:
        assert job.target.name.startswith(job.prompts.prompt.replace(" ", "-"))
        assert job.spec.prompt == COLOURS["prompt"] and job.settings is jobs[0].settings
    counted = folder.jobs([CAT, {**COLOURS, "count": 20, "seed": 0}])[1:]
    assert [job.prompts for job in counted] == [job.prompts for job in jobs]
    spec = folder.spec([{**COLOURS, "seed": seed} for seed in range(20)])
    halves = [{job.key: job.prompts for job in good_jobs(spec, (index, 2))} for index in (1, 2)]
    assert halves[0] | halves[1] == {job.key: job.prompts for job in jobs}


def test_a_job_without_a_seed_draws_by_the_one_from_its_hash_and_the_hash_is_of_the_template(folder: Folder) -> None:
    jobs = folder.jobs([COLOURS] * 12)
    assert len({job.key for job in jobs}) == len({job.seed for job in jobs}) == 12
    assert len({job.prompts.prompt for job in jobs}) == 4
    for same in ([COLOURS] * 12, [{**COLOURS, "seed": job.seed} for job in jobs]):
        again = folder.jobs(same)
        assert [(job.key, job.seed, job.prompts) for job in again] == [(j.key, j.seed, j.prompts) for j in jobs]
    plain = folder.jobs([{"prompt": job.prompts.prompt, "seed": job.seed} for job in jobs])
    assert not {job.key for job in plain} & {job.key for job in jobs}


def test_a_line_one_of_whose_images_draws_what_is_refused_makes_none(folder: Folder) -> None:
    line = {"prompt": "(a:{9|90})", "seed": 0, "count": 9}
    with pytest.raises(InputError, match=r"jobs.jsonl:1: the weight 90 in the prompt"):
        folder.check([line])
    with pytest.warns(SdcliWarning):
        assert folder.check([line, CAT], keep_going=True).images == 1
    assert [job.line for job in folder.jobs([line, CAT], keep_going=True)] == [2]
    seeds = [seed for seed in range(20) if wildcards.template("{9|90}").drawn(seed, "prompt") == "9"]
    assert folder.check([{**line, "seed": seed, "count": 1} for seed in seeds]).images == len(seeds) > 5


def test_shares_have_every_image_once(folder: Folder) -> None:
    spec = folder.spec([{**CAT, "count": 3}, *[CAT] * 8])
    shares = [[job.key for job in good_jobs(spec, (index, 3))] for index in (1, 2, 3)]
    assert sorted(key for one in shares for key in one) == sorted(job.key for job in good_jobs(spec, (1, 1)))
    assert [len(one) for one in shares] == [4, 4, 3]


def test_launched_processes_cut_each_share_once_more(folder: Folder) -> None:
    spec = folder.spec([CAT], shard="2/3")
    ranks = [share(spec, {"WORLD_SIZE": "2", "RANK": str(rank)}) for rank in (0, 1)]
    assert (ranks, share(spec, {})) == ([(3, 6), (4, 6)], (2, 3))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({}, "the prompt is empty"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"class": "cat"}, "this model draws from a prompt"),
        ({**CAT, "steps": 0}, "steps 0: out of range"),
        ({**CAT, "seed": -1}, "seed -1: out of range"),
        ({**CAT, "seed": 2**64}, "out of range"),
        ({**CAT, "count": 0}, "count 0: out of range"),
        ({**CAT, "count": 10**9}, "count 1000000000: out of range; it must lie in 1..100000"),
        ({**CAT, "scheduler": "eulr"}, "eulr"),
        ({**CAT, "scheduler": "f-pndm", "steps": 2}, "f-pndm"),
        ({**CAT, "size": "33x32"}, "no multiple of 2"),
        ({**CAT, "size": "32x32", "width": 32}, "exclude each other"),
        ({"prompt": "(a cat:99)"}, "the weight 99"),
        ({"prompt": "a {dog|(cat:99)}"}, "the weight 99"),
        ({"prompt": "{dog|}"}, "its wildcards may draw nothing at all"),
        ({"prompt": "\ud800"}, "valid"),
        ({**CAT, "model": "nobody/nothing"}, "nobody/nothing"),
        ({**CAT, "latents": "missing.safetensors"}, "missing.safetensors"),
        ({**CAT, "embedding": "missing.pt"}, "missing.pt"),
        ({**CAT, "lora": "missing.pt"}, "missing.pt"),
        ({**CAT, "mix": "x"}, "mix x"),
        ({**CAT, "clip-skip": 2}, "clip-skip 2: this model's text encoder has 2 layers"),
        ({**CAT, "clip_skip": -1}, "clip-skip -1: out of range"),
        ({**CAT, "clip_skip": 0.5}, "clip_skip: is 0.5"),
    ],
)
def test_what_generate_would_refuse_is_refused_with_the_line(folder: Folder, line: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        folder.check([CAT, line, CAT])
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{folder.path / 'jobs.jsonl'}:2: ")


@pytest.mark.parametrize("which", ["init_image", "mask"])
@pytest.mark.parametrize("form", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_a_picture_that_is_cut_short_is_found_before_the_first_image(folder: Folder, which: str, form: str) -> None:
    whole, short = folder.path / "whole.png", folder.path / f"short.{form}"
    picture = Image.effect_noise((models.SIZE, models.SIZE), 80).convert("RGB")
    picture.save(whole)
    picture.save(short)
    short.write_bytes(short.read_bytes()[: short.stat().st_size * 3 // 4])
    job = {**CAT, "init_image": str(whole), "mask": str(whole), which: str(short)}
    with pytest.raises(InputError, match=f"jobs.jsonl:1: .*short.{form}: cannot be decoded"):
        folder.check([job])


def test_all_bad_lines_are_named_by_number_and_the_first_in_full(folder: Folder) -> None:
    bad = {"promt": 1}
    with (
        pytest.warns(SdcliWarning, match="promt: unknown key; did you mean prompt") as warned,
        pytest.raises(InputError, match=r"9 of 11 lines are bad: 2-3, 5-11; nothing was made"),
    ):
        folder.check([CAT, bad, bad, CAT, *[bad] * 7])
    assert len(warned) == 5


def test_two_jobs_of_one_file_name_are_refused(folder: Folder) -> None:
    with pytest.raises(InputError, match=r"jobs.jsonl:2: id: x gives x.png, as another job does"):
        folder.check([{**CAT, "id": "x"}, {"prompt": "a dog", "id": "x"}])
    with pytest.raises(InputError, match=r"jobs.jsonl:2: id: x gives x-2.png"):
        folder.check([{**CAT, "id": "x-2"}, {**CAT, "id": "x", "count": 2}])


def test_ids_that_are_one_name_on_other_systems_are_told_of(folder: Folder) -> None:
    names = ["a", "A", "caf\u00e9", "cafe\u0301", "b"]
    with pytest.warns(SdcliWarning, match="differ in case or accents' form alone") as warned:
        assert folder.check({**CAT, "id": name} for name in names).images == 5
    assert len(warned) == 2


def test_of_a_job_whose_second_picture_has_the_name_of_another_not_even_the_first_is_made(folder: Folder) -> None:
    lines = [{**CAT, "id": "x-2"}, {**CAT, "id": "x", "count": 3}, {**CAT, "id": "x-3"}]
    with pytest.warns(SdcliWarning, match="gives x-2.png"):
        assert folder.check(lines, keep_going=True).images == 2
    assert [job.target.name for job in folder.jobs(lines, keep_going=True)] == ["x-2.png", "x-3.png"]


def test_keep_going_leaves_the_bad_lines_out(folder: Folder) -> None:
    lines = [CAT, {"promt": 1}, {"prompt": "a dog"}]
    with pytest.warns(SdcliWarning):
        checked = folder.check(lines, keep_going=True)
    assert (checked.images, checked.bad) == (2, 1)
    assert [job.line for job in folder.jobs(lines, keep_going=True)] == [1, 3]
    with pytest.raises(InputError):
        folder.jobs(lines)


@pytest.mark.parametrize("lines", [[], [""], ["", "  "]])
def test_a_file_without_a_job_is_refused(folder: Folder, lines: list[str]) -> None:
    with pytest.raises(InputError, match="holds no job"):
        folder.check(lines)


def test_faulty_options_are_told_as_such_and_not_as_lines(folder: Folder) -> None:
    with pytest.raises(UsageError, match="no multiple of 2"):
        folder.check([CAT], own={"size": "33x32"})
    with pytest.raises(UsageError, match="unknown"):
        folder.check([CAT], own={"scheduler": "eulr"})
    (folder.path / "out").write_bytes(b"")
    with pytest.raises(OutputError):
        folder.check([CAT])


def test_a_model_of_classes_takes_classes(classed: Path, unconditional: Path, tmp_path: Path) -> None:
    of_classes = Folder(tmp_path, classed)
    assert [job.settings.plan.label.index for job in of_classes.jobs([{"class": "dog"}, {"class": 3}])] == [1, 3]
    with pytest.raises(InputError, match="no such class"):
        of_classes.check([{"class": "dgo"}])
    assert Folder(tmp_path, unconditional).check([{"seed": 1}, {}]).images == 2


def test_memory_does_not_grow_with_the_lines(folder: Folder) -> None:
    def peak(count: int) -> int:
        spec = folder.spec({**CAT, "prompt": f"a cat {i}"} for i in range(count))
        return min(_peak_of(lambda: plan_batch(spec)) for _ in range(3))  # Python's own tables grow now and then

    assert peak(2000) < peak(200) + 500_000  # bytes; the lines alone have 50 each, and what is made of them 1,000


def _peak_of(work: Callable[[], object]) -> int:
    """The most memory that work has at a time, in bytes."""
    gc.collect()
    gc.freeze()  # else, after many tests, the collector waits for more garbage than this makes
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.unfreeze()


@pytest.mark.slow
def test_a_hundred_thousand_lines_are_looked_at_in_ten_seconds_of_cpu(folder: Folder) -> None:
    spec = folder.spec({"prompt": f"a (cat:1.2) {i}, on a blue background", "steps": 5 + i % 9} for i in range(100_000))
    began = time.process_time()
    assert plan_batch(spec).images == 100_000
    assert time.process_time() - began < 10
