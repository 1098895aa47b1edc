"""Which outcomes of a stopped evaluation are used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_study import Notes

from tuneshift.datafiles import Item
from tuneshift.engines.base import Engine
from tuneshift.evaluate.evidence import Questions, evaluate_arms
from tuneshift.evaluate.tasks import Outcome
from tuneshift.run.directory import read_json, read_jsonl

ITEMS = [Item("e0", "f:1", "what is it", "a"), Item("e1", "f:2", "and that", "b")]


class Examiner:
    """Answers every question with `answer`, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer = "a"

    def __call__(self, engine: Engine, items: Sequence[Item], *, fine_tuned: bool) -> list[Outcome]:
        self.asked += 1
        return [Outcome(item.id, self.answer, self.answer == item.reference, "stop") for item in items]


class Model:
    def close(self) -> None:
        pass


def questions(ask: Examiner) -> Questions:
    return Questions(ITEMS, ask, {"data": "f", "metric": "own.metric", "metric_sha256": "1"}, None, "free")


def examined(folder: Path, asked: Questions, notes: Notes | None = None) -> dict[str, list[Outcome]]:
    arms: dict[str, Any] = {"before": (Model, False), "after": (Model, True)}
    return evaluate_arms(folder, asked, arms, notes or Notes())


def test_outcomes_are_used_again_for_the_same_questions(tmp_path: Path) -> None:
    ask, notes = Examiner(), Notes()
    first = examined(tmp_path, questions(ask))
    (tmp_path / "after.jsonl").unlink()  # as when the evaluation was stopped before its last arm
    assert examined(tmp_path, questions(ask), notes) == first
    assert ask.asked == 3
    assert notes.said == []


@pytest.mark.parametrize(
    "change",
    [
        {"described": {"data": "f", "metric": "own.metric", "metric_sha256": "2"}},
        {"items": [replace(ITEMS[0], reference="c"), ITEMS[1]]},
        {"items": [replace(ITEMS[0], prompt="what was it"), ITEMS[1]]},
    ],
    ids=["the metric's module", "a reference", "a prompt"],
)
def test_outcomes_that_were_asked_or_graded_otherwise_are_measured_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    ask, notes = Examiner(), Notes()
    examined(tmp_path, questions(ask))
    ask.answer = "c"
    found = examined(tmp_path, replace(questions(ask), **change), notes)
    assert ask.asked == 4
    assert [outcome.response for arm in found.values() for outcome in arm] == ["c"] * 4
    assert [row["response"] for row in read_jsonl(tmp_path / "before.jsonl")] == ["c"] * 2
    assert notes.said == ["The questions or their grading have changed; measured anew: before, after"]


def test_where_the_questions_lie_changes_nothing(tmp_path: Path) -> None:
    ask = Examiner()
    examined(tmp_path, questions(ask))
    moved = [replace(item, place=f"elsewhere:{item.id}", bare=("it",)) for item in ITEMS]
    described = {**questions(ask).described, "data": "elsewhere"}
    examined(tmp_path, replace(questions(ask), items=moved, described=described))
    assert ask.asked == 2


def test_an_arm_that_is_asked_something_else_has_its_own_fingerprint(tmp_path: Path) -> None:
    ask = Examiner()
    other = replace(questions(ask), items=ITEMS[:1])
    arms: dict[str, Any] = {"before": (Model, False), "regression_before": (Model, False)}
    for _ in range(2):
        evaluate_arms(tmp_path, questions(ask), arms, Notes(), elsewhere={"regression_before": other})
    assert ask.asked == 2
    asked = read_json(tmp_path / "asked.json")
    assert asked == {"before": questions(ask).fingerprint(), "regression_before": other.fingerprint()}
    more = replace(other, items=[replace(ITEMS[0], prompt="else")])
    evaluate_arms(tmp_path, questions(ask), arms, Notes(), elsewhere={"regression_before": more})
    assert ask.asked == 3
