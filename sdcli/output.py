"""The only place that writes to stdout or stderr: results, notes, warnings, errors, progress."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sdcli.errors import ExitCode, OutputError, SdcliError, SdcliWarning

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

WARNINGS_A_CAUSE = 5


@dataclass
class _Mode:
    is_json: bool = False
    is_quiet: bool = False
    is_debug: bool = False
    is_mute: bool = False
    warned: Counter[str] = field(default_factory=Counter)
    shown: Progress | None = None  # the display that is open: two would draw over each other


_mode = _Mode()


def configure(*, json: bool, quiet: bool, debug: bool) -> None:
    """Set how this process speaks, and show warnings raised below through `warning`."""
    global _mode
    _mode = _Mode(json, quiet, debug)
    warnings.simplefilter("default" if debug else "ignore")
    warnings.simplefilter("always", SdcliWarning)
    warnings.showwarning = _show_warning
    # Read when they are imported; their notes are for programmers.
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "warning" if debug else "error")


def mute() -> None:
    """From now on only errors: another process of the same command speaks for both."""
    _mode.is_mute = True


def result(text: str, record: Mapping[str, Any]) -> None:
    """One result on stdout, as soon as it exists: `text` for a person, with --json the record as one line."""
    _print(_json(record) if _mode.is_json else text)


def document(record: Mapping[str, Any]) -> None:
    """One thing described: a `key: value` line each for a person, with --json one JSON document."""
    if _mode.is_json:
        _print(_json(record, indent=2))
        return
    for key, value in record.items():
        for name, one in (
            {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        ).items():
            _print(escape(f"{name}: {one if isinstance(one, (str, int, float)) else _json(one)}"))


def description(text: str, record: Mapping[str, Any]) -> None:
    """One thing described: `text` for a person, with --json the record as one JSON document."""
    _print(_json(record, indent=2) if _mode.is_json else text)


def record(row: Mapping[str, Any]) -> None:
    """What only --json says: one line; a person is told in other words."""
    if _mode.is_json:
        _print(_json(row))


def heading(text: str) -> None:
    """The head of a table for a person; JSON has none."""
    if not _mode.is_json:
        _print(text)


def results_in_bytes(data: bytes) -> None:
    """A result that is no text (a picture) on stdout."""
    with _stdout() as stream:
        stream.buffer.write(data)
        stream.buffer.flush()


def note(text: str) -> None:
    """Something nice to know, on stderr; not with --quiet or --json."""
    if not (_mode.is_quiet or _mode.is_json or _mode.is_mute):
        print(escape(text), file=sys.stderr, flush=True)


def warning(text: str, cause: str = "") -> None:
    """Something the user should know, on stderr; at most five of one cause."""
    _mode.warned[cause or text] += 1
    if _mode.warned[cause or text] <= WARNINGS_A_CAUSE and not _mode.is_mute:
        print(f"sdcli: warning: {escape(text)}", file=sys.stderr, flush=True)


def error(problem: SdcliError) -> None:
    """The one line that ends a failed command; a traceback before it only with --debug."""
    if _mode.is_debug:
        traceback.print_exception(problem)
    if _mode.is_json:
        row = {"error": problem.message, "hint": problem.hint, "exit_code": int(problem.exit_code)}
        print(json.dumps(row), file=sys.stderr, flush=True)  # ASCII: a message may quote what would steer a terminal
    else:
        print(f"sdcli: error: {escape(str(problem))}", file=sys.stderr, flush=True)


def escape(text: str) -> str:
    """Text with its control characters made visible, so that no file name or prompt steers the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Progress:
    """A bar on stderr that shows where long work stands."""

    def __init__(self, bar: RichProgress | None) -> None:
        self._bar = bar
        self._tasks: dict[str, Any] = {}

    def update(self, what: str, done: int, total: int, info: str = "") -> None:
        """Show `done` of `total` of one piece of work; `info` stands behind the bar. What is done goes away."""
        if self._bar is None or (what not in self._tasks and done >= total):
            return
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total, info="")
        self._bar.update(self._tasks[what], completed=done, total=total, info=info)
        if done >= total:
            self._bar.remove_task(self._tasks.pop(what))

    def show(self, text: str) -> None:
        """Write what a terminal shows as a picture, with the bar out of the way; nothing unless `shows_pictures`."""
        if not shows_pictures():
            return
        if self._bar is not None:
            self._bar.stop()
        print(text, end="", file=sys.stderr, flush=True)
        if self._bar is not None:
            self._bar.start()


def shows_pictures() -> bool:
    """Whether pictures may be shown on stderr: on a terminal, without --quiet."""
    return not (_mode.is_quiet or _mode.is_mute) and sys.stderr.isatty()


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display, silent where stderr is no terminal, or with --quiet or --json; within one, that one."""
    if _mode.shown is not None:
        yield _mode.shown
        return
    if _mode.is_quiet or _mode.is_json or _mode.is_mute or not sys.stderr.isatty():
        yield Progress(None)
        return
    from rich.console import Console  # deferred: 0.05 s, and only a terminal needs it
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    info = TextColumn("{task.fields[info]}")
    console = Console(stderr=True)
    # rich would send what is printed meanwhile to its own console, stderr: a result is for stdout, terminal or not.
    with RichProgress(*columns, info, console=console, transient=True, redirect_stdout=False) as bar:
        _mode.shown = Progress(bar)
        try:
            yield _mode.shown
        finally:
            _mode.shown = None


def open_streams() -> None:
    """Make both streams fit for what is written: any character, and a stderr even where the caller closed it."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold any bytes, a record any character
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  as long as the process lives


def close_quietly() -> ExitCode:
    """The reader of stdout has gone: end without a word, and without Python's complaint at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.PIPE


@contextmanager
def _stdout() -> Iterator[TextIO]:
    """Stdout for one result. Raises OutputError when it is closed or its disk full; a gone reader is not our error."""
    if sys.stdout is None:
        raise OutputError("stdout is closed", "let it go to a file or a program")
    try:
        yield sys.stdout
    except BrokenPipeError:
        raise
    except OSError as problem:
        from sdcli.files import reason  # deferred: 0.01 s that --help does not need

        close_quietly()  # what is still in the buffer could not be written at exit either
        raise OutputError(f"stdout: {reason(problem)}", "let it go to a file or a program that takes it") from problem


def _print(text: str) -> None:
    if _mode.is_mute:
        return
    with _stdout() as stream:
        print(text, file=stream, flush=True)


def _json(value: object, indent: int | None = None) -> str:
    """JSON as people write it, in ASCII where a string is no text that UTF-8 knows."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    warning(str(message), cause=f"{filename}:{lineno}" if category is SdcliWarning else str(category))
