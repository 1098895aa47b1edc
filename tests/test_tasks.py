"""Metrics, and the verdict that is made from their outcomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneshift.errors import ConfigError
from tuneshift.evaluate.tasks import Outcome, find_metric
from tuneshift.evaluate.verdict import judge, sentence


@pytest.mark.parametrize(
    ("name", "pattern", "response", "reference", "right"),
    [
        ("exact_match", None, " PlayMusic", "PlayMusic", True),
        ("exact_match", None, "playmusic", "PlayMusic", False),
        ("normalized_match", None, "  The answer, is: 42!", "the answer is 42", True),
        ("normalized_match", None, "the answer is 43", "the answer is 42", False),
        ("normalized_match", None, "-5", "5", False),
        ("normalized_match", None, "C++", "C#", False),
        ("normalized_match", None, "a < b", "a > b", False),
        ("normalized_match", None, "5 * 3", "5 / 3", False),
        ("normalized_match", None, "well-known", "well known", True),
        ("numeric", None, "so 3 + 4 = 7 apples", "#### 7", True),
        ("numeric", None, "1,234.50", "1234.5", True),
        ("numeric", None, "-7", "7", False),
        ("numeric", None, "no number", "no number", False),
        ("regex", r"#### (-?\d+)", "first #### 3 then #### 4", "4", True),
        ("regex", r"\d+", "a 12 b 13", "13", True),
        ("regex", r"answer: (\d+)|#### (\d+)", "#### 42", "42", True),
        ("regex", r"#### (\d+)", "nothing", "nothing", False),
    ],
)
def test_metrics(name: str, pattern: str | None, response: str, reference: str, right: bool) -> None:
    assert find_metric(name, pattern=pattern)(response, reference) is right


def test_a_dotted_path_finds_a_function_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "own_metric_for_test.py").write_text(
        "def starts(response, reference):\n    return response[0] == reference[0]\n"
    )
    assert find_metric("own_metric_for_test.starts", folder=tmp_path)("ab", "ac")


@pytest.mark.parametrize("name", ["no_such_module.function", "json.no_such_function", "math.pi"])
def test_a_dotted_path_that_is_no_function_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.metric"):
        find_metric(name)


def outcomes(flags: str) -> list[Outcome]:
    return [Outcome(str(n), "", flag == "1", "stop") for n, flag in enumerate(flags)]


def test_an_improvement_is_claimed_only_when_the_exact_test_rejects() -> None:
    few = judge(before=outcomes("0" * 10), after=outcomes("1" * 5 + "0" * 5), source=outcomes("1" * 10))
    assert few["mcnemar_p"] == pytest.approx(2 * 0.5**5)  # five discordant pairs, all one way
    assert few["improved"] is False
    assert few["recovery"] == 0.5
    more = judge(before=outcomes("0" * 10), after=outcomes("1" * 6 + "0" * 4), source=outcomes("1" * 10))
    assert more["mcnemar_p"] == pytest.approx(2 * 0.5**6)
    assert more["improved"] is True
    assert "improved from 0 to 6 of 10" in sentence(more)


def test_a_significant_loss_is_no_improvement() -> None:
    verdict = judge(before=outcomes("1" * 10), after=outcomes("0" * 10), source=outcomes("1" * 10))
    assert verdict["mcnemar_p"] < 0.01
    assert verdict["improved"] is False
    assert sentence(verdict).startswith("No improvement shown")


def test_recovery_is_null_with_a_reason_when_the_source_is_no_better() -> None:
    verdict = judge(before=outcomes("11"), after=outcomes("11"), source=outcomes("10"))
    assert verdict["recovery"] is None
    assert verdict["recovery_reason"]
    assert verdict["minimum_detectable_difference"] is None
