"""Gathering evidence: the three arms answer the same items.

Each arm's outcomes are a file of their own, written whole, so a stopped evaluation goes on with the next arm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneshift.datafiles import Item
from tuneshift.engines.base import Engine
from tuneshift.evaluate.tasks import Metric, Outcome, answer_items
from tuneshift.evaluate.verdict import judge
from tuneshift.progress import SILENT, Progress
from tuneshift.run.directory import jsonl, read_jsonl, write_atomically


@dataclass(frozen=True)
class Questions:
    """What the arms are asked, how they may answer, and how answers are graded.

    `described` says the same for the verdict: data, its sha256, metric, limits.
    """

    items: Sequence[Item]
    metric: Metric
    max_new_tokens: int
    stop: tuple[str, ...]
    described: dict[str, Any]

    def fingerprint(self) -> str:
        """Return what changes when an outcome could change: the questions and the metric's code included."""
        relevant = [[asdict(item) | {"place": ""} for item in self.items], {**self.described, "data": ""}]
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


def gather_evidence(
    folder: Path,
    *,
    questions: Questions | None,
    open_target: Callable[[], Engine],
    open_source: Callable[[], Engine],
    seed: int,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Evaluate the arms that have no outcomes in `folder` yet, and return the verdict on them.

    `open_target` loads T with the new adapter and `open_source` loads F; each is called only where it is needed.
    """
    if questions is None:
        return {
            "improved": None,
            "reason": "No evaluation is configured, so nothing was measured.",
            **dict.fromkeys(("before", "after", "source", "mcnemar_p", "recovery", "questions")),
        }
    arms = {"before": (open_target, False), "after": (open_target, True), "source": (open_source, True)}
    outcomes = evaluate_arms(folder, questions, arms, progress)
    return {**judge(**outcomes, seed=seed), "questions": questions.described}


def evaluate_arms(
    folder: Path,
    questions: Questions,
    arms: dict[str, tuple[Callable[[], Engine], bool]],
    progress: Progress,
) -> dict[str, list[Outcome]]:
    """Return each arm's outcomes, from its file where there is one; an arm is (how to open it, fine-tuned or not)."""
    opened: dict[Callable[[], Engine], Engine] = {}
    total = len(arms) * len(questions.items)
    with progress.stage("Evaluation", total=total, unit="answers") as meter, ExitStack() as end:
        end.callback(_close, opened)
        for number, (arm, (open_engine, fine_tuned)) in enumerate(arms.items()):
            if not _file(folder, arm).exists():
                if open_engine not in opened:
                    _close(opened)
                    opened[open_engine] = open_engine()
                outcomes = answer_items(
                    opened[open_engine],
                    questions.items,
                    fine_tuned=fine_tuned,
                    metric=questions.metric,
                    max_new_tokens=questions.max_new_tokens,
                    stop=questions.stop,
                )
                write_atomically(_file(folder, arm), jsonl([asdict(outcome) for outcome in outcomes]))
            meter.update((number + 1) * len(questions.items), arm)
    return {arm: [Outcome(**row) for row in read_jsonl(_file(folder, arm))] for arm in arms}


def _close(opened: dict[Callable[[], Engine], Engine]) -> None:
    for engine in opened.values():
        engine.close()
    opened.clear()


def _file(folder: Path, arm: str) -> Path:
    return folder / f"{arm}.jsonl"
