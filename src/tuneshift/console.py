"""What a person sees while a run goes on: progress bars on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from tuneshift.progress import Meter, Progress

HOUR = 3600.0  # seconds of past updates from which the time left is told: a round may take minutes
LINE_SECONDS = 10.0  # at least this long between two plain lines of one stage


def open_progress() -> Progress:
    """Return bars where stderr is a terminal, else plain lines."""
    return BarProgress() if sys.stderr.isatty() else LineProgress()


def clean(text: str) -> str:
    """Return text without control and direction marks: a model may have written anything."""
    return "".join(c if c.isprintable() else " " for c in text)


class LineProgress(Progress):
    """One line a note, and one every ten seconds of a stage."""

    @contextmanager
    def stage(self, title: str, *, total: int, unit: str, done: int = 0) -> Iterator[Meter]:
        """Print the stage's advance with its rate and the time left."""
        started = time.monotonic()
        printed, before = started, done

        class Lines(Meter):
            def update(self, done: int, info: str = "") -> None:
                nonlocal printed
                now = time.monotonic()
                if now - printed >= LINE_SECONDS or done >= total:
                    printed = now
                    rate = (done - before) / max(now - started, 1e-9)
                    left = f", {(total - done) / rate:.0f} s left" if before < done < total else ""
                    _say(f"{title}: {done} of {total} {unit}, {rate:.1f}/s{left}; {info}")

        _say(f"{title}: {total - done} {unit} to go")
        yield Lines(total)

    def note(self, text: str) -> None:
        """Print a line."""
        _say(text)


class BarProgress(Progress):
    """A rich progress bar a stage, with rate and time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def stage(self, title: str, *, total: int, unit: str, done: int = 0) -> Iterator[Meter]:
        """Show a bar while the stage is open."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}, {{task.fields[rate]}}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}", markup=False),
        )
        with Bars(*columns, console=self._console, speed_estimate_period=HOUR) as bars:
            task = bars.add_task(title, total=total, completed=done, info="", rate="")
            started, before = time.monotonic(), done

            class Bar(Meter):
                def update(self, done: int, info: str = "") -> None:
                    rate = (done - before) / max(time.monotonic() - started, 1e-9)
                    bars.update(task, completed=done, info=clean(info), rate=f"{rate:.1f}/s")

            yield Bar(total)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(Text(clean(text)))


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {clean(text)}\n")
    sys.stderr.flush()
