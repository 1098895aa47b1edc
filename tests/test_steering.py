"""A steered loop, whole, on tiny random models: each choice is explained, and a stopped run makes it again."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, write_jsonl, write_project
from test_transfer import run_cli

from tuneshift.config import load_config
from tuneshift.coverage import coverage, skeleton
from tuneshift.errors import ConfigError
from tuneshift.run.ledger import Ledger
from tuneshift.wiring import limits_of

SYNTHESIS = {"preset": "tuneshift", "target_size": 10, "oversample": 1.5, "back_generation": 0.5}


def project(folder: Path, tiny: Tiny) -> Path:
    config = write_project(folder, tiny, synthesis=SYNTHESIS)
    first, *seeds = [json.loads(line) for line in (folder / "seeds.jsonl").read_text().splitlines()]
    write_jsonl(folder / "seeds.jsonl", [first, *({**seed, "response": " X"} for seed in seeds)])
    return config


@pytest.fixture(scope="module", autouse=True)
def kinds() -> Iterator[None]:
    """Count what random models say as kinds, though they hardly say anything twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuneshift.coverage.MOST_ALONE", 1.0)
        yield


@pytest.fixture(scope="module")
def steered(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steered")
    assert run_cli("transfer", str(project(folder, tiny)), "--run-dir", str(folder / "run")) == 3
    return folder / "run"


def test_the_time_that_probes_took_is_synthesis_time(steered: Path) -> None:
    with Ledger(steered / "ledger.sqlite") as ledger:
        assert ledger.probes()
        assert ledger.seconds()["synthesis"] > sum(one.seconds for one in ledger.rounds())


def test_a_preset_fills_in_what_is_not_given(tmp_path: Path, tiny: Tiny) -> None:
    loaded = load_config(project(tmp_path, tiny))
    section = loaded.config.synthesis
    assert (section.seed_share, section.select) == (0.5, "balanced")
    assert (section.oversample, section.back_generation) == (1.5, 0.5)
    plain = load_config(project(tmp_path, tiny), ["synthesis.preset=paper", "synthesis.oversample=1"])
    assert plain.config.synthesis.select == "first"


def test_keeping_more_than_the_first_pairs_that_are_learnt_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="Set select: balanced or random, or oversample: 1"):
        load_config(project(tmp_path, tiny), ["synthesis.select=first"])


def test_more_are_kept_than_are_learnt_and_the_choice_is_balanced(steered: Path) -> None:
    rows = [json.loads(line) for line in (steered / "dataset/kept.jsonl").read_text().splitlines()]
    with Ledger(steered / "ledger.sqlite") as ledger:
        kept = {c.id: skeleton(c.text, c.y_f.text) for c in ledger.candidates() if c.kept and c.y_f}
    assert len(rows) == 10
    assert len(kept) >= 15
    assert [row["id"] for row in rows] == [name for name in kept if name in {row["id"] for row in rows}]
    before, after = Counter(kept.values()), Counter(kept[row["id"]] for row in rows)
    assert max(after.values()) <= max(before.values())


def test_where_nothing_is_said_twice_no_more_are_kept_than_are_learnt(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneshift.coverage.MOST_ALONE", 0.3)
    config = project(tmp_path, tiny)
    run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run"), "--set", "evaluation=null")
    with Ledger(tmp_path / "run/ledger.sqlite") as ledger:
        reason = ledger.meta("stop_reason")
        assert 10 <= sum(candidate.kept for candidate in ledger.candidates()) < 15
    assert reason is not None
    assert reason.startswith("target_size reached; hardly two responses are alike")


def test_every_kept_pair_tells_its_strategy_and_its_parents(steered: Path) -> None:
    rows = [json.loads(line) for line in (steered / "dataset/kept.jsonl").read_text().splitlines()]
    with Ledger(steered / "ledger.sqlite") as ledger:
        calls = {call.id: call for call in ledger.calls()}
        candidates = {candidate.id: candidate for candidate in ledger.candidates()}
    assert {call.strategy for call in calls.values()} == {"forward", "backward"}
    own = {call.cue for call in calls.values() if call.strategy == "backward" and call.demos[-1] == "s000"}
    assert len(own) == 1
    assert own.isdisjoint({"X", None})
    for row in rows:
        call = calls[candidates[row["id"]].call_id]
        assert (row["strategy"], row["cue"], row["parents"]) == (call.strategy, call.cue, list(call.demos))
        assert all(parent.startswith("s") or candidates[parent].kept for parent in row["parents"])
    for call in calls.values():
        last = candidates.get(call.demos[-1])
        cue = call.cue if call.demos[-1] == "s000" else "X"  # the first seed has F's own answer
        if last is not None and last.y_f is not None:
            cue = skeleton(last.text, last.y_f.text)
        assert call.cue == (cue if call.strategy == "backward" else None)
        assert call.prompt.endswith(f"- {cue}:") == (call.strategy == "backward")


def test_verdict_reports_and_show_tell_the_coverage_of_what_is_learnt(
    steered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learnt = [json.loads(line)["id"] for line in (steered / "dataset/kept.jsonl").read_text().splitlines()]
    with Ledger(steered / "ledger.sqlite") as ledger:
        found = coverage(ledger.candidates(), ledger.calls(), learnt, ledger.probes())
        kept = sum(candidate.kept for candidate in ledger.candidates())
    assert found is not None
    assert found["probed"]["words"] > 3
    assert (found["of"], found["kept"], found["spread"]["pairs"]) == ("learnt", kept, 10)
    assert sum(row["spread"]["pairs"] for row in found["rounds"] if row["spread"]) == found["loop"]["pairs"] == kept
    assert json.loads((steered / "verdict.json").read_text())["coverage"] == json.loads(json.dumps(found))
    told = f"10 learnt pairs of {kept} kept"
    assert told in (steered / "report.md").read_text()
    assert told in (steered / "report.html").read_text()
    assert run_cli("show", str(steered)) == 0
    assert told in capsys.readouterr().out
    shutil.copytree(steered, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/dataset")  # as before the choice is made
    assert run_cli("show", str(tmp_path / "run")) == 0
    assert f"{kept} kept pairs" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "number"), [("record_calls", 1), ("record_round", 1)])
def test_a_stopped_run_makes_the_same_choices_again(
    steered: Path, tiny: Tiny, tmp_path: Path, method: str, number: int
) -> None:
    config, original, count = project(tmp_path, tiny), getattr(Ledger, method), 0

    def stop_behind(self: Ledger, *arguments: Any) -> None:
        nonlocal count
        original(self, *arguments)
        count += 1
        if count == number + 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, method, stop_behind)
        assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 130
    assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 3
    assert (tmp_path / "run/dataset/kept.jsonl").read_bytes() == (steered / "dataset/kept.jsonl").read_bytes()


def test_the_loop_goes_on_until_the_oversample_is_kept(tmp_path: Path, tiny: Tiny) -> None:
    loaded = load_config(project(tmp_path, tiny))
    assert limits_of(loaded, inputs=None).target_size == 15  # type: ignore[arg-type]  # no prompts from a file
