"""Prompts that the user already has, in place of a generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CORPUS, Tiny, write_jsonl, write_project
from test_transfer import run_cli

from tuneshift.config import load_config
from tuneshift.datafiles import read_prompts
from tuneshift.errors import ConfigError, DataError, Interrupted
from tuneshift.preflight import read_inputs
from tuneshift.prompts.listed import ListedPrompts
from tuneshift.prompts.stopping import Limits, next_calls, stop_reason
from tuneshift.report.card import read_facts
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger, RoundSummary
from tuneshift.run.records import Candidate
from tuneshift.run.stored import counts_eos

TEMPLATE = "Request: {text}\nIntent:"
WORDS = ["play", "book", "rate", "add", "find", "jazz", "table", "novel", "song", "movie", "boston", "tonight"]
TEXTS = [f"{one} {other}" for one in WORDS for other in WORDS if one < other][:40]


def project(folder: Path, tiny: Tiny, **sections: Any) -> Path:
    write_jsonl(folder / "logged.jsonl", [{"prompt": TEMPLATE.replace("{text}", text)} for text in TEXTS])
    return write_project(folder, tiny, generator={"kind": "file", "prompts": "logged.jsonl"}, **sections)


def drawn(run: Path) -> list[str]:
    with Ledger(run / "ledger.sqlite") as ledger:
        return [candidate.text for candidate in ledger.candidates()]


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that uses the whole file up."""
    folder = tmp_path_factory.mktemp("listed")
    config = project(folder, tiny, synthesis={"target_size": 200, "per_call": 3})
    assert run_cli("transfer", str(config), "--run-dir", str(folder / "run")) == 3
    return folder


def test_every_prompt_is_drawn_once_and_the_loop_says_why_it_ended(finished: Path) -> None:
    assert sorted(drawn(finished / "run")) == sorted(TEXTS)
    assert drawn(finished / "run") != TEXTS
    with Ledger(finished / "run/ledger.sqlite") as ledger:
        assert ledger.meta("stop_reason") == "generator.prompts used up"
        calls = ledger.calls()
    assert [len(call.raw) for call in calls] == [3] * 13 + [1]
    assert {(call.prompt, call.demos, call.generated_tokens) for call in calls} == {("", (), 0)}
    assert "generator.model" not in json.loads((finished / "run/manifest.json").read_text())["models"]


def test_what_a_variable_stood_for_is_what_the_run_tells(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project(tmp_path, tiny, synthesis={"target_size": 4}, criterion={"count_eos": "${COUNT_EOS}"})
    config.write_text(config.read_text().replace('"kind": "file"', '"kind": "${KIND}"'))
    monkeypatch.setenv("KIND", "file")
    monkeypatch.setenv("COUNT_EOS", "false")
    run = tmp_path / "run"
    assert run_cli("transfer", str(config), "--run-dir", str(run)) == 3
    monkeypatch.delenv("KIND")
    with Ledger(run / "ledger.sqlite") as ledger:
        assert json.loads(ledger.meta("settings") or "")["generator"]["kind"] == "${KIND}"
        assert counts_eos(ledger) is False
        assert read_facts(RunDirectory(run), ledger, {}).own_prompts


def test_a_run_that_was_stopped_draws_the_prompts_that_were_left(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Ledger.record_round

    def record_round(self: Ledger, summary: RoundSummary, candidates: Any) -> None:
        if summary.round == 2:
            raise Interrupted  # the calls of the round are recorded, the round is not
        original(self, summary, candidates)

    run = finished / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record_round", record_round)
        assert run_cli("transfer", str(finished / "config.yaml"), "--run-dir", str(run)) == 130
    assert len(drawn(run)) == 12
    assert run_cli("transfer", str(finished / "config.yaml"), "--run-dir", str(run)) == 3
    assert drawn(run) == drawn(finished / "run")
    assert (run / "dataset/kept.jsonl").read_bytes() == (finished / "run/dataset/kept.jsonl").read_bytes()


def test_another_seed_draws_in_another_order(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        orders = [
            [text for call in ListedPrompts(TEXTS, 7, seed).write([], round_index=0, calls=9, ledger=ledger)
             for text in call.raw]
            for seed in (0, 0, 1)
        ]  # fmt: skip
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == sorted(TEXTS)  # nine calls were asked for, six had something left


def test_copies_of_seeds_and_of_evaluation_prompts_are_dropped(tiny: Tiny, tmp_path: Path) -> None:
    config = project(tmp_path, tiny, synthesis={"target_size": 1, "max_candidates": 4})
    copies = [CORPUS[0], f"{CORPUS[1]} now", "find jazz", "Find jazz!"]
    write_jsonl(tmp_path / "logged.jsonl", [{"prompt": TEMPLATE.replace("{text}", text)} for text in copies])
    run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run"), "--set", "synthesis.target_size=9")
    with Ledger(tmp_path / "run/ledger.sqlite") as ledger:
        reasons = {candidate.text: candidate.reason for candidate in ledger.candidates()}
    assert (reasons[copies[0]], reasons[copies[1]]) == ("copy of a seed", "in the evaluation set")
    assert "duplicate" in {reasons[copies[2]], reasons[copies[3]]}


@pytest.mark.parametrize(("n", "reason"), [(4, None), (5, "generator.prompts used up")])
def test_the_loop_ends_with_the_last_prompt(n: int, reason: str | None) -> None:
    limits = Limits(target_size=9, max_candidates=100, max_rounds=9, patience=9, supply=5)
    made = [Candidate("id", 0, "call", "text", "prompt", kept=False, reason="high-high")] * n
    assert stop_reason(made, rounds=1, limits=limits) == reason


def test_a_round_asks_for_no_more_prompts_than_there_are() -> None:
    limits = Limits(target_size=90, max_candidates=100, max_rounds=9, patience=9, supply=25)
    assert next_calls([], per_call=10, calls_per_round=8, limits=limits) == 3


def test_a_changed_file_is_refused_when_a_run_goes_on(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    config = project(tmp_path, tiny)
    assert "generator.prompts" in read_inputs(load_config(config).config, folder=tmp_path).digests


def test_a_prompt_outside_the_template_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "logged.jsonl", [{"prompt": "Request: a\nIntent:"}, {"prompt": "b"}])
    with pytest.raises(DataError, match=r"logged\.jsonl:2: the prompt 'b' does not follow prompt_template"):
        read_prompts(path, TEMPLATE)
    assert read_prompts(path, None) == ["Request: a\nIntent:", "b"]
    path.write_text("\n")
    with pytest.raises(DataError, match="no prompt in this file"):
        read_prompts(path, None)


@pytest.mark.parametrize("generator", [{"kind": "file"}, {"prompts": "logged.jsonl"}])
def test_a_file_and_its_kind_go_together(tiny: Tiny, tmp_path: Path, generator: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="`prompts` and `kind: file` go together"):
        load_config(write_project(tmp_path, tiny, generator=generator))


def test_a_plan_probes_the_file(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = project(tmp_path, tiny, criterion={"name": "none"})
    assert run_cli("plan", str(config), "--json", "--set", "synthesis.target_size=900") == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["probe"]["candidates"] == 20
    warned = f"generator.prompts has 40 prompts; about {told['candidates_needed']} are needed."
    assert warned in told["checks"]["warnings"]
