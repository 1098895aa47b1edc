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
from typing import Any, Protocol

from tuneshift.datafiles import Item
from tuneshift.engines.base import Engine
from tuneshift.evaluate.tasks import Outcome
from tuneshift.evaluate.verdict import judge
from tuneshift.progress import SILENT, Progress
from tuneshift.run.directory import jsonl, read_jsonl, write_atomically


class Ask(Protocol):
    """Lets a model answer items, and grades the answers."""

    def __call__(self, engine: Engine, items: Sequence[Item], *, fine_tuned: bool) -> list[Outcome]:
        """Return one outcome an item, in order."""


@dataclass(frozen=True)
class Questions:
    """What the arms are asked, and how they are asked and graded.

    `described` says the same for the verdict: data, its sha256, metric, limits. `chance` is the share right of
    guessing; where there is none, `chance_reason` says why.
    """

    items: Sequence[Item]
    ask: Ask
    described: dict[str, Any]
    chance: float | None
    chance_reason: str | None

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
            **dict.fromkeys(("before", "after", "source", "mcnemar_p", "recovery", "chance", "questions")),
        }
    arms = {"before": (open_target, False), "after": (open_target, True), "source": (open_source, True)}
    outcomes = evaluate_arms(folder, questions, arms, progress)
    chance = {"chance": questions.chance, "chance_reason": questions.chance_reason}
    return {**judge(**outcomes, seed=seed), **chance, "questions": questions.described}


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
                outcomes = questions.ask(opened[open_engine], questions.items, fine_tuned=fine_tuned)
                write_atomically(_file(folder, arm), jsonl([asdict(outcome) for outcome in outcomes]))
            meter.update((number + 1) * len(questions.items), arm)
    return {arm: [Outcome(**row) for row in read_jsonl(_file(folder, arm))] for arm in arms}


def _close(opened: dict[Callable[[], Engine], Engine]) -> None:
    for engine in opened.values():
        engine.close()
    opened.clear()


def _file(folder: Path, arm: str) -> Path:
    return folder / f"{arm}.jsonl"
