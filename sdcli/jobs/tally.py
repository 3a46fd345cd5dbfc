"""A number for each of many keys, on disk once they are many: memory does not grow with them."""

from __future__ import annotations

import hashlib
import sqlite3

KEY_BYTES = 8  # among a million keys the chance that any two are alike is 3e-8


def key_of(text: str) -> str:
    """The key of a text: a hash of it, in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[: 2 * KEY_BYTES]


class Tally:
    """Numbers by key, in a temporary file that goes with the process. Of one thread."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("", isolation_level=None)
        for line in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE tally (key INTEGER PRIMARY KEY, value INTEGER NOT NULL)",
        ):
            self._base.execute(line)

    def get(self, key: str) -> int | None:
        """The number of a key, if it has one."""
        row = self._base.execute("SELECT value FROM tally WHERE key = ?", (number(key),)).fetchone()
        return int(row[0]) if row is not None else None

    def put(self, key: str, value: int) -> None:
        """Give a key a number of 64 bits, with a sign."""
        self._base.execute("INSERT OR REPLACE INTO tally VALUES (?, ?)", (number(key), value))

    def add(self, key: str) -> int:
        """Count a key once more, and tell how often it was before."""
        before = self.get(key) or 0
        self.put(key, before + 1)
        return before


def number(key: str) -> int:
    """A key as SQLite keeps it: its integers have a sign."""
    return int(key, 16) - (1 << 63)
