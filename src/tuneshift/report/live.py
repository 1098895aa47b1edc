"""The live view of a run on a terminal: in the process that works, and with `tuneshift show --watch` in any other.

Both draw `view` of what the ledger holds; the process that works knows its stage a little earlier.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tuneshift.console import clean, duration, stage_line
from tuneshift.errors import Interrupted, RunDirectoryError
from tuneshift.evaluate.stats import Proportion
from tuneshift.progress import Progress, Stage
from tuneshift.run.directory import RunDirectory
from tuneshift.run.watching import STAGES, Snapshot, read_snapshot

REASONS = 6  # of the drop reasons are named
REFRESH_SECONDS = 1.0
READING_SHARE = 0.05  # of the time that reading the ledger may take: it grows, and the run needs the processor


class Reader:
    """Reads a run's snapshots, no more often than the run can afford; in between, the last one stands."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._newest: Snapshot | None = None
        self._due = 0.0

    def __call__(self) -> Snapshot | None:
        """Return the newest snapshot, `None` before there is one."""
        started = time.monotonic()
        if started >= self._due:
            try:
                self._newest = read_snapshot(self._run)
            except RunDirectoryError:  # read between two states of the file; the next read finds it whole
                if self._newest is None:
                    raise
            took = time.monotonic() - started
            self._due = started + max(REFRESH_SECONDS, took / READING_SHARE)
        return self._newest


class LiveProgress(Progress):
    """Notes as lines, and below them the view of the run and the bar of the stage that is open."""

    def __init__(self, run: Path | None = None) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._reader = None if run is None else Reader(RunDirectory(run))
        self._stage: Stage | None = None
        self._live: Live | None = None

    def show(self, stage: Stage) -> None:
        """Redraw; an ended stage leaves a line."""
        self._stage = stage
        if stage.ended and self._live is not None:
            self._live.stop()
            self._live = None
            self.note(stage_line(stage))
        elif not stage.ended and self._live is None:
            self._live = Live(console=self._console, get_renderable=self._view, refresh_per_second=4, transient=True)
            self._live.start()

    def note(self, text: str) -> None:
        """Print a line above the view."""
        self._console.print(Text(clean(text)))

    def _view(self) -> RenderableType:
        try:
            snapshot = self._reader() if self._reader is not None else None
        except RunDirectoryError:  # the run itself will tell, once it reads the ledger
            snapshot = None
        if snapshot is None:
            return _bar(self._stage) if self._stage is not None else Text()
        return view(replace(snapshot, stage=self._stage), now=time.time())


def watch(path: Path, *, console: Console | None = None, pause: Callable[[float], None] = time.sleep) -> None:
    """Show a run until it is finished or the reader has seen enough; on no terminal, a line whenever one changes.

    A run that was stopped is shown as such, and followed when it is continued.

    Raises:
        RunDirectoryError: there is no run directory, or its ledger is damaged.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"{path}: there is no run directory. Give the folder that `tuneshift transfer` uses.")
    console = console or Console(highlight=False)
    read, printed = Reader(RunDirectory(path)), ""
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    try:
        with live or nullcontext():
            while True:
                snapshot = read()
                if live is not None:
                    live.update(view(snapshot, now=time.time()) if snapshot else Text(_waiting(path)), refresh=True)
                elif (line := snapshot_line(snapshot) if snapshot else _waiting(path)) != printed:
                    printed = line
                    sys.stdout.write(line + "\n")
                    sys.stdout.flush()
                if snapshot is not None and snapshot.phase == "finished":
                    return
                pause(REFRESH_SECONDS)
    except Interrupted:
        return  # the reader has seen enough; the run goes on


def view(snapshot: Snapshot, *, now: float) -> RenderableType:
    """Return the view of a run at the instant `now`, in seconds since 1970."""
    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(ratio=1)
    for label, value in _synthesis_rows(snapshot):
        rows.add_row(label, value)
    if (left := _cost_left(snapshot)) is not None:
        rows.add_row("cost", Text(left))
    stage = snapshot.stage
    if stage is not None and not stage.ended and snapshot.phase != "finished":
        rows.add_row("", "")
        rows.add_row("now", _line(clip(stage.info)) if snapshot.phase == "synthesis" else _bar(stage))
        rows.add_row("time left", Text(time_left(snapshot)))
    title = Text.assemble((clean(snapshot.name), "bold"), " · ", _state(snapshot, now))
    return Panel(
        rows, title=title, title_align="left", subtitle=_strip(snapshot), subtitle_align="left", padding=(0, 1)
    )


def snapshot_line(snapshot: Snapshot) -> str:
    """Return a run's state as one plain line."""
    counts, stage = snapshot.counts, snapshot.stage
    parts = [f"{snapshot.name}: {_state(snapshot, 0).plain}", f"{counts.kept} of {_or_unknown(snapshot.wanted)} kept"]
    if counts.candidates:
        parts.append(f"keep rate {keep_rate(snapshot)}")
    if stage is not None and not stage.ended and snapshot.phase != "finished":
        parts.append(stage_line(stage))
    return clean("; ".join(parts))


def _or_unknown(wanted: int | None) -> str:
    return "n/a" if wanted is None else str(wanted)


def keep_rate(snapshot: Snapshot) -> str:
    """Return the share of candidates that is kept, with its interval and how many there are."""
    rate = Proportion(snapshot.counts.kept, snapshot.counts.candidates)
    interval = rate.interval()
    return f"{rate.accuracy:.0%} (95 % interval {interval.low:.0%} to {interval.high:.0%}, n = {rate.n})"


def time_left(snapshot: Snapshot) -> str:
    """Return what is left of the open stage, and what that is reckoned from."""
    stage, counts = snapshot.stage, snapshot.counts
    assert stage is not None
    if snapshot.phase == "synthesis" and snapshot.wanted is not None:
        if counts.kept == 0:
            return "not known: nothing is kept yet"
        each = counts.seconds / counts.kept
        left = each * max(0, snapshot.wanted - counts.kept)
        rounds = f"{counts.rounds} round{'s' if counts.rounds != 1 else ''}"
        return f"about {duration(left)} of this stage (from {rounds}: {each:.2g} s a kept pair)"
    if stage.seconds_left is None:
        return "not known: the first of this stage is not done yet"
    return f"about {duration(stage.seconds_left)} of this stage (from {stage.done - stage.before} {stage.unit})"


def _synthesis_rows(snapshot: Snapshot) -> list[tuple[str, RenderableType]]:
    counts, wanted = snapshot.counts, snapshot.wanted
    bar = ProgressBar(total=wanted or 1, completed=min(counts.kept, wanted or 1), width=32)
    kept = Table.grid(padding=(0, 2))
    kept.add_row(bar, Text(f"{counts.kept} of {_or_unknown(wanted)} in {counts.rounds} rounds"))
    if counts.candidates == 0:
        return [("kept", kept)]
    dropped = [(reason, count) for reason, count in counts.reasons.items() if reason != "kept"]
    named = [f"{count} {clean(reason)}" for reason, count in dropped[:REASONS]]
    others = sum(count for _, count in dropped[REASONS:])
    speed = f"{counts.written_tokens / max(counts.seconds, 1e-9):,.0f} tokens/s written by G, F and B"
    rows: list[tuple[str, RenderableType]] = [
        ("kept", kept),
        ("keep rate", Text(keep_rate(snapshot))),
        ("dropped", Text(" · ".join([*named, *([f"{others} otherwise"] if others else [])]) or "none")),
        ("speed", Text(speed)),
    ]
    if counts.newest_kept is not None:
        text, response = (clip(part) for part in counts.newest_kept)
        rows.append(("latest kept", _line(text)))
        rows.append(("", _line(f"→ {response}", style="green")))
    return rows


def clip(text: str) -> str:
    """Return the beginning of a text on one line, without control and direction marks."""
    return " ".join(clean(text[:300]).split())


def _cost_left(snapshot: Snapshot) -> str | None:
    if snapshot.cost is None:
        return None
    spent, counts = f"{snapshot.cost:.4g} so far, in the currency of the prices", snapshot.counts
    if snapshot.phase != "synthesis" or snapshot.wanted is None:
        return spent
    if counts.kept == 0:
        return f"{spent}; what is left is not known: nothing is kept yet"
    left = snapshot.cost / counts.kept * max(0, snapshot.wanted - counts.kept)
    return f"{spent}; about {left:.2g} left (from {counts.kept} kept pairs)"


def _state(snapshot: Snapshot, now: float) -> Text:
    if snapshot.phase == "finished":
        return Text("finished", style="green")
    if snapshot.alive is False:
        return Text(f"stopped in {snapshot.phase}; the same command continues it", style="yellow")
    stage = snapshot.stage
    silent = now - stage.updated if stage is not None and not stage.ended else 0
    seen = f", last heard of {duration(silent)} ago" if silent > 60 else ""
    return Text(snapshot.phase + seen, style="cyan")


def _strip(snapshot: Snapshot) -> Text:
    """Return the stages, with the seconds of those that took some and the present one in colour."""
    parts = [
        (
            f"{label} {duration(snapshot.seconds[name])}" if snapshot.seconds.get(name) else label,
            "cyan" if label == snapshot.phase else "dim",
        )
        for name, label in STAGES.items()
    ]
    return Text(" > ", style="dim").join([Text(label, style=style) for label, style in parts])


def _bar(stage: Stage) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    rate = "" if stage.rate is None else f", {stage.rate:.1f}/s"
    done = min(stage.done, stage.total)
    row.add_row(
        ProgressBar(total=max(stage.total, 1), completed=done, width=32),
        Text(f"{clean(stage.title)}: {done} of {stage.total} {stage.unit}{rate}"),
    )
    return Group(row, _line(clip(stage.info), style="dim")) if stage.info else row


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _waiting(path: Path) -> str:
    return clean(f"{path}: no ledger yet; the run is in its preflight")
