"""How long-running stages report to whoever watches; the silent default is for notebooks and tests.

Library code only calls these two methods. What a person sees is made in `tuneshift.console`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """The advance of one stage, in units out of `total`."""

    def __init__(self, total: int) -> None:
        self.total = total

    def update(self, done: int, info: str = "") -> None:
        """Say how many units are done so far, and what is newest."""


class Progress:
    """Stages and notes of a run."""

    @contextmanager
    def stage(self, title: str, *, total: int, unit: str, done: int = 0) -> Iterator[Meter]:
        """Open a stage of `total` units, of which `done` were done by an earlier, stopped process."""
        yield Meter(total)

    def note(self, text: str) -> None:
        """Say something that a person who waits wants to know."""


SILENT = Progress()
