"""Metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneshift.errors import ConfigError
from tuneshift.evaluate.tasks import find_metric


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
