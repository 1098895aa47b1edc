"""Runs side by side: what differs, and when their answers can be paired."""

from __future__ import annotations

import html
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from statsmodels.stats.contingency_tables import mcnemar
from test_watching import add_round

from tuneshift import cli
from tuneshift.errors import RunDirectoryError
from tuneshift.evaluate.tasks import Outcome
from tuneshift.evaluate.verdict import judge
from tuneshift.report.compare import compare_lines, compare_runs
from tuneshift.run.directory import RunDirectory, jsonl, write_atomically, write_json
from tuneshift.run.ledger import Ledger

ITEMS = 60
QUESTIONS = {"task": "jsonl", "data": "/a/test.jsonl", "sha256": "ab", "metric": "exact_match", "stop": ["\n"]}
SETTINGS = {"criterion": {"name": "ppl_diff", "tau": 1.5}, "run": {"seed": 0, "dir": None}}


def outcomes(right: set[int], ids: range = range(ITEMS)) -> list[Outcome]:
    return [Outcome(f"q{n}", "", n in right, "stop", {"exact_match": n in right}) for n in ids]


def make_run(
    path: Path, right: set[int] | None, *, questions: dict[str, Any] | None = None, ids: range = range(ITEMS),
    kept: int = 5, seconds: float = 100.0, **settings: Any,
) -> Path:  # fmt: skip
    """Write a run whose target gets the items `right` right; one without is still at its synthesis."""
    with RunDirectory(path) as run, Ledger(run.ledger) as ledger:
        run.keep()
        ledger.set_meta(settings=json.dumps(SETTINGS | settings), inputs=json.dumps({"seeds": "s" * 64}))
        add_round(ledger, 0, kept, 10 - kept)
        if right is None:
            return path
        ledger.set_meta(stop_reason="target_size reached")
        arms = {"before": outcomes(set(), ids), "after": outcomes(right, ids)}
        arms |= {"source": outcomes(set(ids), ids), "base": outcomes(set(), ids)}
        write_json(run.training, {})
        write_atomically(run.evaluation / "after.jsonl", jsonl([asdict(outcome) for outcome in arms["after"]]))
        verdict = judge(**arms) | {"questions": questions or QUESTIONS, "trained_pairs": kept}
        write_json(run.verdict, verdict | {"seconds": {"synthesis": seconds}})
        write_json(run.manifest, {})
    return path


def test_the_paired_test_is_that_of_an_independent_implementation(tmp_path: Path) -> None:
    first, second = set(range(20)), set(range(5, 40))
    paths = [make_run(tmp_path / "one", first), make_run(tmp_path / "two", second)]
    (test,) = compare_runs(paths)["tests"]
    both = len(first & second)
    table = [[both, len(first - second)], [len(second - first), ITEMS - len(first | second)]]
    assert test["mcnemar_p"] == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert (test["only_there"], test["only_here"], test["n"]) == (5, 20, ITEMS)
    assert test["difference"] == pytest.approx((35 - 20) / ITEMS)
    assert test["interval"]["low"] < test["difference"] < test["interval"]["high"]
    assert test["adjusted_p"] == test["mcnemar_p"]


def test_several_tests_are_adjusted_together(tmp_path: Path) -> None:
    rights = {"a": set(range(20)), "b": set(range(30)), "c": set(range(21)), "d": set(range(45))}
    tests = compare_runs([make_run(tmp_path / name, right) for name, right in rights.items()])["tests"]
    raw = [test["mcnemar_p"] for test in tests]
    smallest, middle, largest = sorted(raw)
    by_hand = {smallest: 3 * smallest, middle: max(3 * smallest, 2 * middle), largest: max(2 * middle, largest)}
    assert [test["adjusted_p"] for test in tests] == pytest.approx([min(1.0, by_hand[p]) for p in raw])


def test_only_settings_that_differ_are_shown(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", {1})
    two = make_run(
        tmp_path / "two",
        {1},
        criterion={"name": "ppl_diff", "tau": 2.0},
        run={"seed": 0, "dir": "x"},
        synthesis={"n": 1},
    )
    found = compare_runs([one, two])
    assert found["settings"] == {"criterion.tau": ["1.5", "2.0"], "synthesis.n": [None, "1"]}
    lines = compare_lines(found)
    assert "| criterion.tau | 1.5 | 2.0 |" in lines
    assert "| synthesis.n | (not set) | 1 |" in lines


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"questions": QUESTIONS | {"sha256": "cd"}}, "differ in sha256"),
        ({"questions": QUESTIONS | {"metric": "numeric", "stop": []}}, "differ in metric, stop"),
        ({"ids": range(1, ITEMS)}, "other questions"),
    ],
)
def test_runs_on_other_questions_are_not_compared(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    paths = [make_run(tmp_path / "one", {1, 2}), make_run(tmp_path / "two", {2, 3}, **changes)]
    found = compare_runs(paths)
    (test,) = found["tests"]
    assert why in test["reason"]
    assert (test["mcnemar_p"], test["adjusted_p"], test["difference"]) == (None, None, None)
    assert any("cannot be compared" in line and why.split()[-1] in line for line in compare_lines(found))


def test_the_same_questions_in_another_place_are_the_same(tmp_path: Path) -> None:
    paths = [
        make_run(tmp_path / "one", {1}),
        make_run(tmp_path / "two", {2}, questions=QUESTIONS | {"data": "/b.jsonl"}),
    ]
    assert compare_runs(paths)["tests"][0]["reason"] is None


def test_a_run_that_is_not_finished_is_shown_without_an_accuracy(tmp_path: Path) -> None:
    found = compare_runs([make_run(tmp_path / "one", {1}), make_run(tmp_path / "two", None, kept=3)])
    one, two = found["runs"]
    assert (one["keep_rate"]["rate"], two["keep_rate"]["rate"]) == (0.5, 0.3)
    assert (two["after"], two["seconds"], two["reason"]) == (None, None, "not finished: synthesis")
    assert "not finished: synthesis" in found["tests"][0]["reason"]
    (line,) = [line for line in compare_lines(found) if line.startswith("| target after")]
    assert line == "| target after | 1.7% (0.3% to 8.9%, n = 60) | n/a (not finished: synthesis) |"


def test_the_page_says_what_a_test_shows_and_has_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few, many = make_run(tmp_path / "few", set(range(5))), make_run(tmp_path / "many<b>", set(range(40)))
    page = tmp_path / "compared.html"
    command = [
        "tuneshift",
        "compare",
        *map(str, (few, many, make_run(tmp_path / "going on", None))),
        "--html",
        str(page),
    ]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = html.unescape(page.read_text(encoding="utf-8"))
    assert f"Of 1 comparison with {few}: {many} is better." in said
    assert "many<b>" not in page.read_text(encoding="utf-8")
    assert "8.3% (3.6% to 18.1%, n = 60)" in said
    assert "n/a (not finished: synthesis)" in said
    assert shlex.join(command) in said
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', said)
    assert [row["value"] for row in json.loads(data)["charts"]["0"]] == [5 / 60, 40 / 60]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "is there already" in capsys.readouterr().err


def test_less_than_two_runs_are_refused(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", {1})
    for paths in ([one], [one, one], [one, tmp_path / "." / "one"]):
        with pytest.raises(RunDirectoryError, match="two or more different run directories"):
            compare_runs(paths)
    with pytest.raises(RunDirectoryError, match="no run was started here"):
        compare_runs([one, tmp_path])


def test_the_command_writes_markdown_or_json_and_nothing_into_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [make_run(tmp_path / name, right) for name, right in (("one", {1}), ("two", {1, 2}))]
    before = {path: path.read_bytes() for folder in paths for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr("sys.argv", ["tuneshift", "compare", *map(str, paths), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["reference"] == str(paths[0])
    monkeypatch.setattr("sys.argv", ["tuneshift", "compare", *map(str, paths)])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.startswith("|")
    assert before == {path: path.read_bytes() for folder in paths for path in folder.rglob("*") if path.is_file()}
