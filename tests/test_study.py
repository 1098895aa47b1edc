"""Studies on tiny random models: every file is real, and what is decided is computed again by other means."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as parquet
import pytest
import test_kill
from conftest import CORPUS, Tiny, write_jsonl, write_project
from mock_api import KEY, MockApi
from test_transfer import run_cli

import tuneshift
from tuneshift.config import LoadedConfig
from tuneshift.configfile import lay_over
from tuneshift.criteria import Criterion, decide, score_of
from tuneshift.engines.base import Engine, Weights
from tuneshift.engines.opening import open_engine
from tuneshift.engines.options import EngineOptions
from tuneshift.errors import ConfigError, DataError, InUse
from tuneshift.evaluate.verdict import detectable_sentence
from tuneshift.models import LoadOptions
from tuneshift.progress import Progress
from tuneshift.run.directory import Lock, RunDirectory, read_json, read_jsonl
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate, Response
from tuneshift.study import run as study_run
from tuneshift.study.arms import choose_for_arm
from tuneshift.study.grid import load_study
from tuneshift.study.products import Products
from tuneshift.wiring import limits_of

WORDS = ["play", "book", "rate", "add", "find", "jazz"]
TRAIN = [
    {"prompt": f"Request: {one} {two}\nIntent:", "response": f" {one}"} for one in WORDS for two in WORDS if one != two
]
STUDY: dict[str, Any] = {
    "config": "config.yaml",
    "axes": {"generator": {"base": {}, "logged": {"generator": {"kind": "file", "prompts": "train.jsonl"}}}},
    "replicates": [0, 1],
    "candidates": 20,
    "size": 4,
    "arms": {
        "first": {"criterion": "none"},
        "same": {"criterion": {"name": "none", "tau": 3}},
        "random": {"criterion": "random"},
        "strict": {"criterion": {"name": "ppl_diff", "tau": 1.0001}},
        "original": {"pairs": "{generator}.jsonl"},
        "bound": {"prompts": "train.jsonl"},
        "floor": {"pairs": "seeds"},
    },
    "reference": "first",
}
TABLES = ["results.parquet", "outcomes.parquet", "results.json", "results.md"]


def write_study(folder: Path, tiny: Tiny, **changes: Any) -> Path:
    """Write a study file with its configuration and data."""
    write_project(
        folder,
        tiny,
        distill={"num_train_epochs": 1, "learning_rate": 0.05},
        evaluation={"metric": "graded_by_length.is_even"},
        criterion={"name": "none"},
    )
    (folder / "graded_by_length.py").write_text(
        "def is_even(response, reference):\n    return len(response) % 2 == 0\n"
    )
    seeds = [{"prompt": f"Request: {text}\nIntent:", "response": " a"} for text in CORPUS[:5]]
    write_jsonl(folder / "seeds.jsonl", seeds)
    items = [{"prompt": f"Request: {text} now\nIntent:", "reference": "x"} for text in [*CORPUS[:5], *WORDS]]
    write_jsonl(folder / "test.jsonl", items)
    held_out = {"prompt": items[0]["prompt"], "response": " held out"}
    for name in ("train", "base", "logged"):
        write_jsonl(folder / f"{name}.jsonl", [held_out, *TRAIN])
    path = folder / "study.yaml"
    path.write_text(json.dumps({**STUDY, **changes}), encoding="utf-8")
    return path


class Notes(Progress):
    """Collects what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study in `done/`, what it said in `notes.json`, and how often it opened the source."""
    folder = tmp_path_factory.mktemp("study")
    path, notes, opened = write_study(folder, tiny), Notes(), []
    original = study_run._opened
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_run, "_opened", lambda *given: opened.append(given[0].label) or original(*given))
        study_run.run_study(load_study(path), folder / "done", progress=notes)
    (folder / "notes.json").write_text(json.dumps(notes.said))
    (folder / "opened.json").write_text(json.dumps(opened))
    return folder


def rows(root: Path, name: str = "results") -> list[dict[str, Any]]:
    return list(parquet.read_table(root / f"{name}.parquet").to_pylist())


def row(root: Path, cell: str, replicate: str, arm: str) -> dict[str, Any]:
    (found,) = [r for r in rows(root) if (r["generator"], r["replicate"], r["arm"]) == (cell, replicate, arm)]
    return found


def dataset(root: Path, cell: str, replicate: str, arm: str) -> list[dict[str, str]]:
    return read_jsonl(root / "trainings" / row(root, cell, replicate, arm)["training"] / "dataset/kept.jsonl")


def candidates(root: Path, cell: str, replicate: str) -> list[Candidate]:
    with Ledger(root / "synthesis" / f"generator={cell}" / replicate / "ledger.sqlite") as ledger:
        return ledger.candidates()


UNITS = [(cell, replicate) for cell in ("base", "logged") for replicate in ("0", "1")]


# What a study makes


def test_there_is_a_row_for_each_cell_replicate_and_arm(finished: Path) -> None:
    found = [(r["generator"], r["replicate"], r["arm"]) for r in rows(finished / "done")]
    names = ["target before", "base", "source", *STUDY["arms"]]
    assert found == [(cell, replicate, arm) for cell, replicate in UNITS for arm in names]


def test_every_unit_has_its_candidates_with_both_answers(finished: Path) -> None:
    for unit in UNITS:
        made = candidates(finished / "done", *unit)
        assert 20 <= sum(c.y_f is not None for c in made) < 25  # a call of five is never cut
        assert all((c.y_f is None) == (c.y_b is None) for c in made)
    assert {row["candidates"] for row in rows(finished / "done") if row["arm"] in ("first", "random")} == {20}
    assert [c.text for c in candidates(finished / "done", "base", "0")] != [
        c.text for c in candidates(finished / "done", "base", "1")
    ]


@pytest.mark.parametrize(("cell", "replicate"), UNITS)
def test_each_arm_trains_on_what_it_says(finished: Path, cell: str, replicate: str) -> None:
    root = finished / "done"
    usable = [
        {"prompt": c.prompt, "response": c.y_f.text}
        for c in candidates(root, cell, replicate)
        if c.y_f and c.y_b and c.y_f.text.strip() and c.y_f.finish_reason != "length" and c.y_b.n_tokens
    ]
    drawn = dataset(root, cell, replicate, "first")
    assert drawn == dataset(root, cell, replicate, "random")  # `none` keeps what is usable
    assert [usable.index(pair) for pair in drawn] == sorted(usable.index(pair) for pair in drawn)
    assert len(drawn) == 4
    original = dataset(root, cell, replicate, "original")
    assert len(original) == 4
    assert all(pair in TRAIN for pair in original)
    bound = dataset(root, cell, replicate, "bound")
    assert {pair["prompt"] for pair in bound} <= {pair["prompt"] for pair in TRAIN}
    assert len({pair["prompt"] for pair in bound}) == 4
    assert dataset(root, cell, replicate, "floor") == read_jsonl(finished / "seeds.jsonl")


def test_replicates_draw_otherwise(finished: Path) -> None:
    root = finished / "done"
    for arm in ("random", "original", "bound"):
        assert dataset(root, "base", "0", arm) != dataset(root, "base", "1", arm)


def test_equal_datasets_are_trained_on_once(finished: Path) -> None:
    root = finished / "done"
    assert row(root, "base", "0", "same")["training"] == row(root, "base", "0", "first")["training"]
    assert row(root, "base", "0", "random")["training"] == row(root, "base", "0", "first")["training"]
    assert row(root, "base", "0", "floor")["training"] == row(root, "logged", "0", "floor")["training"]
    assert row(root, "base", "0", "floor")["training"] != row(root, "base", "1", "floor")["training"]
    trainings = {r["training"] for r in rows(root)} - {None}
    assert {path.name for path in (root / "trainings").iterdir()} == trainings
    assert len(trainings) == 10


def test_an_arm_with_too_few_pairs_is_null_with_its_reason(finished: Path) -> None:
    found = row(finished / "done", "base", "0", "strict")
    assert found["reason"] == "kept 0 of 4 wanted"
    assert [found[key] for key in ("pairs", "steps", "training", "correct", "n", "accuracy")] == [None] * 6
    assert (found["criterion"], found["candidates"]) == ("ppl_diff-tau1.0001", 20)
    assert "Not trained: strict: replicate 0: kept 0 of 4 wanted" in (finished / "done/results.md").read_text()


def test_a_row_counts_what_the_trained_target_answers(finished: Path, tiny: Tiny) -> None:
    from tuneshift.datafiles import read_items
    from tuneshift.evaluate.tasks import answer_items

    root = finished / "done"
    found = row(root, "logged", "1", "random")
    adapter = root / "trainings" / found["training"] / "adapter"
    weights = Weights(str(tiny.gemma), str(tiny.gemma), adapter=str(adapter))
    engine = open_engine(weights, EngineOptions(load=LoadOptions(dtype="float32")))
    outcomes = answer_items(
        engine,
        read_items(finished / "test.jsonl"),
        fine_tuned=True,
        grade=lambda response, item: {"even": len(response) % 2 == 0},
        metric="even",
        max_new_tokens=24,
        stop=["\n"],
    )
    assert (found["correct"], found["n"]) == (sum(outcome.correct for outcome in outcomes), 11)
    assert found["steps"] == 1


def test_the_outcomes_add_up_to_the_rows(finished: Path) -> None:
    outcomes = rows(finished / "done", "outcomes")
    for one in rows(finished / "done"):
        key = ("generator", "replicate", "arm")
        own = [o["correct"] for o in outcomes if all(o[name] == one[name] for name in key)]
        assert one["n"] == (len(own) or None)
        assert one["accuracy"] == (sum(own) / len(own) if own else None)
    assert len({one["accuracy"] for one in rows(finished / "done")}) > 3  # or the comparisons compare nothing


def test_the_summary_compares_every_arm_with_the_reference(finished: Path) -> None:
    results = read_json(finished / "done/results.json")
    arms = results["cells"]["generator=base"]["arms"]
    assert [name for name, arm in arms.items() if arm["difference"]] == ["same", "random", "original", "bound", "floor"]
    accuracies = [row(finished / "done", "base", replicate, "bound")["accuracy"] for replicate in ("0", "1")]
    first = [row(finished / "done", "base", replicate, "first")["accuracy"] for replicate in ("0", "1")]
    assert arms["bound"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert arms["bound"]["difference"]["value"] == pytest.approx(np.mean(accuracies) - np.mean(first))
    assert (arms["same"]["difference"]["value"], arms["same"]["difference"]["alike"]) == (None, 2)  # the same trainings
    assert (arms["random"]["seeds"], arms["random"]["items"], arms["source"]["seeds"]) == (2, 11, 1)
    compared = [arm["difference"] for cell in results["cells"].values() for arm in cell["arms"].values()]
    adjusted = [one for one in compared if one is not None and one["p"] is not None]
    alike = [one for one in compared if one is not None and one["reason"] == "both train the same targets"]
    assert (len(compared), len(alike), len(adjusted), results["families"]["reference"]) == (
        20,
        4,
        6,
        6,
    )  # `none` at equal size is `random`
    assert all(one["p"] <= one["p_holm"] <= 1 for one in adjusted)
    lowest = min(adjusted, key=lambda one: float(one["p"]))
    assert lowest["p_holm"] == pytest.approx(min(1, 6 * lowest["p"]))


def test_the_notes_tell_cell_replicate_arm_and_time_left(finished: Path) -> None:
    said = [note for note in json.loads((finished / "notes.json").read_text()) if note.startswith("Training ")]
    trainings = [note for note in said if " of 10: " in note]
    assert trainings[0].startswith("Training 1 of 10: generator=base, replicate 0, arm first, ")
    assert len(trainings) == 10
    assert all(re.search(r"; about .*\d (s|min) left$", note) for note in trainings[1:])


def test_the_replicates_of_a_cell_share_the_opened_models(finished: Path) -> None:
    opened = json.loads((finished / "opened.json").read_text())
    assert opened == ["generator=base, replicate 0", "generator=logged, replicate 0"]


def test_there_is_a_figure_for_each_cell(finished: Path) -> None:
    for cell in ("generator=base", "generator=logged"):
        png = (finished / "done/figures" / f"{cell}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        svg = ElementTree.parse(finished / "done/figures" / f"{cell}.svg").getroot()
        assert svg.tag.endswith("svg")


def test_it_tells_first_what_its_questions_can_show(finished: Path) -> None:
    n = row(finished / "done", "base", "0", "source")["n"]
    first = json.loads((finished / "notes.json").read_text())[0]
    assert first == f"With one training an arm: {detectable_sentence(n)}"
    assert {one["chance"] for one in rows(finished / "done")} == {None}  # of one's own questions it is not known


def test_the_table_holds_no_times(finished: Path) -> None:
    assert not {name for name in rows(finished / "done")[0] if "seconds" in name}
    timings = rows(finished / "done", "timings")
    assert all(one["synthesis_seconds"] > 0 for one in timings)
    assert {one["arm"] for one in timings if one["training_seconds"] is None} == {"strict"}


def test_the_results_tell_what_they_were_written_with(finished: Path) -> None:
    found = read_json(finished / "done/results.json")["environment"]
    assert list(found) == ["tuneshift", "python", "platform", "processor", "versions"]  # nothing that moves
    assert (found["tuneshift"], found["python"]) == (tuneshift.__version__, platform.python_version())
    for name in ("torch", "transformers", "peft", "trl"):
        assert found["versions"][name] == importlib.metadata.version(name)


def test_the_page_holds_the_times_and_the_command(finished: Path) -> None:
    page = (finished / "done/results.html").read_text(encoding="utf-8")
    assert "not kept with these results" not in page
    assert f"tuneshift study {finished / 'study.yaml'} --run-dir {finished / 'done'}" in page
    assert "<td>none</td>" in page  # no hosted generator


def test_the_summary_compares_with_the_target_before_and_between_cells(finished: Path) -> None:
    results = read_json(finished / "done/results.json")
    before = row(finished / "done", "logged", "0", "target before")["accuracy"]
    bound = [row(finished / "done", "logged", replicate, "bound")["accuracy"] for replicate in ("0", "1")]
    gain = results["cells"]["generator=logged"]["arms"]["bound"]["gain"]
    assert gain["value"] == pytest.approx(np.mean(bound) - before)
    compared = {one["arm"]: one for one in results["across"]}
    assert {(one["axis"], one["first"], one["level"]) for one in compared.values()} == {("generator", "base", "logged")}
    assert list(compared) == list(STUDY["arms"])
    first = [
        [row(finished / "done", cell, one, "first")["accuracy"] for one in ("0", "1")] for cell in ("base", "logged")
    ]
    assert compared["first"]["value"] == pytest.approx(np.mean(first[1]) - np.mean(first[0]))
    assert compared["floor"]["reason"] == "both train the same targets"
    assert compared["strict"]["reason"] == "no replicate was trained in both"
    assert results["means"] == []  # both cells ask the same
    assert len({one["questions"] for one in results["rows"]}) == 1


# A study that goes on


def refuse(*given: Any, **named: Any) -> Iterator[None]:
    raise AssertionError("a model was opened")


def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "done", tmp_path / "study")
    return tmp_path / "study"


def test_a_finished_study_opens_no_model_and_writes_the_same_tables(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copied(finished, tmp_path)
    for name in [*TABLES, "timings.parquet"]:
        (root / name).unlink()
    for name in ("_opened", "open_plain", "distill_run", "answer_questions"):
        monkeypatch.setattr(study_run, name, refuse)
    assert run_cli("study", str(finished / "study.yaml"), "--run-dir", str(root)) == 0
    for name in [*TABLES, "timings.parquet", "figures/generator=base.png", "figures/generator=base.svg"]:
        assert (root / name).read_bytes() == (finished / "done" / name).read_bytes(), name


def test_another_arm_of_a_finished_study_generates_nothing_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copied(finished, tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.glob("synthesis/*/*/ledger.sqlite")}
    adapters = {path: path.stat().st_mtime_ns for path in root.glob("trainings/*/training.json")}
    assert len(before) == 4
    more = STUDY["arms"] | {"loose": {"criterion": {"name": "high_high", "tau": 1.01}}}
    more["strict"] = {"criterion": "disagree"}
    path = finished / "more.yaml"
    path.write_text(json.dumps(STUDY | {"arms": more}))
    monkeypatch.setattr(study_run, "_opened", refuse)
    assert run_cli("study", str(path), "--run-dir", str(root)) == 0
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.glob("synthesis/*/*/ledger.sqlite")} == before
    assert {p: p.stat().st_mtime_ns for p in adapters} == adapters
    old = {(r["generator"], r["replicate"], r["arm"]): r for r in rows(finished / "done")}
    for one in rows(root):
        key = (one["generator"], one["replicate"], one["arm"])
        if one["arm"] in ("loose", "strict"):
            assert one["n"] == 11, one["reason"]
        else:
            assert one == old[key]


def test_an_arm_that_needs_a_measure_has_it_taken_on_the_candidates_that_are_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copied(finished, tmp_path)
    arms = {(kept := STUDY["reference"]): STUDY["arms"][kept], "lift": {"criterion": "lift", "best": True}}
    path = finished / "measured.yaml"
    path.write_text(json.dumps(STUDY | {"arms": arms}))
    monkeypatch.setattr(study_run, "_write_candidates", refuse)
    assert run_cli("study", str(path), "--run-dir", str(root)) == 0
    assert {one["reason"] for one in rows(root) if one["arm"] == "lift"} == {None}
    for ledger in root.glob("synthesis/*/*/ledger.sqlite"):
        with Ledger(ledger) as measured, Ledger(finished / "done" / ledger.relative_to(root)) as plain:
            candidates = measured.candidates()
            assert [replace(c, measures={}) for c in candidates] == plain.candidates()
            assert {tuple(c.measures) for c in candidates if score_of(c, Criterion("lift")) is not None} == {
                ("logprob_b_f",)
            }


def test_a_measure_of_the_target_is_taken_with_no_other_model_open(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copied(finished, tmp_path)
    arms = {(kept := STUDY["reference"]): STUDY["arms"][kept], "gap": {"criterion": "target_gap", "best": True}}
    path = finished / "gap.yaml"
    path.write_text(json.dumps(STUDY | {"arms": arms}))
    monkeypatch.setattr(study_run, "_opened", refuse)
    opened, original = [], study_run.open_plain
    monkeypatch.setattr(study_run, "open_plain", lambda *given: opened.append(given[1]) or original(*given))
    assert run_cli("study", str(path), "--run-dir", str(root)) == 0
    assert len(opened) == 1  # for all units
    assert {one["reason"] for one in rows(root) if one["arm"] == "gap"} == {None}
    for unit in UNITS:
        assert {tuple(c.measures) for c in candidates(root, *unit) if c.measures} == {("logprob_t_byte",)}


def test_a_budget_holds_for_all_cells_and_replicates_together(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    with MockApi() as api:
        section = {"base_url": api.url, "model": "mock", "api_key": "${TEST_KEY}"}
        axes = {"rate": {"low": {"distill": {"learning_rate": 0.1}}, "high": {}}}
        path = write_study(tmp_path, tiny, axes=axes, arms={"first": {"criterion": "none"}}, candidates=10, size=2)
        config = json.loads((tmp_path / "config.yaml").read_text())

        def run(max_tokens: int | None) -> int:
            generator = {"kind": "chat", "model": "target", "api": {**section, "max_tokens": max_tokens}}
            (tmp_path / "config.yaml").write_text(json.dumps(config | {"generator": generator}))
            return run_cli("study", str(path), "--run-dir", str(tmp_path / "study"))

        assert run(700) == 2
        assert "generator.api.max_tokens = 700 is reached" in capsys.readouterr().err
        ledgers = sorted((tmp_path / "study").glob("synthesis/*/*/ledger.sqlite"))
        assert len(ledgers) == 3  # a unit takes about 110 tokens, and a request up to 500
        spent = api.sent.total()
        assert 0 < spent <= 700
        for path_of_one in ledgers:  # none of them came near by itself
            with Ledger(path_of_one) as ledger:
                usage = ledger.usage()
            assert usage.prompt_tokens + usage.completion_tokens < spent
        assert run(700) == 2  # what the others took is remembered
        assert api.sent.total() == spent
        assert run(None) == 0
        assert api.sent.total() > spent


def test_candidates_of_other_settings_are_not_mixed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(finished, tmp_path)
    path = finished / "larger.yaml"
    path.write_text(json.dumps(STUDY | {"candidates": 40}))
    for arguments in ([], ["--dry-run"]):
        assert run_cli("study", str(path), "--run-dir", str(root), *arguments) == 4
        assert "were written for `candidates: 20`, and the study now says 40" in capsys.readouterr().err


def test_given_pairs_that_the_target_cannot_read_are_left_out_and_counted(finished: Path) -> None:
    long = [{"prompt": "Request: " + "play " * 200, "response": " a"}] * 3
    write_jsonl(finished / "long.jsonl", [*long, *TRAIN[:4]])
    write_jsonl(finished / "longer.jsonl", [*long, *TRAIN[:3]])
    arms = {"first": STUDY["arms"]["first"], "long": {"pairs": "long.jsonl"}, "longer": {"pairs": "longer.jsonl"}}
    path, notes = finished / "unreadable.yaml", Notes()
    path.write_text(json.dumps(STUDY | {"arms": arms}))
    trials = study_run.decide_arms(load_study(path).units[:1], Products(finished / "done"), notes)
    found = {trial.arm: trial for trial in trials}
    assert [asdict(pair) for pair in found["long"].pairs] == TRAIN[:4]
    assert notes.said == [
        "generator=base, replicate 0, arm long: of its pairs, 3 of 7 are too long for the target and left out"
    ]
    expected = "3 of 4 wanted pairs are in the file; 3 of 6 are too long for the target"
    assert (found["longer"].pairs, found["longer"].reason) == ([], expected)


def test_a_dry_run_counts_and_writes_nothing(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    path = write_study(tmp_path, tiny)
    before = set(tmp_path.rglob("*"))
    assert run_cli("study", str(path), "--run-dir", str(tmp_path / "new"), "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(tmp_path.rglob("*")) == before
    assert told["cells"] == ["generator=base", "generator=logged"]
    assert (told["syntheses"], told["syntheses_done"], told["candidates"]) == (4, 0, 80)
    assert (told["trainings_at_most"], told["trainings_done"]) == (28, 0)
    assert told["questions"] == {"generator=base": 11, "generator=logged": 11}
    done = ["--run-dir", str(finished / "done"), "--dry-run", "--json"]
    assert run_cli("study", str(finished / "study.yaml"), *done) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [told[key] for key in ("syntheses_done", "trainings_done", "trainings_at_most")] == [4, 10, 10]


def test_a_dry_run_counts_no_training_that_no_arm_asks_for_any_more(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "smaller.yaml"
    path.write_text(json.dumps(STUDY | {"size": 3}))
    assert run_cli("study", str(path), "--run-dir", str(finished / "done"), "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    # Of each replicate: a choice in both cells, and both cells' originals and seeds, which are alike; the seeds alone
    # are trained on. F has answered other numbers of prompts, so what the four units' `bound` trains is not known.
    assert (told["trainings_done"], told["trainings_at_most"]) == (2, 2 * (2 + 1 + 1) + 4)


def test_a_run_directory_is_not_taken_for_a_study(
    finished: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished / "done/synthesis/generator=base/0"
    assert run_cli("study", str(finished / "study.yaml"), "--run-dir", str(run)) == 2
    assert "holds a run, and a study needs its own" in capsys.readouterr().err
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes.txt").write_text("mine")
    assert run_cli("study", str(finished / "study.yaml"), "--run-dir", str(tmp_path / "taken")) == 2
    assert "holds other files (notes.txt)" in capsys.readouterr().err
    (tmp_path / "taken/notes.txt").rename(tmp_path / "taken/config.yaml")
    assert run_cli("study", str(finished / "study.yaml"), "--run-dir", str(tmp_path / "taken")) == 2
    assert (tmp_path / "taken/config.yaml").read_text() == "mine"


# SIGKILL at random instants


def start(path: Path, root: Path, within: float) -> int | None:
    """Run a study in a child of the fork server and kill it after `within` seconds; return the exit code."""
    arguments = ["study", str(path), "--run-dir", str(root)]
    process = test_kill.SERVER.Process(target=test_kill.child, args=(arguments, f"{root}.log", None))
    process.start()
    process.join(within)
    process.kill()
    process.join()
    return process.exitcode


def test_a_study_that_was_killed_at_random_instants_writes_the_same_tables(tiny: Tiny, tmp_path: Path) -> None:
    test_kill.SERVER.set_forkserver_preload(test_kill.PRELOADED)
    few = {name: STUDY["arms"][name] for name in ("first", "bound", "strict")}
    few["best"] = {"criterion": "ratio", "best": True}
    path = write_study(tmp_path, tiny, axes={}, arms=few, candidates=10, size=2)
    assert start(path, tmp_path / "reference", 240) == 0, (tmp_path / "reference.log").read_text()
    rng, killed = random.Random(7), 0
    for _ in range(60):
        code = start(path, tmp_path / "killed", rng.uniform(0.3, 2.5))
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "killed.log").read_text()
        killed += 1
    else:
        assert start(path, tmp_path / "killed", 240) == 0
    assert killed >= 2
    for name in [*TABLES, "figures/all.png", "figures/all.svg"]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes(), name
    left = [path for path in (tmp_path / "killed").rglob("*.part")]
    assert left == []


def test_a_training_that_cells_share_answers_by_each_cells_own_engine(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"batch": {"large": {}, "single": {"engine": {"batch_size": 1}}}}
    arms = {"original": {"pairs": "train.jsonl"}}
    path = write_study(tmp_path, tiny, axes=axes, replicates=[0], candidates=2, size=2, arms=arms, reference="original")
    opened, original = [], study_run.open_trained

    def recorded(loaded: LoadedConfig, adapter: Path) -> Engine:
        opened.append(loaded.config.engine.batch_size)
        return original(loaded, adapter)

    monkeypatch.setattr(study_run, "open_trained", recorded)
    study_run.run_study(load_study(path), tmp_path / "done")
    assert len(list((tmp_path / "done/trainings").iterdir())) == 1
    assert len(opened) == 2
    assert 1 in opened


# Several processes


class Freeing(Notes):
    """Frees a lock that the test holds as soon as the study waits for it."""

    def __init__(self, lock: Lock) -> None:
        super().__init__()
        self.lock = lock

    def note(self, text: str) -> None:
        super().note(text)
        if text.startswith("Waiting for "):
            self.lock.__exit__()


def small(folder: Path, tiny: Tiny) -> Path:
    few = {name: STUDY["arms"][name] for name in ("first", "bound")}
    return write_study(folder, tiny, axes={}, replicates=[0, 1], arms=few, candidates=10, size=2)


def begun(path: Path, root: Path) -> Path:
    """Return `root` as another process leaves it that has just begun the study."""
    with RunDirectory(root) as directory:
        study_run.describe(load_study(path), directory)
    return root


def test_what_another_process_holds_is_left_to_it_and_waited_for(tiny: Tiny, tmp_path: Path) -> None:
    path, root = small(tmp_path, tiny), tmp_path / "study"
    held = begun(path, root) / "synthesis/all/0"
    notes = Freeing(Lock(held).__enter__())
    study_run.run_study(load_study(path), root, progress=notes)
    told = [re.sub(r"; about .* left$", "", note) for note in notes.said if note.startswith(("Cand", "Train", "Wait"))]
    assert [note for note in told if " of " in note or "Waiting" in note] == [
        "Candidates and answers of the source 1 of 2: all, replicate 1",
        "Training 1 of 2: all, replicate 1, arm first",
        "Training 2 of 2: all, replicate 1, arm bound",
        f"Waiting for other processes, which make what is left: {held}, 1 in all",
        "Candidates and answers of the source 1 of 1: all, replicate 0",
        "Training 1 of 2: all, replicate 0, arm first",
        "Training 2 of 2: all, replicate 0, arm bound",
    ]
    assert {(one["replicate"], one["arm"]) for one in rows(root) if one["n"]} >= {("0", "bound"), ("1", "bound")}


@pytest.mark.parametrize("name", ["_opened", "open_plain"])
def test_no_model_is_opened_for_what_another_process_holds(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root, study = copied(finished, tmp_path), load_study(finished / "study.yaml")
    products = Products(root)
    for path in root.glob("outcomes/*.jsonl"):
        path.unlink()
    monkeypatch.setattr(study_run, name, refuse)
    use = {"_opened": study_run.use_source, "open_plain": study_run.use_target}[name]
    with ExitStack() as stack:
        runs = [stack.enter_context(products.synthesis(unit)) for unit in study.units]
        assert use(study.units, products, Notes()) == [run.path for run in runs]


def test_a_lock_that_was_removed_while_it_was_waited_for_is_taken_anew(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    first, second = Lock(folder).__enter__(), Lock(folder, wait=True)
    waiting = threading.Thread(target=second.__enter__)
    waiting.start()
    time.sleep(0.3)
    shutil.rmtree(folder)
    first.__exit__()
    waiting.join(10)
    with pytest.raises(InUse), Lock(folder):
        pass
    second.__exit__()


def test_what_another_process_made_in_a_new_folder_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = Lock._locked

    def late(lock: Lock) -> int | None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new/ledger.sqlite").write_text("made")  # by one that was first, and is done
        return locked(lock)

    monkeypatch.setattr(Lock, "_locked", late)
    with pytest.raises(KeyError), RunDirectory(tmp_path / "new"):
        raise KeyError
    assert (tmp_path / "new/ledger.sqlite").read_text() == "made"


def test_one_process_at_a_time_pays_a_hosted_generator(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    with MockApi() as api:
        path, root = small(tmp_path, tiny), tmp_path / "study"
        config = json.loads((tmp_path / "config.yaml").read_text())
        section = {"base_url": api.url, "model": "mock", "api_key": "${TEST_KEY}"}
        generator = {"kind": "chat", "model": "target", "api": section}
        (tmp_path / "config.yaml").write_text(json.dumps(config | {"generator": generator}))

        class Watching(Freeing):
            def note(self, text: str) -> None:
                if text.startswith("Waiting for "):
                    assert api.sent.total() == 0
                super().note(text)

        notes = Watching(Lock(begun(path, root) / "synthesis").__enter__())
        study_run.run_study(load_study(path), root, progress=notes)
        assert sum(note.startswith("Waiting for ") for note in notes.said) == 1
        assert api.sent.total() > 0


def test_processes_share_a_study_and_one_that_is_killed_leaves_its_work_to_the_others(
    tiny: Tiny, tmp_path: Path
) -> None:
    test_kill.SERVER.set_forkserver_preload(test_kill.PRELOADED)
    path, root = small(tmp_path, tiny), tmp_path / "shared"
    assert start(path, tmp_path / "reference", 240) == 0, (tmp_path / "reference.log").read_text()
    arguments = ["study", str(path), "--run-dir", str(root)]
    logs = [f"{root}{number}.log" for number in range(3)]
    processes = [test_kill.SERVER.Process(target=test_kill.child, args=(arguments, log, None)) for log in logs]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    first = Path(logs[0])
    while not (first.exists() and "Candidates and answers" in first.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    processes[0].kill()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0], Path(logs[1]).read_text()
    for name in TABLES:
        assert (root / name).read_bytes() == (tmp_path / "reference" / name).read_bytes(), name
    assert sum(Path(log).read_text().count("Training a LoRA on ") for log in logs[1:]) == 4  # each once
    assert list(root.rglob("*.part")) == []


# What is refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reference": "best"}, "`reference` is 'best', but the arms are first"),
        ({"arms": {"first": {"criterion": "none", "pairs": "seeds"}}}, "arms.first: give exactly one of `criterion`"),
        (
            {"arms": {"first": {"criterion": {"name": "none", "tua": 3}}}},
            "first.criterion.tua: unknown key; did you mean `tau`?",
        ),
        ({"arms": {"first": {"criterion": {"tau": 0.5}}}}, "arms.first.criterion.tau: Input should be greater than 1"),
        ({"arms": {"source": {"criterion": "none"}}, "reference": "source"}, "'source' is that of a column or row"),
        ({"axes": {"arm": {"a": {}}}}, "'arm' is that of a column or row"),
        ({"axes": {"chance": {"a": {}}}}, "'chance' is that of a column or row"),
        ({"arms": {"first": {"criterion": "ppl_diff", "best": True}}}, "arm first: `best` needs a criterion that grad"),
        ({"arms": {"first": {"pairs": "seeds", "best": True}}}, "`best` ranks by a `criterion`, and none is given"),
        ({"axes": {"task": {}}}, "the axis 'task' has no level"),
        ({"axes": {"task": {"a/b": {}}}}, "the name 'a/b' has other characters"),
        ({"axes": {"task": {"a": 3}}}, "axes.task.a: Input should be a valid dictionary (got 3)"),
        ({"replicates": [0, 0]}, "replicates: expected different run seeds"),
        ({"candidates": 0}, "candidates: Input should be greater than or equal to 1 (got 0)"),
        ({"seize": 3}, "seize: unknown key; did you mean `size`?"),
        ({"axes": {"task": {"a": {"synthesis": {"demo": 2}}}}}, "task=a, replicate 0: 1 error(s)"),
        ({"axes": {"task": {"a": {"evaluation": None}}}}, "Add an `evaluation` section"),
        (
            {"axes": {"task": {"a": {"evaluation": {"regression": {"data": "test.jsonl"}}}}}},
            "asks no regression questions",
        ),
        (
            {"replicates": {"a": {}, "b": {"evaluation": {"max_new_tokens": 3}}}},
            "its replicates ask different questions",
        ),
    ],
)
def test_a_wrong_study_file_is_refused_with_the_place(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(write_study(tmp_path, tiny, **changes))
    assert expected in str(caught.value)
    assert "study.yaml" in str(caught.value)


def test_a_missing_file_of_an_arm_is_named(tiny: Tiny, tmp_path: Path) -> None:
    path = write_study(tmp_path, tiny)
    (tmp_path / "logged.jsonl").unlink()
    with pytest.raises(DataError, match=r"logged\.jsonl: cannot be read"):
        load_study(path)


def test_seeds_without_responses_cannot_be_an_arm(tiny: Tiny, tmp_path: Path) -> None:
    path = write_study(tmp_path, tiny)
    write_jsonl(tmp_path / "seeds.jsonl", [{"prompt": f"Request: {text}\nIntent:"} for text in CORPUS[:5]])
    with pytest.raises(ConfigError, match="arm floor: 5 of 5 seeds have no response to learn"):
        load_study(path)


def test_seeds_without_responses_cannot_be_demonstrations(tiny: Tiny, tmp_path: Path) -> None:
    arms = {"first": {"criterion": "none"}, "shown": {"criterion": "few_shot_base", "best": True}}
    path = write_study(tmp_path, tiny, arms=arms, reference="first")
    write_jsonl(tmp_path / "seeds.jsonl", [{"prompt": f"Request: {text}\nIntent:"} for text in CORPUS[:5]])
    with pytest.raises(DataError, match="few_shot_base shows B the seeds with their responses"):
        load_study(path)


# Parts


def test_levels_and_replicates_are_laid_over_the_configuration(tiny: Tiny, tmp_path: Path) -> None:
    axes = {
        "rate": {"low": {"distill": {"learning_rate": 0.1}}, "high": {"distill": {"learning_rate": 0.2}}},
        "seeds_file": {"mine": {"seeds": "seeds.jsonl"}},
    }
    arms = {"first": {"criterion": {"tau": 3}}}
    path = write_study(
        tmp_path, tiny, axes=axes, arms=arms, replicates={"a": {"run": {"seed": 5}, "synthesis": {"demos": 2}}}
    )
    units = load_study(path).units
    assert [unit.cell for unit in units] == ["rate=low,seeds_file=mine", "rate=high,seeds_file=mine"]
    config = units[1].loaded.config
    assert (config.distill.learning_rate, config.distill.r, config.run.seed, config.synthesis.demos) == (0.2, 2, 5, 2)
    assert (config.synthesis.target_size, config.synthesis.patience, config.synthesis.complete_scores) == (20, 20, True)
    decided = units[0].arms[0].criterion
    assert decided is not None
    assert (decided.config.criterion.name, decided.config.criterion.tau) == ("none", 3)


def test_candidates_do_not_depend_on_how_a_run_would_choose_among_what_it_keeps(tiny: Tiny, tmp_path: Path) -> None:
    path = write_study(tmp_path, tiny)
    before = [unit.loaded.fingerprint for unit in load_study(path).units]
    settings = json.loads((tmp_path / "config.yaml").read_text())
    settings["synthesis"] |= {"oversample": 2, "select": "balanced"}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    units = load_study(path).units
    assert [unit.loaded.fingerprint for unit in units] == before
    assert limits_of(units[0].loaded, units[0].inputs).target_size == 20
    settings["synthesis"] |= {"seed_share": 0.5}  # what the generator is shown does matter
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    assert load_study(path).units[0].loaded.fingerprint != before[0]


def test_laying_over_merges_sections_and_replaces_the_rest() -> None:
    below = {"criterion": {"name": "ratio", "tau": 2}, "stop": ["a"], "synthesis": {"demos": 3, "per_call": 5}}
    above = {"criterion": "none", "stop": ["b"], "synthesis": {"demos": 4}, "evaluation": None}
    assert lay_over(below, above) == {
        "criterion": {"name": "none", "tau": 2},
        "stop": ["b"],
        "synthesis": {"demos": 4, "per_call": 5},
        "evaluation": None,
    }
    assert below["synthesis"] == {"demos": 3, "per_call": 5}
    assert lay_over({"criterion": "ratio"}, {"criterion": {"tau": 2}}) == {"criterion": {"name": "ratio", "tau": 2}}


def candidate(number: int, ppl_f: float, ppl_b: float, *, finish: Any = "stop") -> Candidate:
    y_f, y_b = (
        Response(f"answer {number}", (1,), (-float(np.log(ppl)),), None, end, False)
        for ppl, end in ((ppl_f, finish), (ppl_b, "stop"))
    )
    return Candidate(f"c{number}", 0, "call", "text", f"prompt {number}", kept=False, reason="", y_f=y_f, y_b=y_b)


POOL = [candidate(n, 1.1 if n % 3 else 4.0, 4.0, finish="length" if n % 10 == 9 else "stop") for n in range(60)]


def test_a_rule_draws_of_those_that_it_keeps_and_equal_rules_draw_alike() -> None:
    chosen = choose_for_arm(POOL, Criterion("ppl_diff"), 5)
    assert isinstance(chosen, list)
    ids = [one.id for one in chosen]
    assert len(set(ids)) == 5
    assert set(ids) <= {one.id for one in POOL if decide(one, Criterion("ppl_diff")).kept}
    assert ids == [one.id for one in POOL if one.id in ids]
    assert choose_for_arm(POOL, Criterion("asymmetric", tau_f=1.5, tau_b=1.5), 5) == chosen  # which keeps the same
    assert choose_for_arm(POOL, Criterion("none", seed=3), 5) == choose_for_arm(POOL, Criterion("random", seed=3), 5)


def test_random_draws_among_all_usable_candidates_whatever_any_rule_says_of_them() -> None:
    drawn: set[str] = set()
    for seed in range(60):
        chosen = choose_for_arm(POOL, Criterion("random", keep_rate=0.01, seed=seed), 5)
        assert not isinstance(chosen, str)
        assert len(chosen) == 5
        assert [int(one.id[1:]) for one in chosen] == sorted(int(one.id[1:]) for one in chosen)
        drawn |= {one.id for one in chosen}
    assert drawn == {f"c{n}" for n in range(60) if n % 10 != 9}
    assert choose_for_arm(POOL, Criterion("random", seed=3), 5) == choose_for_arm(POOL, Criterion("random", seed=3), 5)


def test_all_rules_decide_over_the_candidates_that_both_models_answered() -> None:
    """A rule that does not read B's answer would otherwise choose among more than the control beside it."""
    answered = [replace(one, measures={"vote_5": 1.0}) for one in kept_by_the_rule()]
    silent = [
        replace(one, id=f"silent {one.id}", y_b=replace(one.y_b, text="", token_ids=(), token_logprobs=()))
        for one in answered
        if one.y_b
    ]
    for rule, best in (("vote", True), ("vote", False), ("random", False), ("ppl_diff", False)):
        chosen = choose_for_arm([*silent, *answered], Criterion(rule), len(answered), best=best)
        assert chosen == choose_for_arm(answered, Criterion(rule), len(answered), best=best)
        assert not isinstance(chosen, str)


def test_an_arm_may_choose_evenly_over_the_responses_that_its_rule_keeps() -> None:
    answers = ["common"] * 30 + ["rare"] * 6
    pool = [replace(c, y_f=replace(c.y_f, text=a)) for c, a in zip(kept_by_the_rule(), answers, strict=True) if c.y_f]
    chosen = choose_for_arm(pool, Criterion("ppl_diff"), 12, select="balanced")
    assert isinstance(chosen, list)
    assert [c.y_f.text for c in chosen if c.y_f] == ["common"] * 6 + ["rare"] * 6


def kept_by_the_rule() -> list[Candidate]:
    return [one for one in POOL if decide(one, Criterion("ppl_diff")).kept]


def test_too_few_kept_candidates_are_a_reason() -> None:
    assert choose_for_arm(POOL, Criterion("ppl_diff"), 50) == "kept 36 of 50 wanted"
    assert choose_for_arm(POOL, Criterion("random"), 55) == "kept 54 of 55 wanted"


def test_the_best_by_a_graded_rule_are_taken_in_the_order_in_which_they_were_written() -> None:
    grades = {c.id: grade for c in POOL if (grade := score_of(c, Criterion("ratio"))) is not None}
    chosen = choose_for_arm(POOL, Criterion("ratio", ratio=1e9), 5, best=True)
    assert isinstance(chosen, list)
    ids = [c.id for c in chosen]
    assert ids == [c.id for c in POOL if c.id in ids]
    assert min(grades[name] for name in ids) >= max(grade for name, grade in grades.items() if name not in ids)
    assert choose_for_arm(POOL, Criterion("lift"), 5, best=True) == "graded 0 of 5 wanted"  # nothing was measured
