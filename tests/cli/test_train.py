"""The trainers' command lines: settings from a file, dry runs, held-out pictures, what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sdcli.cli import signals
from sdcli.cli.signals import Signalled
from sdcli.cli.training import show
from sdcli.pipeline import vae as latent
from sdcli.pipeline.bundle import load_vae
from sdcli.training.loop import Compiling, Preparing
from tests.forks import RUN_COMMAND, Forks
from tests.runs import metrics, names, train_unet, train_vae


def test_settings_come_from_a_file_and_those_of_the_command_line_win(
    pictures: Path, forks: Forks, tmp_path: Path
) -> None:
    file = tmp_path / "train.toml"
    file.write_text('init = "tiny"\nsteps = 1\nlr = 0.002\nbatch-size = 2\ndevice = "cpu"\n', encoding="utf-8")
    command = ("train-vae", "--config", file, "--run", tmp_path / "run", "--data", pictures, "--lr", 0.001)
    ended = forks.sdcli(*command)
    assert ended.code == 0, ended.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert (config["steps"], config["batch_size"], config["lr"], config["init"]) == (1, 2, 0.001, "tiny")


def test_a_file_may_say_where_the_data_lie(pictures: Path, forks: Forks, tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    rows = {"data": str(pictures), "run": str(tmp_path / "run"), "init": "tiny", "device": "cpu"}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in rows.items())
    file.write_text(text + "steps = 1\nadaptive-weight = false\n", encoding="utf-8")
    ended = forks.sdcli("train-vae", "--config", file)
    assert ended.code == 0, ended.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["adaptive_weight"] is False


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("batchsize = 2", 2, "train.toml: batchsize: is no option of train-vae; did you mean batch-size?"),
        ("config = 'other.toml'", 2, "config: is no option"),
        ("steps = 'many'", 2, "invalid value for '--steps'"),
        ("steps = 0", 2, "--steps 0: out of range"),
        ("steps =", 3, "train.toml: is no TOML"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1") + "=", 3, "is no TOML"),
        (None, 3, "train.toml"),
    ],
)
def test_a_file_of_settings_that_is_wrong_is_refused_with_its_line(
    pictures: Path, forks: Forks, tmp_path: Path, text: str | None, code: int, said: str
) -> None:
    file = tmp_path / "train.toml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    ended = forks.sdcli("train-vae", "--config", file, *train_vae(pictures, tmp_path / "run")[1:5])
    assert (ended.code, said in ended.stderr) == (code, True), ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "settings", "same_as"),
    [
        ((), "", ("--model", "MODEL")),
        (("--init", "tiny"), "", ("--init", "tiny")),
        ((), 'init = "tiny"', ("--init", "tiny")),
        (("--model", "builtin"), "", ("--model", "builtin")),
        ((), 'model = "builtin"', ("--model", "builtin")),
    ],
    ids=["alone", "init", "init in a file", "model", "model in a file"],
)
def test_the_model_of_the_environment_counts_where_nothing_else_says_where_to_start(
    pictures: Path,
    sd1: Path,
    forks: Forks,
    tmp_path: Path,
    options: tuple[str, ...],
    settings: str,
    same_as: tuple[str, ...],
) -> None:
    file = tmp_path / "train.toml"
    file.write_text(settings, encoding="utf-8")
    common = ("train-vae", "--data", str(pictures), "--resolution", "32", "--dry-run", "--json")
    set_model = "import os; os.environ['SDCLI_MODEL'] = arguments.pop()\n"
    planned = [
        forks.python(set_model + RUN_COMMAND, [*common, "--config", str(file), *options, str(sd1)]),
        forks.sdcli(*common, *(str(sd1) if word == "MODEL" else word for word in same_as)),
    ]
    assert [ended.code for ended in planned] == [0, 0], planned
    there, here = (json.loads(ended.stdout) for ended in planned)
    assert there["run"] == here["run"]  # named by its settings


def test_a_run_cannot_be_compiled_without_a_compiler(pictures: Path, forks: Forks, tmp_path: Path) -> None:
    without = "import os; os.environ['PATH'] = ''; os.environ.pop('CXX', None)\n"
    command = [*map(str, train_vae(pictures, tmp_path / "run")), "--compile"]
    ended = forks.python(without + RUN_COMMAND, command)
    assert (ended.code, ended.stdout) == (6, "")
    assert "--compile: no C++ compiler is here" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiler_that_fails_is_told_and_nothing_but_the_run_folder_is_there(
    pictures: Path, forks: Forks, tmp_path: Path
) -> None:
    failing = "import os; os.environ['TORCHINDUCTOR_CACHE_DIR'] = arguments.pop()\n"
    failing += "from torch._inductor import config; config.cpp.cxx = ('false',)\n"
    command = [*map(str, train_vae(pictures, tmp_path / "run")), "--compile", str(tmp_path / "cache")]
    ended = forks.python(failing + RUN_COMMAND, command)
    assert ended.code == 6
    assert "--compile: torch could not compile the network" in ended.stderr
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("vae", ()),
        ("vae", ("--regularizer", "vq")),
        ("vae", ("--disc-start", 2, "--disc-layers", 1, "--no-adaptive-weight")),
        ("unet", ("--mixed-precision", "bf16", "--accumulate", 2)),
        ("lora", ("--lora-rank", 2)),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)) or "plain",
)
def test_a_compiled_run_learns_the_same_and_goes_on_without(
    pictures: Path,
    vae_run: Path,
    unet_run: Path,
    forks: Forks,
    tmp_path: Path,
    kind: str,
    flags: tuple[object, ...],
) -> None:
    rows = []
    for name, compiled in (("plain", ()), ("compiled", ("--compile",))):
        run = tmp_path / name
        command = train_vae(pictures, run) if kind == "vae" else train_unet(pictures, run, vae_run)
        if kind == "lora":
            fresh = ("--init", "tiny", "--vae", vae_run / "export")
            command = (*(one for one in command if one not in fresh), "--model", unet_run / "export")
        for more in ((*compiled, "--stop-after", 4), ()):
            ended = forks.sdcli(*command, *flags, *more)
            assert ended.code == 0, ended.stderr
        rows.append([row["loss"] for row in metrics(run) if "lr" in row])
    assert len(rows[0]) == 6
    assert rows[1] == pytest.approx(rows[0], rel=0.02)


def test_signals_wait_for_a_report_but_while_a_run_compiles() -> None:
    def reports(report: Preparing | Compiling) -> Iterator[Preparing | Compiling]:
        yield report
        for number in (signal.SIGINT, signal.SIGTERM):
            sent.append(number)
            os.kill(os.getpid(), number)

    sent: list[int] = []
    with signals.raised():
        show(reports(Preparing("reading", 0, 1)))
        assert len(sent) == 2
        with pytest.raises(Signalled):
            show(reports(Compiling()))
        assert len(sent) == 3


def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(pictures: Path, forks: Forks, tmp_path: Path) -> None:
    command = train_vae(pictures, tmp_path / "run")
    ended = forks.sdcli(*command, "--dry-run", "--holdout", 0.2, "--accumulate", 2, "--json")
    assert (ended.code, ended.stderr) == (0, "")
    facts = json.loads(ended.stdout)
    assert facts["run"] == str(tmp_path / "run")
    assert (facts["pictures"], facts["samples"], facts["held_out"]) == (6, 5, 1)
    assert (facts["pictures_a_step"], facts["steps"], facts["epochs"]) == (8, 6, 9.6)
    assert facts["resumes_from"] == 0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_what_learns(pictures: Path, unet_run: Path, forks: Forks, tmp_path: Path) -> None:
    command = ("train-vae", "--data", pictures, "--model", unet_run / "export", "--device", "cpu", "--resolution", 16)
    counts = []
    for flags in ((), ("--freeze-encoder",)):
        ended = forks.sdcli(*command, "--run", tmp_path / "run", "--dry-run", "--json", *flags)
        assert ended.code == 0, ended.stderr
        counts.append(json.loads(ended.stdout)["parameters"])
    whole = load_vae(unet_run / "export", device=torch.device("cpu"), dtype=torch.float32)
    frozen = sum(value.numel() for value in latent.encoder(whole).parameters())
    assert counts == [whole.num_parameters(), whole.num_parameters() - frozen]


def test_a_dry_run_says_where_a_run_would_go_on(pictures: Path, vae_run: Path, forks: Forks) -> None:
    before = names(vae_run)
    ended = forks.sdcli(*train_vae(pictures, vae_run), "--dry-run")
    assert "resumes_from: 6" in ended.stdout.splitlines()
    assert names(vae_run) == before


def test_a_dry_run_names_a_picture_that_cannot_be_read(own_pictures: Path, forks: Forks, tmp_path: Path) -> None:
    (own_pictures / "dot.png").write_bytes(b"")
    ended = forks.sdcli(*train_vae(own_pictures, tmp_path / "run"), "--dry-run")
    assert (ended.code, "dot.png" in ended.stderr) == (3, True)


def test_held_out_pictures_validate_and_never_train(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    extra = ("--holdout", 0.3, "--validate-every", 3, "--sample-every", 3)
    ended = forks.sdcli(*train_unet(pictures, run, vae_run), *extra)
    assert ended.code == 0, ended.stderr
    validated = {row["step"]: row["validation"] for row in metrics(run) if "validation" in row}
    assert sorted(validated) == [3, 6]
    assert {"loss", "loss_t0", "loss_t1", "loss_t2", "loss_t3"} == validated[6].keys()
    assert "on held-out pictures: loss" in ended.stderr
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-00000003", "step-00000006"]
    assert len(list((run / "samples" / "step-00000006").glob("*.png"))) == 4
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "UNet training" in page and "data:image" in page


def test_what_is_drawn_on_the_way_can_be_said(pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prompts = ("--sample-prompt", "a dot", "--sample-prompt", "../../etc")
    ended = forks.sdcli(*train_unet(pictures, run, vae_run), "--sample-every", 6, *prompts)
    assert ended.code == 0, ended.stderr
    assert names(run / "samples") == ["step-00000006", "step-00000006/1-a-dot.png", "step-00000006/2-etc.png"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--holdout", 1), "--holdout 1.0: out of range"),
        (("--accumulate", 0), "--accumulate 0: out of range"),
        (("--validate-every", 0), "--validate-every 0: out of range"),
        (("--sample-every", 0), "--sample-every 0: out of range"),
        (("--optimizer", "sgd"), "--optimizer sgd: unknown"),
        pytest.param(
            ("--optimizer", "adamw8bit"),
            "--optimizer adamw8bit: bitsandbytes is not installed; pip install 'sdcli[8bit]'",
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"),
        ),
        (("--export", "first"), "--export first: unknown"),
        (("--tracker", "mlflow"), "--tracker mlflow: unknown"),
        pytest.param(
            ("--tracker", "wandb"),
            "--tracker wandb: is not installed; pip install wandb",
            marks=pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed"),
        ),
        (("--disc-width", 20), "--disc-width 20: out of range"),
        (("--disc-start", 0, "--disc-layers", 4), "pictures of 16 px are too small"),
        (("--regularizer", "gan"), "--regularizer gan: unknown"),
        (("--perceptual-network", "missing.pth"), "missing.pth"),
        (("--export", "best"), "--export best: nothing says which step is best"),
        (("--resolution", 8), "--resolution 8: sdcli-perceptual cannot compare pictures so small; use 16 or more"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    pictures: Path, forks: Forks, tmp_path: Path, flags: tuple[object, ...], said: str
) -> None:
    ended = forks.sdcli(*train_vae(pictures, tmp_path / "run"), *flags)
    assert ended.code == (3 if "missing" in said else 2), ended.stderr
    assert said in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--condition", "class"), 3, "has no classes; sort the pictures into one folder a class"),
        (("--zero-terminal-snr",), 2, "this model predicts epsilon; use --prediction v"),
        (("--zero-terminal-snr", "--prediction", "epsilon"), 2, "pure noise says nothing of x_0"),
        (("--loss", "huber"), 2, "--loss huber: unknown"),
        (("--snr-gamma", 0), 2, "--snr-gamma 0.0: out of range"),
        (("--condition", "none", "--train-text-encoder"), 2, "--train-text-encoder: this model has none"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path, flags: tuple[object, ...], code: int, said: str
) -> None:
    command = [one for one in train_unet(pictures, tmp_path / "run", vae_run) if one != "--train-text-encoder"]
    ended = forks.sdcli(*command, *flags)
    assert (ended.code, said in ended.stderr) == (code, True), ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--condition", "none", "--loss", "min-snr"),
        ("--buckets", "--offset-noise", 0.1, "--gradient-checkpointing"),
        ("--prediction", "v", "--zero-terminal-snr", "--accumulate", 2),
        ("--prediction", "x0", "--loss", "hybrid"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_what_is_trained_so_draws(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    run = tmp_path / "run"
    command = [one for one in train_unet(pictures, run, vae_run) if one != "--train-text-encoder"]
    ended = forks.sdcli(*command, *flags)
    assert ended.code == 0, ended.stderr
    prompt, guidance = ([], 1) if "none" in flags else (["a dot"], 2)
    common = ("--model", run / "export", "--steps", 3, "--guidance", guidance, "--seed", 1, "--device", "cpu")
    for scheduler in ("ddim", "ddpm"):
        picture = tmp_path / f"{scheduler}.png"
        ended = forks.sdcli("generate", *prompt, *common, "--scheduler", scheduler, "--output", picture)
        assert (ended.code, picture.exists()) == (0, True), ended.stderr


def test_a_scheduler_that_cannot_sample_zero_terminal_snr_refuses_by_name(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert forks.sdcli(*train_unet(pictures, run, vae_run), "--prediction", "v", "--zero-terminal-snr").code == 0
    ended = forks.sdcli("generate", "a dot", "--model", run / "export", "--scheduler", "lms", "--device", "cpu")
    assert ended.code == 2
    assert "lms" in ended.stderr and "zero" in ended.stderr.lower()


def test_one_picture_alone_cannot_be_held_out(own_pictures: Path, forks: Forks, tmp_path: Path) -> None:
    for path in own_pictures.iterdir():
        if path.stem != "dot":
            path.unlink()
    ended = forks.sdcli(*train_vae(own_pictures, tmp_path / "run"), "--holdout", 0.5)
    assert (ended.code, "holds one picture" in ended.stderr) == (3, True)


def test_captions_that_are_cut_are_said_once(own_pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path) -> None:
    (own_pictures / "dot.txt").write_text("dot " * 120, encoding="utf-8")
    ended = forks.sdcli(*train_unet(own_pictures, tmp_path / "run", vae_run), "--steps", 1)
    said = "1 of 7 captions are too long for the text encoder: their ends are not used"
    assert (ended.code, ended.stderr.count(said)) == (0, 1), ended.stderr


@pytest.mark.parametrize(
    "content", ['{"vae": 5}', '{"vae": {}, "unet": {}, "text_encoder": {}, "scheduler": {}}', "[]"]
)
def test_configs_that_are_none_are_refused(pictures: Path, forks: Forks, tmp_path: Path, content: str) -> None:
    (tmp_path / "own.json").write_text(content, encoding="utf-8")
    command = ("train-vae", "--data", pictures, "--init", tmp_path / "own.json", "--run", tmp_path / "run")
    for regularizer in ("kl", "vq"):
        ended = forks.sdcli(*command, "--regularizer", regularizer, "--device", "cpu")
        assert ended.code == 3, ended.stderr


def test_a_journal_with_a_damaged_line_is_cut_there(pictures: Path, forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert forks.sdcli(*train_vae(pictures, run), "--stop-after", 4).code == 0
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0] + b"\xff\n" + b"".join(lines[1:]))
    ended = forks.sdcli(*train_vae(pictures, run))
    assert ended.code == 0, ended.stderr
    assert [row["step"] for row in metrics(run)] == [1, 5, 6]


# Trackers, where their packages are installed


def test_tensorboard_shows_each_step_of_a_run_in_parts_once(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    command = (*train_unet(pictures, tmp_path / "run", vae_run), "--holdout", 0.3, "--tracker", "tensorboard")
    for ended in (forks.sdcli(*command, "--stop-after", 3), forks.sdcli(*command)):
        assert ended.code == 0, ended.stderr
    events = reader.EventAccumulator(str(tmp_path / "run" / "tracker" / "sdcli"))
    events.Reload()
    steps = [row for row in metrics(tmp_path / "run") if "validation" not in row]
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(row["step"], pytest.approx(row["loss"])) for row in steps]
    assert [event.step for event in events.Scalars("validation/loss")] == [2, 4, 6]


@pytest.mark.parametrize("mode", ["option", "variable", "online"])
def test_wandb_keeps_a_run_on_this_machine_where_it_is_told_to(
    pictures: Path, vae_run: Path, forks: Forks, tmp_path: Path, mode: str
) -> None:
    pytest.importorskip("wandb")
    set_mode = {"WANDB_MODE": "offline" if mode == "variable" else "online", "HOME": str(tmp_path)}
    code = f"import os; os.environ |= {set_mode!r}; os.environ.pop('WANDB_API_KEY', None)\n{RUN_COMMAND}"
    command = [str(word) for word in train_unet(pictures, tmp_path / "run", vae_run)]
    ended = forks.python(code, [*command, "--tracker", "wandb", *(["--offline"] if mode == "option" else [])])
    logs = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    if mode == "online":
        assert (ended.code, len(logs)) == (2, 0), ended.stderr
        assert "sdcli: error: --tracker wandb: No API key configured" in ended.stderr
    else:
        assert (ended.code, len(logs)) == (0, 1), ended.stderr
        assert ended.stdout == f"{tmp_path / 'run' / 'export'}\n"
