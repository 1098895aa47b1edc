"""What a study's replicates say together, on outcomes that are drawn here, against the statistics taken by hand."""

from __future__ import annotations

import html
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from tuneshift.evaluate.seeds import (
    accuracy_over_seeds,
    difference_over_seeds,
    mean_difference_over_cells,
    mean_over_cells,
    recovery_over_seeds,
    seed_test,
)
from tuneshift.report.tables import conclusion
from tuneshift.sections.study import MODELS
from tuneshift.study.figures import write_figures
from tuneshift.study.page import cost_table, study_page
from tuneshift.study.summary import shown_arms, summarize
from tuneshift.study.tables import differences, introduction, markdown, sections

ROOT = Path(__file__).parents[1]
CHANCES = {
    "target before": 0.1,
    "base": 0.2,
    "source": 0.95,
    "filter": 0.6,
    "random": 0.5,
    "original": 0.9,
    "floor": 0.1,
}
SETTINGS: dict[str, Any] = {
    "axes": {"task": {"a": {}, "b": {}}, "base": {"own": {}, "other": {}}},
    "candidates": 20,
    "size": 4,
    "arms": {
        "filter": {"criterion": "ppl_diff"},
        "random": {"criterion": "random"},
        "original": {"pairs": "{task}.jsonl"},
        "floor": {"pairs": "seeds"},
    },
    "reference": "filter",
}
ITEMS = {"a": 60, "b": 25}
Tables = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def tables(replicates: int = 3, *, missing: tuple[str, ...] = ()) -> Tables:
    """Return rows and outcomes of a study whose axis `task` asks different questions, and `base` the same ones.

    `missing` names arms that are not trained in replicate 0 of the first cell. `original` trains alike under `base`.
    """
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    outcomes: list[dict[str, Any]] = []
    untrained = {(task, model): rng.random(n) < CHANCES[model] for task, n in ITEMS.items() for model in MODELS}
    for task in ITEMS:
        for base in ("own", "other"):
            for replicate in map(str, range(replicates)):
                for arm, chance in CHANCES.items():
                    key = {"task": task, "base": base, "replicate": replicate, "arm": arm}
                    right = untrained[task, arm] if arm in MODELS else rng.random(ITEMS[task]) < chance
                    gone = arm in missing and (task, base, replicate) == ("a", "own", "0")
                    training = None if arm in MODELS or gone else f"{arm}{task}{replicate}"
                    training = training if training is None or arm == "original" else training + base
                    reason = "kept 1 of 4 wanted" if gone else None
                    row = {**key, "candidates": None, "pairs": None, "training": training, "reason": reason}
                    row["questions"] = f"asked-{task}"
                    rows.append(row)
                    outcomes += (
                        [] if gone else [{**key, "item": str(i), "correct": bool(c)} for i, c in enumerate(right)]
                    )
    return rows, outcomes


def seeds(given: Tables, task: str, base: str, arm: str, replicates: tuple[str, ...] = ("0", "1", "2")) -> Any:
    """Return an arm's outcomes as an array [seeds, items]."""
    wanted = [(task, base, one, arm) for one in replicates]
    keys = ("task", "base", "replicate", "arm")
    return np.array([[o["correct"] for o in given[1] if tuple(o[k] for k in keys) == one] for one in wanted])


@pytest.fixture(scope="module")
def given() -> Tables:
    return tables()


@pytest.fixture(scope="module")
def found(given: Tables) -> dict[str, Any]:
    return summarize(SETTINGS, *given)


def test_every_arm_is_compared_with_the_target_before(given: Tables, found: dict[str, Any]) -> None:
    for arm in SETTINGS["arms"]:
        gain = found["cells"]["task=b,base=other"]["arms"][arm]["gain"]
        both = seeds(given, "b", "other", "target before"), seeds(given, "b", "other", arm)
        expected = difference_over_seeds(*both)
        assert (gain["value"], gain["seeds"], gain["items"]) == (expected.value, 3, 25)
        assert gain["interval"] == [expected.interval.low, expected.interval.high]
        assert gain["p"] == seed_test(*both).p_value
    assert all(found["cells"]["task=b,base=other"]["arms"][model]["gain"] is None for model in MODELS)


def test_with_one_replicate_the_gain_is_mcnemars_test() -> None:
    one = tables(1)
    gain = summarize(SETTINGS, *one)["cells"]["task=a,base=own"]["arms"]["random"]["gain"]
    before, after = (seeds(one, "a", "own", arm, ("0",))[0] for arm in ("target before", "random"))
    only_before, only_after = int((before & ~after).sum()), int((after & ~before).sum())
    assert gain["p"] == pytest.approx(binomtest(only_before, only_before + only_after).pvalue)
    assert gain["reason"] == "one seed: how much another training would change was not measured"


def test_recovery_is_of_the_source_and_of_each_arm_that_is_a_bound(given: Tables, found: dict[str, Any]) -> None:
    arms = found["cells"]["task=a,base=own"]["arms"]
    assert {name: list(arm["recovery"]) for name, arm in arms.items() if arm["recovery"]} == {
        "filter": ["source", "original"],
        "random": ["source", "original"],
        "original": ["source"],
        "floor": ["source", "original"],
    }
    before, after, bound = (seeds(given, "a", "own", arm) for arm in ("target before", "random", "original"))
    expected = recovery_over_seeds(before, after, bound)
    recovered = arms["random"]["recovery"]["original"]
    assert recovered["value"] == pytest.approx((after.sum() - before.sum()) / (bound.sum() - before.sum()))
    assert expected.interval is not None
    assert recovered["interval"] == [expected.interval.low, expected.interval.high]


def test_each_family_is_adjusted_for_itself(found: dict[str, Any]) -> None:
    arms = [arm for cell in found["cells"].values() for arm in cell["arms"].values()]
    families = {
        "reference": [arm["difference"] for arm in arms if arm["difference"]],
        "target before": [arm["gain"] for arm in arms if arm["gain"]],
        "cells": [one for one in found["across"] if one["p"] is not None],
        "interactions": [one for one in found["interactions"] if one["p"] is not None],
    }
    assert found["families"] == {name: len(family) for name, family in families.items()}
    assert found["families"] == {"reference": 12, "target before": 16, "cells": 6, "interactions": 4}
    for family in families.values():
        expected = multipletests([one["p"] for one in family], method="holm")[1]
        assert [one["p_holm"] for one in family] == pytest.approx(list(expected))


def test_cells_that_ask_the_same_are_compared_and_those_that_do_not_are_not(
    given: Tables, found: dict[str, Any]
) -> None:
    assert {(one["axis"], one["first"], one["level"]) for one in found["across"]} == {("base", "own", "other")}
    assert [(one["levels"]["task"], one["arm"]) for one in found["across"]] == [
        (task, arm) for task in ITEMS for arm in SETTINGS["arms"]
    ]
    one = next(one for one in found["across"] if (one["levels"]["task"], one["arm"]) == ("b", "filter"))
    both = seeds(given, "b", "own", "filter"), seeds(given, "b", "other", "filter")
    assert (one["value"], one["p"]) == (difference_over_seeds(*both).value, seed_test(*both).p_value)
    alike = [one for one in found["across"] if one["arm"] == "original"]
    assert {(one["value"], one["p"], one["p_holm"], one["reason"]) for one in alike} == {
        (None, None, None, "both train the same targets")
    }


def test_replicates_in_which_two_arms_chose_the_same_pairs_are_counted(given: Tables) -> None:
    """Their difference of 0 is no measurement, so the page says how many there are, and compares nothing if all are."""
    rows, outcomes = given

    def chose_alike(replicates: set[str]) -> dict[str, Any]:
        changed = [
            row | {"training": f"same {row['replicate']}"}
            if row["arm"] in ("filter", "random") and row["replicate"] in replicates
            else row
            for row in rows
        ]
        return summarize(SETTINGS, changed, outcomes)["cells"]["task=a,base=own"]["arms"]["random"]["difference"]

    some, none, everywhere = chose_alike({"0", "1"}), chose_alike(set()), chose_alike({"0", "1", "2"})
    assert (some["alike"], some["value"], some["least_shown"]) == (2, none["value"], None)
    assert (none["alike"], none["least_shown"] > 0) == (0, True)
    assert (everywhere["value"], everywhere["p"], everywhere["reason"]) == (None, None, "both train the same targets")


def test_an_arms_lead_over_the_reference_is_compared_between_cells(given: Tables, found: dict[str, Any]) -> None:
    assert [(one["levels"]["task"], one["arm"]) for one in found["interactions"]] == [
        (task, arm) for task in ITEMS for arm in ("random", "original", "floor")
    ]
    one = found["interactions"][0]
    leads = [
        seeds(given, "a", base, "random").mean() - seeds(given, "a", base, "filter").mean() for base in ("own", "other")
    ]
    assert one["value"] == pytest.approx(leads[1] - leads[0])
    assert one["reference"] == "filter"


def test_cells_that_ask_different_questions_are_averaged(given: Tables, found: dict[str, Any]) -> None:
    assert [(mean["axis"], mean["levels"]) for mean in found["means"]] == [
        ("task", {"base": "own"}),
        ("task", {"base": "other"}),
    ]
    arms = found["means"][1]["arms"]
    cells = {arm: [seeds(given, task, "other", arm) for task in ITEMS] for arm in CHANCES}
    expected = mean_over_cells(cells["filter"])
    assert arms["filter"]["accuracy"] == pytest.approx(np.mean([cell.mean() for cell in cells["filter"]]))
    assert arms["filter"]["interval"] == [expected.interval.low, expected.interval.high]
    assert (arms["filter"]["seeds"], arms["filter"]["items"]) == (3, 85)
    gain = mean_difference_over_cells(cells["target before"], cells["filter"])
    assert arms["filter"]["gain"]["interval"] == [gain.interval.low, gain.interval.high]
    difference = mean_difference_over_cells(cells["filter"], cells["random"])
    assert arms["random"]["difference"]["value"] == pytest.approx(difference.value)
    assert arms["filter"]["difference"] is None
    assert (arms["source"]["seeds"], arms["source"]["gain"]) == (1, None)


def test_an_arm_that_lacks_a_replicate_is_compared_in_the_others() -> None:
    given = tables(missing=("random",))
    found = summarize(SETTINGS, *given)
    arm = found["cells"]["task=a,base=own"]["arms"]["random"]
    assert (arm["seeds"], arm["difference"]["seeds"], arm["gain"]["seeds"]) == (2, 2, 2)
    assert arm["reason"] == "replicate 0: kept 1 of 4 wanted"
    after = seeds(given, "a", "own", "random", ("1", "2"))
    assert arm["accuracy"] == accuracy_over_seeds(after).value
    assert arm["difference"]["value"] == pytest.approx(
        after.mean() - seeds(given, "a", "own", "filter", ("1", "2")).mean()
    )
    mean = found["means"][0]["arms"]["random"]
    assert mean["seeds"] == 2
    assert mean["accuracy"] == pytest.approx((after.mean() + seeds(given, "b", "own", "random", ("1", "2")).mean()) / 2)


def test_an_arm_that_was_never_trained_is_null_everywhere() -> None:
    rows, outcomes = tables(1, missing=("random",))
    found = summarize(SETTINGS, rows, outcomes)
    arm = found["cells"]["task=a,base=own"]["arms"]["random"]
    assert arm["reason"] == "replicate 0: kept 1 of 4 wanted"
    assert {arm[key] for key in ("accuracy", "interval", "gain", "difference", "recovery")} == {None}
    assert found["means"][0]["arms"]["random"]["reason"] == "no replicate was trained in every cell"
    between = next(one for one in found["across"] if (one["levels"]["task"], one["arm"]) == ("a", "random"))
    assert (between["value"], between["reason"]) == (None, "no replicate was trained in both")
    assert found["families"] == {"reference": 11, "target before": 15, "cells": 5, "interactions": 3}
    assert "| random | n/a | n/a | n/a |" in markdown({**found, "settings": SETTINGS, "rows": rows}, {})


def test_questions_that_were_not_recorded_are_neither_compared_nor_averaged(given: Tables) -> None:
    rows = [{key: value for key, value in row.items() if key != "questions"} for row in given[0]]
    found = summarize(SETTINGS, rows, given[1])
    assert (found["across"], found["interactions"], found["means"]) == ([], [], [])


def test_what_guessing_gets_right_stands_above_the_arms_where_it_is_known(given: Tables) -> None:
    rows, outcomes = given
    known = [row | {"chance": 0.5 if row["task"] == "a" else None} for row in rows]
    found = summarize(SETTINGS, known, outcomes)
    assert {name: cell["chance"] for name, cell in found["cells"].items()} == {
        "task=a,base=own": 0.5, "task=a,base=other": 0.5, "task=b,base=own": None, "task=b,base=other": None,
    }  # fmt: skip
    page = markdown({**found, "settings": SETTINGS, "rows": known}, {})
    assert page.count("| guessing | 50.0% |") == 2


def test_a_cell_that_has_fewer_candidates_than_were_wanted_says_so(given: Tables, found: dict[str, Any]) -> None:
    short = {"task": "a", "base": "own", "replicate": "1"}
    rows = [row | {"candidates": 12 if short.items() <= row.items() else 20} for row in given[0]]
    page = markdown({**found, "settings": SETTINGS, "rows": rows}, {})
    assert page.count("12 of 20 candidates") == page.count(" of 20 candidates") == 1


def test_an_interaction_of_arms_that_trained_alike_was_not_measured(given: Tables) -> None:
    """`floor` trains as the reference does within both cells, or in one replicate of both."""
    for replicates, value in (("012", None), ("0", "measured")):
        rows = [
            row | {"training": f"filter{row['task']}{row['replicate']}{row['base']}"}
            if row["arm"] == "floor" and row["replicate"] in replicates
            else row
            for row in given[0]
        ]
        found = summarize(SETTINGS, rows, given[1])
        own = [one for one in found["interactions"] if one["arm"] == "floor"]
        assert len(own) == 2
        assert all((one["value"] is None) == (value is None) for one in own)
        assert {one["alike"] for one in own} == {len(replicates)}


def test_the_page_says_what_its_figures_rest_on(given: Tables, found: dict[str, Any]) -> None:
    figures = {name: f"figures/{name}.png" for name in shown_arms(found)}
    page = markdown({**found, "settings": SETTINGS, "rows": given[0]}, figures)
    assert set(re.findall(r"\((figures/.*?)\)", page)) == set(figures.values())
    assert "figures/mean_over_task,base=other.png" in page
    assert "3 replicates (0, 1, 2)" in page
    assert "of three seeds, 83 % held the truth at worst" in page
    assert "12 with filter, 16 with the target before, 6 between cells" in page
    assert "## Mean over task, base=other" in page
    arm = found["cells"]["task=a,base=own"]["arms"]["random"]
    low, high = arm["recovery"]["original"]["interval"]
    assert f"| {arm['recovery']['original']['value']:.2f} | {low:.2f} to {high:.2f} | 60 x 3 |" in page
    assert "both train the same targets" in page
    alone = tables(1)
    said = markdown({**summarize(SETTINGS, *alone), "settings": SETTINGS, "rows": alone[0]}, {})
    assert "One replicate: intervals and p values are about these trainings" in said
    assert "83 %" not in said


class Cells(HTMLParser):
    """Collects the texts of a page's table cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._within = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._within = tag in ("td", "th")
        if self._within:
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = False

    def handle_data(self, data: str) -> None:
        if self._within:
            self.texts[-1] += data


def test_the_html_page_has_the_tables_of_the_markdown(given: Tables, found: dict[str, Any]) -> None:
    results = {**found, "study": "<b>grid</b>\u202e", "settings": SETTINGS, "rows": given[0]}
    told = sections(results)
    trials = [row for row in given[0] if row["arm"] not in MODELS]
    timings = [{"replicate": row["replicate"], "synthesis_seconds": 10.0, "training_seconds": 2.0} for row in trials]
    paid = {"prompt_tokens": 1000, "completion_tokens": 50, "cost": 0.25}
    usage = {name: [paid, paid] if name == "task=a,base=own" else [] for name in found["cells"]}
    page = study_page(results, cost_table(results, timings, usage), ["tuneshift", "study", "a study.yaml"])
    cells = Cells(page).texts
    expected = [
        cell for section in told for table in section.tables for row in [table.header, *table.rows] for cell in row
    ]
    assert cells[: len(expected)] == expected
    costs = ["30", "12", "24", "2,000 tokens read, 100 written; 0.5 in the currency of its prices"]
    assert cells[len(expected) + 5 :][:6] == ["task=a,base=own", *costs, "task=a,base=other"]
    charts = re.findall(r'id="chart-(\d+)"', page)
    assert charts == ["0", "1", "2", "3", "5", "6"]  # 4 is what lies between cells
    assert "&lt;b&gt;grid&lt;/b&gt;[U+202E]" in page
    assert '<code tabindex="0">tuneshift study &#39;a study.yaml&#39;</code>' in page
    assert all(
        sentence in html.unescape(page) for sentence in (introduction(results), conclusion(differences(results)))
    )


def test_the_conclusion_names_what_a_test_shows_and_no_more(found: dict[str, Any]) -> None:
    arms = {name: dict.fromkeys(("difference", "gain")) for name in ("reference", "good", "bad", "unclear")}
    for name, value, p in (("good", 0.1, 0.05), ("bad", -0.1, 0.01), ("unclear", 0.3, 0.06)):
        arms[name] = {"difference": {"value": value, "p_holm": p}, "gain": {"value": value, "p_holm": 1.0}}
    results = {"cells": {"all": {"arms": arms}}, "settings": {"reference": "reference"}}
    said = conclusion(differences(results))
    assert said.startswith(
        "Of 3 comparisons with reference: good is better; bad is worse. Of 3 comparisons with the target"
    )
    assert "the target before: no difference is shown." in said
    two = {"cells": {"x": {"arms": arms}, "y": {"arms": arms}}, "settings": {"reference": "reference"}}
    assert "good (x) and good (y) are better" in conclusion(differences(two))
    nothing = {"cells": {"all": {"arms": {"reference": arms["reference"]}}}, "settings": {"reference": "reference"}}
    assert conclusion(differences(nothing)) == "Nothing could be compared."


def test_there_is_a_figure_for_each_cell_and_mean(found: dict[str, Any], tmp_path: Path) -> None:
    written = write_figures(tmp_path / "figures", shown_arms(found))
    assert list(written) == [*found["cells"], "mean_over_task,base=own", "mean_over_task,base=other"]
    assert all((tmp_path / path).read_bytes().startswith(b"\x89PNG") for path in written.values())


# The committed results


def test_the_committed_outcomes_are_those_of_the_committed_rows() -> None:
    for path in (ROOT / "studies/results").glob("*.parquet"):
        outcomes = parquet.read_table(path).to_pylist()
        rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
        keys = [key for key in outcomes[0] if key not in ("item", "correct")]
        for row in rows:
            own = [one["correct"] for one in outcomes if all(one[key] == row[key] for key in keys)]
            assert (sum(own), len(own)) == (row["correct"] or 0, row["n"] or 0)


def test_the_results_page_is_what_the_committed_files_make() -> None:
    render = runpy.run_path(str(ROOT / "studies/render.py"))
    studies = render["read_all"]()
    assert set(studies) == {path.stem for path in (ROOT / "studies/results").glob("*.json")}
    page = render["page"](studies)
    assert page.splitlines() == render["PAGE"].read_text(encoding="utf-8").splitlines()
    figures = set(re.findall(r"\((results/.*?\.png)\)", page))
    assert figures == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs/results").glob("*/*.png")}
