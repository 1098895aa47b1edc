"""The configurations of the paper's tables, read as a user's are, on tiny models and rows in place of the real ones."""

from __future__ import annotations

import gzip
import json
import re
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from conftest import Tiny, write_jsonl
from test_mbpp import TASKS as PLUS_TASKS
from test_transfer import run_cli

from tuneshift.config import load_config
from tuneshift.datafiles import Item
from tuneshift.errors import DataError
from tuneshift.evaluate.benchmarks import base
from tuneshift.evaluate.benchmarks.bbh import SUBTASKS
from tuneshift.evaluate.benchmarks.mmlu import SUBJECTS
from tuneshift.preflight import read_inputs
from tuneshift.sections.evaluation import EvaluationSection
from tuneshift.study.grid import load_study

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs/paper"
STUDIES = {path.name for path in FOLDER.glob("table*.yaml")}
PLUS_ROWS = [row for row in PLUS_TASKS if row["task_id"] in ("Mbpp/11", "Mbpp/12", "Mbpp/558")]
"""Two tasks of MBPP's test split, and one of another."""
TARGETS = {
    "boolean_expressions": "True", "dyck_languages": ")", "formal_fallacies": "valid", "multistep_arithmetic_two": "3",
    "object_counting": "3", "sports_understanding": "yes", "web_of_lies": "Yes", "navigate": "Yes",
    "causal_judgement": "Yes", "word_sorting": "a b",
}  # fmt: skip


def gsm8k(number: int) -> dict[str, Any]:
    return {"question": f"What is {number} and 1?", "answer": f"It is {number + 1}.\n#### {number + 1}"}


def mmlu(number: int) -> dict[str, Any]:
    return {"question": f"Which is {number}?", "choices": ["a", "b", "c", "d"], "answer": 1, "subject": SUBJECTS[0]}


def mbpp(number: int) -> dict[str, Any]:
    code = f"def add_{number}(x):\r\n    return x + {number}"
    test = f"assert add_{number}(1) == {number + 1}"
    return {
        "task_id": number, "text": f"Write a function to add {number}.", "code": code, "test_list": [test],
        "test_setup_code": "", "challenge_test_list": [],
    }  # fmt: skip


def bbh(subtask: str, number: int) -> dict[str, str]:
    target = TARGETS.get(subtask, "(A)")
    options = "\nOptions:\n(A) one\n(B) two" if target == "(A)" else ""
    return {"input": f"Case {number}?{options}\nList: b a", "target": target}


def hub_rows(benchmark: base.Benchmark, part: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Stand for the Hub, which no test reaches."""
    rows: dict[str | None, list[dict[str, Any]]] = {
        "openai/gsm8k": [gsm8k(number) for number in range(100, 104)],
        "cais/mmlu": [mmlu(number) for number in range(100, 104)],
    }
    found = rows.get(benchmark.hub and benchmark.hub[0]) or [bbh(str(part), number) for number in range(20)]
    return [("Hub", row) for row in found]


@pytest.fixture(scope="module")
def paper(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the configurations, with data made by their script and tiny models in the large ones' place."""
    root = tmp_path_factory.mktemp("paper")
    data, folder = root / "downloads", root / "configs"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("data"))
    for name in ("gsm8k", "mbpp", "mmlu", "bbh"):
        (data / name).mkdir(parents=True)
    write_jsonl(data / "gsm8k/train.jsonl", [gsm8k(number) for number in range(8)])
    write_jsonl(data / "mmlu/auxiliary_train.jsonl", [mmlu(number) for number in range(8)])
    write_jsonl(data / "mbpp/mbpp.jsonl", [mbpp(number) for number in (11, 12, 510, *range(601, 609))])
    write_jsonl(data / "MbppPlus.jsonl", PLUS_ROWS)
    for subtask in SUBTASKS:
        examples = [bbh(subtask, number) for number in range(20)]
        (data / "bbh" / f"{subtask}.json").write_text(json.dumps({"examples": examples}))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("gsm8k", "mbpp", "mmlu", "bbh"):
            patch.setattr(sys, "argv", ["prepare.py", name, "any/base", "--data", str(data), "--data-only"])
            runpy.run_path(str(folder / "prepare.py"), run_name="__main__")
    large = {
        r"adapter: \./data/[\w/.-]+": f"adapter: {tiny.adapter}",
        r"\{(model|base): (meta-llama|google|Qwen)/[\w.-]+": rf"{{\1: {tiny.llama}",
        r"substitute_base: [\w/.-]+": f"substitute_base: {tiny.llama}",
    }
    for path in folder.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        for pattern, tiny_one in large.items():
            text = re.sub(pattern, tiny_one, text)
        path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(base, "_hub_rows", hub_rows)
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")


@pytest.mark.parametrize("name", sorted({path.name for path in FOLDER.glob("*.yaml")} - STUDIES))
def test_a_configuration_of_the_paper_has_all_that_a_run_reads(paper: Path, name: str) -> None:
    loaded = load_config(paper / name)
    inputs = read_inputs(loaded.config, folder=loaded.folder)
    assert len(inputs.seeds) == 5
    assert inputs.items
    assert not {seed.prompt for seed in inputs.seeds} & {item.prompt for item in inputs.items}
    distill, loop = loaded.config.distill, loaded.config.synthesis
    assert (distill.r, distill.lora_alpha, distill.lora_dropout, distill.learning_rate) == (8, 16, 0.05, 2e-5)
    assert (distill.num_train_epochs, distill.target_modules) == (20, ("q_proj", "v_proj"))
    assert (loop.target_size, loop.demos, loop.per_call, loop.decoding) == (250, 5, 20, "faithful")
    assert (loaded.config.criterion.name, loaded.config.criterion.tau) == ("ppl_diff", 1.5)
    assert (loaded.config.generator.api is None) == ("qwen" in name)
    if name.startswith("mbpp"):
        asked_as_evalplus_does(loaded.config.evaluation, inputs.items, metric="plus" if "plus" in name else "base")


def asked_as_evalplus_does(evaluation: EvaluationSection, items: Sequence[Item], *, metric: str) -> None:
    """Check that the test split's tasks alone are asked, and by which metric the verdict goes."""
    assert (evaluation.task, evaluation.metric_name) == ("mbpp_plus", metric)
    assert [item.doc["task_id"] for item in items] == ["Mbpp/11", "Mbpp/12"]


def test_mbpp_and_mbpp_plus_are_two_readings_of_one_run(paper: Path) -> None:
    for pair in ("llama", "gemma"):
        base, plus = (load_config(paper / f"{task}_{pair}.yaml").config for task in ("mbpp", "mbpp_plus"))
        assert base.model_copy(update={"evaluation": plus.evaluation}) == plus
        assert base.evaluation.model_copy(update={"metric": "plus"}) == plus.evaluation


@pytest.mark.parametrize(("name", "cells"), [("table3_llama", 27), ("table3_gemma", 27), ("table8", 1), ("table9", 4)])
def test_a_study_of_the_paper_has_all_that_it_reads(
    paper: Path, name: str, cells: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = load_study(paper / f"{name}.yaml")
    assert run_cli("study", str(study.path), "--run-dir", str(tmp_path / "study"), "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (len(told["cells"]), told["syntheses"], told["pairs_per_training"]) == (cells, 3 * cells, 250)
    assert told["trainings_at_most"] == 3 * cells * len(told["arms"])
    assert not (tmp_path / "study").exists()
    for unit in study.units:
        assert unit.inputs.items
        assert not {seed.prompt for seed in unit.inputs.seeds} & {item.prompt for item in unit.inputs.items}
        if unit.levels.get("row", "").startswith("mbpp"):
            asked_as_evalplus_does(unit.loaded.config.evaluation, unit.inputs.items, metric="base")


def test_mbpp_plus_is_what_evalplus_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = runpy.run_path(str(FOLDER / "prepare.py"), run_name="prepare")["write_mbpp_plus"]
    published = write_jsonl(tmp_path / "published.jsonl", PLUS_ROWS).read_bytes()
    (tmp_path / "published.jsonl.gz").write_bytes(gzip.compress(published))
    for name in ("published.jsonl", "published.jsonl.gz"):
        monkeypatch.setattr("evalplus.data.mbpp._ready_mbpp_plus_path", lambda name=name: str(tmp_path / name))
        path = tmp_path / f"from_{name}" / "MbppPlus.jsonl"
        write(path, tmp_path / "without")
        assert path.read_bytes() == published
    path.write_bytes(b"mine")
    write(path, None)
    assert path.read_bytes() == b"mine"


def test_mbpp_plus_tells_what_to_do_where_it_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline() -> str:
        raise URLError("no network")

    write = runpy.run_path(str(FOLDER / "prepare.py"), run_name="prepare")["write_mbpp_plus"]
    monkeypatch.setattr("evalplus.data.mbpp._ready_mbpp_plus_path", offline)
    with pytest.raises(SystemExit, match=r"no network.*docs/sandbox.md.*or put MbppPlus\.jsonl of MBPP\+ v0\.2\.0"):
        write(tmp_path / "MbppPlus.jsonl", None)
    (tmp_path / "MbppPlus.jsonl").write_text('{"task_id": "Mbpp/11"}\n')
    with pytest.raises(DataError, match="A question has"):
        write(tmp_path / "data/MbppPlus.jsonl", tmp_path)
    assert not (tmp_path / "data").exists()


def test_every_table_of_the_paper_has_its_configurations() -> None:
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\(\.\./configs/paper/(\w+\.yaml)\)", page))
    parts = {"bbh_llama.yaml", "bbh_gemma.yaml"}  # which the studies of Table 3 start from
    assert linked | parts == {path.name for path in FOLDER.glob("*.yaml")}
    assert len(re.findall(r"^\| \d ", page, re.MULTILINE)) == 9
