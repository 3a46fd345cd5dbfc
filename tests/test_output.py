"""What is said on stdout and stderr, and how."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdcli import output
from sdcli.errors import ExitCode, InputError, SdcliWarning, explained


@pytest.fixture(autouse=True)
def plain_mode() -> Iterator[None]:
    """A process that says everything for a person; its warnings set-up is taken back after the test."""
    with warnings.catch_warnings():
        output.configure(json=False, quiet=False, debug=False)
        yield
        output.configure(json=False, quiet=False, debug=False)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a picture of a 狗, naïve", "a picture of a 狗, naïve"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("\x1b[2Jcleared", "\\x1b[2Jcleared"),
        ("bell\a null\0", "bell\\x07 null\\x00"),
        ("right-to-left \u202e", "right-to-left \\u202e"),
        ("lone \udcff byte", "lone \\udcff byte"),
    ],
)
def test_escape_makes_every_character_that_steers_a_terminal_visible(raw: str, shown: str) -> None:
    assert output.escape(raw) == shown


def test_what_is_escaped_is_printable_whatever_it_was() -> None:
    everything = "".join(map(chr, range(0x3000))) + "\ud800\U000e0001"
    assert output.escape(everything).isprintable()


def test_a_result_is_text_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    output.result("a.png", {"path": "a.png"})
    assert capsys.readouterr() == ("a.png\n", "")


def test_with_json_a_result_is_one_line_on_stdout_and_notes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    output.configure(json=True, quiet=False, debug=False)
    output.note("nice to know")
    output.result("狗.png", {"path": "狗.png\n"})
    out, err = capsys.readouterr()
    assert out == '{"path": "狗.png\\n"}\n'
    assert err == ""


def test_a_note_is_escaped_on_stderr_and_silent_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    output.note("saved a\nb")
    assert capsys.readouterr() == ("", "saved a\\nb\n")
    output.configure(json=False, quiet=True, debug=False)
    output.note("saved")
    assert capsys.readouterr() == ("", "")


def test_an_error_is_one_line_however_many_its_words_have(capsys: pytest.CaptureFixture[str]) -> None:
    output.error(InputError("a\nb.png: is no picture", "save it again"))
    assert capsys.readouterr() == ("", "sdcli: error: a\\nb.png: is no picture; save it again\n")


def test_with_json_an_error_is_one_json_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output.configure(json=True, quiet=False, debug=False)
    output.error(InputError("a\nb.png: is no picture", "save it again"))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert json.loads(err) == {"error": "a\nb.png: is no picture", "hint": "save it again", "exit_code": 3}


def test_at_most_five_warnings_of_one_cause_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(9):
        output.warning(f"picture {number}", cause="animations")
    output.warning("another cause")
    shown = capsys.readouterr().err.splitlines()
    assert shown == [f"sdcli: warning: picture {i}" for i in range(5)] + ["sdcli: warning: another cause"]


def test_a_warning_raised_below_is_shown_every_time_and_those_of_libraries_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for _ in range(2):
        warnings.warn("said twice\n", SdcliWarning, stacklevel=1)
        warnings.warn("a library's own", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err.splitlines() == ["sdcli: warning: said twice\\n"] * 2


def test_a_bug_names_its_type_and_shows_a_traceback_only_with_debug(capsys: pytest.CaptureFixture[str]) -> None:
    words = "internal error: ZeroDivisionError: by zero; run again with --debug and report it"
    output.error(explained(ZeroDivisionError("by zero")))
    assert capsys.readouterr().err == f"sdcli: error: {words}\n"
    output.configure(json=False, quiet=False, debug=True)
    output.error(explained(ZeroDivisionError("by zero")))
    assert "\nZeroDivisionError: by zero\n" in "\n" + capsys.readouterr().err


def test_progress_is_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress() as bar:
        bar.update("training", 1, 2, "loss 0.1")
        bar.update("training", 2, 2)
    assert capsys.readouterr() == ("", "")


def test_a_result_goes_to_stdout_while_a_bar_is_shown_on_a_terminal() -> None:
    code = """
from sdcli import output
output.configure(json=False, quiet=False, debug=False)
with output.progress() as bar:
    bar.update("denoising", 1, 2)
    with output.progress() as same:  # a second one would draw over the first
        assert same is bar
    with output.progress() as same:
        assert same is bar
    output.result("puppy.png", {})
with output.progress() as other:
    assert other is not bar
"""
    terminal, stderr = pty.openpty()
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True, check=True)
    shown = os.read(terminal, 1 << 16).decode()
    assert ended.stdout == "puppy.png\n"
    assert "denoising" in shown and "puppy.png" not in shown


@pytest.mark.skipif(sys.platform != "linux", reason="has /dev/full")
@pytest.mark.parametrize("how", ["", "--json"])
def test_a_full_disk_behind_stdout_is_an_output_error(how: str) -> None:
    command = [sys.executable, "-m", "sdcli", "schedulers", *([how] if how else [])]
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (ExitCode.OUTPUT, 1)
    assert "stdout: no space left on device" in ended.stderr


@pytest.mark.parametrize(("closed", "code"), [("2>&-", 0), (">&-", ExitCode.OUTPUT)])
def test_a_closed_stream_is_no_bug(closed: str, code: int) -> None:
    command = f"{shlex.quote(sys.executable)} -m sdcli schedulers {closed}"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert ("dpm" in ended.stdout) == (code == 0)
    assert "internal error" not in ended.stderr + ended.stdout


def test_what_a_model_says_of_itself_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.configure(json=False, quiet=False, debug=False)
    output.document({"scheduler": "\x1b[2J", "names": ["小狗", "\x9b"]})
    assert capsys.readouterr().out == 'scheduler: \\x1b[2J\nnames: ["小狗", "\\x9b"]\n'


def test_a_string_that_is_no_text_is_json_all_the_same(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    output.configure(json=True, quiet=False, debug=False)
    output.result("", {"name": "\ud800"})
    assert json.loads(capsysbinary.readouterr().out) == {"name": "\ud800"}
