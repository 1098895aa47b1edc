"""The doctor: what agrees is said to agree, what does not is found, and what cannot be compared is not made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from completions_server import BASE, TUNED, CompletionsServer
from conftest import Tiny, write_project
from test_transfer import run_cli

from tuneshift.config import load_config
from tuneshift.criteria import decide
from tuneshift.doctor import FLIPS, PAIRS, Diagnosis, examine
from tuneshift.engines.hf import HfEngine
from tuneshift.engines.openai import OpenAIEngine


def diagnosis(folder: Path, tiny: Tiny, **sections: Any) -> Diagnosis:
    return examine(load_config(write_project(folder, tiny, **sections)))


def served(server: CompletionsServer) -> dict[str, Any]:
    sides = {"base": {"base_url": server.url, "model": BASE}, "fine_tuned": {"base_url": server.url, "model": TUNED}}
    return {"kind": "openai", "batch_size": 4, **sides}


def test_transformers_agrees_with_itself(tiny: Tiny, tmp_path: Path) -> None:
    found = diagnosis(tmp_path, tiny)
    assert found.agrees
    assert found.mean_difference is not None
    assert found.mean_difference < 1e-4
    assert found.flips == []
    assert 0 < found.decisions <= PAIRS // 2  # no rule judges an answer that is empty or hit the limit
    assert PAIRS // 2 < found.pairs <= PAIRS  # an empty answer cannot be scored
    assert found.canary["adapter_effect"] > 0.1


def test_a_server_that_serves_the_same_models_agrees(tiny: Tiny, tmp_path: Path) -> None:
    with CompletionsServer(str(tiny.llama), str(tiny.adapter)) as server:
        found = diagnosis(tmp_path, tiny, engine=served(server))
    assert found.agrees
    assert found.engine["engine"] == "openai"
    assert found.canary["reference_gap"] < 1e-4


@pytest.mark.parametrize("engine", [HfEngine, OpenAIEngine], ids=["hf", "openai"])
def test_an_engine_whose_scores_are_off_is_found_out(
    engine: Any, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault that begins after the proof: every score of y_b is too low, so that it passes tau."""
    original = engine.score

    def off(self: Any, requests: Any, *, fine_tuned: bool) -> Any:
        scores = original(self, requests, fine_tuned=fine_tuned)
        wrong = (
            fine_tuned and len(requests) > 6 and getattr(self, "_batch_size", 4) != 1
        )  # not the reference, not the proof
        return [tuple(score - 3 for score in row) for row in scores] if wrong else scores

    monkeypatch.setattr(engine, "score", off)
    with CompletionsServer(str(tiny.llama), str(tiny.adapter)) as server:
        sections = {"engine": served(server) if engine is OpenAIEngine else {"batch_size": 4}}
        config = write_project(tmp_path, tiny, criterion={"name": "ppl_diff", "tau": 100}, **sections)
        assert run_cli("doctor", str(config), "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"] is False
    assert found["mean_difference"] > 0.5
    assert found["flip_rate"] == len(found["flips"]) / found["decisions"]
    assert found["flip_rate"] > FLIPS
    assert {flip["transformers"]["reason"] for flip in found["flips"]} == {"low-low"}
    assert found["reason"].startswith("does not agree")


def test_a_black_box_without_weights_is_not_compared(tiny: Tiny, tmp_path: Path) -> None:
    with CompletionsServer(str(tiny.llama), str(tiny.adapter)) as server:
        found = diagnosis(tmp_path, tiny, source={"base": str(tiny.llama), "adapter": None}, engine=served(server))
    assert (found.agrees, found.mean_difference, found.flip_rate) == (None, None, None)
    assert "source.adapter" in found.reason
    assert found.canary["scoring_gap"] < 1e-4


def test_answers_that_no_rule_judges_are_no_agreement(tiny: Tiny, tmp_path: Path) -> None:
    found = diagnosis(tmp_path, tiny, synthesis={"max_new_tokens": 1})
    assert (found.agrees, found.decisions, found.flip_rate) == (None, 0, None)
    assert "synthesis.max_new_tokens" in found.reason


def test_a_rule_that_looks_at_no_perplexity_is_compared_by_the_papers(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random rule never changes its mind, so it would agree with anything."""
    asked = []
    monkeypatch.setattr("tuneshift.doctor.decide", lambda c, rule: (asked.append(rule.name), decide(c, rule))[1])
    for rule in ("random", "vote", "high_low"):
        diagnosis(tmp_path, tiny, criterion={"name": rule})
    assert list(dict.fromkeys(asked)) == ["none", "ppl_diff", "high_low"]
