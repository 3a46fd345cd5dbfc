from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sdcli
from sdcli.warm import identity


def test_a_process_is_as_itself_and_tells_nothing_but_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "17")
    own = identity.own()
    assert identity.difference(own, identity.own()) == ""
    assert {len(value) for value in own.values()} == {16}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SDCLI_CACHE", "PYTHONPATH", "HF_HOME"])
def test_settings_of_the_environment_that_change_what_is_drawn_or_found_tell_processes_apart(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    without = identity.own()
    monkeypatch.setenv(name, "1")
    set_to_1 = identity.own()
    monkeypatch.setenv(name, "2")
    assert [identity.difference(a, b) for a, b in ((without, set_to_1), (set_to_1, without))] == [name, name]
    assert identity.difference(set_to_1, identity.own()) == name


@pytest.mark.parametrize("name", ["SDCLI_MODEL", "SDCLI_DEVICE", "SDCLI_OFFLINE", "HF_TOKEN", "TERM"])
def test_what_the_request_says_or_nothing_depends_on_tells_none_apart(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = identity.own()
    monkeypatch.setenv(name, "another")
    assert identity.difference(before, identity.own()) == ""


def test_another_version_or_changed_code_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity.own()
    monkeypatch.setattr(sdcli, "__version__", "0.0.0")
    assert identity.difference(before, identity.own()) == "version"
    monkeypatch.undo()
    own = Path(shutil.copytree(identity.ROOT / "warm", tmp_path / "warm"))
    monkeypatch.setattr(identity, "ROOT", own)
    before = identity.own()
    os.utime(own / "place.py", ns=(0, 0))
    assert identity.difference(before, identity.own()) == "code"


def test_a_package_that_came_or_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "site-packages"
    (packages / "a-1.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages), str(tmp_path / "missing" / "dist-packages")])
    before = identity.own()
    (packages / "__pycache__").mkdir()
    assert identity.difference(before, identity.own()) == ""
    os.utime(packages / "a-1.dist-info", ns=(0, 0))
    changed = identity.own()
    assert identity.difference(before, changed) == "installed packages"
    (packages / "b-1.dist-info").mkdir()
    assert identity.difference(changed, identity.own()) == "installed packages"


def test_another_limit_of_file_sizes_is_noticed() -> None:
    code = (
        "import resource; from sdcli.warm import identity; before = identity.own()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12345, 12345)); print(identity.difference(before, identity.own()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "limits\n"
