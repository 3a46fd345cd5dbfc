"""Damaged files of every kind: each is read, or refused in one sentence. `make fuzz` does it at length."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import pytest

from tests.fuzz.readers import READERS, damaged_files, verdict


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    files = islice(damaged_files(reader, tmp_path, random.Random(name)), reader.share)
    verdicts = [verdict(reader, tmp_path, path) for path in files]
    assert any(error is not None for error, _ in verdicts) != reader.forgives, "what is damaged shows"
    assert [fault for _, fault in verdicts if fault] == []
