"""The whole command line on two real models from the package index, with a tiny budget."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import Open
from test_docs import ROOT, readme_yaml
from test_page_browser import decided_as_reselect_does, serious
from test_transfer import run_cli

from tuneshift.config import load_config
from tuneshift.criteria import Criterion, decide, score_of
from tuneshift.datafiles import read_seeds
from tuneshift.demo import prepare_models
from tuneshift.engines.hf import HfEngine
from tuneshift.measuring import PASSES
from tuneshift.models import LoadOptions
from tuneshift.prompts.pool import PoolItem
from tuneshift.report.decomposition import decomposition
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger
from tuneshift.wiring import prompt_generator

pytestmark = pytest.mark.real


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's configuration works as written."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "models").symlink_to(prepare_models())
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "transfer.yaml").write_text(readme_yaml(), encoding="utf-8")
    return folder


def test_a_real_instruct_model_writes_prompts_through_its_chat_template(project: Path) -> None:
    loaded = load_config(
        project / "transfer.yaml",
        ["generator.kind=chat", "generator.model=base", "generator.max_new_tokens=30", "synthesis.per_call=5"],
    )
    engine = HfEngine.open(str(project / "models/SmolLM2-135M-Instruct"), load=LoadOptions())
    generator = prompt_generator(loaded, engine)
    pool = [
        PoolItem(seed.id, seed.text) for seed in read_seeds(Path(loaded.config.seeds), loaded.config.prompt_template)
    ]
    (call,) = generator.write(pool, round_index=0, calls=1)
    assert call.prompt.count("<|im_start|>assistant") == 1
    texts = generator.parse(call)
    assert len(texts) == 5
    assert any(texts)


def test_real_models_measure_for_every_criterion(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One small run that knows every answer; then each measure, each decision, and both sides of eq. 8."""
    settings = {
        "synthesis.target_size": 8,
        "synthesis.max_rounds": 1,
        "synthesis.calls_per_round": 8,
        "synthesis.complete_scores": "true",
        "synthesis.decoding": "faithful",  # eq. 8 speaks of drawn responses
        "distill.num_train_epochs": 1,
        "evaluation": "null",
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    run = project / "measured"
    assert run_cli("transfer", str(project / "transfer.yaml"), "--run-dir", str(run), *overrides) == 0
    for rule in PASSES.keys() - {"exec"}:  # an intent is no program
        chosen = ["--set", f"criterion.name={rule}", "--set", "criterion.threshold=0.05"]
        assert run_cli("measure", str(run), *chosen) == 0
        capsys.readouterr()
        assert run_cli("reselect", str(run), *chosen, "--json") == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert 0 < result["kept"] <= result["candidates"], rule
    with Ledger(run / "ledger.sqlite") as ledger:
        measured = [candidate for candidate in ledger.candidates() if candidate.measures]
        found = decomposition(measured, ledger.rounds())
    for candidate in measured:
        kl, lift = (score_of(candidate, Criterion(rule)) for rule in ("kl", "lift"))
        assert kl is not None
        assert lift is not None
        assert kl >= -1e-3
        assert candidate.measures["vote_5"] in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    # A LoRA on intents made F far surer than B and far from B; lift is an unbiased draw of the divergence.
    assert found is not None
    assert found["n"] >= 20
    assert found["entropy_drop"]["mean"] > 0.1
    assert found["divergence"]["mean"] > 0.1
    error = found["difference"]["standard_error"]
    assert abs(found["difference"]["mean"]) < max(0.5 * found["margin"]["mean"], 4 * error)


@pytest.fixture(scope="session")
def moved(project: Path) -> Path:
    """The run directory of the README's transfer, with few pairs, after it ended as its verdict says."""
    items = (ROOT / "examples/snips/test.jsonl").read_text().splitlines()[:40]
    (project / "few.jsonl").write_text("\n".join(items), encoding="utf-8")
    small = [
        *("--set", "synthesis.target_size=40", "--set", "synthesis.decoding=greedy", "--set", "synthesis.probes=64"),
        *("--set", "distill.num_train_epochs=4", "--set", "distill.learning_rate=0.002"),
        *("--set", "evaluation.data=few.jsonl"),
    ]
    run = project / "run"
    code = run_cli("transfer", str(project / "transfer.yaml"), "--run-dir", str(run), *small)
    assert code == (0 if json.loads((run / "verdict.json").read_text())["improved"] else 3)
    return run


def test_the_readme_configuration_moves_knowledge_between_real_models(moved: Path) -> None:
    verdict = json.loads((moved / "verdict.json").read_text())
    assert verdict["source"]["accuracy"] > 0.8
    assert verdict["before"]["accuracy"] < 0.1
    assert verdict["trained_pairs"] == 40
    with Ledger(moved / "ledger.sqlite") as ledger:
        kept = [candidate for candidate in ledger.candidates() if candidate.kept]
    for candidate in kept:
        assert candidate.y_f is not None
        assert candidate.y_b is not None
        assert candidate.y_f.perplexity() < 1.5 <= candidate.y_b.perplexity()


def test_a_study_compares_arms_between_real_models(project: Path) -> None:
    items = (ROOT / "examples/snips/test.jsonl").read_text().splitlines()[:40]
    (project / "few.jsonl").write_text("\n".join(items), encoding="utf-8")
    level = {
        "synthesis": {"decoding": "greedy"},
        "distill": {"num_train_epochs": 1, "learning_rate": 0.002},
        "evaluation": {"data": "few.jsonl"},
    }
    study = {
        "config": "transfer.yaml",
        "replicates": {"small": level},
        "candidates": 20,
        "size": 8,
        "arms": {"random": {"criterion": "random"}, "ppl_diff": {"criterion": {"name": "ppl_diff", "tau": 3}}},
        "reference": "random",
    }
    (project / "study.yaml").write_text(json.dumps(study), encoding="utf-8")
    root = project / "study"
    assert run_cli("study", str(project / "study.yaml"), "--run-dir", str(root)) == 0
    rows = {row["arm"]: row for row in parquet.read_table(root / "results.parquet").to_pylist()}
    assert rows["source"]["accuracy"] > 0.8
    assert rows["target before"]["accuracy"] < 0.1
    assert (rows["random"]["pairs"], rows["random"]["steps"], rows["random"]["n"]) == (8, 1, 40)
    with Ledger(root / "synthesis/all/small/ledger.sqlite") as ledger:
        made = [candidate for candidate in ledger.candidates() if candidate.y_f is not None]
    assert 20 <= len(made) < 25  # a call of five is never cut; the arms see the first 20
    criterion = Criterion("ppl_diff", tau=3)
    kept = sum(decide(candidate, criterion).kept for candidate in made[:20])
    found = rows["ppl_diff"]
    assert (found["pairs"], found["reason"]) == ((8, None) if kept >= 8 else (None, f"kept {kept} of 8 wanted"))


def test_the_page_of_a_real_run_decides_as_reselect_does(open_page: Open, moved: Path) -> None:
    run = RunDirectory(moved)
    page = open_page(run)
    with Ledger(run.ledger, read_only=True) as ledger:
        candidates = ledger.candidates()
    settings: list[tuple[str, dict[str, float]]] = [
        ("ppl_diff", {"tau": 1.2}), ("asymmetric", {"tau_f": 1.1, "tau_b": 3}), ("ratio", {"ratio": 2.5})
    ]  # fmt: skip
    assert len(decided_as_reselect_does(page, run, settings)) == 3
    searched = candidates[-1].text.lower()
    texts = [[c.text, *(reply.text for reply in (c.y_f, c.y_b) if reply is not None)] for c in candidates]
    page.fill("#filters input[type=search]", searched)
    found = sum(any(searched in text.lower() for text in own) for own in texts)
    assert page.inner_text("#found") == f"{found} of {len(candidates)} candidates"
    page.fill("#filters input[type=search]", "")
    page.click("th[data-column=round] button")
    assert page.locator("#table tr.row td:nth-child(6)").first.inner_text() == "1"
    assert serious(Axe().run(page).response) == []
    assert "Effective seeds" in page.inner_text("#family")
