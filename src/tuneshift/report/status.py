"""What `tuneshift show` tells of a run, finished or not, from its ledger alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tuneshift.console import clean
from tuneshift.coverage import coverage
from tuneshift.dataset import read_rows
from tuneshift.report.coverage import cluster_rows, coverage_sentences
from tuneshift.report.decomposition import decomposition, decomposition_rows, decomposition_title
from tuneshift.run.directory import RunDirectory, read_json
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate, Response
from tuneshift.run.stored import counts_eos
from tuneshift.run.watching import by_stage, phase


def run_status(path: Path, *, examples: int) -> dict[str, Any]:
    """Return the phase, counts by reason, seconds by stage and the newest candidates of each outcome."""
    run = RunDirectory.existing(path)
    with Ledger(run.ledger, read_only=True) as ledger:
        candidates, rounds, calls = ledger.candidates(), ledger.rounds(), ledger.calls()
        stop, seconds, count_eos = ledger.meta("stop_reason"), ledger.seconds(), counts_eos(ledger)
        probes = ledger.probes()
    newest: dict[str, list[dict[str, Any]]] = {}
    for candidate in reversed(candidates):
        shown = newest.setdefault(candidate.reason, [])
        if len(shown) < examples:
            shown.append(_example(candidate, count_eos))
    verdict = read_json(run.verdict) if run.verdict.exists() else None
    learnt = {row["id"] for row in read_rows(run.dataset)} if run.dataset.exists() else None
    return {
        "run": str(path),
        "phase": phase(run, stop),
        "rounds": len(rounds),
        "candidates": len(candidates),
        "kept": sum(candidate.kept for candidate in candidates),
        "stop_reason": stop,
        "reasons": dict(Counter(candidate.reason for candidate in candidates).most_common()),
        "coverage": coverage(candidates, calls, learnt, probes),
        "expected_margin": decomposition(candidates, rounds),
        "seconds": seconds,
        "improved": verdict["improved"] if verdict else None,
        "examples": newest,
    }


def status_lines(status: dict[str, Any]) -> list[str]:
    """Return the status for a terminal."""
    lines = [
        f"{status['run']}: {status['phase']}",
        f"{status['kept']} kept of {status['candidates']} candidates in {status['rounds']} rounds",
        *(f"  {count:6d}  {reason}" for reason, count in status["reasons"].items()),
        "seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in by_stage(status["seconds"]).items()),
    ]
    if (covered := status["coverage"]) is not None:
        lines += ["coverage:", *(f"  {sentence}" for sentence in coverage_sentences(covered))]
        lines += [f"  {count:>6}  {skeleton}" for skeleton, count, _ in cluster_rows(covered)]
    if (found := status["expected_margin"]) is not None:
        lines.append(f"expected margin (paper, eq. 8), {decomposition_title(found)}:")
        lines += [f"  {mean:>8} +- {error}  {label}" for label, mean, error in decomposition_rows(found)]
    for reason, examples in status["examples"].items():
        lines.append(f"newest, {reason}:")
        for example in examples:
            lines.append(f"  {example['text']!r}")
            lines += [
                f"      {role}: {example[role]['text']!r}  PPL_F {_number(example[role]['perplexity'])}"
                for role in ("y_f", "y_b")
                if example[role] is not None
            ]
            if example["measures"]:
                shown = ", ".join(f"{name} {_number(value)}" for name, value in example["measures"].items())
                lines.append(f"      {shown}")
    return [clean(line) for line in lines]


def _example(candidate: Candidate, count_eos: bool) -> dict[str, Any]:
    return {
        "id": candidate.id,
        "text": candidate.text,
        "y_f": _response(candidate.y_f, count_eos),
        "y_b": _response(candidate.y_b, count_eos),
        "measures": dict(candidate.measures),
    }


def _response(response: Response | None, count_eos: bool) -> dict[str, Any] | None:
    """Return a response's text and perplexity."""
    if response is None:
        return None
    return {"text": response.text, "perplexity": response.finite_perplexity(count_eos=count_eos)}


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
