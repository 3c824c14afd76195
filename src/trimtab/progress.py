"""How long work is told to whoever started it.

The library never prints: it calls a `Progress`. The CLI draws bars, tests collect notes,
and `Silent` is what a caller gets who asked for nothing.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def stage(self, title: str) -> None:
        """A new part of the work begins."""

    def note(self, text: str) -> None:
        """One line the user should read: a guess, a fallback, a count."""

    def advance(self, done: float, total: float, unit: str, **figures: float) -> None:
        """`done` of `total` units in this stage; figures (loss, tokens_per_second) as they stand."""


class Silent:
    def stage(self, title: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def advance(self, done: float, total: float, unit: str, **figures: float) -> None:
        pass
