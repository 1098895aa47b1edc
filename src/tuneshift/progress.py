"""How long-running stages report to whoever watches; the silent default is for notebooks and tests.

Library code only calls `stage`, `note` and `log`. What a person sees is made in `tuneshift.console`, what another
process sees in `tuneshift.run.watching`, and what a tracker gets in `tuneshift.tracking`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Stage:
    """The state of one stage: `done` of `total` units, of which an earlier, stopped process did `before`.

    `started` and `updated` are instants in seconds since 1970, so that another process can tell how old they are.
    """

    title: str
    unit: str
    total: int
    done: int
    before: int
    started: float
    updated: float
    info: str = ""
    ended: bool = False

    @property
    def rate(self) -> float | None:
        """Units a second, `None` before the first."""
        return (self.done - self.before) / max(self.updated - self.started, 1e-9) if self.done > self.before else None

    @property
    def seconds_left(self) -> float | None:
        """What is left of the stage at the rate so far; `None` before the first unit."""
        return None if self.rate is None else (self.total - self.done) / self.rate


class Meter:
    """Advances one stage, and shows each state of it."""

    def __init__(self, stage: Stage, show: Callable[[Stage], None]) -> None:
        self.stage = stage
        self._show = show
        show(stage)

    def update(self, done: int, info: str = "", *, ended: bool = False) -> None:
        """Say how many units are done so far, and what is newest."""
        self.stage = replace(self.stage, done=done, info=info, updated=time.time(), ended=ended)
        self._show(self.stage)

    def say(self, info: str) -> None:
        """Say what happens within a unit."""
        self.update(self.stage.done, info)


class Progress:
    """Stages, notes and numbers of a run; this one keeps them to itself."""

    @contextmanager
    def stage(self, title: str, *, total: int, unit: str, done: int = 0) -> Iterator[Meter]:
        """Open a stage of `total` units, of which `done` were done by an earlier, stopped process."""
        now = time.time()
        meter = Meter(Stage(title, unit, total, done, before=done, started=now, updated=now), self.show)
        try:
            yield meter
        finally:
            meter.update(meter.stage.done, meter.stage.info, ended=True)

    def show(self, stage: Stage) -> None:
        """Show a stage that began, advanced or ended."""

    def note(self, text: str) -> None:
        """Say something that a person who waits wants to know."""

    def log(self, part: str, step: int, numbers: Mapping[str, float | None]) -> None:
        """Take the numbers of a step of a part of the run, such as of a round of the synthesis."""


SILENT = Progress()


class Passing(Progress):
    """Passes all that it is told on to another; what adds to it overrides a method, and passes on too."""

    def __init__(self, to: Progress) -> None:
        self._to = to

    def show(self, stage: Stage) -> None:
        """Pass a stage on."""
        self._to.show(stage)

    def note(self, text: str) -> None:
        """Pass a note on."""
        self._to.note(text)

    def log(self, part: str, step: int, numbers: Mapping[str, float | None]) -> None:
        """Pass numbers on."""
        self._to.log(part, step, numbers)
