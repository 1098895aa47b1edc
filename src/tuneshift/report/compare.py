"""`tuneshift compare`: runs side by side, and paired tests of their targets on the same questions.

Runs are compared with the first one that is named. A test speaks of these trained targets; whether another training
under the same settings would do as well takes several seeds (`tuneshift study`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneshift.configfile import flatten
from tuneshift.console import clean
from tuneshift.errors import RunDirectoryError
from tuneshift.evaluate.stats import Proportion, holm_family, mcnemar_exact, paired_difference
from tuneshift.evaluate.tasks import Outcome
from tuneshift.evaluate.verdict import points_with_interval
from tuneshift.report.markdown import markdown_table
from tuneshift.report.page.results import results_page
from tuneshift.report.tables import Section, Table, conclusion
from tuneshift.run.directory import RunDirectory, read_json, read_jsonl, write_atomically
from tuneshift.run.ledger import Counts, Ledger
from tuneshift.run.watching import phase

NOT_COMPARED = ("run.dir",)
"""Settings that say nothing of a run."""


@dataclass(frozen=True)
class Run:
    """What is compared of a run: `outcomes` are the trained target's, `None` where none are there."""

    label: str
    phase: str
    settings: dict[str, str]
    counts: Counts
    verdict: dict[str, Any] | None
    outcomes: list[Outcome] | None


def compare_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Return what differs between runs, their counts and rates, and each run's paired test against the first.

    Raises:
        RunDirectoryError: less than two runs are named, one is named twice, or a directory holds no run.
    """
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        named = ", ".join(map(str, paths)) or "none"
        raise RunDirectoryError(f"compare: two or more different run directories are needed, got {named}.")
    runs = [_read(path) for path in paths]
    keys = sorted({key for run in runs for key in run.settings} - set(NOT_COMPARED))
    differing = [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]
    tests = {run.label: _paired(runs[0], run) for run in runs[1:]}
    adjusted = holm_family({label: test["mcnemar_p"] for label, test in tests.items()})
    return {
        "runs": [_facts(run) for run in runs],
        "settings": {key: [run.settings.get(key) for run in runs] for key in differing},
        "reference": runs[0].label,
        "tests": [{"run": label, **test, "adjusted_p": adjusted[label]} for label, test in tests.items()],
    }


def compare_lines(found: dict[str, Any]) -> list[str]:
    """Return a comparison as Markdown."""
    facts, tests = (markdown_table(table.header, table.rows) for table in (facts_table(found), tests_table(found)))
    return [clean(line) for line in "\n".join([facts, "", what_is_tested(found), "", tests]).split("\n")]


def compare_page(found: dict[str, Any], command: Sequence[str]) -> str:
    """Return a comparison as a page that opens from disk."""
    measured = [(run["run"], run["after"]) for run in found["runs"] if run["reason"] is None]
    drawn = [
        {"name": name, "kind": "trained", "value": after["accuracy"], **_ends(after["interval"])}
        for name, after in measured
    ]
    shown = {
        test["run"]: (test["difference"], test["adjusted_p"])
        for test in found["tests"]
        if test["adjusted_p"] is not None
    }
    return results_page(
        " / ".join(Path(run["run"]).name for run in found["runs"]),
        kind="comparison of runs",
        conclusion=conclusion({found["reference"]: shown}),
        introduction=[],
        sections=[
            Section(
                "Runs",
                tables=[facts_table(found)],
                caption="Right answers of the target after its training, with 95 % interval.",
                intervals=drawn,
            ),
            Section("Target against target", what_is_tested(found), [tests_table(found)]),
        ],
        command=command,
    )


def write_compare_page(path: Path, found: dict[str, Any]) -> None:
    """Write the page of a comparison to `path`.

    Raises:
        RunDirectoryError: something is there already, or it cannot be written.
    """
    if path.exists():
        raise RunDirectoryError(f"{path}: is there already. Give another file as --html.")
    runs = [run["run"] for run in found["runs"]]
    write_atomically(path, compare_page(found, ["tuneshift", "compare", *runs, "--html", str(path)]))


def facts_table(found: dict[str, Any]) -> Table:
    """Return the runs side by side: settings that differ, then `FACTS`."""
    runs = found["runs"]
    rows = [[key, *["(not set)" if v is None else v for v in values]] for key, values in found["settings"].items()]
    rows += [[label, *[show(run) for run in runs]] for label, show in FACTS.items()]
    return Table(["", *[run["run"] for run in runs]], rows)


def tests_table(found: dict[str, Any]) -> Table:
    """Return the paired tests of the others' targets against the first run's."""
    rows = [[test["run"], *_test_cells(test)] for test in found["tests"]]
    return Table(["run", "questions", "difference", "right only here", "right only there", "p"], rows)


def what_is_tested(found: dict[str, Any]) -> str:
    """Return what the tests compare, and what they speak of."""
    n_tests = sum(test["mcnemar_p"] is not None for test in found["tests"])
    family = f", and adjusted for {n_tests} tests (Holm)" if n_tests > 1 else ""
    return (
        f"Each target after its training against that of {found['reference']} (there), question by question; "
        f"exact McNemar test{family}. It is about these trainings: what another seed would give takes a study."
    )


def _ends(interval: dict[str, Any]) -> dict[str, float]:
    return {end: interval[end] for end in ("low", "high")}


def _read(path: Path) -> Run:
    run = RunDirectory.existing(path)
    with Ledger(run.ledger, read_only=True) as ledger:
        settings, inputs = (json.loads(ledger.meta(key) or "{}") for key in ("settings", "inputs"))
        counts, stop = ledger.counts(), ledger.meta("stop_reason")
    verdict = read_json(run.verdict) if run.verdict.exists() else None
    after = run.evaluation / "after.jsonl"
    measured = verdict is not None and verdict["improved"] is not None
    contents = {f"content of {name}": digest[:12] for name, digest in inputs.items()}
    return Run(
        label=str(path),
        phase=phase(run, stop),
        settings=flatten(settings) | contents,
        counts=counts,
        verdict=verdict,
        outcomes=[Outcome(**row) for row in read_jsonl(after)] if measured else None,
    )


def _facts(run: Run) -> dict[str, Any]:
    counts, verdict = run.counts, run.verdict or {}
    rate = Proportion(counts.kept, counts.candidates) if counts.candidates else None
    return {
        "run": run.label,
        "phase": run.phase,
        "rounds": counts.rounds,
        "candidates": counts.candidates,
        "kept": counts.kept,
        "keep_rate": rate and {"rate": rate.accuracy, "n": rate.n, "interval": asdict(rate.interval())},
        "trained_pairs": verdict.get("trained_pairs"),
        **{arm: verdict.get(arm) for arm in ("before", "after", "source")},
        "recovery": verdict.get("recovery"),
        "seconds": sum(verdict["seconds"].values()) if verdict else None,
        "reason": _unmeasured(run),
    }


def _unmeasured(run: Run) -> str | None:
    """Return why a run has no accuracy; `None` where it has."""
    if run.verdict is None:
        return f"not finished: {run.phase}"
    return str(run.verdict["reason"]) if run.outcomes is None else None


def _paired(first: Run, second: Run) -> dict[str, Any]:
    """Return the paired test of two runs' targets, or the reason why there is none."""
    reason = _objection(first, second)
    empty = dict.fromkeys(("n", "difference", "interval", "only_here", "only_there", "mcnemar_p"))
    if reason is not None:
        return {**empty, "reason": reason}
    assert first.outcomes is not None
    assert second.outcomes is not None
    flags = [[outcome.correct for outcome in outcomes] for outcomes in (first.outcomes, second.outcomes)]
    test, change = mcnemar_exact(*flags), paired_difference(*flags)
    return {
        "n": len(flags[0]),
        "difference": change.difference,
        "interval": asdict(change.interval),
        "only_here": test.only_second,
        "only_there": test.only_first,
        "mcnemar_p": test.p_value,
        "reason": None,
    }


def _objection(first: Run, second: Run) -> str | None:
    """Return why two runs' answers cannot be paired, `None` where they can."""
    for run in (first, second):
        if (reason := _unmeasured(run)) is not None:
            return f"{run.label}: {reason}"
    assert first.verdict is not None
    assert second.verdict is not None
    one, other = ({**run["questions"], "data": None} for run in (first.verdict, second.verdict))
    differing = sorted(key for key in one | other if one.get(key) != other.get(key))
    if differing:
        return f"the questions, or how they are asked and graded, differ in {', '.join(differing)}"
    ids = [[outcome.id for outcome in run.outcomes or []] for run in (first, second)]
    return None if ids[0] == ids[1] else "the outcomes are of other questions"


def _test_cells(test: dict[str, Any]) -> list[str]:
    if test["reason"] is not None:
        return ["n/a", f"cannot be compared: {test['reason']}", "", "", ""]
    p = f"{test['mcnemar_p']:.2g}"
    if test["adjusted_p"] != test["mcnemar_p"]:
        p += f", adjusted {test['adjusted_p']:.2g}"
    change = points_with_interval(test["difference"], test["interval"], test["n"])
    return [str(test["n"]), change, str(test["only_here"]), str(test["only_there"]), p]


def _share(rate: dict[str, Any] | None, value: str, reason: str | None) -> str:
    if rate is None:
        return f"n/a ({reason})" if reason else "n/a"
    interval = rate["interval"]
    return f"{rate[value]:.1%} ({interval['low']:.1%} to {interval['high']:.1%}, n = {rate['n']})"


def _count(value: float | None, form: str = "d") -> str:
    return "n/a" if value is None else format(value, form)


FACTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "state": lambda run: run["phase"],
    "candidates": lambda run: str(run["candidates"]),
    "kept": lambda run: f"{run['kept']} in {run['rounds']} rounds",
    "keep rate": lambda run: _share(run["keep_rate"], "rate", "no candidates yet"),
    "trained pairs": lambda run: _count(run["trained_pairs"]),
    "target before": lambda run: _share(run["before"], "accuracy", run["reason"]),
    "target after": lambda run: _share(run["after"], "accuracy", run["reason"]),
    "source": lambda run: _share(run["source"], "accuracy", run["reason"]),
    "recovery": lambda run: _count(run["recovery"], ".2f"),
    "seconds": lambda run: _count(run["seconds"], ".0f"),
}
"""The rows of the table below the settings, by what they are called; intervals are Wilson's, 95 %."""
