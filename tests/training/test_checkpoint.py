"""The run folder: its owner, its settings, and checkpoints that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdcli.errors import InputError, LockedError, SdcliWarning
from sdcli.training import checkpoint
from sdcli.training.checkpoint import Snapshot
from tests import models
from tests.forks import Forks
from tests.runs import DAMAGES, names, newest_checkpoint, train_vae

HASH = "0123abcd"
IDENTITY: dict[str, Any] = {"kind": "vae", "data_hash": "d1", "origin": "tiny", "lr": 0.001, "model": None}

# The same snapshot as `snapshot` below, saved by another process.
SAVE = """
import torch
from pathlib import Path
from sdcli.training import checkpoint
for step in map(int, arguments[1:]):
    tensors = {"weights": {"a": torch.full((10,), float(step))}, "ema": {"a": torch.full((10,), step + 0.5)}}
    snapshot = checkpoint.Snapshot(step, tensors, {"scaler": None})
    checkpoint.save(Path(arguments[0]), snapshot, config_hash="0123abcd")
"""


def snapshot(step: int) -> Snapshot:
    tensors = {"weights": {"a": torch.full((10,), float(step))}, "ema": {"a": torch.full((10,), step + 0.5)}}
    return Snapshot(step, tensors, {"scaler": None})


def saved(folder: Path, *steps: int) -> Path:
    for step in steps:
        checkpoint.save(folder, snapshot(step), config_hash=HASH)
    return folder


def newest_step(folder: Path) -> int | None:
    """The step of the newest whole checkpoint, whose tensors are what was saved."""
    found = checkpoint.newest(folder, config_hash=HASH)
    if found is None:
        return None
    expected = snapshot(found.step)
    for stem, tensors in expected.tensors.items():
        assert torch.equal(found.tensors[stem]["a"], tensors["a"])
    assert found.state == expected.state
    return found.step


# Saving and loading


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weights": {"a.b": torch.randn(3, 4, generator=generator), "half": torch.randn(5).half()},
        "optimizer": {"0.step": torch.tensor(7.0), "0.exp_avg": torch.randn(3, 4).t()},
        "rng": {"cpu": torch.get_rng_state()},
    }
    state = {"optimizer": {"param_groups": [{"lr": 0.1 + 0.2, "betas": [0.9, 0.999]}]}, "scaler": None}
    checkpoint.save(tmp_path, Snapshot(12, tensors, state), config_hash=HASH)
    found = checkpoint.newest(tmp_path, config_hash=HASH)
    assert found is not None
    assert (found.step, found.state) == (12, state)
    for stem, expected in tensors.items():
        assert found.tensors[stem].keys() == expected.keys()
        for key, value in expected.items():
            assert found.tensors[stem][key].dtype == value.dtype
            assert torch.equal(found.tensors[stem][key], value)


def test_a_checkpoint_lists_its_files_and_follows_the_umask(tmp_path: Path) -> None:
    folder = newest_checkpoint(saved(tmp_path, 3))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert sorted(manifest["files"]) == ["ema.safetensors", "state.json", "weights.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (newest_checkpoint(saved(tmp_path / name, 3)) for name in ("one", "two"))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_a_folder_without_checkpoints_has_no_newest_one(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, config_hash=HASH) is None


def test_the_newest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    assert newest_step(saved(tmp_path, 10, 2, 9)) == 10


def test_pruning_leaves_the_steps_named_and_what_comes_after_them(tmp_path: Path) -> None:
    checkpoint.prune(saved(tmp_path, 2, 4, 6, 8, 10), keep=[4, 8])
    assert checkpoint.steps(tmp_path) == [4, 8, 10]


# Damage


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["weights.safetensors", "ema.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_with_one_warning(tmp_path: Path, file: str, damage: str) -> None:
    DAMAGES[damage](newest_checkpoint(saved(tmp_path, 2, 4)) / file)
    with pytest.warns(SdcliWarning, match="checkpoint-00000004: .*the checkpoint before it is tried") as caught:
        assert newest_step(tmp_path) == 2
    assert len(caught) == 1


def test_no_flipped_bit_of_the_manifest_goes_unnoticed(tmp_path: Path) -> None:
    path = newest_checkpoint(saved(tmp_path, 2, 4)) / "manifest.json"
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 5):  # 5 and 8 share no divisor: all eight bits get their turn
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.warns(SdcliWarning):
            assert newest_step(tmp_path) == 2, (bit, bytes(data))


def sealed(path: Path, **more: Any) -> None:
    """Give a checkpoint the manifest of what lies in it now, as somebody who means harm can."""
    names_there = [one.name for one in path.iterdir() if one.is_file() and one.name != "manifest.json"]
    files = {
        one: {"bytes": (path / one).stat().st_size, "sha256": checkpoint.file_hash(path / one)} for one in names_there
    }
    (path / "manifest.json").write_text(json.dumps({"format": 1, "config": HASH, "files": files | more}))


@pytest.mark.parametrize("how", ["a name elsewhere", "a link", "a FIFO", "a file besides", "without state", "deep"])
def test_a_checkpoint_of_other_files_than_its_own_is_passed_over(tmp_path: Path, how: str) -> None:
    path = newest_checkpoint(saved(tmp_path, 2, 4))
    secret = Path(shutil.copy(path / "ema.safetensors", tmp_path / "secret"))
    facts = {"bytes": secret.stat().st_size, "sha256": checkpoint.file_hash(secret)}
    if how == "a name elsewhere":
        sealed(path, **{"../../secret": facts})
    elif how == "a file besides":
        (path / "more.safetensors").write_bytes(secret.read_bytes())
    elif how == "deep":
        (path / "manifest.json").write_text("[" * 100_000)
    else:
        name = "state.json" if how == "without state" else "ema.safetensors"
        (path / name).unlink()
        if how == "a link":
            (path / name).symlink_to(secret)
        elif how == "a FIFO":
            os.mkfifo(path / name)
        sealed(path, **({} if how == "without state" else {name: facts}))
    with pytest.warns(SdcliWarning, match="checkpoint-00000004: .*the checkpoint before it is tried"):
        assert newest_step(tmp_path) == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b"[]"),
        ("state.json", b"{}"),
        ("state.json", b'{"step": 5}'),
        ("state.json", b'{"step": "x"}'),
        ("state.json", b"[" * 100_000),
        ("ema.safetensors", b"x"),
    ],
)
def test_a_checkpoint_that_only_its_manifest_calls_one_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = newest_checkpoint(saved(tmp_path, 2, 4))
    (path / name).write_bytes(content)
    sealed(path)
    with pytest.raises(InputError, match=r"checkpoint-00000004: its files are whole, but no checkpoint of this run"):
        checkpoint.newest(tmp_path, config_hash=HASH)


@pytest.mark.slow
def test_a_checkpoint_of_other_tensors_is_refused_in_a_line(
    pictures: Path, vae_run: Path, tmp_path: Path, forks: Forks
) -> None:
    run = Path(shutil.copytree(vae_run, tmp_path / "vae"))
    path = newest_checkpoint(run)
    config = json.loads((path / "manifest.json").read_text())["config"]
    save_file({"x": torch.zeros(3)}, path / "model.safetensors")
    sealed(path)
    models.edit_json(path / "manifest.json", config=config)
    shutil.rmtree(run / "export")
    ended = forks.sdcli(*train_vae(pictures, run))
    assert (ended.code, ended.stderr.count("\n")) == (3, 1)
    assert "holds no state of this run" in ended.stderr


def test_when_no_checkpoint_is_whole_the_run_is_refused(tmp_path: Path) -> None:
    for path in (saved(tmp_path, 2, 4) / "checkpoints").iterdir():
        (path / "weights.safetensors").write_bytes(b"")
    with pytest.warns(SdcliWarning) as caught, pytest.raises(InputError, match="none of its 2 checkpoints is whole"):
        checkpoint.newest(tmp_path, config_hash=HASH)
    assert len(caught) == 2


def test_a_checkpoint_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    with pytest.warns(SdcliWarning, match="other settings"), pytest.raises(InputError):
        checkpoint.newest(tmp_path, config_hash="another")


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    (newest_checkpoint(saved(tmp_path, 2, 4)) / "weights.safetensors").unlink()
    assert newest_step(saved(tmp_path, 4)) == 4


# Kills and full disks


def test_a_kill_at_any_write_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, forks: Forks) -> None:
    saved(begun(tmp_path / "before"), 2)
    straight = forks.python(SAVE, [str(shutil.copytree(tmp_path / "before", tmp_path / "straight")), "4"])
    assert straight.code == 0
    assert straight.writes > 20
    steps = []
    for write in range(1, straight.writes + 1):
        run = Path(shutil.copytree(tmp_path / "before", tmp_path / "run"))
        assert forks.python(SAVE, [str(run), "4"], at=write, send=signal.SIGKILL).code == -signal.SIGKILL
        steps.append(newest_step(run))
        checkpoint.open_run(tmp_path / "run", IDENTITY)  # as the next process would
        assert not [name for name in names(run) if name.endswith(".part")]
        shutil.rmtree(run)
    assert set(steps) == {2, 4}
    assert steps == sorted(steps)  # once the new one is there, it stays


def test_a_kill_while_a_damaged_checkpoint_is_replaced_leaves_the_whole_one_before(
    tmp_path: Path, forks: Forks
) -> None:
    (newest_checkpoint(saved(tmp_path / "before", 2, 4)) / "state.json").unlink()
    writes = forks.python(SAVE, [str(shutil.copytree(tmp_path / "before", tmp_path / "straight")), "4"]).writes
    for write in range(writes - 10, writes + 1):
        run = Path(shutil.copytree(tmp_path / "before", tmp_path / "run"))
        assert forks.python(SAVE, [str(run), "4"], at=write, send=signal.SIGKILL).code == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SdcliWarning)
            assert newest_step(run) in (2, 4)
        shutil.rmtree(run)


@pytest.mark.parametrize("limit", [80, 300], ids=["tensors", "manifest"])  # bytes, above which a file does not fit
def test_a_full_disk_is_an_output_error_that_keeps_the_old_checkpoint_and_leaves_no_part(
    tmp_path: Path, forks: Forks, limit: int
) -> None:
    saved(tmp_path, 2)
    before = names(tmp_path)
    sizes = {path.name: path.stat().st_size for path in newest_checkpoint(tmp_path).iterdir()}
    assert 80 < sizes["weights.safetensors"] < 300 < sizes["manifest.json"]
    ended = forks.python(SAVE, [str(tmp_path), "4"], file_limit=limit)
    assert ended.code == 99
    assert "sdcli.errors.OutputError" in ended.stderr.splitlines()[-1]
    assert names(tmp_path) == before
    assert newest_step(tmp_path) == 2


# The owner


def test_a_second_owner_is_refused(tmp_path: Path) -> None:
    owned_again = checkpoint.owned(tmp_path / "run")
    with checkpoint.owned(tmp_path / "run"), pytest.raises(LockedError, match="another training owns"), owned_again:
        pass
    with checkpoint.owned(tmp_path / "run"):
        pass


def test_the_lock_dies_with_its_process(tmp_path: Path, forks: Forks) -> None:
    code = """
import os, signal
from pathlib import Path
from sdcli.training import checkpoint
with checkpoint.owned(Path(arguments[0])):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert forks.python(code, [str(tmp_path / "run")]).code == -signal.SIGKILL
    with checkpoint.owned(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    ("file", "content"),
    [("puppy.png", ""), ("config.json", '{"_class_name": "AutoencoderKL"}'), ("config.json", '{"kind": "v')],
    ids=["pictures", "model", "damaged"],
)
def test_a_folder_that_holds_something_else_is_refused_and_nothing_is_written_into_it(
    tmp_path: Path, file: str, content: str
) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=file), checkpoint.owned(tmp_path):
        pass
    assert names(tmp_path) == [file]
    assert (tmp_path / file).read_text(encoding="utf-8") == content


# The settings


def begun(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    checkpoint.open_run(folder, {**IDENTITY, **changes})
    (folder / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    return folder


def test_the_same_settings_open_the_run_again(tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in begun(tmp_path).iterdir()}
    checkpoint.open_run(tmp_path, IDENTITY)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_setting_that_differs_is_named_with_both_values(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(InputError) as refusal:
        checkpoint.open_run(tmp_path, {**IDENTITY, "lr": 0.01, "data_hash": "d2", "model": "m"})
    text = str(refusal.value)
    assert "lr was 0.001 and is 0.01 now" in text
    assert "data_hash was 'd1' and is 'd2' now" in text
    assert "model was None and is 'm' now" in text
    assert "kind" not in text


def test_a_run_that_never_took_a_step_takes_new_settings_and_drops_its_cache(tmp_path: Path) -> None:
    checkpoint.open_run(tmp_path, IDENTITY)
    (tmp_path / "cache").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    checkpoint.open_run(tmp_path, {**IDENTITY, "resolution": 64})
    assert not (tmp_path / "cache").exists()
    begun(tmp_path, resolution=64)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    saved(begun(tmp_path), 2)
    kept = ("notes.part", "cache/moments.safetensors", "export/vae/config.json", "samples/a.part")
    left = (
        ".config.json.123-0123abcd.part",
        "export.part/vae/config.json",
        "export.old.part/vae/config.json",
        "checkpoints/checkpoint-00000004.part/weights.safetensors",
        "cache/.moments.safetensors.123-0123abcd.part",
        "cache/.tmpAbC123",
    )
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    checkpoint.open_run(tmp_path, IDENTITY)
    found = names(tmp_path)
    assert set(kept) <= set(found)
    assert not {name.partition("/")[0] for name in found} & {".config.json.123-0123abcd.part", "export.part"}
    assert not set(left) & set(found)
    assert newest_step(tmp_path) == 2


# The optimizer
