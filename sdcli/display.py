"""Where work is shown that no story could tell of: a model is fetched where it is first named.

The command line sets `progress`, as it sets `warnings.showwarning`. Every command imports this: it imports nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Protocol

    class Display(Protocol):
        """What shows where long work stands."""

        def update(self, what: str, done: int, total: int, info: str = "") -> None:
            """Show `done` of `total` of one piece of work."""


class _Nowhere:
    def __enter__(self) -> _Nowhere:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, what: str, done: int, total: int, info: str = "") -> None:
        """Show nothing."""


progress: Callable[[], AbstractContextManager[Display]] = _Nowhere
