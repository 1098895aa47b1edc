"""What a plan bills: by a clock that only the work moves which the test is about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, make_tokenizer, write_project

from tuneshift import plan
from tuneshift.config import load_config
from tuneshift.datafiles import Item
from tuneshift.encoding import Reader
from tuneshift.evaluate.evidence import Questions, Regression
from tuneshift.evaluate.tasks import Outcome
from tuneshift.pipeline import Synthesis
from tuneshift.plan import _evaluation_seconds
from tuneshift.run.ledger import Ledger

LONG = "play " * 200


class Clock:
    """A clock that stands still but for what answers take."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class F:
    reader = Reader(make_tokenizer(44, bos=False), 256, 44)


def questions(clock: Clock, prompts: Sequence[str], *, seconds: float, limit: int) -> Questions:
    def ask(engine: Any, items: Sequence[Item], *, fine_tuned: bool) -> list[Outcome]:
        assert fine_tuned
        assert len(items) <= plan.PROBE
        assert all(item.prompt != LONG for item in items)
        clock.now += seconds * len(items)
        return [Outcome(item.id, "", False, "stop") for item in items]

    items = [Item(f"e{number}", f"f:{number}", prompt, "x") for number, prompt in enumerate(prompts)]
    return Questions(items, ask, {"max_new_tokens": limit}, None, "free")


def estimated(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, main: Questions | None, other: Questions | None = None
) -> dict[str, Any]:
    monkeypatch.setattr(plan, "time", clock)
    monkeypatch.setattr(plan, "evaluation_questions", lambda loaded, inputs: main)
    monkeypatch.setattr(plan, "regression_of", lambda loaded, inputs: other and Regression(other, 0.02))
    return _evaluation_seconds(None, None, F())  # type: ignore[arg-type]


def test_each_set_of_questions_is_billed_at_its_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    main = questions(clock, ["play"] * 30, seconds=1, limit=8)
    other = questions(clock, ["book a table"] * 50, seconds=10, limit=200)
    found = estimated(monkeypatch, clock, main, other)
    assert found == {"evaluation_seconds": 30 * 1 * 4 + 50 * 10 * 2, "evaluation_reason": None}
    assert estimated(monkeypatch, clock, main)["evaluation_seconds"] == 30 * 4


def test_regression_questions_that_f_cannot_read_are_billed_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    main = questions(clock, ["play"] * 2, seconds=1, limit=8)
    other = questions(clock, [LONG, "play", LONG], seconds=10, limit=8)
    assert estimated(monkeypatch, clock, main, other)["evaluation_seconds"] == 2 * 4 + 3 * 10 * 2
    unreadable = questions(clock, [LONG], seconds=10, limit=8)
    found = estimated(monkeypatch, clock, main, unreadable)
    reason = "F can read none of the regression questions"
    assert found == {"evaluation_seconds": None, "evaluation_reason": reason}


def test_without_questions_there_is_nothing_to_bill(monkeypatch: pytest.MonkeyPatch) -> None:
    found = estimated(monkeypatch, Clock(), None)
    assert found == {"evaluation_seconds": None, "evaluation_reason": "no questions"}


def test_single_words_are_billed_once_and_candidates_as_many_as_are_needed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, probe, rounds = Clock(), Synthesis.probe, Synthesis.round

    def slow_probe(self: Synthesis, ledger: Ledger) -> None:
        clock.now += 100 if ledger.probes() is None else 0
        probe(self, ledger)

    def slow_round(self: Synthesis, *arguments: Any) -> Any:
        clock.now += 10
        return rounds(self, *arguments)

    monkeypatch.setattr(plan, "time", clock)
    monkeypatch.setattr(Synthesis, "probe", slow_probe)
    monkeypatch.setattr(Synthesis, "round", slow_round)
    synthesis = {"preset": "tuneshift", "target_size": 50, "oversample": 2, "probes": 8}
    project = write_project(tmp_path, tiny, synthesis=synthesis, criterion="none", evaluation=None)
    found = plan.plan(load_config(project))
    assert (found["probe"]["candidates"], found["probe"]["seconds"]) == (20, 10)  # four calls of five, in one round
    assert found["candidates_needed"] >= 100
    assert found["synthesis_seconds"] == 100 + 10 / found["probe"]["candidates"] * found["candidates_needed"]
