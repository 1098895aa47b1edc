"""Parts of a run again: its candidates measured for, and under, another criterion; its target on other questions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuneshift.config import LoadedConfig
from tuneshift.criteria import Criterion, decidable, decide_all, may_keep, score_of, unmeasured
from tuneshift.datafiles import Item
from tuneshift.dataset import choose, kept_rows, read_rows
from tuneshift.errors import ConfigError, DataError, ResumeRefused, RunDirectoryError
from tuneshift.evaluate.evidence import gather_evidence
from tuneshift.measuring import measure_stored
from tuneshift.pipeline import finish
from tuneshift.preflight import Inputs, read_inputs
from tuneshift.progress import SILENT, Progress
from tuneshift.prompts.contamination import HeldOut
from tuneshift.prompts.parsing import extract_text
from tuneshift.run.directory import RunDirectory, jsonl, write_atomically, write_json
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate
from tuneshift.run.resume import changed_inputs
from tuneshift.run.stored import stored_config
from tuneshift.run.usage import timed
from tuneshift.wiring import calibration_of, criterion_of, criterion_on, examination, open_instruments


def reselect(run: RunDirectory, overrides: Sequence[str]) -> dict[str, Any]:
    """Write the dataset that another criterion keeps from the run's candidates, and return what it kept.

    No model is touched: every rule is a function of the stored records, and what it needs beyond both responses,
    `measure` measures before. Of what it keeps, pairs are chosen as the run does, by `synthesis.target_size` and
    `select`.

    The run itself stays as it was: the dataset goes to `reselected/`, under a name that tells rule and threshold. What
    the loop would have generated next under the other criterion is not known, since kept prompts breed new ones.

    Raises:
        ConfigError: an override touches another section.
        RunDirectoryError: candidates that the criterion could keep, or that its tau is calibrated on, are not measured.
    """
    _only(overrides, ("criterion",), "generated prompts can only be decided again by other `criterion` settings")
    with Ledger(run.ledger) as ledger:
        loaded = stored_config(run, ledger, overrides)
        candidates, calls, probes = ledger.candidates(), ledger.calls(), ledger.probes() or ()
    criterion = criterion_of(loaded)
    lacking = unmeasured(candidates, criterion, gated=calibration_of(loaded) is None)
    if lacking:
        settings = " ".join(f"--set {override}" for override in overrides)
        raise RunDirectoryError(
            f"{run.path}: {len(lacking)} of {len(candidates)} candidates have no {' and '.join(criterion.needs())}, "
            f"which criterion {criterion.name} reads. Measure them first: tuneshift measure {run.path} {settings}"
        )
    if unasked := _uncalibrated(candidates, loaded):
        raise RunDirectoryError(
            f"{run.path}: tau: auto is calibrated on answers of both models, and B did not answer {unasked} of the "
            f"first {calibration_of(loaded)} candidates: the run's own tau had dropped them for F's answer alone. Give "
            "a tau, or start a run with synthesis.complete_scores: true."
        )
    criterion = criterion_on(loaded, candidates)
    decided = decide_all(candidates, criterion)
    section, kept = loaded.config.synthesis, [candidate for candidate in decided if candidate.kept]
    chosen = choose(kept, section.target_size, section.select, seed=loaded.config.run.seed, probes=probes)
    rows = kept_rows(chosen, calls, count_eos=criterion.count_eos)
    path = run.reselected / f"{criterion.label()}.jsonl"
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
        "written": len(rows),
        "reasons": dict(Counter(candidate.reason for candidate in decided).most_common()),
        "dataset": str(path),
    }


def _uncalibrated(candidates: Sequence[Candidate], loaded: LoadedConfig) -> int:
    """Return how many candidates an automatic tau would be calibrated on, had B answered them."""
    calibration, judges = calibration_of(loaded), replace(criterion_of(loaded), name="none")
    if calibration is None or criterion_of(loaded).needs():
        return 0
    unasked = [y_f for c in candidates[:calibration] if c.y_b is None and (y_f := decidable(c)) is not None]
    return sum(may_keep(y_f, judges) for y_f in unasked)


def measure(run: RunDirectory, overrides: Sequence[str], *, progress: Progress = SILENT) -> dict[str, Any]:
    """Measure what a criterion needs on the run's candidates, and return how many were measured and their scores.

    Measures go to the ledger, a shard of the candidates at a time, and a repeated call goes on with the rest. The run's
    dataset stays; `reselect` decides.

    Raises:
        ConfigError: an override touches another section, or the criterion needs no measure.
        ResumeRefused: the seeds or the adapter are not those that the run was started with.
    """
    _only(overrides, ("criterion", "engine"), "measuring can only be given `criterion` and `engine` settings")
    with Ledger(run.ledger) as ledger:
        loaded = stored_config(run, ledger, overrides)
        criterion, candidates = criterion_of(loaded), ledger.candidates()
        if not criterion.needs():
            raise ConfigError(f"criterion {criterion.name} needs no measure: tuneshift reselect decides at once.")
        lacking = unmeasured(candidates, criterion, gated=False)
        inputs = read_inputs(loaded.config, folder=loaded.folder, trains=False)
        _check_source(run, ledger, inputs, "measures would not belong to its candidates")
        title = f"Measuring for {criterion.name}"
        with (
            open_instruments(loaded, inputs.seeds) as instruments,
            timed(ledger, "measure"),
            progress.stage(title, total=len(lacking), unit="candidates") as meter,
        ):
            measure_stored(ledger, criterion, instruments, meter.update)
        return {
            "criterion": criterion.name,
            "candidates": len(candidates),
            "measured": len(lacking),
            **_scores(ledger.candidates(), criterion),
        }


def _check_source(run: RunDirectory, ledger: Ledger, inputs: Inputs, otherwise: str) -> None:
    """Refuse seeds or an adapter that are not those that the run was started with."""
    own = {name: digest for name, digest in inputs.digests.items() if name in ("seeds", "source.adapter")}
    if other := changed_inputs(ledger, own):
        raise ResumeRefused(
            f"{run.path}: this run was started with other content in {', '.join(other)}, so {otherwise}. "
            "Restore the file."
        )


def _scores(candidates: Sequence[Candidate], criterion: Criterion) -> dict[str, Any]:
    """Return how many candidates have finite measures, and the quartiles of their scores, `None` for less than 2."""
    judged = [c for c in candidates if all(c.measures.get(name) is not None for name in criterion.needs())]
    graded = judged if criterion.rule.grade is not None else []
    scores = [score for candidate in graded if (score := score_of(candidate, criterion)) is not None]
    return {"judged": len(judged), "quartiles": statistics.quantiles(scores) if len(scores) > 1 else None}


def evaluate_again(
    run: RunDirectory, overrides: Sequence[str], *, progress: Progress = SILENT
) -> tuple[dict[str, Any], Path]:
    """Evaluate a trained run's arms on other questions; return the verdict and the folder that holds it.

    The run's own evidence stays as it is. Questions that the target was trained on are left out and counted.

    Raises:
        RunDirectoryError: the run has no trained adapter yet. ConfigError: an override touches another section.
        DataError: the target was trained on every question. ResumeRefused: the seeds or the adapter are others now.
    """
    if not run.training.exists():
        raise RunDirectoryError(f"{run.path}: the target is not trained yet. Finish `tuneshift transfer` first.")
    _only(overrides, ("evaluation",), "a trained run can only be given other `evaluation` settings")
    with Ledger(run.ledger) as ledger:
        loaded = stored_config(run, ledger, overrides)
        if loaded.config.evaluation is None:
            raise ConfigError(f"{run.path}: no questions are configured. Give --set evaluation.data=FILE.jsonl.")
        inputs = read_inputs(loaded.config, folder=loaded.folder, trains=False)
        _check_source(run, ledger, inputs, "F and B would not be this run's")
    template = loaded.config.prompt_template
    prompts = [row["prompt"] for row in read_rows(run.dataset)]
    trained = [form for prompt in prompts for form in (prompt, extract_text(prompt, template)) if form]
    asked = _untrained(inputs.items, trained, "evaluation.data", progress)
    regression = _untrained(inputs.regression, trained, "evaluation.regression.data", progress)
    examined = examination(loaded, replace(inputs, items=asked, regression=regression), run.adapter)
    folder = run.evaluations / examined.fingerprint()
    verdict = gather_evidence(folder, examined, progress=progress)
    verdict["excluded_questions"] = len(inputs.items) - len(asked)
    if examined.regression is not None:
        verdict["regression"]["excluded_questions"] = len(inputs.regression) - len(regression)
    write_json(folder / "verdict.json", verdict)
    return verdict, folder


def _untrained(items: Sequence[Item], trained: Sequence[str], setting: str, progress: Progress) -> list[Item]:
    """Return the questions that no prompt which the target was trained on gives away."""
    known = HeldOut(items).given_away_by(*trained)
    left = [item for item in items if item.id not in known]
    if items and not left:
        raise DataError(f"{setting}: the target was trained on every one of these questions. Give others.")
    if len(left) < len(items):
        progress.note(
            f"{setting}: {len(items) - len(left)} of {len(items)} are left out: the target was trained on them"
        )
    return left


def report_again(run: RunDirectory) -> None:
    """Write the report of a finished run again, with all that reads the verdict.

    Raises:
        RunDirectoryError: the run has no verdict yet.
    """
    if not run.verdict.is_file():
        raise RunDirectoryError(f"{run.path}: there is no verdict to report yet. Finish `tuneshift transfer` first.")
    with Ledger(run.ledger) as ledger:
        finish(run, ledger)


def _only(overrides: Sequence[str], sections: Sequence[str], why: str) -> None:
    wrong = [override for override in overrides if override.partition("=")[0].split(".")[0].strip() not in sections]
    if wrong:
        raise ConfigError(f"--set {wrong[0]}: {why}.")
