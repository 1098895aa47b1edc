"""Parts of a run again: its candidates under another criterion, its trained target on other questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tuneshift.criteria import calibrate_tau, decide
from tuneshift.dataset import kept_rows
from tuneshift.errors import ConfigError, RunDirectoryError
from tuneshift.evaluate.evidence import gather_evidence
from tuneshift.pipeline import finish
from tuneshift.preflight import read_inputs
from tuneshift.progress import SILENT, Progress
from tuneshift.run.directory import RunDirectory, jsonl, write_atomically
from tuneshift.run.ledger import Ledger
from tuneshift.run.stored import stored_config
from tuneshift.wiring import calibration_of, criterion_of, evidence_settings


def reselect(run: RunDirectory, overrides: Sequence[str]) -> dict[str, Any]:
    """Write the dataset that another criterion keeps from the run's candidates, and return what it kept.

    No model is touched: every rule is a function of the stored records.

    The run itself stays as it was: the dataset goes to `reselected/<criterion>.jsonl`. What the loop would have
    generated next under the other criterion is not known, since kept prompts breed new ones.
    """
    with Ledger(run.ledger) as ledger:
        loaded = stored_config(run, ledger, overrides)
        candidates = ledger.candidates()
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


def evaluate_again(run: RunDirectory, overrides: Sequence[str], *, progress: Progress = SILENT) -> dict[str, Any]:
    """Evaluate a trained run's arms anew under `overrides` of the `evaluation` section, and write the verdict.

    Raises:
        RunDirectoryError: the run has no trained adapter yet. ConfigError: an override touches another section.
    """
    if not run.training.exists():
        raise RunDirectoryError(f"{run.path}: the target is not trained yet. Finish `tuneshift transfer` first.")
    wrong = [override for override in overrides if not override.startswith("evaluation")]
    if wrong:
        raise ConfigError(f"--set {wrong[0]}: a trained run can only be given other `evaluation` settings.")
    with Ledger(run.ledger) as ledger:
        loaded = stored_config(run, ledger, overrides)
        inputs = read_inputs(loaded.config, folder=loaded.folder)
        settings = evidence_settings(loaded, inputs, run.adapter)
        verdict = gather_evidence(run, ledger, anew=True, progress=progress, **settings)
        finish(run, ledger)
    return verdict
