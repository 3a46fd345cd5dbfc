"""Job files are read a line at a time, and what is wrong with a line is kept with its number."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sdcli.errors import InputError
from sdcli.jobs import lines
from sdcli.jobs.lines import Line
from sdcli.specs import BatchSpec, GenerateSpec


def write(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def read(folder: Path, name: str, data: bytes | str) -> list[Line]:
    return list(lines.read(write(folder, name, data)))


def wrong(folder: Path, line: str, name: str = "jobs.jsonl") -> str:
    (found,) = read(folder, name, line)
    assert found.error is not None
    assert str(found.error).startswith(f"{folder / name}:{found.number}: ")
    return str(found.error).removeprefix(f"{folder / name}:{found.number}: ")


def test_a_line_of_json_has_generates_options_by_name(tmp_path: Path) -> None:
    text = '{"prompt": "a cat", "seed": 7, "guidance": 3, "timestep-spacing": "trailing", "id": "cover", "class": 3, '
    text += '"embedding": "a.pt", "mix": ["a=1,b=2"], "latents": "x.safetensors", "size": null}\n'
    (line,) = read(tmp_path, "jobs.jsonl", text)
    assert (line.number, line.id, line.error) == (1, "cover", None)
    assert line.values == {
        "prompt": "a cat",
        "seed": 7,
        "guidance": 3.0,
        "timestep_spacing": "trailing",
        "class_name": "3",
        "embedding": ("a.pt",),
        "mix": ("a=1,b=2",),
        "latents": Path("x.safetensors"),
    }


def test_every_field_of_generate_is_a_key_or_of_the_whole_run_and_of_a_known_type() -> None:
    names = {one.name for one in dataclasses.fields(GenerateSpec)}
    assert names >= BatchSpec.OF_THE_RUN
    kinds = {str(one.type).removesuffix(" | None") for one in dataclasses.fields(GenerateSpec)}
    assert kinds <= {"str", "int", "float", "bool", "Path", "tuple[str, ...]", "tuple[Path, ...]"}


def test_a_mark_at_the_begin_windows_ends_empty_lines_and_a_missing_end_are_no_matter(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b\\u00e9"}'
    found = read(tmp_path, "jobs.jsonl", data)
    assert [(line.number, line.values) for line in found] == [(1, {"prompt": "a"}), (4, {"prompt": "bé"})]
    assert read(tmp_path, "jobs.txt", b"\xef\xbb\xbfa cat\r\n\n (a dog:1.2) \n") == [
        Line(1, {"prompt": "a cat"}),
        Line(3, {"prompt": "(a dog:1.2)"}),
    ]


def test_a_table_has_its_keys_in_the_head_and_empty_cells_say_nothing(tmp_path: Path) -> None:
    text = '\ufeffid,prompt,seed,guidance\r\n1,"a ""red"", big\ncat",7,\r\n\r\n,a dog,,2.5\r\n'
    found = read(tmp_path, "jobs.csv", text)
    assert found == [
        Line(2, {"prompt": 'a "red", big\ncat', "seed": 7}, "1"),
        Line(5, {"prompt": "a dog", "guidance": 2.5}),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"promt": "a"}', "promt: unknown key; did you mean prompt?"),
        ('{"zzzz": "a"}', "zzzz: unknown key; known are prompt"),
        ('{"device": "cpu"}', "device: is of the whole run; give it on the command line: --device"),
        ('{"batch-size": 3}', "give it on the command line: --batch-size"),
        ('{"seed": "7"}', "expected is a whole number"),
        ('{"seed": 7.0}', "expected is a whole number"),
        ('{"seed": true}', "expected is a whole number"),
        ('{"guidance": "x"}', "expected is a number"),
        ('{"guidance": NaN}', "NaN: is no number"),
        ('{"guidance": 1e999}', "expected is a number"),
        ('{"prompt": 3}', "expected is text"),
        ('{"prompt": ["a"]}', "expected is text"),
        ('{"embedding": [1]}', "expected is a list of texts"),
        ('{"seed": 1, "seed": 2}', "seed: is given twice"),
        ('{"timestep-spacing": "a", "timestep_spacing": "b"}', "is given twice"),
        ('["a"]', "is no JSON object"),
        ("a cat", "is no JSON ("),
        ('{"prompt": ', "is no JSON ("),
        ("[" * 100_000, "is no JSON ("),
        ('{"id": "../x"}', "is no file name"),
        ('{"id": ".hidden"}', "is no file name"),
        ('{"id": "-n"}', "is no file name"),
        ('{"id": ""}', "is no file name"),
        ('{"id": "a\\u0000b"}', "is no file name"),
        ('{"id": "\\ud800"}', "is no file name"),
        (f'{{"id": "{"x" * 300}"}}', "is no file name"),
        ('{"id": 1.5}', "expected is text or a whole number"),
        (f'{{"prompt": "{"x" * lines.MAX_LINE_BYTES}"}}', "has over 1,048,576 bytes"),
    ],
)
def test_a_bad_line_is_told_with_what_is_expected(tmp_path: Path, line: str, said: str) -> None:
    assert said in wrong(tmp_path, line)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("seed\nx\n", "seed: is x; expected is a whole number"),
        ("guidance\nx\n", "expected is a number"),
        ("guidance\ninf\n", "expected is a number"),
        ("prompt\na,b\n", "has 2 cells, the head 1"),
        ("id\na/b\n", "is no file name"),
        ('prompt,seed\n"a cat,7\na dog,3\n', "is no CSV (unexpected end of data)"),
        ('prompt\n"a" cat\n', "is no CSV ("),
    ],
)
def test_a_bad_row_is_told_with_what_is_expected(tmp_path: Path, table: str, said: str) -> None:
    assert said in wrong(tmp_path, table, "jobs.csv")


def test_reading_goes_on_after_a_bad_line_of_any_kind(tmp_path: Path) -> None:
    long = b"x" * (3 * lines.MAX_LINE_BYTES)
    found = read(tmp_path, "jobs.jsonl", b'\xff\n{"prompt": "a"}\n' + long + b'\n{"prompt": "b"}\n')
    assert [(line.number, line.values, line.error is None) for line in found] == [
        (1, {}, False),
        (2, {"prompt": "a"}, True),
        (3, {}, False),
        (4, {"prompt": "b"}, True),
    ]
    rows = read(tmp_path, "jobs.csv", b'prompt\n\xff\nok\n"' + long + b'"\nlast\n')
    assert [row.values.get("prompt") for row in rows][:2] == [None, "ok"]
    assert [row.error is None for row in rows][:3] == [False, True, False]
    assert rows[-1].values == {"prompt": "last"}


@pytest.mark.parametrize("head", ["promt", "prompt,prompt", "prompt,device", "timestep-spacing,timestep_spacing"])
def test_a_table_with_a_faulty_head_is_refused(tmp_path: Path, head: str) -> None:
    with pytest.raises(InputError, match=r"jobs\.csv:1: "):
        read(tmp_path, "jobs.csv", f"{head}\na,b\n")


@pytest.mark.parametrize("name", ["jobs", "jobs.json", "jobs.xlsx"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is no job file"):
        read(tmp_path, name, "a")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name in ("missing.jsonl", "folder.txt"):
        with pytest.raises(InputError):
            list(lines.read(tmp_path / name))


def test_lines_are_not_held(tmp_path: Path) -> None:
    """The first is there before the rest of the file is read."""
    path = write(tmp_path, "jobs.jsonl", '{"prompt": "a"}\n' * 3)
    found: Any = lines.read(path)
    assert next(found).number == 1
    found.close()
