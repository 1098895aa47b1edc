"""The ledger: a run's SQLite database, from which its whole state can be rebuilt.

One writer (the run directory's lock sees to it), write-ahead log, full synchronisation. A round commits whole, so after
a kill at any instant the ledger holds complete rounds only, plus generator calls whose text need not be bought again.
Log-probabilities are JSON numbers, which Python writes and reads without loss; a sum that is not a number is NULL.
Calls and candidates are read in the order in which they were written, by row numbers: by id, call 1000 precedes 101.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tuneshift.errors import RunDirectoryError
from tuneshift.run.records import Candidate, GeneratorCall, Probe, Usage

APPLICATION_ID = 0x54534B44  # "TSKD"
SCHEMA_VERSION = 6
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE calls (
    id TEXT PRIMARY KEY, round INTEGER NOT NULL, demos TEXT NOT NULL, prompt TEXT NOT NULL, raw TEXT NOT NULL,
    finished TEXT NOT NULL, generated_tokens INTEGER NOT NULL, seconds REAL NOT NULL, decoding TEXT NOT NULL,
    strategy TEXT NOT NULL CHECK (strategy IN ('forward', 'backward', 'probed', 'listed')), cue TEXT
);
CREATE TABLE rounds (round INTEGER PRIMARY KEY, tau REAL NOT NULL, seconds REAL NOT NULL, decoding TEXT NOT NULL);
CREATE TABLE candidates (
    id TEXT PRIMARY KEY, round INTEGER NOT NULL REFERENCES rounds, call_id TEXT NOT NULL REFERENCES calls,
    text TEXT NOT NULL, prompt TEXT NOT NULL, kept INTEGER NOT NULL, reason TEXT NOT NULL
);
CREATE TABLE responses (
    candidate_id TEXT NOT NULL REFERENCES candidates, role TEXT NOT NULL CHECK (role IN ('y_f', 'y_b')),
    text TEXT NOT NULL, token_ids TEXT NOT NULL, token_logprobs TEXT NOT NULL, sum_logprob REAL,
    n_tokens INTEGER NOT NULL, eos_logprob REAL, finish_reason TEXT NOT NULL, reencoded INTEGER NOT NULL,
    base_logprobs TEXT, base_eos_logprob REAL,
    PRIMARY KEY (candidate_id, role)
);
CREATE TABLE stage_seconds (stage TEXT NOT NULL, seconds REAL NOT NULL);
CREATE TABLE requests (
    number INTEGER PRIMARY KEY, call_id TEXT NOT NULL, prompt_reserved INTEGER NOT NULL,
    completion_reserved INTEGER NOT NULL, status INTEGER, problem TEXT, seconds REAL,
    prompt_tokens INTEGER AS (CASE WHEN json_valid(body) THEN json_extract(body, '$.usage.prompt_tokens') END) STORED,
    completion_tokens INTEGER
        AS (CASE WHEN json_valid(body) THEN json_extract(body, '$.usage.completion_tokens') END) STORED,
    body TEXT
);
CREATE TABLE measures (
    candidate_id TEXT NOT NULL REFERENCES candidates, name TEXT NOT NULL, value REAL, PRIMARY KEY (candidate_id, name)
);
"""
STATEMENTS = [statement for part in SCHEMA.split(";") if (statement := part.strip())]


@dataclass(frozen=True)
class RoundSummary:
    """A round as it was committed: the tau that decided it, its seconds, and how both models answered."""

    round: int
    tau: float
    seconds: float
    decoding: dict[str, Any]


@dataclass(frozen=True)
class Counts:
    """What the committed rounds amount to.

    `reasons` counts candidates by outcome, most frequent first; `written_tokens` are those of G, F and B, written in
    `seconds`; `newest_kept` is the text and y_f of the candidate that was kept last.
    """

    rounds: int
    candidates: int
    kept: int
    reasons: dict[str, int]
    written_tokens: int
    seconds: float
    newest_kept: tuple[str, str] | None


ROLES = ("y_f", "y_b")
CALL_JSON = ("demos", "raw", "finished", "decoding")
RESPONSE_JSON = ("token_ids", "token_logprobs", "base_logprobs")
PROBES, CALLS, ROUNDS, CANDIDATES = (
    TypeAdapter(list[Probe]),
    TypeAdapter(list[GeneratorCall]),
    TypeAdapter(list[RoundSummary]),
    TypeAdapter(list[Candidate]),
)
"""Rows are checked for their types as they are read: a damaged file may still be a database."""


class Ledger:
    """The database of one run, as a context manager.

    With `read_only` it writes nothing and keeps nobody from writing, so it may be opened while a run goes on.

    Raises:
        RunDirectoryError: the file is damaged, cannot be written, or is no ledger of this version; on opening, and for
            what SQLite finds later, on leaving the context.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._read_only = read_only
        try:
            self._db = sqlite3.connect(_address(path) if read_only else path, isolation_level=None, uri=read_only)
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        try:
            self._open()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self._db.close()
            raise self._unusable(error) from error

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        with suppress(sqlite3.Error):  # a reader that is still there keeps closing from emptying the log
            if not self._read_only:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        if isinstance(error, sqlite3.Error) or (self._read_only and isinstance(error, UnicodeDecodeError)):
            raise self._unusable(error) from error  # a reader has not checked the whole file before

    def meta(self, key: str) -> str | None:
        """Return a stored setting of the run, or `None`."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, **values: str) -> None:
        """Store settings of the run."""
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())

    def probes(self) -> list[Probe] | None:
        """Return what F was probed with, `None` before that."""
        stored = self.meta("probes")
        return None if stored is None else PROBES.validate_json(stored)

    def record_probes(self, probes: Sequence[Probe]) -> None:
        """Commit what F was probed with."""
        self.set_meta(probes=PROBES.dump_json(list(probes)).decode())

    def record_calls(self, calls: Sequence[GeneratorCall]) -> None:
        """Commit generator calls with their raw text, before anything is parsed."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(c.id, c.round, json.dumps(c.demos), c.prompt, json.dumps(c.raw), json.dumps(c.finished)),
                        *(c.generated_tokens, c.seconds, json.dumps(c.decoding), c.strategy, c.cue),
                    )
                    for c in calls
                ],
            )

    def begin_request(self, call_id: str, prompt_bound: int, completion_bound: int) -> int:
        """Note a request to an API before it leaves, with the most tokens that it may take; return its number."""
        with self._transaction():
            row = (call_id, prompt_bound, completion_bound)
            columns = "call_id, prompt_reserved, completion_reserved"
            return int(self._db.execute(f"INSERT INTO requests ({columns}) VALUES (?, ?, ?)", row).lastrowid or 0)

    def end_request(
        self, number: int, status: int | None, problem: str | None, seconds: float, body: str, charged: bool
    ) -> None:
        """Commit what came of a request, its raw body included, before anything is parsed."""
        with self._transaction():
            self._db.execute(
                "UPDATE requests SET status = ?, problem = ?, seconds = ?, body = ?, prompt_reserved = "
                "prompt_reserved * ?, completion_reserved = completion_reserved * ? WHERE number = ?",
                (status, problem, seconds, body, charged, charged, number),
            )

    def bodies(self, call_id: str) -> list[str]:
        """Return the raw bodies of a call's successful requests."""
        where = "call_id = ? AND status BETWEEN 200 AND 299 ORDER BY number"
        return [str(row[0]) for row in self._db.execute(f"SELECT body FROM requests WHERE {where}", (call_id,))]

    def usage(self) -> Usage:
        """Return what all requests to an API took."""
        missing = "prompt_tokens IS NULL OR completion_tokens IS NULL"
        row = self._db.execute(
            f"SELECT count(*) AS requests, total(({missing}) AND prompt_reserved > 0) AS unreported, "
            "total(prompt_tokens) AS prompt_tokens, total(completion_tokens) AS completion_tokens, "
            "total(iif(prompt_tokens IS NULL, prompt_reserved, 0)) AS prompt_reserved, "
            "total(iif(completion_tokens IS NULL, completion_reserved, 0)) AS completion_reserved FROM requests"
        ).fetchone()
        return Usage(**{key: int(value) for key, value in dict(row).items()})

    def record_round(self, summary: RoundSummary, candidates: Sequence[Candidate]) -> None:
        """Commit a whole round: all its candidates with responses, measures and decisions, or nothing."""
        responses = [(c.id, role, r) for c in candidates for role, r in (("y_f", c.y_f), ("y_b", c.y_b)) if r]
        with self._transaction():
            row = (summary.round, summary.tau, summary.seconds, json.dumps(summary.decoding))
            self._db.execute("INSERT INTO rounds VALUES (?, ?, ?, ?)", row)
            self._db.executemany(
                "INSERT INTO candidates VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(c.id, c.round, c.call_id, c.text, c.prompt, int(c.kept), c.reason) for c in candidates],
            )
            self._db.executemany(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(candidate_id, role, r.text, json.dumps(r.token_ids), json.dumps(r.token_logprobs)),
                        *(r.sum_logprob, r.n_tokens, r.eos_logprob, r.finish_reason, int(r.reencoded)),
                        *(None if r.base_logprobs is None else json.dumps(r.base_logprobs), r.base_eos_logprob),
                    )
                    for candidate_id, role, r in responses
                ],
            )
            self._insert_measures(candidates)

    def record_measures(self, candidates: Sequence[Candidate]) -> None:
        """Commit the measures of candidates that are in the ledger already, all of them or nothing."""
        with self._transaction():
            self._insert_measures(candidates)

    def calls(self, round_index: int | None = None) -> list[GeneratorCall]:
        """Return the generator calls of one round, or of all, in order."""
        where, values = ("WHERE round = ?", (round_index,)) if round_index is not None else ("", ())
        rows = self._db.execute(f"SELECT * FROM calls {where} ORDER BY rowid", values)
        with self._decoding():
            return CALLS.validate_python(
                [{**row, **{key: json.loads(row[key]) for key in CALL_JSON}} for row in map(dict, rows)]
            )

    def rounds(self) -> list[RoundSummary]:
        """Return the committed rounds in order."""
        rows = self._db.execute("SELECT * FROM rounds ORDER BY round")
        with self._decoding():
            return ROUNDS.validate_python([{**row, "decoding": json.loads(row["decoding"])} for row in map(dict, rows)])

    def candidates(self) -> list[Candidate]:
        """Return every candidate with its responses and measures, in the order in which they were written."""
        responses: dict[tuple[str, str], dict[str, Any]] = {}
        measures: dict[str, dict[str, float | None]] = {}
        rows = self._db.execute("SELECT * FROM candidates ORDER BY rowid")
        with self._decoding():
            for row in map(dict, self._db.execute("SELECT * FROM responses")):
                numbers = {key: json.loads(row[key]) for key in RESPONSE_JSON if row[key] is not None}
                responses[row["candidate_id"], row["role"]] = {**row, **numbers}
            for candidate_id, name, value in self._db.execute("SELECT * FROM measures"):
                measures.setdefault(candidate_id, {})[name] = value
            return CANDIDATES.validate_python(
                [
                    {**row, **{role: responses.get((row["id"], role)) for role in ROLES}}
                    | {"measures": measures.get(row["id"], {})}
                    for row in map(dict, rows)
                ]
            )

    def counts(self) -> Counts:
        """Return what the committed rounds amount to, without reading the candidates' text."""
        reasons = self._db.execute("SELECT reason, count(*) FROM candidates GROUP BY reason ORDER BY 2 DESC").fetchall()
        kept = self._db.execute("SELECT count(*) FROM candidates WHERE kept").fetchone()[0]
        rounds, seconds = self._db.execute("SELECT count(*), total(seconds) FROM rounds").fetchone()
        asked = self._db.execute("SELECT total(generated_tokens) FROM calls WHERE round < ?", (rounds,)).fetchone()[0]
        answered = self._db.execute("SELECT total(n_tokens) FROM responses").fetchone()[0]
        newest = self._db.execute(
            "SELECT c.text, r.text FROM candidates c JOIN responses r ON r.candidate_id = c.id AND r.role = 'y_f' "
            "WHERE c.kept ORDER BY c.rowid DESC LIMIT 1"
        ).fetchone()
        total = sum(count for _, count in reasons)
        return Counts(
            rounds, total, kept, dict(map(tuple, reasons)), int(asked + answered), seconds, newest and tuple(newest)
        )

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add time spent in a stage; a stopped and continued stage adds up."""
        with self._transaction():
            self._db.execute("INSERT INTO stage_seconds VALUES (?, ?)", (stage, seconds))

    def raise_peaks(self, peaks: Mapping[str, int | None]) -> None:
        """Note the peak memory of a process in bytes by kind; the largest of all processes stays."""
        known = self.peaks(list(peaks))
        higher = {key: str(value) for key, value in peaks.items() if value is not None and value > (known[key] or 0)}
        self.set_meta(**higher)

    def peaks(self, kinds: Sequence[str]) -> dict[str, int | None]:
        """Return what `raise_peaks` noted, `None` for what was not measured."""
        return {kind: None if (value := self.meta(kind)) is None else int(value) for kind in kinds}

    def seconds(self) -> dict[str, float]:
        """Return the seconds spent by stage, in the order in which stages began; rounds are added to synthesis."""
        rounds = self._db.execute("SELECT sum(seconds) FROM rounds").fetchone()[0] or 0.0
        rows = self._db.execute("SELECT stage, sum(seconds) FROM stage_seconds GROUP BY stage ORDER BY min(rowid)")
        stages = {stage: seconds for stage, seconds in rows}
        synthesis = rounds + stages.pop("synthesis", 0.0)
        return {"preflight": stages.pop("preflight", 0.0), "synthesis": synthesis, **stages}

    def _insert_measures(self, candidates: Sequence[Candidate]) -> None:
        rows = [(c.id, name, value) for c in candidates for name, value in c.measures.items()]
        self._db.executemany("INSERT OR REPLACE INTO measures VALUES (?, ?, ?)", rows)

    def _unusable(self, error: Exception) -> RunDirectoryError:
        why = " ".join(str(error).split())
        return RunDirectoryError(
            f"{self.path}: this ledger cannot be used ({why[:300]}). If the disk is full, free space; else restore it "
            "from a backup, or start again with another --run-dir."
        )

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Translate what reading a damaged row raises."""
        try:
            yield
        except (ValueError, TypeError) as error:
            raise self._unusable(error) from error

    def _open(self) -> None:
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA busy_timeout = 5000")
        if self._read_only:
            return self._check_version()
        self._switch_to_log()
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        if self._version() == (0, 0):
            self._create()
        self._check_version()
        problems = self._db.execute("PRAGMA quick_check").fetchone()[0]
        if problems != "ok":
            raise sqlite3.DatabaseError(problems)

    def _switch_to_log(self) -> None:
        """Use a write-ahead log; of processes that switch a new file at once, SQLite lets none wait for the other."""
        for last in [False] * 100 + [True]:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if last or error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    raise
                time.sleep(0.05)

    def _check_version(self) -> None:
        application, version = self._version()
        if application != APPLICATION_ID:
            raise sqlite3.DatabaseError(f"application {application:#x}, not a TuneShift ledger")
        if version != SCHEMA_VERSION:
            raise sqlite3.DatabaseError(
                f"another version of TuneShift wrote it: its form is {version}, and this version reads {SCHEMA_VERSION}"
            )
        tables = {row[0] for row in self._db.execute("SELECT sql FROM sqlite_master WHERE type = 'table'")}
        if tables != set(STATEMENTS):
            raise sqlite3.DatabaseError("its tables are not those of a TuneShift ledger")

    def _version(self) -> tuple[int, int]:
        application, version = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        return application, version

    def _create(self) -> None:
        """Make the tables, unless another process that opened the new file at the same time has made them."""
        with self._transaction():
            if self._version() == (0, 0):
                for statement in STATEMENTS:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


def _address(path: Path) -> str:
    """Return the URI that reads a ledger without writing.

    Where no process has left a write-ahead log, nothing changes the file, and SQLite need not even make its index of
    the log.
    """
    log = path.with_name(f"{path.name}-wal")
    unchanging = "" if log.exists() and log.stat().st_size else "&immutable=1"
    return f"{path.absolute().as_uri()}?mode=ro{unchanging}"


class _Transaction:
    """All statements inside commit together, or none does."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")
