"""Which pictures a gallery shows, and in which order."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from sdcli.errors import OutputError
from sdcli.jobs.album import arrange, one_at_a_time


def ledger(folder: Path, *rows: object) -> None:
    """A ledger of these records, and an empty file of every name in them."""
    for row in rows:
        if isinstance(row, dict) and str(row.get("path", "-")).isalnum():
            (folder / str(row["path"])).touch()
    (folder / "ledger.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def shown(folder: Path, *names: str, most: int = 100) -> list[tuple[str, int]]:
    return [(row["path"], row["seed"]) for row in arrange(folder, names, most).records()]


def test_pictures_stand_in_the_order_of_the_jobs_and_others_behind_them_as_they_were_made(tmp_path: Path) -> None:
    ledger(tmp_path, *({"path": name, "seed": seed} for seed, name in enumerate(("old", "b", "a", "older", "c"))))
    assert shown(tmp_path, "a", "never made", "b", "a", "c") == [("a", 2), ("b", 1), ("c", 4), ("old", 0), ("older", 3)]


def test_of_several_records_of_a_file_the_last_one_counts_and_a_file_that_is_gone_has_none(tmp_path: Path) -> None:
    ledger(tmp_path, *({"path": name, "seed": seed} for seed, name in enumerate(("a", "b", "a", "c"))))
    (tmp_path / "c").unlink()
    assert shown(tmp_path) == [("b", 1), ("a", 2)]


def test_there_are_no_more_than_asked_for_and_the_others_are_counted(tmp_path: Path) -> None:
    ledger(tmp_path, *({"path": f"{n}", "seed": n} for n in range(9)))
    album = arrange(tmp_path, ("7", "3"), 4)
    assert [row["seed"] for row in album.records()] == [7, 3, 0, 1]
    assert album.left_out == 5


def test_what_is_no_record_of_a_file_in_the_folder_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "secret.png").touch()
    bad = ("../secret.png", "", ".", "..", "sub/a", "\0", "\ud800", None, 7, ["a"])
    ledger(tmp_path / "out", [], 1, {"seed": 1}, *({"path": name} for name in bad), {"path": "a", "seed": 1})
    with (tmp_path / "out" / "ledger.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"path": "a"')  # a process was killed
    assert shown(tmp_path / "out") == [("a", 1)]


def test_galleries_of_one_folder_are_written_after_each_other(tmp_path: Path) -> None:
    said: list[str] = []

    def write() -> None:
        with one_at_a_time(tmp_path):
            said.append("second")

    with one_at_a_time(tmp_path):
        other = threading.Thread(target=write)
        other.start()
        time.sleep(0.1)
        said.append("first")
    other.join()
    assert said == ["first", "second"]


def test_a_folder_that_is_gone_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such file"), one_at_a_time(tmp_path / "gone"):
        pass
