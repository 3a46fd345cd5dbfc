"""The ledger of a batch: a record of every finished image, whole whatever happens, one owner of a folder or a share."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

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


def test_a_damaged_line_costs_only_its_own_record(folder: Path) -> None:
    path = folder / "ledger.jsonl"
    path.write_bytes(b'nonsense\n[1]\n{"key": "x", "path": "a"}\n' + path.read_bytes())
    with opened(folder, WHOLE) as ledger:
        assert ledger.has(KEYS[0], "a.png") and ledger.has(KEYS[1], "b.png")


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
