"""The command tree, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from sdcli import __version__, output
from sdcli.cli import codec, generate, inside, models, train
from sdcli.errors import ExitCode, SdcliError, Stopped, UsageError

app = typer.Typer(
    name="sdcli",
    help="Text to image from the command line: generate, encode, decode, train.",
    no_args_is_help=True,
    rich_markup_mode=None,  # with the next line: --help in 0.10 s instead of 0.25 s
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Text to image from the command line."""
    if version:
        output.result(f"sdcli {__version__}", {"sdcli": __version__})
        raise typer.Exit


app.command("generate")(generate.generate)
app.command("encode")(codec.encode)
app.command("decode")(codec.decode)
app.command("schedulers")(inside.schedulers)
app.command("doctor")(inside.doctor)
app.add_typer(models.app, name="models")
app.command("train-vae")(train.train_vae)
app.command("train-unet")(train.train_unet)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave with its exit code."""
    sys.exit(int(run(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: Sequence[str]) -> ExitCode:
    """Run one command; whatever happens becomes an exit code and at most one error line."""
    options = list(arguments[: list(arguments).index("--")] if "--" in arguments else arguments)
    # Read before parsing, so that an error of the parser already takes the form asked for.
    output.configure(
        json="--json" in options, quiet="--quiet" in options or "-q" in options, debug="--debug" in options
    )
    try:
        with _signals_raise():
            code = app(args=list(arguments), prog_name="sdcli", standalone_mode=False)
        return ExitCode(code) if code is not None else ExitCode.OK
    except SdcliError as problem:
        output.error(problem)
        return ExitCode(problem.exit_code)
    except TyperException as problem:
        output.error(UsageError(_one_line(problem.format_message()), "see --help"))
        return ExitCode.USAGE
    except BrokenPipeError:
        return output.close_quietly()
    except (KeyboardInterrupt, typer.Abort):
        output.error(Stopped(signal.SIGINT))
        return ExitCode.INTERRUPTED
    except MemoryError as problem:
        output.error(SdcliError("out of memory", "use a smaller size or batch"))
        del problem
        return ExitCode.RESOURCES
    except Exception as problem:
        output.error(output.internal_error(problem))
        return ExitCode.BUG


@contextmanager
def _signals_raise() -> Iterator[None]:
    """TERM and HUP unwind the stack as INT does, so that no half file stays behind."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _one_line(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:]
