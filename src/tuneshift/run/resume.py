"""Starting a run's ledger, and continuing one: only the same configuration may go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import yaml

from tuneshift.config import LoadedConfig
from tuneshift.configfile import difference, read_mapping
from tuneshift.errors import ResumeRefused
from tuneshift.run.directory import RunDirectory, write_atomically
from tuneshift.run.ledger import Ledger


def open_ledger(loaded: LoadedConfig, run: RunDirectory) -> Ledger:
    """Start a run's ledger or continue it; from here on the directory outlives an error.

    Raises:
        ResumeRefused: it was started with settings that give other results; the message shows the difference.
    """
    described = check_resumable(loaded, run)
    run.keep()
    if not described:
        text = yaml.safe_dump(loaded.raw, sort_keys=False, allow_unicode=True)
        write_atomically(run.config, f"# relative paths start at {loaded.folder}\n{text}")
    ledger = Ledger(run.ledger)
    ledger.set_meta(fingerprint=loaded.fingerprint, folder=str(loaded.folder), name=loaded.name)
    return ledger


def check_resumable(loaded: LoadedConfig, run: RunDirectory) -> bool:
    """Tell whether the directory holds a run to continue; see `open_ledger` for what it raises."""
    if not run.ledger.exists():
        return False
    run.keep()
    with Ledger(run.ledger) as ledger:
        before = ledger.meta("fingerprint")
    if before is not None and before != loaded.fingerprint:
        changed = difference(read_mapping(run.config), loaded.raw)
        shown = "\n".join(f"  {line}" for line in changed) or "  a ${VARIABLE}, a default or a path has another value"
        raise ResumeRefused(
            f"{run.path}: this run was started with another configuration, so its results cannot be continued:\n"
            f"{shown}\nGive another --run-dir, or undo the change."
        )
    return before is not None


def synthesis_finished(run: RunDirectory) -> bool:
    """Tell whether the loop has met a stop rule, so that its models need not be loaded again."""
    with Ledger(run.ledger) as ledger:
        return ledger.meta("stop_reason") is not None


@contextmanager
def timed(ledger: Ledger, stage: str) -> Iterator[None]:
    """Add the time spent inside to the stage's seconds in the ledger."""
    started = time.monotonic()
    try:
        yield
    finally:
        ledger.add_seconds(stage, time.monotonic() - started)
