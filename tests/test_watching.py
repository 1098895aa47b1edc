"""What is seen of a run while it goes on, from its own process and from another one."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import HOSTILE as THIRTY
from rich.console import Console

from tuneshift.console import duration
from tuneshift.errors import Interrupted, RunDirectoryError
from tuneshift.progress import Progress, Stage
from tuneshift.report import live
from tuneshift.report.live import keep_rate, snapshot_line, time_left, view, watch
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger, RoundSummary
from tuneshift.run.records import Candidate, GeneratorCall, Response
from tuneshift.run.watching import Recorded, Snapshot, read_snapshot

NOW = 1_000_000.0
SETTINGS = {"synthesis": {"target_size": 4, "oversample": 2.0}, "generator": {"api": None}}
HOSTILE = [
    *THIRTY,
    "\x1b[2J\x1b[31mred", "\x1b]0;title\x07", "\u202eevil\u202c", "\u2066x\u2069", "[bold]markup[/bold] [/]",
    "a\r\nb\x00c",
    "\x9b31m", "\u200f\u200e", "x" * 100_000, "[link=http://x]y[/link]",
]  # fmt: skip


def response(text: str, tokens: int) -> Response:
    return Response(text, (7,) * tokens, (-0.5,) * tokens, None, "stop", False)


def add_round(ledger: Ledger, index: int, kept: int, dropped: int, *, text: str = "play jazz") -> list[Candidate]:
    """Commit a call of 30 tokens and a round of 2 s, whose candidates have answers of 3 and 4 tokens."""
    call = GeneratorCall(f"r{index:04d}-c000", index, (), "p", ("raw",), (True,), 30, 0.1, {})
    made = [
        Candidate(
            f"r{index:04d}-c000-{n:03d}", index, call.id, f"{text} {n}", f"{text} {n}", n < kept,
            "kept" if n < kept else "low-low", response(f"{text} f{n}", 3), response("b", 4),
        )
        for n in range(kept + dropped)
    ]  # fmt: skip
    ledger.record_calls([call])
    ledger.record_round(RoundSummary(index, 1.5, 2.0, {}), made)
    return made


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of two rounds, of which 5 of 20 candidates are kept, 8 wanted."""
    directory = RunDirectory(tmp_path / "run")
    with directory, Ledger(directory.ledger) as ledger:
        directory.keep()
        ledger.set_meta(name="intents", settings=json.dumps(SETTINGS))
        add_round(ledger, 0, 1, 9)
        add_round(ledger, 1, 4, 6)
    return directory


def snapshot(run: RunDirectory) -> Snapshot:
    found = read_snapshot(run)
    assert found is not None
    return found


def test_how_many_are_wanted_is_not_known_where_a_variable_says_it(run: RunDirectory) -> None:
    with run, Ledger(run.ledger) as ledger:
        ledger.set_meta(settings=json.dumps({"synthesis": {"target_size": "${SIZE}"}}))
    assert "5 of n/a kept" in snapshot_line(snapshot(run))
    assert "5 of n/a in 2 rounds" in drawn(snapshot(run))


def drawn(shown: Snapshot, width: int = 100, now: float = NOW) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(view(shown, now=now))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


# --- what is read ---


def test_a_snapshot_counts_what_the_rounds_hold(run: RunDirectory) -> None:
    counts = snapshot(run).counts
    with Ledger(run.ledger) as ledger:
        candidates = ledger.candidates()
    assert (counts.rounds, counts.candidates, counts.kept) == (2, len(candidates), sum(c.kept for c in candidates))
    assert counts.reasons == {"low-low": 15, "kept": 5}
    assert counts.written_tokens == 2 * 30 + 20 * (3 + 4)
    assert counts.seconds == 4.0
    assert counts.newest_kept == ("play jazz 3", "play jazz f3")


def test_calls_of_a_round_that_is_not_committed_do_not_count_as_written_in_its_time(run: RunDirectory) -> None:
    before = snapshot(run).counts
    with Ledger(run.ledger) as ledger:
        ledger.record_calls([GeneratorCall("r0002-c000", 2, (), "p", ("raw",), (True,), 99, 0.1, {})])
        assert snapshot(run).counts == before


def test_reading_writes_nothing_and_waits_for_nobody(run: RunDirectory) -> None:
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.path.iterdir()}

    before = content()
    snapshot(run)
    assert content() == before
    with run, Ledger(run.ledger) as ledger:  # a run holds the lock, and is in the middle of a transaction
        with ledger._transaction():
            ledger._db.execute("INSERT INTO meta VALUES ('half', 'done')")
            started = time.monotonic()
            assert snapshot(run).counts.candidates == 20
            assert time.monotonic() - started < 2
        add_round(ledger, 2, 1, 0)
        assert snapshot(run).counts.candidates == 21


def test_a_reader_cannot_write(run: RunDirectory) -> None:
    with (
        pytest.raises(RunDirectoryError, match="readonly"),
        Ledger(run.ledger, read_only=True) as ledger,
    ):
        ledger.set_meta(name="other")


def test_a_reader_that_stays_leaves_the_writer_a_whole_file(run: RunDirectory) -> None:
    with Ledger(run.ledger) as ledger:
        add_round(ledger, 2, 1, 0)
        reader = Ledger(run.ledger, read_only=True)
        assert reader.counts().rounds == 3
    alone = sqlite3.connect(f"{run.ledger.as_uri()}?immutable=1", uri=True)  # the file without its log
    assert alone.execute("SELECT count(*) FROM rounds").fetchone() == (3,)
    alone.close()
    with reader:
        assert reader.counts().rounds == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from tuneshift.progress import SILENT
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger
from tuneshift.run.watching import Recorded

with RunDirectory(Path(sys.argv[1])) as run, Ledger(run.ledger) as ledger:
    with Recorded(SILENT, ledger).stage("Synthesis", total=8, unit="kept pairs", done=5) as meter:
        ledger._db.execute("BEGIN IMMEDIATE")
        ledger._db.execute("INSERT INTO meta VALUES ('half', 'done')")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_was_killed_reads_as_stopped(run: RunDirectory) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(run.path)]).returncode == -signal.SIGKILL
    found = snapshot(run)
    assert found.alive is False
    assert found.stage is not None
    assert (found.stage.done, found.stage.ended) == (5, False)
    assert "stopped in synthesis; the same command continues it" in drawn(found)
    with run, Ledger(run.ledger):
        assert snapshot(run).alive is True


def test_a_run_on_another_machine_is_not_called_stopped(run: RunDirectory) -> None:
    (run.path / ".lock").write_text(f"process {os.getpid()} on elsewhere")
    assert snapshot(run).alive is None
    assert "stopped" not in drawn(snapshot(run))


def test_before_the_ledger_there_is_no_snapshot_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    assert read_snapshot(RunDirectory(tmp_path)) is None
    (tmp_path / "ledger.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(RunDirectoryError, match="this ledger cannot be used"):
        read_snapshot(RunDirectory(tmp_path))


def test_a_ledger_of_another_version_is_named_as_such(run: RunDirectory) -> None:
    with closing(sqlite3.connect(run.ledger)) as database:
        database.execute("PRAGMA user_version = 1")
    with pytest.raises(RunDirectoryError, match="another version of TuneShift wrote it: its form is 1, and this"):
        read_snapshot(run)


# --- what is told on ---


class Seen(Progress):
    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.notes: list[str] = []

    def show(self, stage: Stage) -> None:
        self.stages.append(stage)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_stage_is_noted_in_the_ledger_and_told_on(run: RunDirectory) -> None:
    seen = Seen()
    with Ledger(run.ledger) as ledger:
        with Recorded(seen, ledger).stage("Distillation", total=100, unit="pairs", done=10) as meter:
            assert snapshot(run).stage == seen.stages[0]
            for done in range(11, 50):
                meter.update(done, f"step {done}")
            noted = snapshot(run).stage
            assert noted is not None
            assert noted.done < 49  # not each step waits for the disk
        assert len(seen.stages) == 41
        assert snapshot(run).stage == replace(seen.stages[-1], done=49, ended=True)


def test_a_stage_knows_its_rate_and_what_is_left_of_it() -> None:
    stage = Stage("Distillation", "pairs", total=100, done=40, before=20, started=NOW, updated=NOW + 10)
    assert (stage.rate, stage.seconds_left) == (2.0, 30.0)
    assert (replace(stage, done=20).rate, replace(stage, done=20).seconds_left) == (None, None)


# --- what is shown ---


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (59.4, "59 s"), (118.6, "1 min 59 s"), (3599.7, "1 h 0 min"), (6900, "1 h 55 min")],
)
def test_a_time_is_told_in_one_form(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_the_view_names_what_a_person_who_waits_wants_to_know(run: RunDirectory) -> None:
    stage = Stage("Synthesis", "kept pairs", 8, 5, 0, NOW - 30, NOW - 1, "round 3: F answers 10 prompts")
    shown = drawn(replace(snapshot(run), stage=stage, alive=True))
    for words in (
        "intents · synthesis", "5 of 8 in 2 rounds", "25% (95 % interval 11% to 47%, n = 20)", "15 low-low",
        "50 tokens/s", "play jazz 3", "→ play jazz f3", "round 3: F answers 10 prompts",
        "about 2 s of this stage (from 2 rounds: 0.8 s a kept pair)",
    ):  # fmt: skip
        assert words in shown, words
    assert "cost" not in shown


def test_nothing_is_reckoned_from_nothing(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    with directory, Ledger(directory.ledger) as ledger:
        directory.keep()
        ledger.set_meta(name="new", settings=json.dumps(SETTINGS))
        with Recorded(Progress(), ledger).stage("Synthesis", total=8, unit="kept pairs"):
            empty = snapshot(directory)
            assert "keep rate" not in drawn(empty)
            assert time_left(empty) == "not known: nothing is kept yet"
            add_round(ledger, 0, 0, 10)
            none_kept = snapshot(directory)
    assert keep_rate(none_kept).startswith("0% (95 % interval 0% to 28%, n = 10)")
    assert time_left(none_kept) == "not known: nothing is kept yet"
    assert "latest kept" not in drawn(none_kept)


def test_the_cost_so_far_and_to_come_is_that_of_the_kept_pairs(run: RunDirectory) -> None:
    shown = drawn(replace(snapshot(run), cost=0.5))
    assert "0.5 so far, in the currency of the prices; about 0.3 left (from 5 kept pairs)" in shown


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_a_model_wrote_cannot_reach_the_terminal(tmp_path: Path, text: str) -> None:
    directory = RunDirectory(tmp_path / "run")
    with directory, Ledger(directory.ledger) as ledger:
        directory.keep()
        ledger.set_meta(name=text, settings=json.dumps(SETTINGS))
        add_round(ledger, 0, 1, 1, text=text)
        stage = Stage(text, "kept pairs", 8, 1, 0, NOW, NOW, info=text)
        ledger.set_meta(stage=json.dumps(asdict(stage)))
    shown = drawn(snapshot(directory), width=80)
    lines = shown.splitlines()
    assert all(character.isprintable() for line in lines for character in line)
    assert {len(line) for line in lines} == {80}
    assert len(lines) < 40
    assert snapshot_line(snapshot(directory)).isprintable()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_view_fits_any_terminal(run: RunDirectory, width: int) -> None:
    stage = Stage("Synthesis", "kept pairs", 8, 5, 0, NOW - 30, NOW - 1, "x" * 500)
    assert max(map(len, drawn(replace(snapshot(run), stage=stage), width=width).splitlines())) == width


# --- following ---


def test_watching_follows_a_run_to_its_end(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    steps = iter([lambda: None, lambda: add(2), lambda: run.manifest.write_text("{}")])

    def add(index: int) -> None:
        with Ledger(run.ledger) as ledger:
            add_round(ledger, index, 1, 1)

    def pause(seconds: float) -> None:
        next(steps)()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "REFRESH_SECONDS", 0.0)
        patch.setattr(live, "READING_SHARE", float("inf"))
        watch(run.path, console=Console(file=io.StringIO(), force_terminal=False), pause=pause)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["intents"] * 3  # one a change, none for the step without one
    assert "5 of 8 kept" in lines[0]
    assert "6 of 8 kept" in lines[1]
    assert "finished" in lines[2]


def test_who_has_seen_enough_ends_the_watching_and_not_the_run(run: RunDirectory) -> None:
    def pause(seconds: float) -> None:
        raise Interrupted

    watch(run.path, console=Console(file=io.StringIO(), force_terminal=False), pause=pause)
    assert snapshot(run).phase == "synthesis"


def test_watching_waits_for_the_ledger_but_not_for_a_folder(tmp_path: Path, run: RunDirectory) -> None:
    with pytest.raises(RunDirectoryError, match="there is no run directory"):
        watch(tmp_path / "nowhere")
    started = tmp_path / "started"
    started.mkdir()

    def pause(seconds: float) -> None:
        run.manifest.write_text("{}")
        for path in run.path.iterdir():
            (started / path.name).write_bytes(path.read_bytes())

    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "REFRESH_SECONDS", 0.0)
        watch(started, console=Console(file=shown, force_terminal=True, width=80), pause=pause)
    assert "the run is in its preflight" in shown.getvalue().replace("\n", " ")
    assert "finished" in shown.getvalue()
