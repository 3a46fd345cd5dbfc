"""`sdcli generate` as a script sees it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdcli import __version__
from sdcli.errors import ExitCode
from sdcli.pipeline import known_words
from sdcli.pipeline.adapters import Embedding, write_embedding
from sdcli.store import Model, model_hash
from tests import models
from tests.commands import Shell, tree
from tests.forks import Forks

PROMPT = "a picture of a puppy"
FIELDS = [
    "path",
    "prompt",
    "negative",
    "model",
    "model_hash",
    "prediction",
    "seed",
    "width",
    "height",
    "scheduler",
    "steps",
    "evaluations",
    "guidance",
    "seconds",
    "tokens",
    "sdcli",
]


def test_what_is_chosen_of_scheduler_and_guidance_is_in_the_record(shell: Shell) -> None:
    options = ["--scheduler", "dpm", "--order", "3", "--sigmas", "karras"]
    options += ["--guidance-interval", "0.2:0.8", "--guidance-rescale", "0.7"]
    done = shell("generate", PROMPT, "--steps", "3", "--json", *options)
    assert done.code == 0
    record = json.loads(done.stdout)
    inside = json.loads(texts(Path(record["path"]).read_bytes())["sdcli"])
    for facts in (record, inside):
        assert (facts["scheduler"], facts["order"], facts["sigmas"]) == ("dpm", 3, "karras")
        assert (facts["guidance_interval"], facts["guidance_rescale"]) == ("0.2:0.8", 0.7)
    dry = json.loads(shell("generate", PROMPT, "--dry-run", "--json", *options).stdout)
    assert dry["overrides"]["solver_order"] == 3
    assert dry["overrides"]["use_karras_sigmas"] is True
    assert dry["guidance_interval"] == "0.2:0.8"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scheduler", "heun", "--order", "2"], "--order 2: scheduler heun takes no --order"),
        (["--scheduler", "dpm", "--order", "4"], "--order 4: scheduler dpm does not take it; use one of 1, 2, 3"),
        (["--scheduler", "euler", "--eta", "0.5"], "takes no --eta; ddim and tcd do"),
        (["--eta", "1.5"], "--eta 1.5: out of range"),
        (["--sigmas", "cosine"], "--sigmas cosine: scheduler dpm does not take it; use one of model, karras"),
        (["--scheduler", "ddpm", "--variance", "learned-range"], "this model has learned no variance"),
        (["--timestep-spacing", "even"], "use one of linspace, leading, trailing"),
        (["--guidance-interval", "0.8:0.2"], "expected is A:B with 0 <= A < B <= 1"),
        (["--guidance-interval", "half"], "write it as 0.2:0.8"),
        (["--guidance-interval", "nan:1"], "out of range"),
        (["--guidance", "1", "--guidance-interval", "0.2:0.4"], "change nothing at --guidance 1"),
        (["--guidance", "1", "--guidance-rescale", "0.7"], "change nothing at --guidance 1"),
        (["--scheduler", "DPM++ 2M Karras", "--sigmas", "model"], "--sigmas model: the scheduler's name says karras"),
        (["--scheduler", "DPM++ 3M", "--order", "1"], "--order 1: the scheduler's name says 3"),
        (["--guidance-rescale", "nan"], "--guidance-rescale nan: out of range"),
    ],
)
def test_what_a_scheduler_does_not_take_is_refused_before_anything_is_drawn(
    shell: Shell, options: list[str], words: str
) -> None:
    done = shell("generate", PROMPT, "--steps", "3", *options)
    assert done.code == ExitCode.USAGE
    assert words in done.stderr
    assert list(Path().iterdir()) == []


def texts(png: bytes) -> dict[str, str]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        return dict(image.text)


def test_stdout_is_the_path_and_stderr_is_empty(shell: Shell) -> None:
    outcome = shell("generate", PROMPT, "--steps", 2, "--seed", 7)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "a-picture-of-a-puppy-7.png\n", "")
    assert Image.open("a-picture-of-a-puppy-7.png").size == (models.SIZE, models.SIZE)


def test_json_is_one_line_an_image_with_the_fields_of_the_contract(shell: Shell, sd1: Path) -> None:
    outcome = shell(
        "generate", PROMPT, "-N", "blurry", "-s", 2, "--scheduler", "plms", "-g", 3, "--seed", 7, "-n", 2, "--json"
    )
    rows = [json.loads(line) for line in outcome.lines]
    assert (outcome.code, outcome.stderr) == (0, "")
    assert [list(row) for row in rows] == [FIELDS, FIELDS]
    for row, seed in zip(rows, (7, 8), strict=True):
        assert row.pop("seconds") > 0
        assert row == {
            "path": f"a-picture-of-a-puppy-{seed}.png",
            "prompt": PROMPT,
            "negative": "blurry",
            "model": str(sd1),
            "model_hash": model_hash(Model("", sd1)),
            "prediction": "epsilon",
            "seed": seed,
            "width": models.SIZE,
            "height": models.SIZE,
            "scheduler": "pndm",
            "steps": 2,
            "evaluations": 3,
            "guidance": 3.0,
            "tokens": {"kept": 5, "cut": 0, "chunks": 1},
            "sdcli": __version__,
        }


def test_a_drawn_seed_is_reported_and_gives_the_picture_again(shell: Shell) -> None:
    row = json.loads(shell("generate", PROMPT, "-s", 1, "--json").stdout)
    again = shell("generate", PROMPT, "-s", 1, "--seed", row["seed"], "-o", "again").stdout.strip()
    assert Path(again).read_bytes() == Path(row["path"]).read_bytes()


def test_the_record_is_inside_the_picture_without_path_and_seconds(shell: Shell) -> None:
    row = json.loads(shell("generate", "ein 小狗 🐶", "-s", 1, "--seed", 7, "--json").stdout)
    inside = texts(Path(row["path"]).read_bytes())
    assert set(inside) == {"parameters", "sdcli"}
    assert json.loads(inside["sdcli"]) == {k: v for k, v in row.items() if k not in ("path", "seconds")}
    assert inside["parameters"].startswith(
        "ein 小狗 🐶\nSteps: 1, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 32x32,"
    )


def test_the_same_command_twice_gives_the_same_bytes(shell: Shell) -> None:
    for folder in ("a", "b"):
        assert shell("generate", PROMPT, "-s", 2, "--seed", 7, "-n", 2, "-o", folder).code == 0
    assert tree(Path("a")) == tree(Path("b"))
    assert len(tree(Path("a"))) == 2


def test_no_metadata_leaves_all_of_it_out(shell: Shell) -> None:
    shell("generate", PROMPT, "-s", 1, "-o", "with.png", "--seed", 7)
    shell("generate", PROMPT, "-s", 1, "-o", "without.png", "--seed", 7, "--no-metadata")
    assert texts(Path("without.png").read_bytes()) == {}
    assert Image.open("with.png").tobytes() == Image.open("without.png").tobytes()


def test_a_class_is_drawn_by_its_name_or_its_index_and_recorded(shell: Shell, classed: Path) -> None:
    drawn = [
        shell("generate", "--class", asked, "-m", classed, "-s", 2, "--seed", 7, "-o", asked, "--json")
        for asked in ("dog", "1")
    ]
    rows = [json.loads(outcome.stdout) for outcome in drawn]
    assert [(outcome.code, outcome.stderr) for outcome in drawn] == [(0, "")] * 2
    assert [row["path"] for row in rows] == ["dog/dog-7.png", "1/dog-7.png"]
    assert set(rows[0]) == {*FIELDS, "class"}
    assert rows[0]["class"] == {"index": 1, "name": "dog"}
    pictures = [Path(row["path"]).read_bytes() for row in rows]
    assert pictures[0] == pictures[1]
    inside = texts(pictures[0])
    assert json.loads(inside["sdcli"]) == {k: v for k, v in rows[0].items() if k not in ("path", "seconds")}
    assert "Class: dog, Class index: 1," in inside["parameters"]


def test_an_unconditional_model_draws_without_a_word(shell: Shell, unconditional: Path) -> None:
    outcome = shell("generate", "-m", unconditional, "-s", 2, "--seed", 7, "-n", 2)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "image-7.png\nimage-8.png\n", "")


def test_an_embedding_is_named_in_the_record_and_nothing_of_this_machine(shell: Shell, tmp_path: Path) -> None:
    write_embedding(tmp_path, Embedding("<my-cat>", torch.ones(2, 16)))
    file = tmp_path / "my-cat.safetensors"
    arguments = ["-s", 1, "--seed", 7, "--json", "--embedding", f"{file}:my-style", "--embedding", file]
    outcome = shell("generate", "a <my-cat> in my-style", *arguments)
    assert (outcome.code, outcome.stderr) == (0, "")
    row = json.loads(outcome.stdout)
    assert list(row) == [*FIELDS, "embeddings"]
    assert [(one["file"], one["token"]) for one in row["embeddings"]] == [
        (file.name, "my-style"),
        (file.name, "<my-cat>"),
    ]
    assert row["tokens"] == {"kept": 6, "cut": 0, "chunks": 1}
    data = Path(row["path"]).read_bytes()
    assert b"TI hashes" in data and str(tmp_path).encode() not in data.replace(row["model"].encode(), b"")


def test_an_embedding_that_no_prompt_names_is_a_warning(shell: Shell, tmp_path: Path) -> None:
    write_embedding(tmp_path, Embedding("<my-cat>", torch.ones(1, 16)))
    outcome = shell("generate", PROMPT, "-s", 1, "--embedding", "../my-cat.safetensors")
    said = "no prompt names its token <my-cat>, so it changes nothing"
    assert (outcome.code, outcome.stderr) == (0, f"sdcli: warning: --embedding ../my-cat.safetensors: {said}\n")


# Where it goes.


def test_a_dash_sends_the_picture_and_nothing_else_to_stdout(shell: Shell) -> None:
    shell("generate", PROMPT, "-s", 2, "--seed", 7, "-o", "x.png")
    for more in ([], ["--quiet"]):
        outcome = shell("generate", PROMPT, "-s", 2, "--seed", 7, "-o", "-", *more)
        assert (outcome.code, outcome.stderr) == (0, "")
        assert outcome.data == Path("x.png").read_bytes()
    assert list(tree(Path())) == ["x.png"]


@pytest.mark.parametrize(("form", "name"), [("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")])
def test_a_format_is_that_of_files_in_a_folder_of_a_file_by_its_suffix_and_of_stdout(
    shell: Shell, form: str, name: str
) -> None:
    drawn = ("generate", PROMPT, "-s", 1, "--seed", 7)
    assert shell(*drawn, "-o", "out", "--format", form).stdout == f"out/a-picture-of-a-puppy-7.{form}\n"
    shell(*drawn, "-o", f"x.{form}")
    outcome = shell(*drawn, "-o", "-", "--format", form)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.data == Path(f"x.{form}").read_bytes() == Path(f"out/a-picture-of-a-puppy-7.{form}").read_bytes()
    with Image.open(f"x.{form}") as opened:
        assert (opened.format, opened.size) == (name, (models.SIZE, models.SIZE))
    shell(*drawn, "-o", f"bare.{form}", "--no-metadata")
    assert b"sdcli" in outcome.data and b"sdcli" not in Path(f"bare.{form}").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "bmp"], "--format bmp: unknown; use one of png, webp, jpg"),
        (["-o", "x.bmp"], "--output x.bmp: is of no kind of picture; name a file of .png, .webp, .jpg, .jpeg"),
        (["-o", "x.jpeg", "--format", "webp"], "--output x.jpeg with --format webp: contradict each other"),
        (["--quality", "90"], "--quality 90: a PNG picture loses nothing"),
        (["-o", "-", "--quality", "90"], "--quality 90: a PNG picture loses nothing"),
        (["--format", "webp", "--quality", "0"], "--quality 0: out of range; it must lie in 1..100"),
        (["--format", "webp", "--quality", "101"], "--quality 101: out of range"),
    ],
)
def test_a_format_or_a_quality_that_makes_no_sense_is_a_usage_error(
    shell: Shell, options: list[str], words: str
) -> None:
    outcome = shell("generate", PROMPT, *options)
    assert (outcome.code, outcome.stdout) == (ExitCode.USAGE, "")
    assert words in outcome.stderr
    assert tree(Path()) == {}


def test_a_template_names_the_pictures_and_an_unknown_field_is_told_with_the_list(shell: Shell) -> None:
    drawn = ("generate", PROMPT, "-s", 1, "--seed", 7, "-n", 2)
    outcome = shell(*drawn, "-o", "out/{scheduler}/{index:04d}-{seed}-{slug}.webp")
    names = [f"out/dpm/000{i}-{6 + i}-a-picture-of-a-puppy.webp" for i in (1, 2)]
    assert (outcome.code, outcome.lines, outcome.stderr) == (0, names, "")
    assert set(tree(Path())) == {"out", "out/dpm", *names}
    wrong = shell(*drawn, "-o", "{date}.png")
    assert wrong.code == ExitCode.USAGE and "{date} is no field; there are index, seed, slug" in wrong.stderr


def test_a_grid_is_written_besides_the_pictures_and_told_last(shell: Shell) -> None:
    drawn = ("generate", PROMPT, "-s", 1, "--seed", 7, "-n", 3, "-b", 2, "-o", "out", "--grid", "sheets/all.webp")
    outcome = shell(*drawn, "--json")
    rows = [json.loads(line) for line in outcome.lines]
    assert (outcome.code, outcome.stderr, len(rows)) == (0, "", 4)
    assert rows[-1] == {"path": "sheets/all.webp", "grid": [7, 8, 9]}
    with Image.open("sheets/all.webp") as sheet:
        assert sheet.width == 8 + 3 * 168  # 32 px enlarged five times
        assert sheet.getexif() == {}
    before = Path("sheets/all.webp").read_bytes()
    assert shell(*drawn, "--if-exists", "overwrite").lines[-1] == "sheets/all.webp"
    assert Path("sheets/all.webp").read_bytes() == before
    assert len(shell(*drawn, "--if-exists", "skip").lines) == 3  # nothing was drawn


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--grid", "x.bmp"], "--grid x.bmp: is no name of a picture file; name a file of .png, .webp, .jpg, .jpeg"),
        (["--grid", "folder"], "--grid folder: is no name of a picture file"),
        (["-o", "x.png", "--grid", "x.png"], "--grid x.png: would be the name of a picture, too"),
        (["-o", "-", "--grid", "x.png"], "--grid with --output -: stdout takes one picture"),
    ],
)
def test_a_grid_that_cannot_be_is_a_usage_error(shell: Shell, options: list[str], words: str) -> None:
    outcome = shell("generate", PROMPT, *options)
    assert (outcome.code, outcome.stdout) == (ExitCode.USAGE, "")
    assert words in outcome.stderr
    assert tree(Path()) == {}


@pytest.mark.parametrize(("scheduler", "calls"), [("ddim", 3), ("euler", 3), ("heun", 5)])
def test_a_film_shows_every_call_of_the_unet_and_ends_with_the_picture(
    shell: Shell, scheduler: str, calls: int
) -> None:
    drawn = ("generate", PROMPT, "-s", 3, "--seed", 7, "--scheduler", scheduler, "-o", "x.png")
    outcome = shell(*drawn, "--save-steps", "film.webp", "--json")
    rows = [json.loads(line) for line in outcome.lines]
    assert (outcome.code, outcome.stderr) == (0, "")
    assert rows[0] == {"path": "film.webp", "seed": 7, "frames": calls}
    assert rows[1]["path"] == "x.png"
    shell(*drawn, "--save-steps", "steps", "--if-exists", "overwrite")
    assert sorted(tree(Path("steps"))) == [f"x-step-{number:04d}.png" for number in range(1, calls + 1)]
    last = Image.open(f"steps/x-step-{calls:04d}.png")
    assert last.tobytes() == Image.open("x.png").tobytes()
    with Image.open("film.webp") as film:
        assert (film.format, film.size) == ("WEBP", last.size)
        assert 2 <= film.n_frames <= calls  # equal ones are one, shown longer
    before = Path("film.webp").read_bytes()
    shell(*drawn, "--save-steps", "film.webp", "--if-exists", "overwrite")
    assert Path("film.webp").read_bytes() == before


def test_in_a_folder_every_picture_has_its_steps(shell: Shell) -> None:
    outcome = shell("generate", PROMPT, "-s", 2, "--seed", 7, "-n", 3, "-b", 2, "--save-steps", "steps", "--json")
    rows = [json.loads(line) for line in outcome.lines]
    steps = {(row["seed"], row["step"]): row["path"] for row in rows if "step" in row}
    assert steps.keys() == {(seed, step) for seed in (7, 8, 9) for step in (1, 2)}
    assert set(tree(Path("steps"))) == {Path(path).name for path in steps.values()}
    assert len(rows) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--save-steps", "x.gif"], "--save-steps x.gif: a film is a .webp file"),
        (["--save-steps", "x.webp", "-n", "2"], "--count 2 with --save-steps x.webp: a film shows one picture"),
        (["--save-steps", "x", "-o", "-"], "--save-steps with --output -"),
        (["--save-steps", "x.webp", "-o", "x.webp"], "--save-steps x.webp: would be the name of a picture, too"),
        (["--save-steps", "x.webp", "--width", "16384"], "WebP takes up to 16383"),
    ],
)
def test_a_film_that_cannot_be_is_a_usage_error(shell: Shell, options: list[str], words: str) -> None:
    outcome = shell("generate", PROMPT, *options)
    assert (outcome.code, outcome.stdout) == (ExitCode.USAGE, "")
    assert words in outcome.stderr
    assert tree(Path()) == {}


def test_a_dash_reads_the_prompt_from_stdin(shell: Shell) -> None:
    row = json.loads(shell("generate", "-", "-s", 1, "--json", stdin="  ein\nHündchen \n".encode()).stdout)
    assert row["prompt"] == "ein\nHündchen"


def test_words_after_two_dashes_are_the_prompt(shell: Shell) -> None:
    outcome = shell("generate", "--dry-run", "--seed", 7, "--", "--json")
    assert outcome.code == 0
    assert 'outputs: ["json-7.png"]' in outcome.lines


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("../../../etc/passwd", "etc-passwd-7.png"),
        ("/etc/passwd", "etc-passwd-7.png"),
        ("a\nb\tc \x1b[31m\x7f", "a-b-c-31m-7.png"),
        ("a\0b", "a-b-7.png"),
        ("!?!... ", "image-7.png"),
        ("小狗" * 500, "小狗" * 20 + "-7.png"),
        ("-rf x", "rf-x-7.png"),
        ("x" * 100_000, "x" * 60 + "-7.png"),
    ],
)
def test_whatever_the_prompt_the_file_lies_in_its_folder_under_a_plain_name(
    shell: Shell, prompt: str, name: str, tmp_path: Path
) -> None:
    outcome = shell("generate", "-", "-s", 1, "--seed", 7, "-o", "out", stdin=prompt.encode())
    assert (outcome.code, outcome.stdout) == (0, f"out/{name}\n")
    assert list(tree(tmp_path / "work")) == ["out", f"out/{name}"]
    assert json.loads(texts(Path("out", name).read_bytes())["sdcli"])["prompt"] == prompt.strip()


def test_a_prompt_too_long_is_cut_with_a_warning_on_stderr(shell: Shell) -> None:
    outcome = shell("generate", "dog " * 1205, "-s", 1)
    assert outcome.code == 0
    assert outcome.stderr == "sdcli: warning: the prompt is too long: the last 5 of 1205 tokens are not used\n"


@pytest.mark.parametrize(
    ("if_exists", "code", "names"),
    [
        ("number", 0, {"x.png", "x-2.png", "x-3.png"}),
        ("skip", 0, {"x.png"}),
        ("overwrite", 0, {"x.png"}),
        ("error", ExitCode.OUTPUT, {"x.png"}),
    ],
)
def test_a_picture_that_is_there_is_kept_unless_asked(shell: Shell, if_exists: str, code: int, names: set[str]) -> None:
    Path("x.png").write_bytes(b"mine")
    for _ in range(2):
        outcome = shell("generate", PROMPT, "-s", 1, "-o", "x.png", "--if-exists", if_exists)
        assert outcome.code == code
    assert set(tree(Path())) == names
    assert (Path("x.png").read_bytes() == b"mine") == (if_exists != "overwrite")


def test_numbering_is_the_default_and_the_path_told_is_the_one_written(shell: Shell) -> None:
    Path("x.png").write_bytes(b"mine")
    assert shell("generate", PROMPT, "-s", 1, "-o", "x.png").stdout == "x-2.png\n"


def test_skipping_says_so_in_the_record(shell: Shell) -> None:
    Path("x.png").write_bytes(b"mine")
    outcome = shell("generate", PROMPT, "-s", 1, "-o", "x.png", "--if-exists", "skip", "--json")
    assert json.loads(outcome.stdout) == {"path": "x.png", "skipped": True}


# Without doing it.


def test_a_dry_run_tells_the_decisions_and_writes_nothing(shell: Shell, sd1: Path) -> None:
    outcome = shell("generate", PROMPT, "--seed", 7, "-n", 2, "--scheduler", "heun", "-s", 4, "--dry-run", "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout) == {
        "model": str(sd1),
        "folder": str(sd1),
        "scheduler": "heun",
        "class": "HeunDiscreteScheduler",
        "overrides": {},
        "prediction": "epsilon",
        "steps": 4,
        "evaluations": 7,
        "guidance": 7.5,
        "size": "32x32",
        "seeds": [7, 8],
        "outputs": ["a-picture-of-a-puppy-7.png", "a-picture-of-a-puppy-8.png"],
        "tokens": {"kept": 5, "cut": 0, "chunks": 1},
    }
    assert tree(Path()) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="where a file name may be any bytes")
def test_a_path_of_any_bytes_and_a_prompt_of_any_letters_are_told_whatever_the_locale(sd1: Path) -> None:
    command = [sys.executable, "-m", "sdcli", "generate", "小狗", "--model", sd1, "--dry-run", "--json", "-o", b"\xff"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    ended = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b'"\xff/' + "小狗".encode() in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--class", "dog", "--dry-run"], 0),
        (["--class", "dgo"], ExitCode.USAGE),
        (["a (red:1.2) dog", "-m", "builtin", "--dry-run"], 0),
        (["a (red:11) dog", "-m", "builtin"], ExitCode.USAGE),
    ],
)
def test_what_is_drawn_is_decided_in_a_fresh_interpreter_without_torch(
    classed: Path, arguments: list[str], code: int
) -> None:
    program = "import sys; from sdcli.cli.app import run; code = run(sys.argv[1:]);"
    program += "sys.exit('imported torch' if 'torch' in sys.modules else code)"
    command = [sys.executable, "-c", program, "generate", "-m", str(classed), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr


def test_a_picture_and_a_mask_are_drawn_from_and_told_in_the_record(shell: Shell, tmp_path: Path) -> None:
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    Image.new("L", (20, 16), 255).save(tmp_path / "mask.png")
    pair = ("--init-image", tmp_path / "red.png", "--mask", tmp_path / "mask.png")
    done = shell("generate", PROMPT, "--steps", 4, "--strength", 0.5, *pair, "--json")
    assert (done.code, done.stderr) == (0, "")
    row = json.loads(done.stdout)
    assert (row["width"], row["height"], row["steps"], row["evaluations"], row["strength"]) == (20, 16, 4, 2, 0.5)
    assert (row["init_image"]["file"], row["mask"]["file"]) == ("red.png", "mask.png")


def test_a_dry_run_tells_of_the_picture_and_imports_no_torch(sd1: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    code = (
        "import json, sys\n"
        "from sdcli.cli.app import run\n"
        f"run(['generate', 'a dog', '--init-image', 'red.png', '--dry-run', '--json', '-m', {str(sd1)!r}])\n"
        "print(json.dumps(sorted({'torch', 'diffusers'} & set(sys.modules))))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    document, heavy = done.stdout.rstrip().rsplit("\n", 1)
    told = json.loads(document)
    assert heavy == "[]"
    assert told.items() >= {"init_image": "red.png", "strength": 0.75, "steps_made": 18, "evaluations": 18}.items()
    assert told["size"] == "20x16"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--strength", "2", "--init-image", "red.png"), ExitCode.USAGE, "--strength 2.0: out of range"),
        (("--strength", "0.5"), ExitCode.USAGE, "--strength without --init-image"),
        (("--mask", "red.png"), ExitCode.USAGE, "--mask without --init-image"),
        (("--init-image", "none.png"), ExitCode.INPUT, "none.png"),
        (("--init-image", "text.png"), ExitCode.INPUT, "text.png"),
        (("--init-image", "red.png", "--mask", "text.png"), ExitCode.INPUT, "text.png"),
    ],
)
def test_a_picture_that_makes_no_sense_is_refused_and_nothing_written(
    shell: Shell, arguments: list[str], code: ExitCode, said: str
) -> None:
    Image.new("RGB", (20, 16), "red").save("red.png")
    Path("text.png").write_text("no picture")
    before = tree(Path())
    done = shell("generate", PROMPT, *arguments)
    assert done.code == code and said in done.stderr and done.stderr.count("\n") == 1
    assert tree(Path()) == before


def test_a_dry_run_tells_what_of_the_negative_prompt_is_not_used(shell: Shell) -> None:
    arguments = ("generate", PROMPT, "--dry-run", "--json", "-N")
    cut = shell(*arguments, "dog " * 1201)
    assert json.loads(cut.stdout)["negative_tokens"] == {"kept": 1200, "cut": 1, "chunks": 16}
    assert "the negative prompt is too long: the last 1 of 1201 tokens are not used" in cut.stderr
    each = shell(*arguments, "{dog|" + "dog " * 1201 + "}", "--seed", 1, "-n", 6)
    assert {one["cut"] for one in json.loads(each.stdout)["negative_tokens"]} == {0, 1}
    unheard = shell(*arguments, "dog", "--guidance", 1)
    assert "negative_tokens" not in json.loads(unheard.stdout)
    assert "warning: the negative prompt is not used: at guidance 1 nothing leads away from it" in unheard.stderr


def test_a_dry_run_tells_words_that_the_model_never_saw(shell: Shell, sd1: Path) -> None:
    folder = models.copy(sd1, Path("telling"))
    known_words.write(folder, ["a", "dog", "red"])
    told = shell("generate", "a {zyzzyva|quokka} dog", "-n", 9, "--seed", 1, "--model", folder, "--dry-run", "--json")
    assert set(json.loads(told.stdout)["unknown_words"]) == {"zyzzyva", "quokka"}
    assert "words that this model never saw while it learned: " in told.stderr
    known = shell("generate", "a red dog", "--model", folder, "--dry-run", "--json")
    assert "unknown_words" not in json.loads(known.stdout) and known.stderr == ""


def test_what_wildcards_drew_is_in_the_names_the_record_and_the_dry_run(shell: Shell) -> None:
    arguments = ("a {red|blue} dog{ BREAK on a sofa|}", "--seed", 4, "-n", 3, "--json")
    dry = json.loads(shell("generate", *arguments, "--dry-run").stdout)
    outcome = shell("generate", *arguments, "-s", 1)
    rows = [json.loads(line) for line in outcome.lines]
    assert (outcome.code, outcome.stderr) == (0, "")
    assert len({row["prompt"] for row in rows}) > 1
    for row, seed in zip(rows, (4, 5, 6), strict=True):
        assert (list(row), row["seed"]) == ([*FIELDS, "prompt_template"], seed)
        assert row["prompt_template"] == arguments[0]
        inside = texts(Path(row["path"]).read_bytes())
        assert json.loads(inside["sdcli"]) == {k: v for k, v in row.items() if k not in ("path", "seconds")}
        assert inside["parameters"].startswith(row["prompt"] + "\nSteps: 1,")
        assert f", Template: {arguments[0]}, " in inside["parameters"]
    assert dry["prompt_template"] == arguments[0]
    assert dry["prompts"] == [row["prompt"] for row in rows]
    assert dry["outputs"] == [row["path"] for row in rows]
    assert dry["tokens"] == [row["tokens"] for row in rows]
    negative = json.loads(shell("generate", "a dog", "-N", "{x|y}", "--seed", 4, "-n", 9, "--json", "--dry-run").stdout)
    assert set(negative["negatives"]) == {"x", "y"} and negative["tokens"]["kept"] == 2


def test_a_dry_run_tells_of_swapped_words_and_of_what_is_cut(shell: Shell) -> None:
    arguments = ("--dry-run", "--replace", "cat=dog", "--mix", "puppy=0.5,cat=0.5", "--seed", 7)
    outcome = shell("generate", PROMPT + " dog" * 1200, *arguments)
    assert outcome.code == 0
    assert 'swaps: ["--replace cat=dog", "--mix puppy=0.5,cat=0.5"]' in outcome.lines
    assert {"tokens.kept: 1200", "tokens.cut: 5", "tokens.chunks: 16"} <= set(outcome.lines)
    assert "warning: the prompt is too long: the last 5 of 1205 tokens are not used" in outcome.stderr
    assert "--replace cat=dog: the prompt does not have the word, so it changes nothing" in outcome.stderr


@pytest.mark.parametrize("has_lora", [False, True])
def test_no_trainer_is_imported_to_draw_and_so_none_of_peft_that_diffusers_does_not_bring(
    forks: Forks, sd1: Path, tmp_path: Path, has_lora: bool
) -> None:
    """Of the package one module alone imports peft, a trainer: see `test_architecture.py`."""
    options = ["--lora", str(models.write_lora(tmp_path / "a.safetensors", sd1))] if has_lora else []
    code = "import sys\n"
    code += "for name in [name for name in sys.modules if name.split('.')[0] == 'sdcli']: del sys.modules[name]\n"
    code += "from sdcli.cli import app\n"
    code += "print(app.run(arguments), *sorted(name for name in sys.modules if name.startswith('sdcli.training')))"
    made = ("-o", str(tmp_path / "a.png"), "--no-serve", "--json")
    ended = forks.python(code, ["generate", "a cat", "-m", str(sd1), "--steps", "1", *made, *options])
    record, *rest = ended.stdout.splitlines()
    assert (rest, "loras" in json.loads(record), ended.stderr) == (["0"], has_lora, "")


NETWORKS = "a cat <lora:x:0.8> <LoRA:x:0.8> on a <lyco:y> <lora:x:0.8>"


@pytest.mark.parametrize(
    "command",
    [
        ("generate", NETWORKS, "-N", "<lora:x:0.8>", "--steps", 2),
        ("generate", NETWORKS, "-N", "<lora:x:0.8>", "--steps", 2, "-n", 3, "--dry-run"),
        ("generate", "{" + NETWORKS + "}", "--dry-run", "--embedding", "cat.pt"),
        ("batch", "jobs.txt", "-o", "out", "--steps", 2),
        ("batch", "jobs.txt", "-o", "out", "--dry-run"),
        ("tokens", NETWORKS),
        ("encode", "red.png", "--invert", NETWORKS, "--steps", 2, "-o", "red.safetensors"),
        ("bench", "--prompt", NETWORKS, "--schedulers", "ddim", "--steps", 1, "--reference-steps", 4),
    ],
    ids=lambda command: f"{command[0]}{' --dry-run' if '--dry-run' in command else ''}",
)
def test_each_network_that_prompts_name_is_one_warning_in_every_command(shell: Shell, command: tuple[Any, ...]) -> None:
    Path("jobs.txt").write_text(f"{NETWORKS}\n{NETWORKS} and a dog\n", encoding="utf-8")
    Path("cat.pt").write_bytes(b"PK\3\4")
    Image.new("RGB", (32, 32), "red").save("red.png")
    outcome = shell(*command)
    assert outcome.code == 0
    told = [line for line in outcome.stderr.splitlines() if line.startswith("sdcli: warning: ")]
    assert told == [
        f"sdcli: warning: {one} in the prompt is read as words: name the file with --lora FILE:SCALE"
        for one in ("<lora:x:0.8>", "<LoRA:x:0.8>", "<lyco:y>")
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a (dog:11)"], "the weight 11 in the prompt: out of range; it must lie in 0..10"),
        ([PROMPT, "-N", "(dog:-1)"], "the weight -1 in the prompt: out of range"),
        (["a {cat|(dog:11)}"], "the weight 11 in the prompt: out of range; it must lie in 0..10"),
        ([PROMPT, "--clip-skip", "2"], "--clip-skip 2: this model's text encoder has 2 layers; it must lie in 0..1"),
        ([PROMPT, "--clip-skip", "-1"], "--clip-skip -1: out of range; it must be at least 0"),
        ([PROMPT, "--clip-skip", "one"], "--clip-skip"),
        (["{a cat|}"], "the prompt '{a cat|}': its wildcards may draw nothing at all; say outside of them what to"),
        ([PROMPT, "--replace", "puppy"], "--replace puppy: says not what for what; write it as in --replace puppy=cat"),
        ([PROMPT, "--replace", "puppy= "], "--replace puppy= : says not what for what"),
        ([PROMPT, "--mix", "puppy"], "--mix puppy: puppy is no word with its weight; write it as in --mix puppy=0.5"),
        ([PROMPT, "--mix", "puppy=1,"], "--mix puppy=1,: an empty part is no word with its weight"),
        ([PROMPT, "--mix", "puppy=nan"], "--mix puppy=nan: puppy=nan is no word with its weight"),
        ([PROMPT, "--mix", "puppy=11"], "weights in -10..10"),
        ([PROMPT, "--mix", "puppy=1,hot dog=1"], "--mix puppy=1,hot dog=1: puppy is 1 token, hot dog is 2 tokens"),
        ([PROMPT, "--replace", "puppy=cat", "--mix", "puppy=1"], "--mix puppy=1: puppy is swapped already"),
    ],
)
def test_a_weight_or_a_swap_that_makes_no_sense_is_a_usage_error(shell: Shell, arguments: list[str], said: str) -> None:
    outcome = shell("generate", *arguments, "--dry-run")
    assert (outcome.code, outcome.stdout) == (ExitCode.USAGE, "")
    assert said in outcome.stderr


def test_words_are_no_options_of_a_class_model(shell: Shell, classed: Path) -> None:
    outcome = shell("generate", "--class", "dog", "-m", classed, "--replace", "puppy=cat")
    assert (outcome.code, outcome.stdout) == (ExitCode.USAGE, "")
    assert "--replace and --mix: this model reads no prompts" in outcome.stderr


def test_a_dry_run_in_a_fresh_interpreter_imports_no_torch(sd1: Path, tmp_path: Path) -> None:
    """With a file of vectors, which is not read, not even the tokenizer, and a LoRA, of which the header is."""
    lora = models.write_lora(tmp_path / "a.safetensors", sd1)
    code = "import sys; from sdcli.cli.app import run; code = run(sys.argv[1:]);"
    code += "heavy = {'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'accelerate'} & sys.modules.keys();"
    code += "sys.exit(f'imported {heavy}' if heavy else code)"
    command = [
        sys.executable,
        "-c",
        code,
        "generate",
        PROMPT,
        "--model",
        str(sd1),
        "--embedding",
        __file__,
        "--lora",
        f"{lora}:0.5",
        "--dry-run",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f'loras: [{{"file": "{lora}", "scale": 0.5}}]' in ended.stdout


# How it ends.


RUN = "import sys; from sdcli.cli import app; sys.exit(app.run(arguments))"


def test_a_closed_stdout_ends_it_quietly(forks: Any, sd1: Path, tmp_path: Path) -> None:
    closed = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1); "
    arguments = ["generate", PROMPT, "-m", str(sd1), "-s", "1", "-n", "3", "-b", "1", "-o", str(tmp_path)]
    ended = forks.python(closed + RUN, arguments)
    assert (ended.code, ended.stderr) == (ExitCode.PIPE, "")
    assert len(tree(tmp_path)) == 1  # the first picture is there, its path could not be told


def test_term_in_the_middle_of_the_work_ends_it_with_whole_pictures_alone(
    forks: Any, sd1: Path, tmp_path: Path
) -> None:
    when_one_is_there = f"""
import os, pathlib, signal, threading, time
def wait():
    while not list(pathlib.Path({str(tmp_path)!r}).glob("*.png")):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=wait, daemon=True).start()
"""
    arguments = ["generate", PROMPT, "-m", str(sd1), "-s", "50", "-n", "500", "-b", "1", "-o", str(tmp_path)]
    ended = forks.python(when_one_is_there + RUN, arguments)
    assert (ended.code, ended.stderr) == (ExitCode.TERMINATED, "sdcli: error: stopped\n")
    pictures = list(tmp_path.iterdir())
    assert 1 <= len(pictures) < 100
    assert {str(path) for path in pictures} >= set(ended.stdout.split())
    for path in pictures:
        Image.open(path).load()


def test_term_before_any_write_leaves_a_whole_picture_or_none(forks: Any, sd1: Path, tmp_path: Path) -> None:
    """The signal is sent before each single call that changes the file system."""
    arguments = ("generate", PROMPT, "--model", sd1, "--steps", 1, "--seed", 7, "--output")
    whole = forks.sdcli(*arguments, tmp_path / "whole.png")
    assert (whole.code, whole.stdout) == (0, f"{tmp_path / 'whole.png'}\n")
    made = {"whole.png": (tmp_path / "whole.png").read_bytes()}
    for at in range(1, whole.writes + 1):
        ended = forks.sdcli(*arguments, tmp_path / "x.png", at=at, send=signal.SIGTERM)
        assert (ended.code, ended.stderr) == (ExitCode.TERMINATED, "sdcli: error: stopped\n")
        found = tree(tmp_path)
        assert found in (made, made | {"x.png": made["whole.png"]}), f"TERM before write {at} of {whole.writes}"
        (tmp_path / "x.png").unlink(missing_ok=True)


def test_term_inside_a_library_is_not_taken_for_an_error_of_the_library(forks: Any, sd1: Path, tmp_path: Path) -> None:
    while_the_tokenizer_is_read = """
import os, signal, sys
def audit(event, arguments):
    if event == "open" and str(arguments[0]).endswith("tokenizer_config.json"):
        os.kill(os.getpid(), signal.SIGTERM)
sys.addaudithook(audit)
"""
    arguments = ["generate", PROMPT, "-m", str(sd1), "-s", "1", "-o", str(tmp_path)]
    ended = forks.python(while_the_tokenizer_is_read + RUN, arguments)
    assert (ended.code, ended.stderr) == (ExitCode.TERMINATED, "sdcli: error: stopped\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_int_and_hup_end_it_as_term_does(forks: Any, sd1: Path, tmp_path: Path, number: signal.Signals) -> None:
    ended = signalled(forks, number, "SIG_DFL", "generate", PROMPT, "-m", sd1, "-s", 1, "-o", tmp_path / "x.png")
    assert (ended.code, ended.stdout, ended.stderr) == (128 + number, "", "sdcli: error: stopped\n")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_nohup_or_the_shell_ignores_is_ignored(
    forks: Any, sd1: Path, tmp_path: Path, number: signal.Signals
) -> None:
    ended = signalled(forks, number, "SIG_IGN", "generate", PROMPT, "-m", sd1, "-s", 1, "-o", tmp_path / "x.png")
    assert (ended.code, ended.stderr) == (0, "")
    assert list(tree(tmp_path)) == ["x.png"]


def signalled(forks: Any, number: int, before: str, *arguments: object) -> Any:
    """Run a command that began with a signal at its default or ignored, and send it before the first write."""
    code = f"import signal, sys; signal.signal({int(number)}, signal.{before});"
    code += "from sdcli.cli import app; sys.exit(app.run(arguments))"
    return forks.python(code, [str(argument) for argument in arguments], at=1, send=int(number))


def test_kill_before_any_write_leaves_no_half_picture(forks: Any, sd1: Path, tmp_path: Path) -> None:
    arguments = ("generate", PROMPT, "--model", sd1, "--steps", 1, "--seed", 7, "--output")
    whole = forks.sdcli(*arguments, tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    for at in range(1, whole.writes + 1):
        assert forks.sdcli(*arguments, tmp_path / "x.png", at=at, send=signal.SIGKILL).code == -signal.SIGKILL
        if (tmp_path / "x.png").exists():
            assert (tmp_path / "x.png").read_bytes() == data
            (tmp_path / "x.png").unlink()


def test_a_sheet_that_is_there_is_kept_if_asked_and_never_takes_the_place_of_a_picture(shell: Shell) -> None:
    options = ("-s", 1, "-n", 2, "-o", "out", "--grid", "sheet.png", "--if-exists", "skip", "--json")
    first = shell("generate", PROMPT, "--seed", 1, *options)
    before = Path("sheet.png").read_bytes()
    second = shell("generate", PROMPT, "--seed", 5, *options)
    assert (first.code, second.code) == (0, 0)
    assert json.loads(second.lines[-1]) == {"path": "sheet.png", "skipped": True}
    assert Path("sheet.png").read_bytes() == before
    same = Path("a.png").resolve()
    refused = shell("generate", PROMPT, "-s", 1, "-o", "a.png", "--grid", same, "--if-exists", "overwrite")
    assert refused.code == ExitCode.USAGE and "would be the name of a picture, too" in refused.stderr


def test_the_steps_of_a_second_run_are_those_of_its_own_picture(shell: Shell) -> None:
    for _ in range(2):
        assert shell("generate", PROMPT, "-s", 2, "--seed", 1, "-o", "x.png", "--save-steps", "steps").code == 0
    assert set(tree(Path())) == {"x.png", "x-2.png", "steps"} | {
        f"steps/{name}-step-000{step}.png" for name in ("x", "x-2") for step in (1, 2)
    }


def test_a_dry_run_names_all_that_would_be_written(shell: Shell) -> None:
    beside = ("--grid", "g.webp", "--save-steps", "s", "--save-latents", "l", "--dry-run", "--json")
    row = json.loads(shell("generate", "a", "--seed", 1, "-s", 3, "-n", 2, "-o", "o", *beside).stdout)
    assert row["outputs"] == ["o/a-1.png", "o/a-2.png"]
    assert row["save_latents"] == ["l/a-1.latents.safetensors", "l/a-2.latents.safetensors"]
    assert row["save_steps"] == ["s/a-1-step-{0001..0003}.png", "s/a-2-step-{0001..0003}.png"]
    assert row["grid"] == "g.webp"
    assert tree(Path()) == {}


def test_a_slash_at_the_end_of_any_output_makes_a_folder(shell: Shell) -> None:
    beside = ("--save-steps", "s.d/", "--save-latents", "l.d/", "--seed", 7, "--dry-run", "--json")
    row = json.loads(shell("generate", PROMPT, "-s", 2, "-o", "o.d/", *beside).stdout)
    assert row["outputs"] == ["o.d/a-picture-of-a-puppy-7.png"]
    assert row["save_latents"] == ["l.d/a-picture-of-a-puppy-7.latents.safetensors"]
    assert row["save_steps"] == ["s.d/a-picture-of-a-puppy-7-step-{0001..0002}.png"]
    Image.new("RGB", (32, 32)).save("x.png")
    for command in ("encode x.png", "roundtrip x.png", "diffuse x.png --t 5 --space pixels", "schedulers --plot betas"):
        ended = shell(*command.split(), "-o", f"{command[:3]}.d/")
        assert ended.code == 0 and str(next(Path(f"{command[:3]}.d").iterdir())) in ended.stdout, ended.stderr


def test_stdout_is_for_a_picture_or_for_json(shell: Shell) -> None:
    outcome = shell("generate", PROMPT, "-o", "-", "--json")
    assert (outcome.code, outcome.stdout) == (ExitCode.USAGE, "")
    assert json.loads(outcome.stderr)["error"] == "--json with --output -: stdout takes the picture"


def test_part_files_of_dead_processes_go_from_every_folder_that_is_written_to(shell: Shell) -> None:
    parts = [Path(folder) / ".x.png.999999999-0123abcd.part" for folder in ("out", "sheets", "steps", "latents")]
    for part in parts:
        part.parent.mkdir()
        part.touch()
        os.utime(part, (0, 0))
    beside = ("--grid", "sheets/g.png", "--save-steps", "steps", "--save-latents", "latents")
    assert shell("generate", PROMPT, "-s", 1, "-o", "out", *beside).code == 0
    assert [part for part in parts if part.exists()] == []


def test_steps_of_pictures_of_one_name_in_different_folders_are_all_kept(shell: Shell) -> None:
    done = shell("generate", PROMPT, "-s", 2, "--seed", 1, "-n", 2, "-o", "{seed}/a.png", "--save-steps", "steps")
    assert done.code == 0
    assert len(list(Path("steps").iterdir())) == 4
