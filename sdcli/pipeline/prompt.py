r"""Prompt syntax -> weighted text, and its pieces -> chunks of as many as the text encoder reads at once. No torch.

| written            | means                                                    |
|--------------------|----------------------------------------------------------|
| `(x:1.2)`          | x counts 1.2                                             |
| `(x)`, `[x]`       | x counts 1.1, 1/1.1; nested weights multiply             |
| `\(` `\)` `\[` `\]` `\\` | the character itself                               |
| `\{` `\|` `\}`     | the same: alone they are plain text, see `wildcards`     |
| `BREAK`            | what follows begins a new chunk                          |

A bracket without its partner is plain text, and so is whatever else other programs read in brackets; `networks` tells
what of that names files there.
Source: AUTOMATIC1111/stable-diffusion-webui, its wiki on attention and emphasis and on infinite prompt length; there,
a bracket that is never closed counts up to the end of the prompt.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sdcli.errors import UsageError

EMPHASIS = 1.1
MAX_WEIGHT = 10.0
MAX_CHUNKS = 16  # of a prompt: 1,200 pieces with CLIP's 75; each costs an encoding, and time in every step
PARTNERS = {")": "(", "]": "["}
PART = re.compile(r"\\[\\()\[\]{}|]|[()\[\]]|[^\\()\[\]]+|\\")  # an escape, a bracket, plain text, a lone backslash
NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?\s*", re.IGNORECASE)  # no word that `float` takes for one
BREAK = re.compile(r"\bBREAK\b")
NETWORK = re.compile(r"<(lora|lyco|locon|hypernet):[^<>]*>", re.IGNORECASE)  # what A1111 takes out of a prompt


@dataclass(frozen=True)
class Span:
    """Text of one weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Piece:
    """One of the tokenizer's pieces of a prompt, and what the text encoder is fed for it."""

    id: int  # the tokenizer's own
    rows: tuple[int, ...]  # of the token table; several for a learned token of several vectors
    weight: float = 1.0
    swap: str = ""  # the option that has other rows fed than the piece's own


@dataclass(frozen=True)
class Chunks:
    """The pieces of a prompt as the text encoder reads them, and those that it does not."""

    chunks: tuple[tuple[Piece, ...], ...]  # one at least
    rest: tuple[Piece, ...] = ()

    @property
    def kept(self) -> int:
        """Rows fed, the marks and the padding aside."""
        return sum(len(piece.rows) for chunk in self.chunks for piece in chunk)

    @property
    def cut(self) -> int:
        """Rows that found no room."""
        return sum(len(piece.rows) for piece in self.rest)

    def counts(self) -> dict[str, int]:
        """How much is kept and cut, and in how many chunks: what a record says of it."""
        return {"kept": self.kept, "cut": self.cut, "chunks": len(self.chunks)}

    def padded(self, count: int) -> Chunks:
        """The same with empty chunks at the end, `count` in all."""
        return replace(self, chunks=self.chunks + ((),) * (count - len(self.chunks)))


def parse(prompt: str) -> tuple[tuple[Span, ...], ...]:
    """The spans of a prompt in sections, of which each but the first follows a BREAK; in linear time.

    Neighbours of one weight are one span, so that a prompt without syntax is a single span of just its own text.
    Raises UsageError for a weight that is not in 0..10.
    """
    parts = PART.findall(prompt)
    factors = _factors(parts)
    sections: list[list[tuple[list[str], float]]] = [[]]
    weights = [1.0]
    for index, part in enumerate(parts):
        if index in factors:  # a bracket that has its partner
            if part in PARTNERS:
                weights.pop()
            else:
                weights.append(weights[-1] * factors[index])
            continue
        is_escape = len(part) == 2 and part[0] == "\\"
        for number, text in enumerate(BREAK.split(part[1:] if is_escape else part)):
            if number:
                sections.append([])
            _add(sections[-1], text, weights[-1])
    return tuple(tuple(Span("".join(texts), weight) for texts, weight in section) for section in sections)


def check(prompt: str) -> None:
    """Raise UsageError for a weight that is not in 0..10."""
    if "(" in prompt:  # else there is none that `parse` could refuse
        parse(prompt)


def networks(*prompts: str) -> list[str]:
    """What stands in prompts as A1111 names networks, `<lora:blue:0.8>`, each once."""
    return list(dict.fromkeys(match[0] for text in prompts for match in NETWORK.finditer(text)))


def chunked(sections: Sequence[Iterable[Piece]], room: int, *, most: int = MAX_CHUNKS) -> Chunks:
    """Pieces in chunks of up to `room` rows; those of each section begin a chunk of their own.

    The rows of one piece stay together unless no chunk has room for all. What comes after `most` chunks is cut.
    As in AUTOMATIC1111's program, a BREAK where a chunk is empty leaves an empty chunk, but none at the end.
    """
    chunks: list[list[Piece]] = []
    for section in sections:
        chunks.append([])
        used = 0
        for piece in section:
            rest = piece.rows
            while rest:
                if used == room or used + len(rest) > room >= len(rest):
                    chunks.append([])
                    used = 0
                taken, rest = rest[: room - used], rest[room - used :]
                chunks[-1].append(replace(piece, rows=taken))
                used += len(taken)
    if len(chunks) > 1 and not chunks[-1]:
        chunks.pop()
    cut = tuple(piece for chunk in chunks[most:] for piece in chunk)
    return Chunks(tuple(tuple(chunk) for chunk in chunks[:most]), cut)


def _factors(parts: list[str]) -> dict[int, float]:
    """What each bracket that has a partner multiplies, by its index; takes `:1.2` off the part before a `)`.

    Of brackets that cross, as in `(a [b) c]`, those opened first are partners and the others plain text.
    """
    factors: dict[int, float] = {}
    opened: list[int] = []
    waiting = {"(": 0, "[": 0}  # how many of each kind are open, so that no search goes astray
    for index, part in enumerate(parts):
        if part in waiting:
            opened.append(index)
            waiting[part] += 1
        elif part in PARTNERS and waiting[PARTNERS[part]]:
            while True:
                opener = opened.pop()
                waiting[parts[opener]] -= 1
                if parts[opener] == PARTNERS[part]:
                    break
            factor = 1 / EMPHASIS
            if part == ")":
                parts[index - 1], factor = _text_and_weight(parts[index - 1])
            factors[opener] = factors[index] = factor
    return factors


def _text_and_weight(part: str) -> tuple[str, float]:
    """What stands before a `)` as text and weight. Raises UsageError for a weight out of range."""
    text, colon, number = part.rpartition(":")
    if not colon or not NUMBER.fullmatch(number):
        return part, EMPHASIS
    weight = float(number)
    if not 0 <= weight <= MAX_WEIGHT:
        raise _out_of_range(number.strip())
    return text, weight


def _add(section: list[tuple[list[str], float]], text: str, weight: float) -> None:
    if not text:
        return
    if not 0 <= weight <= MAX_WEIGHT and text.strip():
        raise _out_of_range(f"{weight:g} of {reprlib.repr(text)}")
    if section and section[-1][1] == weight:
        section[-1][0].append(text)
    else:
        section.append(([text], weight))


def _out_of_range(what: str) -> UsageError:
    shown = what if len(what) <= 60 else what[:60] + "..."
    return UsageError(
        f"the weight {shown} in the prompt: out of range", rf"it must lie in 0..{MAX_WEIGHT:g}; \( is a plain bracket"
    )
