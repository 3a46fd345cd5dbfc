"""The command tree, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from sdcli import __version__, display, output
from sdcli.cli import signals
from sdcli.errors import ExitCode, SdcliError, Stopped, UsageError, explained

HELP = """Text to image from the command line: generate, encode, decode, train.

sdcli COMMAND --help tells all about one; sdcli --version prints the version."""


@dataclass(frozen=True)
class Command:
    """Where a command's function (or its group) lives, and its line in `sdcli --help`."""

    module: str
    attribute: str
    summary: str


# Only the command that is called is imported: the help of one does not pay for the options of all.
COMMANDS = {
    "generate": Command("generate", "generate", "Draw pictures of a prompt."),
    "batch": Command("batch", "batch", "Draw the pictures of a job file."),
    "encode": Command("codec", "encode", "Turn pictures into latent files."),
    "decode": Command("codec", "decode", "Turn latent files into pictures."),
    "roundtrip": Command("codec", "roundtrip", "Tell what pictures keep through the VAE and back."),
    "tokens": Command("tokens", "tokens", "Show what the text encoder makes of a prompt."),
    "diffuse": Command("diffuse", "diffuse", "Show a picture at chosen steps into the noise."),
    "meta": Command("meta", "meta", "Tell what pictures say about their making, or take it out of them."),
    "replay": Command("replay", "replay", "Draw pictures again from what they say about themselves."),
    "schedulers": Command("inside", "schedulers", "List the schedulers with the UNet evaluations they make."),
    "bench": Command("bench", "bench", "Compare schedulers: evaluations, time, distance to the solution."),
    "serve": Command("serve", "serve", "Keep a model loaded, for generate to draw with."),
    "models": Command("models", "app", "What models there are, and what they are."),
    "doctor": Command("inside", "doctor", "Say what this installation can do."),
    "dataset": Command("dataset", "app", "Look at training pictures before they are trained on."),
    "train-vae": Command("train_vae", "train_vae", "Train a VAE, further or from scratch."),
    "train-unet": Command("train_unet", "train_unet", "Train a UNet on captioned pictures, further or from scratch."),
    "train-embedding": Command("train_embedding", "train_embedding", "Learn a new word for what some pictures show."),
}


def command_tree(arguments: Sequence[str]) -> typer.Typer:
    """The Typer application for one call: the command named in full, of the others only their names."""
    called, sub_called = ([word for word in arguments if not word.startswith("-")] + ["", ""])[:2]
    app = typer.Typer(
        name="sdcli",
        help=HELP,
        add_completion=not called,  # parsing any option of the root's would cost every command 0.1 s, for pydantic
        rich_markup_mode=None,  # with the next line: --help in 0.10 s instead of 0.25 s
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(add_help_option=not called)(_root)
    is_completing = "_SDCLI_COMPLETE" in os.environ  # the shell asks for what may follow, of any command
    for name, command in COMMANDS.items():
        if name != called and not is_completing:
            app.command(name, help=command.summary)(_root)
            continue
        found = getattr(importlib.import_module(f"sdcli.cli.{command.module}"), command.attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name, add_help_option=not sub_called)
        else:
            app.command(name)(found)
    return app


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave with its exit code."""
    # Python's 700 has the collector walk all modules hundreds of times while torch and diffusers are imported.
    gc.set_threshold(100_000)
    output.open_streams()
    sys.exit(int(run(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: Sequence[str]) -> ExitCode:
    """Run one command; whatever happens becomes an exit code and at most one error line."""
    arguments = arguments or ["--help"]
    options = list(arguments[: list(arguments).index("--")] if "--" in arguments else arguments)
    # Read before parsing, so that an error of the parser already takes the form asked for.
    is_debug = "--debug" in options or os.environ.get("SDCLI_DEBUG", "").lower() in ("1", "true", "yes", "on", "t", "y")
    output.configure(json="--json" in options, quiet="--quiet" in options or "-q" in options, debug=is_debug)
    display.progress = output.progress
    if options[:1] == ["--version"]:
        output.result(f"sdcli {__version__}", {"sdcli": __version__})
        return ExitCode.OK
    try:
        with signals.raised():
            code = command_tree(arguments)(args=list(arguments), prog_name="sdcli", standalone_mode=False)
        return ExitCode(code) if code is not None else ExitCode.OK
    except SdcliError as problem:
        output.error(problem)
        return ExitCode(problem.exit_code)
    except TyperException as problem:
        output.error(UsageError(_one_line(problem.format_message()), "see --help"))
        return ExitCode.USAGE
    except BrokenPipeError:
        return output.close_quietly()
    except SystemExit as end:  # Typer's own answer to a closed pipe is to leave with 1
        if isinstance(end.__context__, BrokenPipeError):
            return output.close_quietly()
        raise
    except signals.Signalled as signalled:
        stopped = Stopped(signalled.number)
        output.error(stopped)
        return ExitCode(stopped.exit_code)
    except Exception as problem:
        error = explained(problem)
        output.error(error)
        return ExitCode(error.exit_code)


def _root() -> None:
    """Stand for the root, and for the commands that are not called."""


def _one_line(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:]
