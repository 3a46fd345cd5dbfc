"""`sdcli batch` as a script sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sdcli.cli import signals
from sdcli.cli.signals import Signalled
from sdcli.errors import ExitCode
from tests import models
from tests.commands import Shell

GOOD = '{"prompt": "a cat", "steps": 2, "id": "x"}\n'
BAD = '{"promt": "a cat"}\n'


def write(text: str, name: str = "jobs.jsonl") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_stdout_has_the_paths_of_what_was_made_and_stderr_a_summary(shell: Shell) -> None:
    done = shell("batch", write("a cat\na dog\n", "jobs.txt"), "-o", "out", "--steps", 2)
    assert (done.code, done.stderr) == (0, "images: 2 made\n")
    assert sorted(done.lines) == sorted(str(path) for path in Path("out").glob("*.png"))
    again = shell("batch", "jobs.txt", "-o", "out", "--steps", 2)
    assert (again.code, again.stdout, again.stderr) == (0, "", "images: 0 made, 2 there before\n")


def test_json_is_a_record_a_picture_with_its_job(shell: Shell) -> None:
    done = shell("batch", write(GOOD), "-o", "out", "--json")
    (record,) = map(json.loads, done.lines)
    assert (done.code, done.stderr) == (0, "")
    assert (record["path"], record["prompt"], record["id"], record["steps"]) == ("out/x.png", "a cat", "x", 2)
    (row,) = map(json.loads, Path("out/ledger.jsonl").read_text(encoding="utf-8").splitlines())
    assert row == {"key": record["job"], **record, "path": "x.png"}


def test_a_bad_line_is_one_error_and_nothing_is_made(shell: Shell) -> None:
    done = shell("batch", write(GOOD + BAD), "-o", "out")
    assert (done.code, done.stdout) == (ExitCode.INPUT, "")
    assert done.stderr == "sdcli: error: jobs.jsonl:2: promt: unknown key; did you mean prompt?\n"
    assert not Path("out").exists()


def test_keep_going_makes_the_good_ones_and_says_that_it_is_not_all(shell: Shell) -> None:
    done = shell("batch", write(GOOD + BAD), "-o", "out", "--keep-going")
    assert (done.code, done.lines) == (ExitCode.PARTIAL, ["out/x.png"])
    assert "sdcli: warning: jobs.jsonl:2: promt: unknown key" in done.stderr
    assert done.stderr.endswith(
        "sdcli: error: 1 of 2 jobs failed; mend them; the same command again makes what is missing\n"
    )


def test_dry_run_counts_and_draws_nothing(shell: Shell) -> None:
    done = shell("batch", write(GOOD), "-o", "out", "--dry-run", "--json")
    assert (done.code, json.loads(done.stdout)) == (0, {"images": 1, "lines": 1, "bad": 0})
    assert not Path("out").exists()


def test_strength_and_mask_of_the_command_line_are_for_the_pictures_that_jobs_name(
    shell: Shell, inpainting: Path
) -> None:
    for name in ("photo.png", "mask.png"):
        Image.linear_gradient("L").resize((models.SIZE, models.SIZE)).save(name)
    started = '{"prompt": "a cat", "init_image": "photo.png", "id": "x"}\n'
    own = '{"prompt": "a cat", "init_image": "photo.png", "strength": 1, "id": "y"}\n'
    common = ["-o", "out", "--json", "--steps", 2]
    done = shell("batch", write(started + own + '{"prompt": "a cat", "id": "z"}\n'), *common, "--strength", 0.5)
    assert (done.code, done.stderr) == (0, "")
    assert {row["id"]: row.get("strength") for row in map(json.loads, done.lines)} == {"x": 0.5, "y": 1.0, "z": None}
    done = shell(
        "batch", write(started), "--model", inpainting, "--mask", "mask.png", *common, "--if-exists", "overwrite"
    )
    assert (done.code, [json.loads(line)["mask"]["file"] for line in done.lines]) == (0, ["mask.png"])
    bare = shell("batch", write(GOOD), "--model", inpainting, *common)
    assert (bare.code, "jobs.jsonl:1: " in bare.stderr, "name the picture" in bare.stderr) == (
        ExitCode.INPUT,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", "3/2"], "--shard 3/2: out of range"),
        (["--shard", "0/2"], "--shard 0/2: out of range"),
        (["--shard", "x"], "--shard x: is no share"),
        (["--strength", "2"], "--strength 2.0: out of range"),
        (["--max-failures", "0"], "--max-failures 0: out of range"),
        (["--if-exists", "number"], "--if-exists number: the same batch again would make every picture again"),
        (["--if-exists", "maybe"], "--if-exists maybe: unknown"),
        (["--steps", "0"], "--steps 0: out of range"),
        (["--batch-size", "0"], "--batch-size 0: out of range"),
        (["-o", "-"], "--output -: a batch writes files"),
        (["-o", "out/{seed}"], "--output out/{seed}: a batch names its pictures itself"),
        (["--prompt", "x"], "no such option: --prompt"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_drawn(shell: Shell, options: list[str], words: str) -> None:
    done = shell("batch", write(GOOD), *options)
    assert (done.code, done.stdout) == (ExitCode.USAGE, "")
    assert words in done.stderr
    assert [path.name for path in Path().iterdir()] == ["jobs.jsonl"]


def test_a_gallery_is_told_last_and_written_anew_by_the_same_command(shell: Shell) -> None:
    done = shell("batch", write("a cat\na dog\n", "jobs.txt"), "-o", "out", "--steps", 1, "--gallery")
    assert (done.code, done.lines[-1], len(done.lines)) == (0, "out/gallery.html", 3)
    first = Path("out/gallery.html").read_bytes()
    again = shell("batch", "jobs.txt", "-o", "out", "--steps", 1, "--gallery", "--json")
    assert [json.loads(line) for line in again.lines] == [{"path": "out/gallery.html", "gallery": 2, "left_out": 0}]
    assert Path("out/gallery.html").read_bytes() == first


def test_a_gallery_takes_the_place_of_nothing_else(shell: Shell) -> None:
    jobs = write(GOOD)
    Path("out").mkdir()
    Path("out/gallery.html").write_text("my own", encoding="utf-8")
    for extra in ([], ["--dry-run"]):
        done = shell("batch", jobs, "-o", "out", "--gallery", *extra)
        assert (done.code, done.stdout) == (ExitCode.OUTPUT, "")
        assert "out/gallery.html: exists and is no gallery of sdcli; move it away" in done.stderr
    assert {path.name for path in Path("out").iterdir()} == {"gallery.html"}
    assert shell("batch", jobs, "-o", "out", "--gallery", "--if-exists", "overwrite").code == 0
    Path("out/gallery.html").unlink()
    Path("out/gallery.html").mkdir()
    assert "out/gallery.html: is a folder" in shell("batch", jobs, "-o", "out", "--gallery").stderr


def test_stdin_is_not_looked_at_in_vain(shell: Shell) -> None:
    assert "--dry-run of stdin" in shell("batch", "-", "--dry-run").stderr
    closed = shell("batch", "-", "-o", "out")
    assert (closed.code, "stdin is closed" in closed.stderr) == (ExitCode.USAGE, True)


def test_a_folder_that_another_batch_owns_is_left_alone(shell: Shell) -> None:
    import fcntl

    Path("out").mkdir()
    with Path("out/.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = shell("batch", write(GOOD), "-o", "out")
    assert done.code == ExitCode.LOCKED
    assert "another batch owns this folder" in done.stderr


def test_the_first_signal_is_kept_and_the_second_ends_at_once() -> None:
    def end(number: int, frame: object) -> None:
        raise Signalled(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with signals.kept(1) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM]
            with pytest.raises(Signalled):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_a_process_stays_warm_between_lines_of_stdin(tmp_path: Path, sd1: Path) -> None:
    command = [sys.executable, "-m", "sdcli", "batch", "-", "-o", str(tmp_path), "--model", str(sd1), "--steps", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        for name in ("one", "two"):
            process.stdin.write(f'{{"prompt": "a cat", "id": "{name}"}}\n')
            process.stdin.flush()
            assert process.stdout.readline() == f"{tmp_path / name}.png\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == ExitCode.TERMINATED


@pytest.mark.slow
def test_accelerate_launch_makes_fifty_files_once(tmp_path: Path, sd1: Path) -> None:
    jobs = tmp_path / "jobs.txt"
    jobs.write_text("".join(f"a cat {i}\n" for i in range(50)), encoding="utf-8")
    common = ["-m", "sdcli", "batch", str(jobs), "--model", str(sd1), "--steps", "1", "--deterministic", "-o"]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}  # as accelerate has it; sums round by the number of threads
    subprocess.run([sys.executable, *common, str(tmp_path / "one")], check=True, capture_output=True, env=threads)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    subprocess.run([*launch, *common, str(tmp_path / "two")], check=True, capture_output=True, env=threads)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")} for name in ("one", "two"))
    assert len(one) == 50 and one == two
    rows = [json.loads(line) for line in (tmp_path / "two" / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(row["path"] for row in rows) == sorted(one)
