"""Gathering a run's evidence: the three arms answer the same items, and the verdict is written.

Each arm's outcomes are a file of their own, written whole, so a stopped evaluation goes on with the next arm.
"""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneshift.datafiles import Item
from tuneshift.engines.base import Engine
from tuneshift.evaluate.tasks import Metric, Outcome, answer_items
from tuneshift.evaluate.verdict import judge
from tuneshift.progress import SILENT, Progress
from tuneshift.run.directory import RunDirectory, jsonl, read_jsonl, write_atomically, write_json
from tuneshift.run.ledger import Ledger
from tuneshift.run.resume import timed


@dataclass(frozen=True)
class Questions:
    """What the arms are asked, how they may answer, and how answers are graded."""

    items: Sequence[Item]
    metric: Metric
    max_new_tokens: int
    stop: tuple[str, ...]


def gather_evidence(
    run: RunDirectory,
    ledger: Ledger,
    *,
    questions: Questions | None,
    open_target: Callable[[], Engine],
    open_source: Callable[[], Engine],
    criterion: str,
    target_size: int,
    seed: int,
    anew: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Evaluate the arms that have no outcomes yet, or all of them `anew`, and write and return the verdict.

    `open_target` loads T with the new adapter and `open_source` loads F; each is called only where it is needed.
    """
    if questions is None:
        verdict: dict[str, Any] = {
            "improved": None,
            "reason": "No evaluation is configured, so nothing was measured.",
            **dict.fromkeys(("before", "after", "source", "mcnemar_p", "recovery")),
        }
    else:
        with timed(ledger, "evaluate"):
            arms = {"before": (open_target, False), "after": (open_target, True), "source": (open_source, True)}
            outcomes = evaluate_arms(run, questions, arms, anew=anew, progress=progress)
        verdict = judge(before=outcomes["before"], after=outcomes["after"], source=outcomes["source"], seed=seed)
    verdict["criterion"] = criterion
    verdict |= what_it_took(ledger, target_size=target_size)
    write_json(run.verdict, verdict)
    return verdict


def evaluate_arms(
    run: RunDirectory,
    questions: Questions,
    arms: dict[str, tuple[Callable[[], Engine], bool]],
    *,
    anew: bool,
    progress: Progress,
) -> dict[str, list[Outcome]]:
    """Return each arm's outcomes; an arm is (how to open it, fine-tuned or not).

    An arm whose file exists is read from it, and each new one is written at once. `anew`, all are evaluated and the old
    files stay until the last arm is done.
    """
    opened: dict[Callable[[], Engine], Engine] = {}
    outcomes: dict[str, list[Outcome]] = {}
    total = len(arms) * len(questions.items)
    with progress.stage("Evaluation", total=total, unit="answers") as meter:
        for number, (arm, (open_engine, fine_tuned)) in enumerate(arms.items()):
            if not anew and _file(run, arm).exists():
                outcomes[arm] = _read(_file(run, arm))
            else:
                if open_engine not in opened:
                    _close(opened)
                    opened[open_engine] = open_engine()
                outcomes[arm] = answer_items(
                    opened[open_engine],
                    questions.items,
                    fine_tuned=fine_tuned,
                    metric=questions.metric,
                    max_new_tokens=questions.max_new_tokens,
                    stop=questions.stop,
                )
                if not anew:
                    _write(_file(run, arm), outcomes[arm])
            meter.update((number + 1) * len(questions.items), arm)
    _close(opened)
    if anew:
        run.manifest.unlink(missing_ok=True)
        for arm in arms:
            _write(_file(run, arm), outcomes[arm])
    return outcomes


def what_it_took(ledger: Ledger, *, target_size: int) -> dict[str, Any]:
    """Return counts, seconds by stage and peak memory for the verdict."""
    candidates = ledger.candidates()
    rounds = ledger.rounds()
    kept = sum(candidate.kept for candidate in candidates)
    return {
        "kept": kept,
        "trained_pairs": min(target_size, kept),
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


def _close(opened: dict[Callable[[], Engine], Engine]) -> None:
    for engine in opened.values():
        engine.close()
    opened.clear()


def _file(run: RunDirectory, arm: str) -> Path:
    return run.evaluation / f"{arm}.jsonl"


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    write_atomically(path, jsonl([asdict(outcome) for outcome in outcomes]))


def _read(path: Path) -> list[Outcome]:
    return [Outcome(**row) for row in read_jsonl(path)]
