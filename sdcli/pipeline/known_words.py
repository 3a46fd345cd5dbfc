"""Which words a model saw while it learned, and which of a prompt it did not: `words.txt` in its folder. No torch."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from sdcli import layout
from sdcli.errors import InputError, SdcliWarning
from sdcli.files import atomic_write, exists, read_bytes
from sdcli.pipeline import prompt as syntax

FILE = "words.txt"
MAX_BYTES = 8 << 20
WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
MOST_TOLD = 5  # words in a warning
MAX_TOLD = 40  # characters of one


def words(text: str) -> list[str]:
    """The words of a plain text, lower case, each once; a hyphen parts two."""
    return list(dict.fromkeys(word.replace("\u2019", "'") for word in WORD.findall(text.lower())))


def read(place: Path) -> frozenset[str] | None:
    """The words that a model saw; None where it does not say. Raises InputError for a list that is none."""
    path = place / FILE
    if not place.is_dir() or not exists(path):
        return None
    facts = path.stat()
    return _read(path, facts.st_mtime_ns, facts.st_size)


def write(folder: Path, seen: Iterable[str]) -> None:
    """Write the list of a model's words."""
    with atomic_write(folder / FILE) as part:
        part.write_text("".join(f"{word}\n" for word in sorted(set(seen))), encoding="utf-8")


def unknown(known: frozenset[str] | None, prompt: str, learned: Iterable[str] = ()) -> tuple[str, ...]:
    """The words of a prompt that a model never saw, in their order; none where it does not say what it saw.

    learned: tokens of embeddings, which mean what they were trained to.
    """
    if known is None:
        return ()
    spans = [span.text for section in syntax.parse(prompt) for span in section]
    plain = " ".join(spans)
    for token in learned:
        begin, end = (r"\b" if re.match(r"\w", sign) else "" for sign in (token[:1], token[-1:]))
        plain = re.sub(f"{begin}{re.escape(token)}{end}", " ", plain, flags=re.IGNORECASE)
    return tuple(word for word in words(plain) if word not in known)


def warn_of_unknown(found: tuple[str, ...], what: str) -> None:
    """Warn of words that a model never saw. what: `prompt` or `negative prompt`."""
    if found:
        told = ", ".join(word[:MAX_TOLD] for word in found[:MOST_TOLD])
        more = f" and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
        note = f"the {what} has words that this model never saw while it learned: {told}{more}"
        warnings.warn(note, SdcliWarning, stacklevel=2)


@functools.lru_cache(maxsize=4)
def _read(path: Path, changed: int, size: int) -> frozenset[str]:
    """The file of a time of change and a size: jobs of many settings share one set."""
    try:
        text = read_bytes(path, max_bytes=MAX_BYTES, within=layout.root(path.parent)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8", "get the file again, or remove it") from error
    return frozenset(text.split("\n")) - {""}
