"""Experiment trackers: what they get, from whom, and that nothing else goes out."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import Tiny, write_project
from test_transfer import files, run_cli
from test_watching import Seen, add_round

from tuneshift import tracking
from tuneshift.errors import ConfigError, Interrupted
from tuneshift.progress import SILENT
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger
from tuneshift.tracking import TRACKERS, check_trackers, followed, verdict_numbers

INSTALLED = {name: importlib.util.find_spec(name) is not None for name in TRACKERS}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard itself reads: by name, the value of each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    tags = reader.Tags()
    assert not any(tags[kind] for kind in tags if kind not in ("scalars", "tensors")), tags  # no text, no graph
    assert not tags["tensors"]
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in tags["scalars"]}


@pytest.fixture(scope="module")
def tracked(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    config = write_project(folder, tiny, run={"trackers": ["tensorboard"]})
    assert run_cli("transfer", str(config), "--run-dir", str(folder / "run")) == 3
    return folder / "run"


def test_tensorboard_reads_back_what_the_run_recorded(tracked: Path) -> None:
    found = scalars(tracked / "tensorboard")
    with Ledger(tracked / "ledger.sqlite", read_only=True) as ledger:
        candidates, rounds = ledger.candidates(), len(ledger.rounds())
    for index in range(rounds):
        so_far = [candidate for candidate in candidates if candidate.round <= index]
        kept = sum(candidate.kept for candidate in so_far)
        assert found["synthesis/kept"][index] == (index + 1, kept)
        assert found["synthesis/candidates"][index] == (index + 1, len(so_far))
        assert found["synthesis/keep_rate"][index] == (index + 1, pytest.approx(kept / len(so_far)))
    training = json.loads((tracked / "training.json").read_text())
    per_epoch = training["steps"] // 2
    losses = [(per_epoch, training["losses"][0]), (training["steps"], training["losses"][1])]
    assert found["distillation/loss"] == [(step, pytest.approx(loss, abs=1e-4)) for step, loss in losses]
    assert found["distillation/learning_rate"][0][1] > 0
    verdict = json.loads((tracked / "verdict.json").read_text())
    for arm in ("before", "after", "source", "base"):
        assert found[f"evaluation/accuracy_{arm}"] == [(1, pytest.approx(verdict[arm]["accuracy"]))]
    assert found["evaluation/mcnemar_p"] == [(1, pytest.approx(verdict["mcnemar_p"]))]
    assert ("evaluation/recovery" in found) == (verdict["recovery"] is not None)


def test_no_text_of_the_run_is_in_the_event_files(tracked: Path) -> None:
    with Ledger(tracked / "ledger.sqlite", read_only=True) as ledger:
        texts = [c.text.encode() for c in ledger.candidates() if len(c.text) > 8]
        settings = json.loads(ledger.meta("settings") or "")
    content = b"".join(path.read_bytes() for path in (tracked / "tensorboard").iterdir())
    hidden = [*texts, str(tracked).encode(), settings["source"]["base"].encode(), b"Request:"]
    assert texts
    assert not [text for text in hidden if text in content]


def test_without_trackers_a_run_has_no_tracker_and_no_name_for_one(tiny: Tiny, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with run, Ledger(run.ledger) as ledger:
        run.keep()
        with followed(SILENT, (), run, ledger) as progress:
            progress.log("synthesis", 1, {"kept": 1})
        assert ledger.meta("tracked") is None
    assert files(run.path) == {".lock", "ledger.sqlite"}


def test_a_run_that_is_continued_goes_on_in_the_same_place(tmp_path: Path) -> None:
    run, names = RunDirectory(tmp_path / "run"), []
    seen = Seen()

    def tracker(folder: Path, identity: str, end: ExitStack) -> Any:
        names.append(identity)
        return lambda numbers, step: None

    with run, Ledger(run.ledger) as ledger, pytest.MonkeyPatch.context() as patch:
        run.keep()
        patch.setitem(TRACKERS, "tensorboard", tracker)
        for _ in range(2):
            with followed(seen, ["tensorboard"], run, ledger) as progress, progress.stage("S", total=1, unit="u"):
                add_round(ledger, len(ledger.rounds()), 1, 1)
    assert len(set(names)) == 1
    assert len(seen.stages) == 4


class Away(ModuleType):
    """Stands for wandb and mlflow: takes any call and notes what it was told, all of it by name."""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            told.append((name, named))
            return [] if name == "search_runs" else self

        return call


told: list[tuple[str, dict[str, Any]]] = []


@pytest.mark.parametrize("called", ["bob's", "lr=1e-3:v2", "50%"])
def test_a_folder_may_be_called_anything(tmp_path: Path, called: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told.clear()
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, Away(name))
        with ExitStack() as end:
            TRACKERS[name](tmp_path / called, "0123abcd", end)
    by_call = dict(told)
    assert by_call["init"]["id"] == "0123abcd"
    assert by_call["search_runs"]["filter_string"] == "tags.tuneshift = '0123abcd'"
    assert by_call["start_run"]["tags"] == {"tuneshift": "0123abcd"}
    assert by_call["init"]["name"] == by_call["start_run"]["run_name"] == f"{called}-0123abcd"


@pytest.mark.parametrize("when", ["open", "log", "end"])
def test_a_tracker_that_fails_is_told_once_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    run, seen, calls = RunDirectory(tmp_path / "run"), Seen(), []

    def fail(*_: object) -> None:
        calls.append(when)
        raise ConnectionError("the server\nis away")

    def failing(folder: Path, identity: str, end: ExitStack) -> Any:
        end.callback(fail)
        if when == "open":
            fail()
        return fail if when == "log" else lambda numbers, step: None

    monkeypatch.setitem(TRACKERS, "wandb", failing)
    whole: list[int] = []
    monkeypatch.setitem(TRACKERS, "tensorboard", lambda *_: lambda numbers, step: whole.append(step))
    with run, Ledger(run.ledger) as ledger:
        run.keep()
        with followed(seen, ["wandb", "tensorboard"], run, ledger) as progress:
            for step in (1, 2, 3):
                progress.log("synthesis", step, {"kept": 1})
    assert whole == [1, 2, 3]  # the other tracker gets everything
    assert len(calls) == (1 if when == "end" else 2)  # the end is told even to one that failed
    (note,) = seen.notes
    assert "wandb failed" in note
    assert "ConnectionError: the server is away" in note


def test_an_interrupted_run_ends_though_a_tracker_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(numbers: object, step: int) -> None:
        raise Interrupted

    monkeypatch.setitem(TRACKERS, "wandb", lambda *_: interrupted)
    run = RunDirectory(tmp_path / "run")
    with (
        run,
        Ledger(run.ledger) as ledger,
        pytest.raises(Interrupted),
        followed(SILENT, ["wandb"], run, ledger) as progress,
    ):
        progress.log("synthesis", 1, {"kept": 1})


def test_what_was_not_measured_is_left_out_and_not_zero(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = RunDirectory(tmp_path / "run")
    with run, Ledger(run.ledger) as ledger:
        run.keep()
        with followed(SILENT, ["tensorboard"], run, ledger) as progress:
            progress.log("evaluation", 1, {"recovery": None, "difference": 0.0})
    assert scalars(run.path / "tensorboard") == {"evaluation/difference": [(1, 0.0)]}


def test_a_verdict_without_questions_has_no_numbers() -> None:
    arms = dict.fromkeys((*tracking.ARMS, "mcnemar_p", "recovery"))
    assert set(verdict_numbers({"improved": None, **arms}).values()) == {None}


OFFLINE = {
    "wandb": {"WANDB_MODE": "offline"},
    "mlflow": {"MLFLOW_TRACKING_URI": "file:{folder}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"},
    "trackio": {"TRACKIO_DIR": "{folder}/trackio", "HF_HUB_OFFLINE": "1"},
}


@pytest.mark.parametrize("name", OFFLINE)
def test_a_tracker_without_a_network_holds_the_numbers_of_both_parts_of_a_run(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in OFFLINE[name].items():
        monkeypatch.setenv(key, value.format(folder=tmp_path))
    pytest.importorskip(name)  # which may read the environment
    run = RunDirectory(tmp_path / "the-run")
    with run, Ledger(run.ledger) as ledger:
        run.keep()
        for part in ("synthesis", "distillation"):
            with followed(SILENT, [name], run, ledger) as progress:
                for step in (1, 2):
                    progress.log(part, step, {"value": step + 0.5, "missing": None})
    assert capsys.readouterr().out == ""
    if name == "mlflow":
        import mlflow

        (stored,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
        found = {
            metric: [(m.step, m.value) for m in mlflow.MlflowClient().get_metric_history(stored.info.run_id, metric)]
            for metric in stored.data.metrics
        }
        assert found == {f"{part}/value": [(1, 1.5), (2, 2.5)] for part in ("synthesis", "distillation")}
        return
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".wandb", ".db"))
    assert content.count(b"synthesis/value") >= 2
    assert content.count(b"distillation/value") >= 2
    assert b"missing" not in content
    own = [str(tmp_path), sys.executable, "requirements.txt"]
    assert not [text for text in own if text.encode() in content]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if INSTALLED[name]:
        pytest.skip(f"{name} is installed")
    config = write_project(tmp_path, tiny, run={"trackers": [name]})
    assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 2
    assert f"run.trackers: {name} is not installed. Run: pip install {name}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_trackers_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if INSTALLED["wandb"]:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="wandb is not installed"):
        check_trackers(["wandb"])


def test_trls_own_setting_leads_to_ours(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_project(tmp_path, tiny, distill={"trainer_args": {"report_to": "tensorboard"}})
    assert run_cli("plan", str(config)) == 2
    assert "report_to has a setting of its own. Set run.trackers." in capsys.readouterr().err


@pytest.mark.parametrize("value", ["[comet]", "all", "{tensorboard: true}"])
def test_an_unknown_tracker_is_refused(
    tiny: Tiny, tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_project(tmp_path, tiny)
    assert run_cli("plan", str(config), "--set", f"run.trackers={value}") == 2
    assert "run.trackers" in capsys.readouterr().err
