"""Exit codes and the errors that carry them. No input or output here."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process tells the shell; stable across versions."""

    OK = 0
    BUG = 1
    USAGE = 2
    INPUT = 3
    PARTIAL = 4
    OUTPUT = 5
    RESOURCES = 6
    NUMERICAL = 7
    LOCKED = 8
    HANGUP = 129
    INTERRUPTED = 130
    PIPE = 141
    TERMINATED = 143


class SdcliError(Exception):
    """An error told in one line: what is wrong, then what to do about it."""

    exit_code = ExitCode.BUG

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(SdcliError):
    """An option is unknown, out of range or contradicts another; found before a model is loaded."""

    exit_code = ExitCode.USAGE


class InputError(SdcliError):
    """A model, picture, latent file, dataset or checkpoint is missing, malformed or of the wrong kind."""

    exit_code = ExitCode.INPUT


class PartialError(SdcliError):
    """A batch has ended, and some of its jobs failed."""

    exit_code = ExitCode.PARTIAL


class OutputError(SdcliError):
    """The result cannot be written."""

    exit_code = ExitCode.OUTPUT


class ResourceError(SdcliError):
    """Not enough device, memory or time for what was asked."""

    exit_code = ExitCode.RESOURCES


class NumericalError(SdcliError):
    """NaN or Inf in weights, latents, pixels or loss."""

    exit_code = ExitCode.NUMERICAL


class LockedError(SdcliError):
    """Another process owns this folder."""

    exit_code = ExitCode.LOCKED


class Stopped(SdcliError):
    """A signal asked for the end; `exit_code` is 128 plus its number."""

    def __init__(self, signal_number: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = ExitCode(128 + signal_number)


class SdcliWarning(UserWarning):
    """Something the user should know that stops nothing; raised through `warnings`, shown by the command line."""


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether memory ran out, the machine's or a device's.

    torch, which is not imported here, has a class for a GPU's memory and only words for the machine's own.
    """
    return (
        isinstance(problem, MemoryError)
        or type(problem).__name__ == "OutOfMemoryError"
        or (isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem))
    )


def out_of_memory(where: str = "", hint: str = "use a smaller size or batch") -> ResourceError:
    """What is said where memory ran out; where: in whose work, if that is told."""
    return ResourceError(f"{where}: out of memory" if where else "out of memory", hint)


def explained(problem: Exception) -> SdcliError:
    """What a failed command says of whatever stopped it: an error of ours as it is, memory that ran out, or a bug."""
    if isinstance(problem, SdcliError):
        return problem
    if is_out_of_memory(problem):
        error: SdcliError = out_of_memory()
    else:
        what = f"internal error: {type(problem).__name__}: {problem}"
        error = SdcliError(what, "run again with --debug and report it")
    error.__cause__ = problem
    return error
