"""The ledger of long work: rows survive whatever happens, one owner, settings that must not change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdcli.errors import InputError, LockedError, OutputError, SdcliWarning
from sdcli.ledger import digest, opened

IDENTITY = {"kind": "bench", "model": "a", "seed": 3}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with two rows."""
    with opened(tmp_path / "run", IDENTITY) as book:
        book.add("one", {"x": 1})
        book.add("two", {"x": None})
    return tmp_path / "run"


def test_rows_are_there_for_the_same_settings(run: Path) -> None:
    with opened(run, dict(IDENTITY)) as book:
        assert book.rows == {"one": {"x": 1}, "two": {"x": None}}
        book.add("three", {"x": 3})
    assert len((run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "one"}',
        '{"key": "one", "x": "1"}',
        '{"key": "one", "x": true}',
        '{"key": "one", "x": NaN}',
        '{"key": "one", "x": 1' + 400 * "0" + "}",
        '{"key": "one", "x": 1, "y": 2}',
    ],
)
def test_a_row_that_does_not_fit_is_done_again_and_the_others_stay(run: Path, line: str) -> None:
    path = run / "ledger.jsonl"
    path.write_text(f"{line}\n{path.read_text(encoding='utf-8').splitlines()[1]}\n", encoding="utf-8")
    columns = {"x": (int, float, type(None))}
    with (
        pytest.warns(SdcliWarning, match=r"ledger\.jsonl:1: is no row of this run"),
        opened(run, IDENTITY, columns) as book,
    ):
        assert book.rows == {"two": {"x": None}}
    with opened(run, IDENTITY, columns) as book:
        assert book.rows == {"two": {"x": None}}


def test_what_is_nested_too_deep_is_no_whole_row(run: Path) -> None:
    (run / "ledger.jsonl").write_text("[" * 100_000 + "\n", encoding="utf-8")
    with opened(run, IDENTITY) as book:
        assert book.rows == {}


@pytest.mark.parametrize(("name", "error"), [("ledger.jsonl", InputError), (".lock", OutputError)])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(run: Path, name: str, error: type[Exception]) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(error), opened(run, IDENTITY):
        pass


@pytest.mark.parametrize("cut", [1, 5, 14])
def test_half_a_line_of_a_killed_process_is_dropped_and_its_row_can_be_added_again(run: Path, cut: int) -> None:
    path = run / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with opened(run, IDENTITY) as book:
        kept = {"one": {"x": 1}, "two": {"x": None}} if cut == 1 else {"one": {"x": 1}}  # a line that lacks its end
        assert book.rows == kept
        book.add("two", {"x": 2})
    with opened(run, IDENTITY) as book:
        assert book.rows == {"one": {"x": 1}, "two": {"x": 2}}


def test_other_settings_are_refused_by_name_and_nothing_is_changed(run: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with (
        pytest.raises(InputError, match="seed was 3 and is 4 now; repeat the first command to resume"),
        opened(run, IDENTITY | {"seed": 4}),
    ):
        pass
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_run_without_a_row_takes_other_settings(tmp_path: Path) -> None:
    for seed in (3, 4):
        with opened(tmp_path, IDENTITY | {"seed": seed}) as book:
            assert book.rows == {}


def test_a_second_owner_is_refused(run: Path) -> None:
    with opened(run, IDENTITY), pytest.raises(LockedError, match="another bench owns"), opened(run, IDENTITY):
        pass
    with opened(run, IDENTITY):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    with pytest.raises(InputError, match=r"holds photo\.png but no bench"), opened(tmp_path, IDENTITY):
        pass
    (tmp_path / "config.json").write_text('{"kind": "unet"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"holds config\.json but no bench"), opened(tmp_path, IDENTITY):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "photo.png"]


def test_a_place_that_cannot_be_a_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), opened(tmp_path / "file" / "run", IDENTITY):
        pass


def test_a_digest_does_not_depend_on_the_order_of_settings() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
