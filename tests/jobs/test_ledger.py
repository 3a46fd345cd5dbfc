"""The ledger of a batch: a record of every finished image, whole whatever happens, one owner of a folder or a share."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from sdcli.errors import LockedError, OutputError
from sdcli.jobs.ledger import opened

WHOLE = (1, 1)
KEYS = ("0" * 16, "8" * 16, "f" * 16)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two records."""
    with opened(tmp_path / "out", WHOLE) as ledger:
        ledger.add(KEYS[0], {"path": "a.png", "prompt": "é"})
        ledger.add(KEYS[1], {"path": "b.png", "prompt": "x" * 10_000})
    return tmp_path / "out"


def test_what_was_added_is_there_for_the_next_run(folder: Path) -> None:
    with opened(folder, WHOLE) as ledger:
        assert ledger.has(KEYS[0], "a.png") and ledger.has(KEYS[1], "b.png")
        assert not ledger.has(KEYS[1], "a.png") and not ledger.has(KEYS[0], "c.png")
    assert [line["key"] for line in lines(folder)] == list(KEYS[:2])


def test_of_several_records_of_one_path_the_last_counts(folder: Path) -> None:
    with opened(folder, WHOLE) as ledger:
        ledger.add(KEYS[2], {"path": "a.png"})
    with opened(folder, WHOLE) as ledger:
        assert ledger.has(KEYS[2], "a.png") and not ledger.has(KEYS[0], "a.png")


@pytest.mark.parametrize("cut", [1, 30, 9_000])
def test_half_a_line_of_a_killed_process_is_cut_off(folder: Path, cut: int) -> None:
    path = folder / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with opened(folder, WHOLE) as ledger:
        assert [line["key"] for line in lines(folder)] == [KEYS[0]]
        assert not ledger.has(KEYS[1], "b.png")


def test_half_a_line_that_another_process_leaves_meanwhile_is_cut_off_by_the_next_append(folder: Path) -> None:
    with opened(folder, WHOLE) as ledger:
        with (folder / "ledger.jsonl").open("ab") as stream:
            stream.write(b'{"key": "half')
        ledger.add(KEYS[2], {"path": "c.png"})
    assert [line["key"] for line in lines(folder)] == list(KEYS)


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"\xff\xfe",
        b"\0" * 5000,
        b"[1]",
        b"5",
        b"[" * 100_000,
        b'{"path": "a"}',
        b'{"key": "x", "path": "a"}',
        b'{"key": "%s", "path": "a"}' % (b"f" * 17),
        b'{"key": 5, "path": "a"}',
        b'{"key": "00", "path": 5}',
        b'{"key": null, "path": null}',
    ],
)
def test_a_damaged_or_foreign_line_costs_only_its_own_record(folder: Path, line: bytes) -> None:
    path = folder / "ledger.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with opened(folder, WHOLE) as ledger:
        assert ledger.has(KEYS[0], "a.png") and ledger.has(KEYS[1], "b.png")


def test_a_ledger_cut_at_any_byte_has_the_records_that_are_whole(tmp_path: Path) -> None:
    with opened(tmp_path, WHOLE) as ledger:
        for key in KEYS:
            ledger.add(key, {"path": f"{key}.png"})
    path = tmp_path / "ledger.jsonl"
    data = path.read_bytes()
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        whole = data[:end].count(b"\n")
        with opened(tmp_path, WHOLE) as ledger:
            assert [ledger.has(key, f"{key}.png") for key in KEYS] == [i < whole for i in range(3)]
        assert len(lines(tmp_path)) == whole


def test_two_threads_that_add_at_once_lose_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = os.pwrite

    def slowly(*arguments: Any) -> int:
        time.sleep(0.001)
        return written(*arguments)

    monkeypatch.setattr(os, "pwrite", slowly)
    with opened(tmp_path, WHOLE) as ledger:

        def add(letter: str) -> None:
            for i in range(20):
                ledger.add(f"{i:016x}", {"path": f"{letter}{i}.png"})

        threads = [Thread(target=add, args=(letter,)) for letter in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(str(row["path"]) for row in lines(tmp_path)) == sorted(f"{x}{i}.png" for x in "ab" for i in range(20))


def test_a_folder_that_is_removed_or_a_file_that_is_replaced_meanwhile_takes_no_record(folder: Path) -> None:
    with opened(folder, WHOLE) as ledger:
        (folder / "ledger.jsonl").rename(folder / "moved.jsonl")
        (folder / "ledger.jsonl").write_bytes(b"")
        with pytest.raises(OutputError, match="was removed or replaced"):
            ledger.add(KEYS[2], {"path": "c.png"})
        shutil.rmtree(folder)
        with pytest.raises(OutputError, match="was removed or replaced"):
            ledger.add(KEYS[2], {"path": "c.png"})


@pytest.mark.parametrize("name", ["ledger.jsonl", ".lock"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_nobody_waits_for_it(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(OutputError, match="is no regular file"), opened(tmp_path, WHOLE):
        pass


def test_a_folder_has_one_owner_or_one_for_each_share(folder: Path) -> None:
    with opened(folder, WHOLE):
        for share in (WHOLE, (1, 2)):
            with pytest.raises(LockedError, match="another batch owns"), opened(folder, share):
                pass
    with ExitStack() as stack:
        ledgers = [stack.enter_context(opened(folder, (index, 2))) for index in (1, 2)]
        for index, ledger in enumerate(ledgers):
            ledger.add(KEYS[2], {"path": f"{index}.png"})
        with pytest.raises(LockedError, match="share 2/2 owns"), opened(folder, (2, 2)):
            pass
        with pytest.raises(LockedError), opened(folder, WHOLE):
            pass
    assert [line["path"] for line in lines(folder)] == ["a.png", "b.png", "0.png", "1.png"]


def test_a_folder_that_cannot_be_made_is_no_bug(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError), opened(tmp_path / "file", WHOLE):
        pass
