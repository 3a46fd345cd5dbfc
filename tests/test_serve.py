"""One real warm process for all of these tests, and commands in processes of their own beside it."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sdcli import serve
from sdcli.cli.app import run
from sdcli.errors import InputError
from sdcli.events import Event, ImageRecord, Progress, Waiting
from sdcli.pipeline.adapters import Embedding, write_embedding
from sdcli.pipeline.device import give_back
from sdcli.plan import plan
from sdcli.specs import GenerateSpec
from sdcli.warm import client, place
from tests import models
from tests.commands import tree
from tests.forks import RUN_COMMAND, Ended, Forks

LIMIT_SECONDS = 120.0  # for what takes a few on an idle machine
IN_A_FOLDER = """
import os, sys
folder, umask, has_reader = arguments.pop(0), int(arguments.pop(0), 8), arguments.pop(0)
os.chdir(folder)
os.umask(umask)
if has_reader == "no":
    reader, writer = os.pipe()
    os.close(reader)
else:
    writer = os.open("../stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(writer, 1)
from sdcli import output
output.open_streams()
"""


class Warm:
    """The warm process; started again when a test has ended it."""

    def __init__(self, forks: Forks, log: Path) -> None:
        self._environment, self._log = forks.environment, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "sdcli", "serve", "--json", "--idle", "1h"]
            with self._log.open("wb") as log:
                self.process = subprocess.Popen(command, stdout=log, env=self._environment)
            until(lambda: '"ready"' in self._log.read_text())
        return self.process

    def told(self) -> list[dict[str, Any]]:
        """What it said of each request."""
        return [json.loads(line) for line in self._log.read_text().splitlines()[1:]]

    @contextmanager
    def asked(self, times: int = 1) -> Iterator[None]:
        """A block in which so many requests come, and at whose end all has been said of them."""
        count = len(self.told())
        yield
        until(lambda: len(self.told()) >= count + times)
        assert len(self.told()) == count + times


@pytest.fixture(scope="module")
def process(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    warm = Warm(forks, tmp_path_factory.mktemp("log") / "log.jsonl")
    yield warm
    if warm.process is not None:
        warm.process.kill()
        warm.process.wait()


@pytest.fixture
def warm(process: Warm) -> Warm:
    """A warm process that listens, as the commands of `forks` find it."""
    process.start()
    return process


@pytest.fixture
def beside(warm: Warm, forks: Forks, monkeypatch: pytest.MonkeyPatch) -> Warm:
    """The same, as this process finds it, too."""
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, forks.environment[name])
    return warm


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, sd1: Path) -> Path:
    """What commands name: a photo, half a photo, a learned word, a model whose weights are no numbers."""
    folder = tmp_path_factory.mktemp("inputs")
    Image.effect_noise((40, 32), 99).convert("RGB").save(folder / "photo.png")
    (folder / "half.png").write_bytes((folder / "photo.png").read_bytes()[:300])
    write_embedding(folder, Embedding("my-style", torch.ones(2, models.CONTEXT)))
    models.copy(sd1, folder / "nan")
    models.edit_weights(folder / "nan" / "unet", lambda weights: {k: v * float("nan") for k, v in weights.items()})
    return folder


GOOD = {
    "plain": ("a puppy", "--seed", "7"),
    "json": ("a puppy", "--seed", "7", "-n", "3", "--batch-size", "2", "--grid", "grid.png", "--json"),
    "stochastic": ("a puppy", "--seed", "7", "--scheduler", "euler-a", "--dtype", "bfloat16", "-o", "a.webp"),
    "photo": ("a puppy", "--seed", "7", "--init-image", "IN/photo.png", "--strength", "0.6", "-o", "\udcff/{seed}"),
    "besides": ("a", "--seed", "7", "--save-steps", "steps", "--save-latents", "l.safetensors", "-o", "deep/er/a.jpg"),
    "warnings": ("x " * 2000, "--seed", "7", "--embedding", "IN/my-style.safetensors", "-N", "y " * 2000),
    "swapped": ("a puppy", "--mix", "puppy=0.5,cat=0.5", "--seed", "7", "-o", "a.png", "--no-metadata"),
    "drawn": ("a {red|blue} {puppy|cat}", "-n", "3", "--seed", "1", "--clip-skip", "1", "-o", "{slug}", "--json"),
    "skipped": ("a puppy", "--seed", "7", "-n", "2", "-o", "old.png", "--if-exists", "skip", "--json"),
    "stdout": ("a puppy", "--seed", "7", "-o", "-"),
}
BAD = {
    "not finite": (7, ("a puppy", "--model", "IN/nan", "-o", "new/a.png")),
    "half": (3, ("a puppy", "--init-image", "IN/half.png", "--json")),
    "embedding": (3, ("a puppy", "--embedding", "IN/photo.png")),
    "word": (2, ("a puppy", "--replace", "puppy=supercalifragilistic")),
    "device": (2, ("a puppy", "--device", "abacus")),
    "no device": (6, ("a puppy", "--device", "cuda:99", "--json")),
    "taken": (5, ("a puppy", "-o", "old.png", "--if-exists", "error")),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_command_leaves_the_same_files_and_words_served_or_not(
    name: str, warm: Warm, forks: Forks, tmp_path: Path, sd1: Path, inputs: Path
) -> None:
    with warm.asked():
        served = outcome(forks, tmp_path / "served", sd1, inputs, GOOD[name], umask="027")
    assert warm.told()[-1]["exit_code"] == 0
    with warm.asked(0):
        assert served == outcome(forks, tmp_path / "cold", sd1, inputs, (*GOOD[name], "--no-serve"), umask="027")
    assert served[0] == 0 and served[1] != b""
    assert all(mode == 0o640 for mode in served[4].values())


@pytest.mark.parametrize("name", BAD)
def test_a_command_fails_alike_served_or_not(
    name: str, warm: Warm, forks: Forks, tmp_path: Path, sd1: Path, inputs: Path
) -> None:
    code, words = BAD[name][0], (*BAD[name][1], "--seed", "7")
    is_asked = name not in ("half", "taken")  # of what is found to be wrong before, nobody is asked
    with warm.asked(int(is_asked)):
        served = outcome(forks, tmp_path / "served", sd1, inputs, words)
    assert served == outcome(forks, tmp_path / "cold", sd1, inputs, (*words, "--no-serve"))
    assert served[0] == code and served[2].count("error") == 1
    assert set(served[3]) == {"old.png"}
    if is_asked:
        assert (warm.told()[-1]["images"], warm.told()[-1]["exit_code"]) == (0, code)
    with warm.asked():
        assert outcome(forks, tmp_path / "next", sd1, inputs, GOOD["plain"])[0] == 0  # it has lived through it


def test_a_reader_that_went_away_ends_both_at_the_same_picture(
    warm: Warm, forks: Forks, tmp_path: Path, sd1: Path, inputs: Path
) -> None:
    words = ("a puppy", "--seed", "7", "-n", "3")
    with warm.asked():
        served = outcome(forks, tmp_path / "served", sd1, inputs, words, has_reader="no")
    assert served == outcome(forks, tmp_path / "cold", sd1, inputs, (*words, "--no-serve"), has_reader="no")
    assert served[0] == 141 and set(served[3]) == {"old.png", "a-puppy-7.png"}


def test_requests_leave_nothing_behind_that_later_ones_see(
    warm: Warm, forks: Forks, tmp_path: Path, sd1: Path, classed: Path, inputs: Path
) -> None:
    stochastic = ("a puppy", "--seed", "7", "--scheduler", "dpm-sde", "--embedding", "IN/my-style.safetensors")
    with warm.asked(5):
        first = outcome(forks, tmp_path / "first", sd1, inputs, stochastic)
        assert outcome(forks, tmp_path / "a", classed, inputs, ("--class", "1", "--seed", "7"))[0] == 0
        assert outcome(forks, tmp_path / "b", sd1, inputs, BAD["not finite"][1])[0] == 7
        assert outcome(forks, tmp_path / "c", sd1, inputs, ("a my-style", *stochastic[1:]))[0] == 0
        assert outcome(forks, tmp_path / "last", sd1, inputs, stochastic) == first
    assert first[2].count("no prompt names its token") == 1


def test_a_model_whose_files_have_changed_is_loaded_anew(
    warm: Warm, forks: Forks, tmp_path: Path, model: Path, inputs: Path
) -> None:
    words = ("a puppy", "--seed", "7", "-o", "a.png")
    with warm.asked(2):
        before = outcome(forks, tmp_path / "before", model, inputs, words)
        models.edit_weights(model / "vae", lambda weights: {key: 0.9 * value for key, value in weights.items()})
        after = outcome(forks, tmp_path / "after", model, inputs, words)
    assert after == outcome(forks, tmp_path / "cold", model, inputs, (*words, "--no-serve"))
    assert after[3]["a.png"] != before[3]["a.png"]


def test_other_settings_of_torch_are_a_reason_to_draw_here_with_a_warning(
    warm: Warm, forks: Forks, tmp_path: Path, sd1: Path
) -> None:
    code = "import os; os.environ['OMP_NUM_THREADS'] = '3'\n" + RUN_COMMAND
    words = ["generate", "a puppy", "--model", str(sd1), "--steps", "2", "-o", str(tmp_path / "a.png")]
    with warm.asked(0):
        ended = forks.python(code, words)
        assert ended.code == 0 and (tmp_path / "a.png").exists()
        for option in ("--no-serve", "--debug"):
            assert "warm process" not in forks.sdcli(*words, option).stderr
    assert re.fullmatch(
        r"sdcli: warning: /.*/serve.sock: the warm process differs in OMP_NUM_THREADS \(.*\); drawing without it\n",
        ended.stderr,
    )


def test_an_interrupted_client_exits_as_ever_and_the_drawing_stops_without_a_file(
    warm: Warm, forks: Forks, tmp_path: Path, sd1: Path
) -> None:
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.5)\n" + RUN_COMMAND
    )
    words = ["generate", "a puppy", "--model", str(sd1), "--steps", "999", "--size", "128x128"]
    with warm.asked():
        ended = forks.python(code, [*words, "-o", str(tmp_path / "a.png")])
    assert (ended.code, ended.stdout, ended.stderr) == (130, "", "sdcli: error: stopped\n")
    assert warm.told()[-1]["exit_code"] is None and warm.told()[-1]["images"] == 0
    assert list(tmp_path.iterdir()) == []


def test_who_comes_while_another_is_served_waits_for_his_turn(beside: Warm, tmp_path: Path, sd1: Path) -> None:
    with beside.asked(2):
        first = events(sd1, tmp_path / "first.png", steps=300)
        until(lambda: isinstance(next(first), Progress))
        second = events(sd1, tmp_path / "second.png", steps=2)
        assert isinstance(next(second), Waiting)
        assert client.look() == "drawing"
        first.close()  # type: ignore[attr-defined]
        assert [event.path for event in second if isinstance(event, ImageRecord)] == [tmp_path / "second.png"]
    assert not (tmp_path / "first.png").exists()
    until(lambda: client.look() == "ready")


def test_what_can_be_drawn_again_without_harm_is_said_with_every_step(beside: Warm, tmp_path: Path, sd1: Path) -> None:
    common = {"prompt": "a puppy", "model": str(sd1), "steps": 2, "count": 3, "batch_size": 2}
    spec = {**common, "output": {"path": str(tmp_path)}}
    with beside.asked():
        told = spoken({"spec": spec, **here()})
    steps = [(*message["progress"], message["is_unwritten"]) for message in told if "progress" in message]
    assert steps == [(2, 6, True), (4, 6, False), (5, 6, False), (6, 6, False)]
    assert [list(message) for message in told if "progress" not in message] == [["record", "path"]] * 3 + [["done"]]
    with beside.asked():
        told = spoken({"spec": {**spec, "save_steps": {"path": str(tmp_path)}}, **here()})
    assert {message["is_unwritten"] for message in told if "progress" in message} == {False}


def test_nonsense_is_answered_and_lived_through(beside: Warm, tmp_path: Path) -> None:
    for request in ({}, {"umask": "x"}, {**here(), "spec": {"puppy": 1}}, {**here(), "spec": []}):
        with beside.asked():
            (told,) = spoken(request)
        assert told["error"] == "SdcliError" and told["text"].startswith("internal error: ")
    with beside.asked():
        assert spoken({**here(), "folder_file": [0, 0]}) == [{"refusal": "the warm process does not see this folder"}]
    with beside.asked():
        assert spoken({**here(), "folder": str(tmp_path / "missing")})[0].keys() == {"refusal"}
    assert beside.told()[-1] == {"images": 0, "seconds": beside.told()[-1]["seconds"], "exit_code": None}


def test_a_second_process_is_refused_before_it_loads_anything(beside: Warm, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["serve"]) == 8
    out, err = capfd.readouterr()
    assert out == "" and f"sdcli serve is there, as process {beside.start().pid}; use it, or end it first" in err
    assert client.look() == "ready"


@pytest.mark.slow
def test_memory_and_descriptors_stay_flat_over_a_thousand_requests(beside: Warm, tmp_path: Path, sd1: Path) -> None:
    sizes, descriptors = [], []
    for number in range(1000):
        size = ("32x32", "48x32", "64x64")[number % 3]
        with beside.asked():
            drawn = list(events(sd1, tmp_path / "a.png", steps=1, size=size, if_exists="overwrite"))
        assert isinstance(drawn[-1], ImageRecord)
        if number in (99, 999):
            folder = Path(f"/proc/{beside.start().pid}")
            sizes.append(int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            descriptors.append(len(list((folder / "fd").iterdir())))
    assert descriptors[0] == descriptors[1]
    assert sizes[1] - sizes[0] < 20 << 20


def test_killed_with_9_it_is_missed_once_and_can_be_started_again(
    warm: Warm, forks: Forks, tmp_path: Path, sd1: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    killed = warm.start()
    killed.kill()
    killed.wait()
    assert place.socket_path().exists()
    words = ("generate", "a puppy", "--model", sd1, "--steps", "2", "--seed", "7", "-o", tmp_path / "a.png")
    ended = [forks.sdcli(*words) for _ in range(2)]
    assert [one.code for one in ended] == [0, 0]
    assert re.fullmatch(r"sdcli: warning: .*: the warm process is dead; drawing without it\n", ended[0].stderr)
    assert ended[1].stderr == ""
    assert serve_here(sd1, capfd) == (0, f"ready: {place.socket_path()}\n", "nothing to draw for 0.1s: ended\n")
    assert not place.socket_path().exists()


def test_a_signal_ends_it_cleanly(sd1: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def send() -> None:
        until(lambda: place.socket_path().exists())
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    code = run(["serve", "--model", str(sd1), "--idle", "100s"])
    sender.join()
    assert code == 143
    assert capfd.readouterr().err == "sdcli: error: stopped\n"
    assert not place.socket_path().exists()


def test_what_cannot_be_loaded_ends_it_before_it_listens(inputs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--model", str(inputs / "nan")]) == 7
    assert capfd.readouterr().out == ""
    assert not place.socket_path().exists()


def test_a_path_too_long_for_a_socket_is_told(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    assert serve_here(sd1, capfd)[0] == 5


def test_one_model_is_kept_and_read_again_only_when_a_file_has_changed(model: Path, classed: Path) -> None:
    load, cpu = partial(serve.Kept().load, is_lean=True), torch.device("cpu")
    first = load(model, device=cpu, dtype=torch.float32)
    assert load(model, device=cpu, dtype=torch.float32) is first
    assert load(model, device=cpu, dtype=torch.bfloat16) is not first
    second = load(model, device=cpu, dtype=torch.float32)
    assert second is not first
    path = model / "scheduler" / "scheduler_config.json"
    before = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(model, device=cpu, dtype=torch.float32) is not second  # its time of change cannot be set back
    (model / "unet" / "config.json").unlink()
    with pytest.raises(InputError):
        load(model, device=cpu, dtype=torch.float32)
    assert load(classed, device=cpu, dtype=torch.float32) is not first


def outcome(
    forks: Forks,
    folder: Path,
    model: Path,
    inputs: Path,
    words: tuple[str, ...],
    *,
    umask: str = "022",
    has_reader: str = "yes",
) -> tuple[int, bytes, str, dict[str, Any], dict[str, int]]:
    """What a command leaves in a folder of its own: exit code, both streams, files, and the rights of the new ones."""
    folder.mkdir()
    (folder / "old.png").write_bytes(b"old")
    (folder / "old.png").chmod(0o640)
    named = [word.replace("IN/", f"{inputs}/") for word in words]
    if "--model" not in words:
        named += ["--model", str(model)]
    arguments = [str(folder), umask, has_reader, "generate", *named, "--steps", "2"]
    ended: Ended = forks.python(IN_A_FOLDER + RUN_COMMAND, arguments)
    stdout = b"" if has_reader == "no" else (folder.parent / "stdout").read_bytes()
    stdout = re.sub(rb'"seconds": [\d.]+', b"", stdout)
    files = tree(folder)
    rights = {name: (folder / name).stat().st_mode & 0o777 for name, data in files.items() if data is not None}
    return ended.code, stdout, ended.stderr, files, rights


def events(model: Path, target: Path, **options: Any) -> Iterator[Event]:
    """The events of a plan that the warm process draws."""
    spec = GenerateSpec(prompt="a puppy", model=str(model), seed=7, output=target, **options)
    return client.draw(spec, plan(spec))


def spoken(request: dict[str, Any]) -> list[dict[str, Any]]:
    """All that the warm process says to a request."""
    told = []
    with client.connected() as (line, _):
        assert line.receive(LIMIT_SECONDS)[0] == {"turn": True}
        line.send(request)
        while not told or told[-1].keys().isdisjoint({"done", "error", "refusal"}):
            told.append(line.receive(LIMIT_SECONDS)[0])
            if "record" in told[-1]:
                line.send({})
    return told


def here() -> dict[str, Any]:
    """Where this process is, as a request says it."""
    status = Path().stat()
    return {"folder": str(Path.cwd()), "folder_file": [status.st_dev, status.st_ino], "umask": 0o022}


def serve_here(model: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """`sdcli serve` in this process, for a moment: exit code, stdout and stderr."""
    capfd.readouterr()
    code = run(["serve", "--model", str(model), "--idle", "0.1s"])
    give_back()
    out, err = capfd.readouterr()
    return int(code), out, err


def until(is_so: Callable[[], object]) -> None:
    """Wait for something that will be so soon."""
    end = time.monotonic() + LIMIT_SECONDS
    for _ in itertools.count():
        if is_so():
            return
        assert time.monotonic() < end, "it has not come to be"
        time.sleep(0.02)
