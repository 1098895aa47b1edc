"""Gathering a run's evidence: the three arms answer the same items, and the verdict is written.

Each arm's outcomes are a file of their own, written whole, so a stopped evaluation goes on with the next arm.
"""

from __future__ import annotations

import json
import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuneshift.config import LoadedConfig
from tuneshift.datafiles import Item
from tuneshift.engines.base import Engine
from tuneshift.engines.hf import HfEngine
from tuneshift.errors import ConfigError, RunDirectoryError
from tuneshift.evaluate.tasks import Outcome, answer_items, find_metric
from tuneshift.evaluate.verdict import judge
from tuneshift.models import resolve_model
from tuneshift.preflight import Inputs, read_inputs
from tuneshift.progress import Progress
from tuneshift.report.markdown import write_report
from tuneshift.run.directory import RunDirectory, jsonl, write_atomically, write_json
from tuneshift.run.ledger import Ledger
from tuneshift.run.manifest import write_manifest
from tuneshift.run.resume import timed
from tuneshift.run.stored import stored_config
from tuneshift.wiring import load_options, open_run_source


def gather_evidence(
    loaded: LoadedConfig, run: RunDirectory, inputs: Inputs, ledger: Ledger, progress: Progress
) -> dict[str, Any]:
    """Evaluate the arms that have no outcomes yet, and write and return the verdict."""
    if loaded.config.evaluation is None:
        reason = "evaluation is not configured, so nothing was measured"
        verdict: dict[str, Any] = {"improved": None, "reason": reason}
        verdict |= dict.fromkeys(("before", "after", "source", "mcnemar_p", "recovery"))
    else:
        with timed(ledger, "evaluate"):
            outcomes = evaluate_arms(loaded, run, inputs, progress)
        verdict = judge(**outcomes, seed=loaded.config.run.seed)
    verdict |= what_it_took(ledger)
    write_json(run.verdict, verdict)
    return verdict


def evaluate_again(run: RunDirectory, overrides: Sequence[str], *, progress: Progress) -> dict[str, Any]:
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
        for path in run.evaluation.glob("*.jsonl"):
            path.unlink()
        verdict = gather_evidence(loaded, run, inputs, ledger, progress)
        write_report(run, ledger)
        write_manifest(run, ledger)
    return verdict


def evaluate_arms(
    loaded: LoadedConfig, run: RunDirectory, inputs: Inputs, progress: Progress
) -> dict[str, list[Outcome]]:
    """Return the outcomes of T before, T after and F, from their files where these exist."""
    missing = [arm for arm in ("before", "after", "source") if not _file(run, arm).exists()]
    if "before" in missing or "after" in missing:
        progress.note(f"Evaluating the target before and after: {len(inputs.items)} items each")
        engine = HfEngine.open(resolve_model(loaded.config.target.model), load=load_options(loaded))
        engine.attach(str(run.adapter))
        for arm in ("before", "after"):
            if arm in missing:
                _evaluate(loaded, run, arm, inputs.items, engine, fine_tuned=arm == "after")
        engine.close()
    if "source" in missing:
        progress.note(f"Evaluating the source: {len(inputs.items)} items")
        source = open_run_source(loaded, inputs.seeds)
        _evaluate(loaded, run, "source", inputs.items, source.engine, fine_tuned=True)
        source.close()
    return {arm: _read(_file(run, arm)) for arm in ("before", "after", "source")}


def what_it_took(ledger: Ledger) -> dict[str, Any]:
    """Return counts, seconds by stage and peak memory for the verdict."""
    candidates = ledger.candidates()
    rounds = ledger.rounds()
    return {
        "kept": sum(candidate.kept for candidate in candidates),
        "candidates": len(candidates),
        "reasons": dict(Counter(candidate.reason for candidate in candidates).most_common()),
        "rounds": len(rounds),
        "tau": rounds[-1].tau if rounds else None,
        "stop_reason": ledger.meta("stop_reason"),
        "seconds": {"synthesis": sum(entry.seconds for entry in rounds), **ledger.seconds()},
        **peak_memory(),
    }


def peak_memory() -> dict[str, int | None]:
    """Return this process's largest resident set, and its largest CUDA allocation (`None` without CUDA), in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in KiB on Linux
    torch = sys.modules.get("torch")
    cuda = torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else None
    return {
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_cuda_memory_bytes": cuda,
    }


def _evaluate(
    loaded: LoadedConfig,
    run: RunDirectory,
    arm: str,
    items: Sequence[Item],
    engine: Engine,
    *,
    fine_tuned: bool,
) -> None:
    section = loaded.config.evaluation
    assert section is not None, "arms are evaluated only where an evaluation is configured"
    synthesis = loaded.config.synthesis
    outcomes = answer_items(
        engine,
        items,
        fine_tuned=fine_tuned,
        metric=find_metric(section.metric, pattern=section.pattern, folder=loaded.folder),
        max_new_tokens=section.max_new_tokens or synthesis.max_new_tokens,
        stop=synthesis.stop if section.stop is None else section.stop,
    )
    write_atomically(_file(run, arm), jsonl([asdict(outcome) for outcome in outcomes]))


def _file(run: RunDirectory, arm: str) -> Path:
    return run.evaluation / f"{arm}.jsonl"


def _read(path: Path) -> list[Outcome]:
    parse: Callable[[str], dict[str, Any]] = json.loads
    return [Outcome(**parse(line)) for line in path.read_text(encoding="utf-8").splitlines()]
