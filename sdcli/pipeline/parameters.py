"""The `parameters` text of A1111's interface and of all that write like it, read back."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

MAX_LENGTH = 1 << 20  # characters; no program writes a longer one, and it is not taken apart
MAX_JSON = 1 << 16  # characters of a value in JSON; one that is longer is taken as plain
MAX_TAILS = 10  # places where a text may end in JSON of stable-diffusion.cpp: its prompt is repeated there
NEGATIVE = "Negative prompt:"
TEMPLATES = ("Template", "Negative Template")  # of wildcards, as dynamic prompts names them
SDCPP = "SDCPP: "
SDCPP_SCHEMA = "sdcpp.image.params/v1"
KEY = re.compile(r"(\w[\w \-/]{1,80}):\s*")  # A1111's, bounded, so that no text takes more than linear time
QUOTED = re.compile(r'"(?:\\.|[^\\"])+"', re.DOTALL)
LEAST_PAIRS = 3  # that make a line one of settings and not of the prompt


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=lambda _: None)


@dataclass(frozen=True)
class Parameters:
    """A text taken apart. pairs: by their names there, quotes and JSON resolved; sdcpp: stable-diffusion.cpp's JSON."""

    prompt: str = ""
    negative: str = ""
    pairs: dict[str, Any] = field(default_factory=dict)
    sdcpp: dict[str, Any] = field(default_factory=dict)


def read_parameters(text: str) -> Parameters:
    """What a `parameters` text says; any text is a prompt at least.

    The settings are the last line of three pairs or more; below it only the templates of dynamic prompts may stand.
    Source: A1111's modules/infotext_utils.py as of version 1.10, and what other programs write in its manner.
    """
    if len(text) > MAX_LENGTH:
        return Parameters(text)
    text, sdcpp = _without_tail(text.strip())
    lines = text.split("\n")
    at, pairs = _settings(lines)
    pairs |= _templates(lines[at + 1 :])
    prompt: list[str] = []
    negative: list[str] = []
    is_negative = False
    for line in (line.strip() for line in lines[:at]):
        if line.startswith(NEGATIVE) and not is_negative:
            is_negative, line = True, line[len(NEGATIVE) :].strip()
        (negative if is_negative else prompt).append(line)
    return Parameters("\n".join(prompt), "\n".join(negative), pairs, sdcpp)


def read_json(text: str) -> Any:
    """JSON of others: NaN, which ComfyUI writes, and 1e999 are null; None for what is none or nested too deeply."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def _settings(lines: list[str]) -> tuple[int, dict[str, Any]]:
    """Where the line of settings stands, and its pairs; behind the last line and none if there is none."""
    for at in range(len(lines) - 1, -1, -1):
        pairs = _pairs(lines[at])
        if len(pairs) >= LEAST_PAIRS and (at == len(lines) - 1 or "Steps" in pairs):
            return at, pairs
    return len(lines), {}


def _templates(lines: list[str]) -> dict[str, str]:
    """What stands below the settings, of one line or more each."""
    found: dict[str, list[str]] = {}
    said: list[str] = []
    for line in lines:
        key, _, text = line.partition(":")
        if key in TEMPLATES and key not in found:
            line, said = text, found.setdefault(key, [])
        said.append(line.strip())
    return {key: "\n".join(some) for key, some in found.items()}


def _pairs(line: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    at = 0
    while at < len(line):
        comma = line.find(",", at)
        end = comma if comma >= 0 else len(line)
        key = KEY.search(line, at, end)
        if key is None:
            at = end + 1
            continue
        value, at = _value(line, key.end())
        found[key[1]] = value
    return found


def _value(line: str, at: int) -> tuple[Any, int]:
    """The value at a place and the place behind the comma after it: quoted, JSON as Civitai writes it, or plain."""
    behind = -1
    value: Any = None
    if quoted := QUOTED.match(line, at):
        value, behind = read_json(quoted[0]), quoted.end()
        value = value if value is not None else quoted[0][1:-1]
    elif line.startswith("{", at):
        try:
            value, length = DECODER.raw_decode(line[at : at + MAX_JSON])
            behind = at + length
        except (ValueError, RecursionError):
            behind = -1
    comma = line.find(",", max(at, behind))
    end = comma if comma >= 0 else len(line)
    if behind < 0 or line[behind:end].strip():
        return line[at:end].strip(), end + 1
    return value, end + 1


def _without_tail(text: str) -> tuple[str, dict[str, Any]]:
    """The text without the JSON that stable-diffusion.cpp ends it with, unquoted, and that."""
    at = text.find(SDCPP)
    for _ in range(MAX_TAILS):
        if at < 0:
            break
        found = read_json(text[at + len(SDCPP) :])
        if isinstance(found, dict) and found.get("schema") == SDCPP_SCHEMA:
            return text[:at].rstrip(", \n"), found
        at = text.find(SDCPP, at + 1)
    return text, {}
