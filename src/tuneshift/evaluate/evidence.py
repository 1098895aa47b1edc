"""Gathering evidence: the arms answer the same items.

Each arm's outcomes are a file of their own, written whole, so a stopped evaluation goes on with the next arm;
`asked.json` holds the fingerprint of what each arm was asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tuneshift.datafiles import Item
from tuneshift.engines.base import Engine
from tuneshift.evaluate.tasks import Outcome
from tuneshift.evaluate.verdict import ARMS, judge, judge_regression
from tuneshift.progress import SILENT, Progress
from tuneshift.run.directory import jsonl, read_json, read_jsonl, write_atomically, write_json


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
        """Return what changes when an outcome could change: the questions and the metric's code included.

        Where an item stands, and by what else it would be known, changes no outcome.
        """
        items = [asdict(item) | {"place": ""} for item in self.items]
        for item in items:
            del item["bare"]
        relevant = [items, {**self.described, "data": ""}]
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Regression:
    """Questions on something else, and the loss of accuracy on them, as a fraction, that would matter."""

    questions: Questions
    margin: float


@dataclass(frozen=True)
class Examination:
    """What is asked, and whom.

    `open_target` loads T with the new adapter and `open_source` loads F with B; each is called only where it is
    needed. T before and after also answer the questions of `regression`. `seed` is the bootstrap's.
    """

    questions: Questions | None
    regression: Regression | None
    open_target: Callable[[], Engine]
    open_source: Callable[[], Engine]
    seed: int

    def fingerprint(self) -> str:
        """Return what changes when an outcome could change, for a folder's name."""
        asked = [self.questions, self.regression.questions if self.regression else None]
        return "-".join(questions.fingerprint() for questions in asked if questions is not None)


def gather_evidence(folder: Path, examination: Examination, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Evaluate the arms that have no outcomes in `folder` yet, and return the verdict on them.

    Outcomes that answer other questions, or were graded otherwise, are measured anew.
    """
    questions, regression = examination.questions, examination.regression
    if questions is None:
        return {
            "improved": None,
            "reason": "No evaluation is configured, so nothing was measured.",
            **dict.fromkeys((*ARMS, "mcnemar_p", "recovery", "chance", "regression", "questions")),
        }
    arms = {"before": (examination.open_target, False), "after": (examination.open_target, True)}
    elsewhere = {f"regression_{arm}": regression.questions for arm in arms} if regression else {}
    arms |= {name: arms[name.removeprefix("regression_")] for name in elsewhere}
    arms |= {"source": (examination.open_source, True), "base": (examination.open_source, False)}
    outcomes = evaluate_arms(folder, questions, arms, progress, elsewhere=elsewhere)
    judged = judge(**{arm: outcomes[arm] for arm in ARMS}, seed=examination.seed)
    verdict = {**judged, **_described(questions)}
    if regression is None:
        return verdict | {"regression": None, "regression_reason": "no evaluation.regression is configured"}
    before, after = (outcomes[name] for name in elsewhere)
    elsewhere_judged = judge_regression(before=before, after=after, margin=regression.margin, seed=examination.seed)
    return verdict | {"regression": {**elsewhere_judged, **_described(regression.questions)}}


def _described(questions: Questions) -> dict[str, Any]:
    return {"chance": questions.chance, "chance_reason": questions.chance_reason, "questions": questions.described}


def evaluate_arms(
    folder: Path,
    questions: Questions,
    arms: dict[str, tuple[Callable[[], Engine], bool]],
    progress: Progress,
    *,
    elsewhere: Mapping[str, Questions] | None = None,
) -> dict[str, list[Outcome]]:
    """Return each arm's outcomes, from its file where there is one; an arm is (how to open it, fine-tuned or not).

    An arm that is named in `elsewhere` answers those questions instead.
    """
    opened: dict[Callable[[], Engine], Engine] = {}
    asked = {arm: (elsewhere or {}).get(arm, questions) for arm in arms}
    if stale := _drop_stale(folder, {arm: one.fingerprint() for arm, one in asked.items()}):
        progress.note(f"The questions or their grading have changed; measured anew: {', '.join(stale)}")
    total, done = sum(len(one.items) for one in asked.values()), 0
    with progress.stage("Evaluation", total=total, unit="answers") as meter, ExitStack() as end:
        end.callback(_close, opened)
        for arm, (open_engine, fine_tuned) in arms.items():
            if not _file(folder, arm).exists():
                if open_engine not in opened:
                    _close(opened)
                    opened[open_engine] = open_engine()
                outcomes = asked[arm].ask(opened[open_engine], asked[arm].items, fine_tuned=fine_tuned)
                write_atomically(_file(folder, arm), jsonl([asdict(outcome) for outcome in outcomes]))
            done += len(asked[arm].items)
            meter.update(done, arm)
    return {arm: [Outcome(**row) for row in read_jsonl(_file(folder, arm))] for arm in arms}


def _drop_stale(folder: Path, asked: dict[str, str]) -> list[str]:
    """Drop the outcomes of arms that were asked otherwise, write down what is asked now, and return those arms."""
    path = folder / "asked.json"
    before = read_json(path) if path.exists() else {}
    stale = [arm for arm in asked if before.get(arm) != asked[arm] and _file(folder, arm).exists()]
    for arm in stale:
        _file(folder, arm).unlink()
    write_json(path, asked)
    return stale


def _close(opened: dict[Callable[[], Engine], Engine]) -> None:
    for engine in opened.values():
        engine.close()
    opened.clear()


def _file(folder: Path, arm: str) -> Path:
    return folder / f"{arm}.jsonl"
