"""Benchmarks in a whole run, and lm-evaluation-harness on our engines against its own model."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from completions_server import CompletionsServer
from conftest import CORPUS, Tiny, write_jsonl, write_project
from test_benchmarks import BBH_ROWS, GSM8K_ROWS, MMLU_ROWS, bbh_items, gsm8k_items, harness_tasks, mmlu_items
from test_openai_engine import LOAD, open_server, weights
from test_transfer import run_cli

from tuneshift.datafiles import Item
from tuneshift.demo import prepare_models
from tuneshift.engines.hf import HfEngine
from tuneshift.engines.opening import open_proved
from tuneshift.engines.options import EngineOptions
from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.evaluate.benchmarks.harness import ask_through_harness
from tuneshift.evaluate.tasks import Outcome, answer_items
from tuneshift.models import LoadOptions
from tuneshift.run.directory import read_jsonl


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run between tiny models that was evaluated on the held-out half of eight problems of GSM8K's form."""
    folder = tmp_path_factory.mktemp("gsm8k")
    write_jsonl(folder / "eight.jsonl", [{"question": f"what {n}", "answer": f"#### {n}"} for n in range(8)])
    settings = {"task": "gsm8k", "data": "eight.jsonl", "max_new_tokens": 8, "held_out": {"fraction": 0.5}}
    config = write_project(folder, tiny, evaluation=settings)
    assert run_cli("transfer", str(config), "--run-dir", str(folder / "run")) == 3
    return folder / "run"


def test_a_transfer_is_judged_on_a_benchmark(finished: Path) -> None:
    verdict = json.loads((finished / "verdict.json").read_text())
    assert verdict["questions"]["task"] == "gsm8k"
    assert verdict["questions"]["metric"] == "flexible_extract"
    assert verdict["questions"]["stop"] == ["Question:", "</s>", "<|im_end|>"]
    assert verdict["chance"] is None
    assert "free" in verdict["chance_reason"]
    for arm in ("before", "after", "source"):
        assert set(verdict[arm]["by_metric"]) == {"flexible_extract", "strict_match"}
        for rate in verdict[arm]["by_metric"].values():
            assert rate["n"] == verdict[arm]["n"] == 4
            assert rate["interval"]["low"] <= rate["accuracy"] <= rate["interval"]["high"]
    outcomes = read_jsonl(finished / "evaluation/after.jsonl")
    assert all(set(row["graded"]) == {"flexible_extract", "strict_match"} for row in outcomes)
    assert "By strict_match: target before 0 of 4" in (finished / "report.md").read_text()


def evaluate(run: Path, capsys: pytest.CaptureFixture[str], **settings: Any) -> dict[str, Any]:
    """Evaluate a run again, and return the verdict, which is all that stands on stdout."""
    capsys.readouterr()
    code = run_cli("evaluate", str(run), "--set", f"evaluation={json.dumps(settings)}", "--json")
    (line,) = capsys.readouterr().out.splitlines()
    verdict = dict(json.loads(line))
    assert code == (0 if verdict["improved"] else 3)
    return verdict


def test_the_harness_gives_the_same_verdict_as_the_native_grading(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [{"question": f"play {n}", "answer": f"#### {n}"} for n in range(3)]
    data = str(write_jsonl(tmp_path / "three.jsonl", questions))
    navigate = tmp_path / "navigate.json"
    navigate.write_text(json.dumps({"examples": [BBH_ROWS["navigate"], {"input": "stop?", "target": "No"}]}))
    for task, path in (("gsm8k", data), ("bbh", str(navigate))):
        settings = {"task": task, "data": path, "max_new_tokens": 8}
        native = evaluate(finished, capsys, **settings)
        harness = evaluate(finished, capsys, **settings, harness="lm_eval")
        assert native["chance"] == (0.5 if task == "bbh" else None)
        assert harness["questions"]["harness"] == "lm-eval 0.4.13"
        for key in ("before", "after", "source", "chance", "improved", "mcnemar_p"):
            assert harness[key] == native[key]


def test_mmlu_is_judged_by_likelihoods_and_a_stopped_evaluation_goes_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"task": "mmlu", "harness": "lm_eval", "data": str(write_jsonl(tmp_path / "m.jsonl", MMLU_ROWS))}
    verdict = evaluate(finished, capsys, **settings)
    assert verdict["chance"] == 0.25
    assert verdict["before"]["n"] == 3
    assert verdict["before"]["hit_length_limit"] is None
    assert set(verdict["after"]["by_metric"]) == {"acc"}
    folder = Path(verdict["run"])
    rows = read_jsonl(folder / "before.jsonl")
    assert [row["id"] for row in rows] == ["mmlu-00000", "mmlu-00001", "mmlu-00002"]
    assert {row["response"] for row in rows} <= set("ABCD")
    before = (folder / "before.jsonl").stat().st_mtime_ns
    after = (folder / "after.jsonl").read_bytes()
    (folder / "after.jsonl").unlink()  # as if the run had been stopped in this arm
    assert evaluate(finished, capsys, **settings) == verdict
    assert (folder / "before.jsonl").stat().st_mtime_ns == before
    assert (folder / "after.jsonl").read_bytes() == after


def test_a_benchmark_tells_what_the_target_forgot(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "a b", "reference": "c"}])
    other = {"task": "mmlu", "harness": "lm_eval", "data": str(write_jsonl(tmp_path / "m.jsonl", MMLU_ROWS))}
    verdict = evaluate(finished, capsys, data=str(own), regression=other)
    assert (verdict["after"]["n"], verdict["questions"]["task"]) == (1, "jsonl")
    found = verdict["regression"]
    assert (found["before"]["n"], found["after"]["n"], found["chance"]) == (3, 3, 0.25)
    assert (found["questions"]["task"], found["non_inferior"]) == ("mmlu", None)
    written = {path.name for path in Path(verdict["run"]).glob("*.jsonl")}
    assert written == {
        f"{arm}.jsonl" for arm in ("before", "after", "source", "base", "regression_before", "regression_after")
    }


def test_a_benchmarks_questions_that_were_trained_on_are_left_out(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = finished / "dataset/kept.jsonl"
    own = kept.read_text()
    row = json.loads(own.splitlines()[0]) | {"prompt": "Question: play 1\nAnswer:"}
    data = write_jsonl(tmp_path / "q.jsonl", [{"question": f"play {n}", "answer": f"#### {n}"} for n in range(3)])
    try:
        kept.write_text(json.dumps(row) + "\n")
        verdict = evaluate(finished, capsys, task="gsm8k", data=str(data), max_new_tokens=4, harness="lm_eval")
    finally:
        kept.write_text(own)
    assert (verdict["before"]["n"], verdict["excluded_questions"]) == (2, 1)
    rows = read_jsonl(Path(verdict["run"]) / "before.jsonl")
    assert [row["id"] for row in rows] == ["gsm8k-00000", "gsm8k-00002"]


@pytest.mark.parametrize("task", ["gsm8k", "mmlu"])
def test_a_plan_times_the_benchmarks_answers(
    task: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"gsm8k": [{"question": "what", "answer": "#### 3"}], "mmlu": MMLU_ROWS}[task]
    settings: dict[str, Any] = {"task": task, "data": str(write_jsonl(tmp_path / "q.jsonl", rows))}
    settings |= {"max_new_tokens": 8} if task == "gsm8k" else {"harness": "lm_eval"}
    config = write_project(tmp_path, tiny, evaluation=settings)
    assert run_cli("plan", str(config), "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["evaluation_seconds"] > 0


def test_a_question_that_does_not_fit_is_refused_before_the_synthesis(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "q.jsonl", GSM8K_ROWS)
    config = write_project(tmp_path, tiny, evaluation={"task": "gsm8k", "data": "q.jsonl"})
    assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 2
    assert f"{tmp_path / 'q.jsonl'}:1: its" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["gsm8k", "mmlu"])
def test_the_harness_asks_models_behind_a_server(name: str, tiny: Tiny, tmp_path: Path) -> None:
    items = {"gsm8k": gsm8k_items, "mmlu": mmlu_items}[name](tmp_path)
    benchmark = BENCHMARKS[name]
    settings: dict[str, Any] = {"benchmark": benchmark, "metric": benchmark.metrics[0], "max_new_tokens": 4}
    here, _ = open_proved(weights(tiny), EngineOptions(load=LOAD), CORPUS[:3])
    with CompletionsServer(str(tiny.llama), str(tiny.adapter)) as server:
        there = open_server(server, tiny)
        for side in (True, False):
            assert ask_through_harness(there, items, fine_tuned=side, **settings) == ask_through_harness(
                here, items, fine_tuned=side, **settings
            )
        there.close()


@pytest.mark.parametrize(
    ("package", "task", "settings"),
    [
        ("lm_eval", "gsm8k", {"harness": "lm_eval"}),
        ("word2number", "bbh", {"subtask": "object_counting"}),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_remedy(
    package: str, task: str, settings: dict[str, Any], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"gsm8k": GSM8K_ROWS, "bbh": [BBH_ROWS["object_counting"]]}[task]
    data = str(write_jsonl(tmp_path / "q.jsonl", rows))
    config = write_project(tmp_path, tiny, evaluation={"task": task, "data": data, **settings})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package, None)  # as Python sees a package that is not there
        assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 2
    message = capsys.readouterr().err
    assert package in message
    assert "pip install 'tuneshift[eval]'" in message.replace("\n", " ")


# --- against the harness's own model ---

WRITTEN = 24  # tokens that both models write


def by_the_harnesss_own_model(engine: HfEngine, items: list[Item], name: str) -> dict[str, list[dict[str, Any]]]:
    """Return the harness's samples by task, with its own Hugging Face model on the engine's weights."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=engine._base, tokenizer=engine.tokenizer, batch_size=4)
    loaded = {"tasks": harness_tasks(items, name)}
    for task in loaded["tasks"].values():
        if name != "mmlu":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": WRITTEN}, update=True)
    return dict(evaluate(model, loaded, log_samples=True, bootstrap_iters=0)["samples"])


@pytest.mark.real
@pytest.mark.parametrize("name", ["gsm8k", "bbh", "mmlu"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_real_model_gets_the_harnesss_own_scores(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the harness's own model writes the same texts, and every item is graded the same."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    items = {
        "gsm8k": lambda: gsm8k_items(tmp_path),
        "bbh": lambda: [item for subtask in ("navigate", "snarks") for item in bbh_items(tmp_path, subtask)],
        "mmlu": lambda: mmlu_items(tmp_path),
    }[name]()
    model = str(prepare_models() / "SmolLM2-135M-Instruct")
    engine = HfEngine.open(model, load=LoadOptions(dtype="float32"))
    benchmark, metric = BENCHMARKS[name], BENCHMARKS[name].metrics[0]
    limit = benchmark.max_new_tokens if name == "mmlu" else WRITTEN
    ours = ask_through_harness(
        engine, items, fine_tuned=False, benchmark=benchmark, metric=metric, max_new_tokens=limit
    )
    if benchmark.grade is not None:
        settings: dict[str, Any] = {"grade": benchmark.grade, "metric": metric, "stop": benchmark.stop}
        native = answer_items(engine, items, fine_tuned=False, max_new_tokens=WRITTEN, **settings)
        assert [asdict(outcome) for outcome in native] == [asdict(outcome) for outcome in ours]
    samples = by_the_harnesss_own_model(engine, items, name)
    compared = 0
    for task, outcomes in outcomes_by_task(ours, items, name).items():
        for sample in samples[task]:
            outcome = outcomes[sample["doc_id"]]
            (found,) = sample["metrics"]
            grading = metric if name == "mmlu" else sample["filter"].replace("-", "_")
            assert outcome.graded[grading] == bool(sample[found] == 1)
            if name != "mmlu":
                assert sample["resps"][0][0] == outcome.response
            compared += 1
    assert compared == len(items) * len(benchmark.metrics)


def outcomes_by_task(outcomes: list[Outcome], items: list[Item], name: str) -> dict[str, list[Outcome]]:
    grouped: dict[str, list[Outcome]] = {}
    for item, outcome in zip(items, outcomes, strict=True):
        grouped.setdefault(BENCHMARKS[name].harness_task(item), []).append(outcome)
    return grouped
