"""What a person sees while a run goes on: a live view on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tuneshift.progress import Progress, Stage

LINE_SECONDS = 10.0  # at least this long between two plain lines of one stage


def open_progress(run: Path | None = None) -> Progress:
    """Return a live view where stderr is a terminal, of the run whose directory is given; else plain lines."""
    if not sys.stderr.isatty():
        return LineProgress()
    from tuneshift.report.live import LiveProgress

    return LiveProgress(run)


def clean(text: str) -> str:
    """Return text without control and direction marks: a model may have written anything."""
    return "".join(c if c.isprintable() else " " for c in text)


def duration(seconds: float) -> str:
    """Return seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def stage_line(stage: Stage) -> str:
    """Return how far a stage is, as one line."""
    parts = [f"{stage.title}: {stage.done} of {stage.total} {stage.unit}"]
    if stage.rate is not None:
        parts.append(f"{stage.rate:.1f}/s")
    if stage.ended:
        parts.append(f"in {duration(stage.updated - stage.started)}")
    elif stage.seconds_left is not None and stage.done < stage.total:
        parts.append(f"{duration(stage.seconds_left)} left")
    return ", ".join(parts) + (f"; {stage.info}" if stage.info else "")


class LineProgress(Progress):
    """One line a note, and one every ten seconds of a stage."""

    def __init__(self) -> None:
        self._printed = 0.0

    def show(self, stage: Stage) -> None:
        """Print the stage's advance with its rate and the time left."""
        began = stage.updated == stage.started
        if began and not stage.ended:
            _say(f"{stage.title}: {stage.total - stage.done} {stage.unit} to go")
        elif stage.ended or stage.updated - self._printed >= LINE_SECONDS:
            _say(stage_line(stage))
        else:
            return
        self._printed = stage.updated

    def note(self, text: str) -> None:
        """Print a line."""
        _say(text)


def _say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {clean(text)}\n")
    sys.stderr.flush()
