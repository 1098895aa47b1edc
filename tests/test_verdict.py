"""The verdict that is made from the arms' outcomes, and how it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuneshift.evaluate.stats import minimum_detectable_difference
from tuneshift.evaluate.tasks import Outcome
from tuneshift.evaluate.verdict import (
    detectable_gains,
    detectable_sentence,
    judge,
    judge_regression,
    points,
    points_with_interval,
    sentence,
)
from tuneshift.report.markdown import accuracy_rows, accuracy_section, regression_line

ROOT = Path(__file__).parents[1]


def outcomes(flags: str) -> list[Outcome]:
    return [Outcome(str(n), "", flag == "1", "stop") for n, flag in enumerate(flags)]


def judged(before: str, after: str, source: str, base: str | None = None) -> dict[str, Any]:
    found = judge(
        before=outcomes(before),
        after=outcomes(after),
        source=outcomes(source),
        base=outcomes(base or "0" * len(before)),
    )
    return {**found, "chance": None, "regression": None}


def regressed(before: str, after: str, margin: float = 0.02) -> dict[str, Any]:
    return judge_regression(before=outcomes(before), after=outcomes(after), margin=margin)


# The claim


def test_an_improvement_is_claimed_only_when_the_exact_test_rejects() -> None:
    few = judged("0" * 10, "1" * 5 + "0" * 5, "1" * 10)
    assert few["mcnemar_p"] == pytest.approx(2 * 0.5**5)  # five discordant pairs, all one way
    assert few["mcnemar_mid_p"] == pytest.approx(0.5**5)
    assert few["improved"] is False
    assert few["recovery"] == 0.5
    more = judged("0" * 10, "1" * 6 + "0" * 4, "1" * 10)
    assert more["mcnemar_p"] == pytest.approx(2 * 0.5**6)
    assert more["improved"] is True
    assert "improved from 0 to 6 of 10" in sentence(more)


def test_a_significant_loss_is_no_improvement() -> None:
    verdict = judged("1" * 10, "0" * 10, "1" * 10)
    assert verdict["mcnemar_p"] < 0.01
    assert verdict["improved"] is False
    assert sentence(verdict).startswith("No improvement shown")


def test_recovery_is_null_with_a_reason_when_the_source_is_no_better() -> None:
    verdict = judged("11", "11", "10")
    assert verdict["recovery"] is None
    assert verdict["recovery_reason"]
    assert verdict["minimum_detectable_difference"] is None
    assert verdict["minimum_detectable_reason"] == "no answer changed"


def test_so_few_changed_answers_that_no_gain_could_be_shown_are_told_in_place_of_a_gain() -> None:
    """One of 50 answers changed: 2.8 sqrt(0.02 / 50) is 5.6 points, more than the 2 points that changed at all."""
    few = judged("0" * 50, "1" + "0" * 49, "1" * 50)
    assert few["minimum_detectable_difference"] is None
    assert few["minimum_detectable_reason"] == "where 2.0% of the answers change, 50 items can show none"
    shown = accuracy_section({**few, "questions": {"metric": "exact_match"}})
    assert "changed answers: n/a (where 2.0% of the answers change, 50 items can show none)." in shown
    enough = judged("0" * 50, "1" * 10 + "0" * 40, "1" * 50)
    assert enough["minimum_detectable_difference"] == pytest.approx(minimum_detectable_difference(50, 0.2))
    assert enough["minimum_detectable_reason"] is None


# What was lost


def test_negative_flips_are_counted_with_rates_and_intervals() -> None:
    verdict = judged("1100", "0110", "1111")
    lost, missing = verdict["negative_flips"]["before"], verdict["negative_flips"]["source"]
    assert (lost["items"], lost["were_right"], lost["n"], lost["rate"]) == (1, 2, 4, 0.25)
    assert (missing["items"], missing["were_right"], missing["rate"]) == (2, 4, 0.5)
    assert lost["interval"]["low"] < 0.25 < lost["interval"]["high"]
    assert verdict["lost_items"] == 1
    assert "of 2 items that the target had right before, 1 are wrong after; of all 4 that is 25.0%" in accuracy_section(
        verdict
    )


def test_a_regression_that_is_ruled_out_is_shown_and_said_nowhere() -> None:
    found = regressed("1" * 200, "1" * 200)
    assert (found["non_inferior"], found["non_inferior_reason"]) == (True, None)
    assert found["lower_bound"] > -0.02
    assert "a loss of 2 points is ruled out" in regression_line(found)
    assert "regression" not in sentence({**judged("0" * 9, "1" * 9, "1" * 9), "regression": found})


def test_a_loss_beyond_the_margin_is_said_and_leaves_the_claim() -> None:
    found = regressed("1" * 100, "0" * 10 + "1" * 90)
    verdict = {**judged("0" * 9, "1" * 9, "1" * 9), "regression": found}
    assert found["non_inferior"] is False
    assert found["negative_flips"]["items"] == 10
    assert verdict["improved"] is True
    assert sentence(verdict).endswith(
        "On the regression questions it lost more than the margin of 2 points: -10.0 points."
    )


def test_too_few_regression_questions_decide_nothing_and_say_so() -> None:
    found = regressed("1" * 50, "1" * 50)
    assert found["non_inferior"] is None
    assert found["non_inferior_reason"] == "50 questions do not rule out a loss of 2 points"
    assert regressed("1" * 50, "1" * 49 + "0")["non_inferior"] is None  # a loss of the margin itself is no more than it
    assert "is not ruled out" in regression_line(found)
    assert regressed("1" * 100, "0" * 5 + "1" * 95)["non_inferior"] is None  # 5 points lost, but 1 would do as well


# How it is told


@pytest.mark.parametrize(
    ("difference", "n", "told"),
    [
        (0.0, 200, "0"),
        (0.0013, 200, "0 (below one item)"),
        (-0.0049, 200, "0 (below one item)"),
        (0.005, 200, "+0.5 points"),
        (1 / 3 - 1 / 3 * 2, 3, "-33.3 points"),
        (-0.05, 200, "-5.0 points"),
    ],
)
def test_differences_below_one_item_are_told_as_zero(difference: float, n: int, told: str) -> None:
    assert points(difference, n) == told


def test_a_difference_is_told_with_its_interval() -> None:
    interval = {"low": -0.0123, "high": 0.02, "level": 0.95}
    assert points_with_interval(0.0013, interval, 200) == "0 (below one item), 95 % interval -1.2 to +2.0"


def test_what_questions_can_show_is_told_before_they_are_asked() -> None:
    assert [found["gain"] for found in detectable_gains(200)] == [
        pytest.approx(minimum_detectable_difference(200, share)) for share in (0.2, 0.5)
    ]
    assert "200 questions show gains from 8.9 points up if 20% of the answers change" in detectable_sentence(200)
    assert "no gain if 20% of the answers change, gains from 44.3 points" in detectable_sentence(20)
    assert detectable_gains(5) == [{"discordant": 0.2, "gain": None}, {"discordant": 0.5, "gain": None}]


def test_an_answer_that_is_not_above_chance_is_said() -> None:
    verdict = judged("0" * 40, "1" * 10 + "0" * 30, "1" * 40)
    assert verdict["improved"] is True
    assert "above chance" not in sentence(verdict)
    assert sentence({**verdict, "chance": 0.25}).endswith("It is not shown to be above chance, 25.0%.")
    assert "above chance" not in sentence({**verdict, "chance": 0.1})
    assert accuracy_rows({**verdict, "chance": 0.25})[0] == ["Chance", "", "25.0%", "", ""]
    assert [row[0] for row in accuracy_rows({**verdict, "chance": None})] == [
        "Source's base",
        "Source, fine-tuned",
        "Target before",
        "Target after",
    ]
