"""Lines of stdin as they arrive, as many at once as are there."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator

from sdcli.errors import InputError, UsageError
from sdcli.files import reason
from sdcli.jobs.lines import BOM, MAX_LINE_BYTES

WAIT_SECONDS = 0.2  # between two looks at whether it is time to stop
BLOCK_BYTES = 1 << 16

Numbered = tuple[int, bytes | None]  # a line and its number, from 1; None for one that is too long to be kept


def stdin_lines(most: int) -> Iterator[list[Numbered]]:
    """Up to `most` lines at a time, to the end of stdin; an empty list each time that none came while waiting.

    Reads the descriptor itself: a thread, or Python's own buffer, would hold lines back or hang at the end.
    Raises UsageError where there is no stdin, InputError when it cannot be read.
    """
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError) as error:  # closed
        raise UsageError("stdin is closed", "write jobs to it, one a line, or name a file") from error
    rest, number, is_skipping = b"", 0, False
    while True:
        if not select.select([descriptor], [], [], WAIT_SECONDS)[0]:
            yield []
            continue
        try:
            data = os.read(descriptor, BLOCK_BYTES)
        except OSError as error:
            raise InputError(f"stdin: {reason(error)}", "write jobs to it, one a line") from error
        *whole, rest = (rest + data).split(b"\n")
        if not data and (rest or is_skipping):  # the last line, without an end
            whole, rest = [rest], b""
        lines: list[Numbered] = []
        for line in whole:
            number += 1
            is_long = is_skipping or len(line) > MAX_LINE_BYTES
            lines.append((number, None if is_long else line.removeprefix(BOM) if number == 1 else line))
            is_skipping = False
        if len(rest) > MAX_LINE_BYTES:
            rest, is_skipping = b"", True
        for first in range(0, len(lines), most):
            yield lines[first : first + most]
        if not data:
            return
