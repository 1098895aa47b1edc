"""Deciding a finished run's candidates again under another criterion, without touching a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tuneshift.config import check_config
from tuneshift.criteria import calibrate_tau, decide
from tuneshift.dataset import kept_rows
from tuneshift.run.directory import RunDirectory, jsonl, write_atomically
from tuneshift.run.ledger import Ledger
from tuneshift.run.stored import stored_config
from tuneshift.wiring import calibration_of, criterion_of


def reselect(run: RunDirectory, overrides: Sequence[str]) -> dict[str, Any]:
    """Write the dataset that another criterion keeps from the run's candidates, and return what it kept.

    The run itself stays as it was: the dataset goes to `reselected/<criterion>.jsonl`. What the loop would have
    generated next under the other criterion is not known, since kept prompts breed new ones.
    """
    with Ledger(run.ledger) as ledger:
        stored = stored_config(run, ledger)
        candidates = ledger.candidates()
    loaded = check_config(stored.raw, folder=stored.folder, name=stored.name, overrides=overrides, shown_as="--set")
    criterion = criterion_of(loaded)
    calibration = calibration_of(loaded)
    if calibration is not None:
        tau = calibrate_tau(candidates[:calibration], criterion)
        criterion = criterion.with_tau(tau if tau is not None else criterion.tau)
    decided = [decide(candidate, criterion) for candidate in candidates]
    rows = kept_rows(decided, target_size=len(decided))
    path = run.path / "reselected" / f"{criterion.name}.jsonl"
    write_atomically(path, jsonl(rows))
    before = {candidate.id for candidate in candidates if candidate.kept}
    after = {candidate.id for candidate in decided if candidate.kept}
    return {
        "criterion": criterion.name,
        "tau": criterion.tau,
        "candidates": len(candidates),
        "kept": len(after),
        "kept_before": len(before),
        "added": len(after - before),
        "removed": len(before - after),
        "reasons": dict(Counter(candidate.reason for candidate in decided).most_common()),
        "dataset": str(path),
    }
