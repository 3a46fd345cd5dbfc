"""A prompt that comes on stdin."""

from __future__ import annotations

import sys

from sdcli.errors import UsageError

MAX_PROMPT_BYTES = 1 << 20


def prompt_from_stdin() -> str:
    """What stands on stdin, without the white space around it. Raises UsageError when that cannot be a prompt."""
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1) if sys.stdin is not None else b""
    if len(data) > MAX_PROMPT_BYTES:
        raise UsageError(f"the prompt on stdin has over {MAX_PROMPT_BYTES:,} bytes", "give a shorter one")
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise UsageError("the prompt on stdin is no valid text", "write it in UTF-8") from error
