"""The whole command line on tiny random models of two architectures: exact files, exact counts."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CORPUS, Tiny, make_tokenizer, save, write_jsonl, write_project
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tuneshift import cli
from tuneshift.config import LoadedConfig
from tuneshift.configfile import read_mapping
from tuneshift.criteria import TOO_LONG
from tuneshift.errors import MemoryLimitError
from tuneshift.progress import Progress
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger, RoundSummary
from tuneshift.run.records import Candidate

RUN_FILES = {
    ".lock", "config.yaml", "ledger.sqlite", "dataset/kept.jsonl", "dataset/README.md", "training.json", "verdict.json",
    "report.md", "report.html", "manifest.json", "evaluation/before.jsonl", "evaluation/after.jsonl",
    "evaluation/source.jsonl", "evaluation/base.jsonl", "evaluation/asked.json",
    "adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    "adapter/tokenizer.json", "adapter/tokenizer_config.json",
    *(f"figures/{name}_{shade}.{suffix}"
      for name in ("accuracy", "perplexity_f", "perplexity_b", "plane", "map", "map_rounds", "family_seeds",
                   "family_parents", "loss")
      for shade in ("light", "dark") for suffix in ("png", "svg")),
}  # fmt: skip


def run_cli(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tuneshift", *arguments])
        try:
            cli.main()
        except SystemExit as exit_:
            return int(exit_.code or 0)
    return 0


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transfer")
    config = write_project(folder, tiny)
    assert run_cli("transfer", str(config), "--run-dir", str(folder / "run")) == 3  # random models do not improve
    return folder / "run"


def test_a_transfer_makes_exactly_these_files(finished: Path) -> None:
    assert files(finished) == RUN_FILES


def test_counts_agree_between_ledger_dataset_and_verdict(finished: Path) -> None:
    verdict = json.loads((finished / "verdict.json").read_text())
    with Ledger(finished / "ledger.sqlite") as ledger:
        candidates, calls = ledger.candidates(), ledger.calls()
    kept = [candidate for candidate in candidates if candidate.kept]
    rows = [json.loads(line) for line in (finished / "dataset/kept.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert [row["id"] for row in rows] == [candidate.id for candidate in kept[:12]]
    assert verdict["candidates"] == len(candidates) == 5 * len(calls)
    assert verdict["kept"] == len(kept)
    assert sum(verdict["reasons"].values()) == len(candidates)
    assert [verdict[arm]["n"] for arm in ("before", "after", "source", "base")] == [5] * 4
    assert (verdict["regression"], verdict["regression_reason"]) == (None, "no evaluation.regression is configured")
    assert set(verdict["seconds"]) == {"preflight", "synthesis", "distill", "evaluate"}
    assert verdict["peak_memory_bytes"] > 2**20


def test_the_base_answered_wherever_its_answer_could_matter_and_every_response_is_scored(finished: Path) -> None:
    with Ledger(finished / "ledger.sqlite") as ledger:
        answered = [candidate for candidate in ledger.candidates() if candidate.y_f is not None]
    assert answered
    for candidate in answered:
        assert candidate.y_f is not None
        unusable = candidate.y_f.finish_reason == "length" or not candidate.y_f.text.strip()
        assert (candidate.y_b is None) == unusable
        for response in filter(None, (candidate.y_f, candidate.y_b)):
            assert len(response.token_ids) == len(response.token_logprobs)
            assert "\n" not in response.text
        assert candidate.y_f.base_logprobs is None
        if candidate.y_b is not None:
            known = candidate.y_b.base_logprobs
            assert (known is None) == candidate.y_b.reencoded
            assert known is None or len(known) == len(candidate.y_b.token_ids)
    assert any(candidate.y_b and candidate.y_b.base_logprobs for candidate in answered)


def test_parents_are_seeds_or_kept_candidates_of_earlier_rounds(finished: Path) -> None:
    with Ledger(finished / "ledger.sqlite") as ledger:
        kept = {c.id: c.round for c in ledger.candidates() if c.kept}
        calls = ledger.calls()
    assert any(demo in kept for call in calls for demo in call.demos)
    for call in calls:
        assert len(set(call.demos)) == 3
        assert all(demo.startswith("s") or kept[demo] < call.round for demo in call.demos)


def test_the_adapter_loads_and_only_its_weights_were_trained(finished: Path, tiny: Tiny) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.gemma)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, str(finished / "adapter"))
    weights = load_file(finished / "adapter/adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
    with adapted.disable_adapter():
        ids = torch.arange(3, 40)[None]
        fresh = AutoModelForCausalLM.from_pretrained(tiny.gemma)
        assert torch.equal(adapted(input_ids=ids).logits, fresh(input_ids=ids).logits)
    assert set(before) == set(fresh.state_dict())


def test_the_manifest_vouches_for_every_artefact(finished: Path) -> None:
    from tuneshift.models import file_sha256

    manifest = json.loads((finished / "manifest.json").read_text())
    assert set(manifest["files"]) == RUN_FILES - {".lock", "ledger.sqlite", "manifest.json"}
    for name, digest in manifest["files"].items():
        assert file_sha256(finished / name) == digest


def test_the_manifest_names_the_commit_of_the_code(finished: Path) -> None:
    root = Path(__file__).parents[1]
    asked = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    if asked.returncode != 0:
        pytest.skip("these sources are no git checkout")
    assert json.loads((finished / "manifest.json").read_text())["git"]["commit"] == asked.stdout.strip()


def test_the_same_command_on_a_finished_run_changes_nothing_and_says_where_the_report_is(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = files(finished) - {".lock"}
    before = {name: (finished / name).read_bytes() for name in names}
    assert run_cli("transfer", str(finished.parent / "config.yaml"), "--run-dir", str(finished)) == 3
    assert {name: (finished / name).read_bytes() for name in names} == before
    assert f"report: {finished / 'report.html'}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("setting", ["seeds", "evaluation.data"])
def test_a_run_whose_files_have_changed_is_not_continued(
    finished: Path, tmp_path: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    project = Path(shutil.copytree(finished.parent, tmp_path / "project"))
    overrides = ["--set", f"{setting}={tmp_path / 'copy.jsonl'}"]
    source = project / ("seeds.jsonl" if setting == "seeds" else "test.jsonl")
    shutil.copy(source, tmp_path / "copy.jsonl")
    config, run = str(project / "config.yaml"), str(tmp_path / "run")
    assert run_cli("transfer", config, "--run-dir", run, *overrides) == 3
    lines = source.read_text().splitlines()
    (tmp_path / "copy.jsonl").write_text("\n".join(lines[1:]))
    assert run_cli("transfer", config, "--run-dir", run, *overrides) == 4
    assert f"other content in {setting}" in capsys.readouterr().err


def test_a_changed_configuration_is_refused_with_a_diff(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(finished.parent / "config.yaml")
    code = run_cli("transfer", config, "--run-dir", str(finished), "--set", "synthesis.target_size=13")
    assert code == 4
    assert "synthesis.target_size: 12 -> 13" in capsys.readouterr().err
    assert files(finished) == RUN_FILES


def test_until_the_training_is_done_its_settings_may_change(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a step that did not fit into memory: candidates stay, and checkpoints of other settings go."""
    config, run = str(finished.parent / "config.yaml"), tmp_path / "run"

    def too_large(loaded: LoadedConfig, run: RunDirectory, progress: Progress) -> int:
        (run.checkpoints / "checkpoint-1").mkdir(parents=True)
        raise MemoryLimitError("too large")

    with monkeypatch.context() as patch:
        patch.setattr("tuneshift.pipeline.distill_run", too_large)
        assert run_cli("transfer", config, "--run-dir", str(run)) == 2
    candidates = (run / "dataset/kept.jsonl").read_bytes()
    monkeypatch.setattr("tuneshift.pipeline.synthesis_models", None)  # nothing is written or answered again
    assert run_cli("transfer", config, "--run-dir", str(run), "--set", "criterion.tau=1.4") == 4
    assert (run / "checkpoints/checkpoint-1").is_dir()
    assert run_cli("transfer", config, "--run-dir", str(run), "--set", "distill.num_train_epochs=1") == 3
    assert (run / "dataset/kept.jsonl").read_bytes() == candidates
    assert len(json.loads((run / "training.json").read_text())["losses"]) == 1
    assert read_mapping(run / "config.yaml")["distill"]["num_train_epochs"] == 1
    capsys.readouterr()
    assert run_cli("transfer", config, "--run-dir", str(run), "--set", "distill.num_train_epochs=3") == 4
    assert "distill.num_train_epochs: 1 -> 3" in capsys.readouterr().err


def test_json_is_the_last_line_of_stdout(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("show", str(finished), "--json") == 0
    status = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status["phase"] == "finished"
    assert status["candidates"] == sum(status["reasons"].values())


def test_reselect_with_the_same_rule_keeps_the_same(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("reselect", str(finished), "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["added"] == result["removed"] == 0
    assert run_cli("reselect", str(finished), "--set", "criterion=none", "--json") == 0
    everything = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert everything["kept"] > result["kept"]
    assert everything["removed"] == 0


def test_each_threshold_gives_a_dataset_of_its_own(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tau in (1.2, 2.0):
        assert run_cli("reselect", str(finished), "--set", "criterion=ppl_diff", "--set", f"criterion.tau={tau}") == 0
    assert {path.name for path in (finished / "reselected").glob("ppl*")} == {
        "ppl_diff-tau1.2.jsonl",
        "ppl_diff-tau2.jsonl",
    }
    assert run_cli("reselect", str(finished), "--set", "synthesis.target_size=3") == 2
    assert "synthesis.target_size=3" in capsys.readouterr().err


def test_an_automatic_tau_is_not_calibrated_on_what_a_fixed_one_left_unasked(
    finished: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Ledger(finished / "ledger.sqlite") as ledger:
        middle = statistics.median(c.y_f.perplexity() for c in ledger.candidates() if c.y_f and c.y_f.n_tokens)
    criterion = {"name": "high_high", "tau": middle}  # B is not asked where F is surer than that
    config = write_project(tmp_path, tiny, criterion=criterion, synthesis={"target_size": 2}, evaluation=None)
    run, auto = str(tmp_path / "run"), ["--set", "criterion.tau=auto", "--set", "criterion.calibration=20"]
    assert run_cli("transfer", str(config), "--run-dir", run) == 0
    assert run_cli("reselect", run, *auto) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "Give a tau, or start a run with synthesis.complete_scores: true" in told
    complete = str(tmp_path / "complete")
    command = ["transfer", str(config), "--run-dir", complete, "--set", "synthesis.complete_scores=true"]
    assert run_cli(*command) == 0
    assert run_cli("reselect", complete, *auto) == 0


def test_a_report_that_is_written_again_tells_where_the_run_was_made(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    assert run_cli("report", str(copy)) == 0  # the page names the folder
    made, card = (copy / "manifest.json").read_text(), (copy / "adapter/README.md").read_text()
    monkeypatch.setattr("tuneshift.__version__", "9.9")
    monkeypatch.setattr("tuneshift.run.manifest._cuda_devices", lambda: ["another machine's"])
    assert run_cli("report", str(copy)) == 0
    assert (copy / "manifest.json").read_text() == made
    assert (copy / "adapter/README.md").read_text() == card


def test_evaluate_again_on_other_data(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    items = tmp_path / "two.jsonl"
    items.write_text('{"prompt": "a b", "reference": "c"}\n{"prompt": "d e", "reference": "f"}\n')
    own = (copy / "verdict.json").read_bytes()
    for _ in range(2):
        assert run_cli("evaluate", str(copy), "--set", f"evaluation.data={items}") == 3
    (again,) = (copy / "evaluations").iterdir()
    verdict = json.loads((again / "verdict.json").read_text())
    assert (verdict["before"]["n"], verdict["excluded_questions"]) == (2, 0)
    assert verdict["questions"]["data"] == str(items)
    assert (copy / "verdict.json").read_bytes() == own
    assert run_cli("report", str(copy)) == 0


def test_a_stopped_evaluation_whose_metric_has_changed_is_graded_anew(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "regraded.py"
    module.write_text("def right(response, reference):\n    return False\n")
    config = write_project(tmp_path, tiny, synthesis={"target_size": 4}, evaluation={"metric": "regraded.right"})
    run = tmp_path / "run"
    assert run_cli("transfer", str(config), "--run-dir", str(run)) == 3
    (run / "manifest.json").unlink()  # as when it was stopped before its last step
    module.write_text("def right(response, reference):\n    return response is not None\n")
    monkeypatch.delitem(sys.modules, "regraded")
    capsys.readouterr()
    assert run_cli("transfer", str(config), "--run-dir", str(run)) == 3
    assert "measured anew: before, after, source, base" in " ".join(capsys.readouterr().err.split())
    verdict = json.loads((run / "verdict.json").read_text())
    assert [verdict[arm]["correct"] for arm in ("before", "after", "source", "base")] == [5] * 4


def test_other_questions_tell_what_the_target_forgot(tiny: Tiny, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": f"{text}:", "reference": "x"} for text in CORPUS[:4]])
    config = write_project(
        tmp_path,
        tiny,
        synthesis={"target_size": 4},
        evaluation={"data": "test.jsonl", "regression": {"data": str(other), "max_new_tokens": 3, "margin": 0.1}},
    )
    run = tmp_path / "run"
    assert run_cli("transfer", str(config), "--run-dir", str(run)) == 3
    added = {f"evaluation/regression_{arm}.jsonl" for arm in ("before", "after")}
    assert files(run) == RUN_FILES | added
    assert added <= set(json.loads((run / "manifest.json").read_text())["files"])
    found = json.loads((run / "verdict.json").read_text())["regression"]
    assert (found["before"]["n"], found["after"]["n"], found["margin"]) == (4, 4, 0.1)
    assert found["non_inferior"] is None  # four questions rule out no loss of a tenth
    assert found["questions"]["max_new_tokens"] == 3
    assert "## Regression" in (run / "report.md").read_text()
    trained = json.loads((run / "dataset/kept.jsonl").read_text().splitlines()[0])["prompt"]
    write_jsonl(other, [{"prompt": trained, "reference": "x"}, {"prompt": "a b", "reference": "c"}])
    for margin in ("0.1", "0.2"):  # another margin is another judgement of the same answers
        assert run_cli("evaluate", str(run), "--set", f"evaluation.regression.margin={margin}") == 3
    (again,) = (run / "evaluations").iterdir()
    found = json.loads((again / "verdict.json").read_text())["regression"]
    assert (found["before"]["n"], found["excluded_questions"], found["margin"]) == (1, 1, 0.2)


def test_regression_prompts_are_held_out_and_have_to_fit_into_the_target(tiny: Tiny, tmp_path: Path) -> None:
    from tuneshift.config import load_config
    from tuneshift.preflight import read_inputs

    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "play " * 200, "reference": "x"}])
    config = write_project(tmp_path, tiny, evaluation={"data": "test.jsonl", "regression": {"data": "other.jsonl"}})
    inputs = read_inputs(load_config(config).config, folder=tmp_path)
    assert len(inputs.items) == 5
    for item in (*inputs.items, *inputs.regression):
        assert inputs.held_out.given_away_by(item.prompt.upper()) == {item.id}
    assert set(inputs.digests) >= {"evaluation.data", "evaluation.regression.data"}
    assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 2
    assert not (tmp_path / "run").exists()
    other.unlink()
    assert run_cli("plan", str(config)) == 2


def test_questions_that_were_trained_on_are_left_out_and_counted(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    trained = json.loads((copy / "dataset/kept.jsonl").read_text().splitlines()[0])["prompt"]
    rows = [{"prompt": trained.upper(), "reference": "x"}, {"prompt": "a b", "reference": "c"}]
    items = write_jsonl(tmp_path / "two.jsonl", rows)
    assert run_cli("evaluate", str(copy), "--set", f"evaluation.data={items}") == 3
    (path,) = (copy / "evaluations").glob("*/verdict.json")
    verdict = json.loads(path.read_text())
    assert (verdict["before"]["n"], verdict["excluded_questions"]) == (1, 1)
    write_jsonl(items, rows[:1])
    assert run_cli("evaluate", str(copy), "--set", f"evaluation.data={items}") == 2


def test_a_pair_that_the_target_cannot_read_is_dropped_with_that_reason(tiny: Tiny, tmp_path: Path) -> None:
    target = Path(shutil.copytree(tiny.gemma, tmp_path / "short"))
    settings = json.loads((target / "config.json").read_text())
    longest = max(len(text) for text in CORPUS[:5]) + 20 + 25  # room for the prompts, with characters as tokens
    (target / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": longest}))
    config = write_project(tmp_path, tiny, target={"model": str(target)}, criterion={"name": "none"})
    config.write_text(config.read_text().replace('"max_new_tokens": 24', '"max_new_tokens": 20'))
    run = tmp_path / "run"
    assert run_cli("transfer", str(config), "--run-dir", str(run)) == 3
    with Ledger(run / "ledger.sqlite") as ledger:
        candidates = ledger.candidates()
    tokenizer = AutoTokenizer.from_pretrained(target)
    for candidate in candidates:
        if candidate.y_f is not None and candidate.y_f.n_tokens:
            pair = tokenizer(candidate.prompt)["input_ids"] + tokenizer(candidate.y_f.text)["input_ids"]
            assert candidate.kept <= (len(pair) <= longest)


def test_no_rule_keeps_afterwards_what_the_target_cannot_read(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneshift.encoding.Reader.can_learn", lambda self, prompt, response: len(response) < 12)
    config, run = write_project(tmp_path, tiny, evaluation=None), tmp_path / "run"
    assert run_cli("transfer", str(config), "--run-dir", str(run)) == 0
    with Ledger(run / "ledger.sqlite") as ledger:
        candidates = ledger.candidates()
    too_long = {candidate.id for candidate in candidates if candidate.reason == TOO_LONG}
    assert too_long == {c.id for c in candidates if c.y_f is not None and len(c.y_f.text) >= 12}
    assert too_long
    assert not any(candidate.kept for candidate in candidates if candidate.id in too_long)
    for rule in ("none", "random", "length"):
        assert run_cli("reselect", str(run), "--set", f"criterion={{name: {rule}, keep_rate: 1.0, tau: 1000}}") == 0
    for path in (run / "reselected").iterdir():
        assert too_long.isdisjoint(json.loads(line)["id"] for line in path.read_text().splitlines())


def test_a_generator_whose_context_the_kept_prompts_outgrow_writes_to_the_end(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 44, "bos_token_id": 2, "eos_token_id": 1}
    writer = GPT2LMHeadModel(GPT2Config(n_positions=64, **size))  # it has no place for another token
    save(writer, make_tokenizer(44, bos=False), tmp_path / "writer")
    generator = {"model": str(tmp_path / "writer"), "max_new_tokens": 24}
    config = write_project(tmp_path, tiny, generator=generator, criterion={"name": "none"}, evaluation=None)
    write_jsonl(tmp_path / "seeds.jsonl", [{"prompt": f"Request: {text}\nIntent:"} for text in ("a b", "b c", "c d")])
    command = ["transfer", str(config), "--set", "synthesis.target_size=40", "--run-dir"]
    assert run_cli(*command, str(tmp_path / "run")) == 0
    assert "examples are not shown to the generator: they do not fit into its context" in caplog.text
    assert "generator calls showed fewer than 3 examples" in (tmp_path / "run/report.md").read_text()
    original = Ledger.record_round

    def stop_behind_the_second(self: Ledger, summary: RoundSummary, candidates: list[Candidate]) -> None:
        original(self, summary, candidates)
        if summary.round == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "record_round", stop_behind_the_second)
        assert run_cli(*command, str(tmp_path / "stopped")) == 130
    assert run_cli(*command, str(tmp_path / "stopped")) == 0
    kept = [(tmp_path / run / "dataset/kept.jsonl").read_bytes() for run in ("run", "stopped")]
    assert kept[0] == kept[1]


def test_an_automatic_tau_is_calibrated_once_and_frozen(tiny: Tiny, tmp_path: Path) -> None:
    criterion = {"name": "ppl_diff", "tau": "auto", "keep_rate": 0.3, "calibration": 40}
    config = write_project(tmp_path, tiny, criterion=criterion)
    run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run"))
    with Ledger(tmp_path / "run/ledger.sqlite") as ledger:
        rounds, candidates = ledger.rounds(), ledger.candidates()
    first = [candidate for candidate in candidates if candidate.round == 0]
    answered = [candidate for candidate in first if candidate.y_f is not None]
    assert len(first) >= 40
    assert len(rounds) > 1
    assert len({entry.tau for entry in rounds}) == 1
    assert rounds[0].tau != 1.5
    assert sum(candidate.kept for candidate in first) / len(answered) == pytest.approx(0.3, abs=0.15)


def test_complete_scores_ask_the_base_everywhere_and_change_no_decision(tiny: Tiny, tmp_path: Path) -> None:
    found = {}
    for complete in (False, True):
        (tmp_path / str(complete)).mkdir()
        synthesis = {"complete_scores": complete, "max_rounds": 3}
        config = write_project(
            tmp_path / str(complete), tiny, synthesis=synthesis, criterion={"name": "ppl_diff", "tau": 6.0}
        )
        run_cli("transfer", str(config), "--run-dir", str(tmp_path / str(complete) / "run"))
        with Ledger(tmp_path / str(complete) / "run/ledger.sqlite") as ledger:
            found[complete] = {c.id: c for c in ledger.candidates() if c.y_f is not None}
    assert {name for name, c in found[False].items() if c.kept} == {name for name, c in found[True].items() if c.kept}
    assert all(candidate.y_b is not None for candidate in found[True].values())
    unasked = [candidate for candidate in found[False].values() if candidate.y_b is None]
    assert any(candidate.reason == "high-unscored" for candidate in unasked)
    for name, candidate in found[False].items():
        assert candidate.y_f == found[True][name].y_f


def test_plan_estimates_and_writes_nothing(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_project(tmp_path, tiny)
    before = files(tmp_path)
    assert run_cli("plan", str(config), "--json") == 0
    estimate = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert estimate["probe"]["candidates"] == 20
    assert estimate["training_steps"] == 2 * 3
    assert estimate["questions"] == 5
    assert [found["gain"] for found in estimate["detectable_gains"]] == [None, None]  # five questions are too few
    assert files(tmp_path) == before


def merged(tiny: Tiny, folder: Path) -> Path:
    """Save the tiny source as a full fine-tuned checkpoint."""
    base = AutoModelForCausalLM.from_pretrained(tiny.llama)
    PeftModel.from_pretrained(base, str(tiny.adapter)).merge_and_unload().save_pretrained(folder)
    shutil.copy(tiny.llama / "tokenizer.json", folder)
    shutil.copy(tiny.llama / "tokenizer_config.json", folder)
    return folder


@pytest.mark.parametrize("shape", ["full checkpoint", "substitute base", "generator is the source", "no template"])
def test_every_shape_of_a_configuration_runs_to_its_end(tiny: Tiny, tmp_path: Path, shape: str) -> None:
    sections: dict[str, object] = {
        "full checkpoint": {"source": {"adapter": None, "model": str(merged(tiny, tmp_path / "merged"))}},
        "substitute base": {"source": {"substitute_base": str(tiny.gemma)}},
        "generator is the source": {"generator": {"model": "source"}},
        "no template": {"prompt_template": None},
    }[shape]
    config = write_project(tmp_path, tiny, synthesis={"target_size": 4}, **sections)
    run = tmp_path / "run"
    assert run_cli("transfer", str(config), "--run-dir", str(run)) == 3
    assert files(run) == RUN_FILES
    with Ledger(run / "ledger.sqlite") as ledger:
        answered = [candidate for candidate in ledger.candidates() if candidate.y_f and candidate.y_b]
    assert answered
    # Another tokenizer wrote y_b, so both responses are encoded anew, and the record says so.
    anew = {response.reencoded for c in answered for response in (c.y_f, c.y_b) if response and response.n_tokens}
    assert anew == {True} if shape == "substitute base" else False in anew
    assert any(c.y_b and c.y_b.base_logprobs for c in answered) == (shape != "substitute base")


def test_without_questions_nothing_is_measured_and_the_verdict_says_so(tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny, synthesis={"target_size": 4}, evaluation=None)
    run = tmp_path / "run"
    assert run_cli("transfer", str(config), "--run-dir", str(run)) == 0
    assert files(run) == {name for name in RUN_FILES if not name.startswith(("evaluation", "figures/accuracy"))}
    verdict = json.loads((run / "verdict.json").read_text())
    assert [verdict[key] for key in ("improved", "before", "after", "mcnemar_p", "recovery")] == [None] * 5
    assert verdict["reason"]
