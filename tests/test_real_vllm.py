"""The real vLLM with a real model: it agrees with transformers, ends with the run, and its known faults are refused.

It needs the virtual environment .venv-vllm, which `make test` makes. Servers take most of the time to start, so two
pairs serve the whole file: one that the engine started itself, and one that does what vLLM's CPU kernels get wrong.
"""

from __future__ import annotations

import json
import os
import socket
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from test_docs import ROOT, readme_yaml
from test_ray import marked, soon
from test_transfer import run_cli
from transformers import AutoModelForCausalLM

from tuneshift import guard
from tuneshift.demo import prepare_models
from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import Decoding, Engine, ScoreRequest, Weights
from tuneshift.engines.canary import AGREEMENT, Canary, mean_distance
from tuneshift.engines.opening import open_proved
from tuneshift.engines.options import Endpoint, EngineOptions
from tuneshift.engines.source import Source
from tuneshift.engines.vllm import VllmEngine, VllmOptions, server_environment
from tuneshift.errors import ModelError
from tuneshift.run.ledger import Ledger

PYTHON = ROOT / ".venv-vllm/bin/python"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-vllm: run `make .venv-vllm/installed`"),
]

GREEDY = Decoding(temperature=0, max_new_tokens=12, stop=("\n",))
TAU = 1.5  # of the README's configuration
OPTIONS = EngineOptions(kind="vllm", python=str(PYTHON), max_model_len=1024, batch_size=32)
HF = EngineOptions(batch_size=32)


def lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROOT / "examples/snips" / name).read_text().splitlines()]


SEEDS = [row["prompt"] for row in lines("seeds.jsonl")]
QUESTIONS = [row["prompt"] for row in lines("test.jsonl")[:32]]


@pytest.fixture(scope="module")
def weights() -> Weights:
    model = str(prepare_models() / "SmolLM2-135M-Instruct")
    return Weights(model, model, adapter=str(ROOT / "examples/snips/adapter"))


@dataclass(frozen=True)
class Served:
    """The engine on its two servers, what it proved, and a mark that its processes carry in their environment."""

    engine: VllmEngine
    canary: Canary
    mark: str


@pytest.fixture(scope="module")
def served(weights: Weights) -> Iterator[Served]:
    mark = uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESHIFT_TEST_MARK", mark)
        engine, canary = open_proved(weights, OPTIONS, SEEDS)
    assert isinstance(engine, VllmEngine)
    with closing(engine):
        yield Served(engine, canary, mark)


@pytest.fixture(scope="module")
def here(weights: Weights) -> Engine:
    return open_proved(weights, HF, SEEDS)[0]


def test_the_engine_proves_itself_against_transformers(served: Served) -> None:
    assert served.canary.reference_gap is not None
    assert 0 < served.canary.reference_gap < AGREEMENT
    assert served.canary.scoring_gap is not None
    assert served.canary.scoring_gap < AGREEMENT
    assert served.canary.adapter_effect > 1


def test_its_answers_and_scores_are_those_of_transformers(served: Served, here: Engine) -> None:
    prompts = [tuple(encode_prompt(here.tokenizer, prompt)) for prompt in QUESTIONS]
    # bf16 sums depend on which requests met in the server's batches: F is sure and turns seldom, B turns now and then.
    for side, least in ((True, 28), (False, 16)):
        ours = here.generate(prompts, seeds=range(32), decoding=GREEDY, fine_tuned=side)
        theirs = served.engine.generate(prompts, seeds=range(32), decoding=GREEDY, fine_tuned=side)
        equal = sum(a.text == b.text for a, b in zip(ours, theirs, strict=True))
        requests = [ScoreRequest(p, c.token_ids) for p, c in zip(prompts, ours, strict=True) if c.token_ids]
        ours_under_f = here.score(requests, fine_tuned=True)
        gap = mean_distance(ours_under_f, served.engine.score(requests, fine_tuned=True))
        assert equal >= least
        assert 0 < gap < AGREEMENT


def configured(folder: Path, weights: Weights, engine: dict[str, Any], *, generator: str) -> Path:
    """Write the README's configuration with an engine and a tiny budget."""
    config = yaml.safe_load(readme_yaml())
    questions = folder / "few.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in lines("test.jsonl")[:20]))
    config |= {"source": {"base": weights.base, "adapter": weights.adapter}, "engine": engine}
    config["target"] = {"model": str(prepare_models() / "gemma-3-270m")}
    config["generator"]["model"] = generator
    config["seeds"] = str(ROOT / "examples/snips/seeds.jsonl")
    config["synthesis"] |= {"target_size": 20, "decoding": "greedy", "complete_scores": True, "probes": 64}
    config["evaluation"]["data"] = str(questions)
    config["distill"] = {"num_train_epochs": 2, "learning_rate": 2e-3}
    path = folder / "transfer.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def check_transfer(run: Path, code: int) -> None:
    verdict = json.loads((run / "verdict.json").read_text())
    assert code == (0 if verdict["improved"] else 3)
    assert verdict["source"]["accuracy"] > 0.8
    assert verdict["before"]["accuracy"] < 0.2
    assert verdict["after"]["accuracy"] is not None
    assert verdict["trained_pairs"] == 20


def test_a_transfer_behind_servers_of_ones_own_decides_as_one_in_this_process(
    served: Served,
    here: Engine,
    weights: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine: dict[str, Any] = {"kind": "openai", "batch_size": 32}
    for side, server in zip(("base", "fine_tuned"), served.engine._servers, strict=True):
        key, at = f"TUNESHIFT_TEST_{side.upper()}", server.endpoint
        monkeypatch.setenv(key, at.api_key or "")
        engine[side] = {"base_url": at.base_url, "model": at.model, "api_key": f"${{{key}}}"}
    config = configured(tmp_path, weights, engine, generator="target")
    code = run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run"))
    check_transfer(tmp_path / "run", code)
    with Ledger(tmp_path / "run/ledger.sqlite") as ledger:
        decided = {c.id: c for c in ledger.candidates() if c.y_f and c.y_b and c.y_f.text and c.y_b.text}
    prompts = {name: candidate.prompt for name, candidate in decided.items()}
    answers = Source(here, canary=served.canary).answer(prompts, decoding=GREEDY, run_seed=0)
    flips = 0
    for name, candidate in decided.items():
        ours, theirs = answers[name], candidate
        assert ours.y_b
        assert theirs.y_f
        assert theirs.y_b
        flips += (ours.y_f.perplexity() < TAU <= ours.y_b.perplexity()) != (
            theirs.y_f.perplexity() < TAU <= theirs.y_b.perplexity()
        )
    assert len(decided) >= 20
    assert flips <= 0.1 * len(decided)


def test_its_servers_are_gone_once_it_is_closed(served: Served) -> None:
    addresses = [server.endpoint.base_url for server in served.engine._servers]
    assert len(addresses) == 2
    assert sum("api_server" in command for command in marked(served.mark).values()) >= 2
    served.engine.close()
    assert soon(lambda: not marked(served.mark), 10)
    for address in addresses:
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"{address}/models", timeout=5)


def test_a_whole_transfer_on_vllm(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = uuid4().hex
    monkeypatch.setenv("TUNESHIFT_TEST_MARK", mark)
    engine = {"kind": "vllm", "python": str(PYTHON), "max_model_len": 1024, "batch_size": 32}
    config = configured(tmp_path, weights, engine, generator="base")
    code = run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run"))
    check_transfer(tmp_path / "run", code)
    described = json.loads((tmp_path / "run/manifest.json").read_text())
    assert '"engine": "vllm"' in json.dumps(described)
    assert soon(lambda: set(marked(mark)) <= {os.getpid()}, 10)


def test_a_server_that_cannot_start_ends_the_run_with_the_reason_and_exit_2(
    weights: Weights, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2 has 9 attention heads, which two devices cannot share."""
    engine = {"kind": "vllm", "python": str(PYTHON), "tensor_parallel_size": 2, "reference_check": False}
    config = configured(tmp_path, weights, engine, generator="base")
    assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 2
    said = capfd.readouterr().err
    assert "the server did not start" in said
    assert "attention heads (9) must be divisible by tensor parallel size (2)" in " ".join(said.split())
    assert "Traceback" not in said


LAYERS = ["--lora-target-modules", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"]  # not the output layer


@dataclass(frozen=True)
class Faulty:
    """Addresses of servers that apply adapters on a CPU: to the layers, and to the output layer too."""

    layers: str
    head: str
    changed_head: str


@pytest.fixture(scope="module")
def faulty(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faulty")
    head = adapter_of_the_head(weights.base, folder / "head")
    options = VllmOptions(str(PYTHON), OPTIONS.load, 1, 0.8, 512, 16, None)
    with ExitStack() as end:
        addresses = []
        for name, more in (("F", [*LAYERS, "--lora-modules", f"F={weights.adapter}"]),
                           ("H", ["--lora-modules", f"H={head}"])):  # fmt: skip
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = [
                str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", weights.base, "--served-model-name",
                "base", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512", "--enforce-eager",
                "--generation-config", "vllm", "--logprobs-mode", "raw_logprobs", "--enable-lora", "--max-loras", "1",
                "--max-lora-rank", "8", *more,
            ]  # fmt: skip
            log = end.enter_context((folder / f"{name}.log").open("w"))
            process = guard.start(command, output=log, env=server_environment(options))
            end.callback(guard.stop, process)
            addresses.append(f"http://127.0.0.1:{port}")
        for address, log in zip(addresses, ("F", "H"), strict=True):
            assert soon(lambda at=address: answers(at), 300), (folder / f"{log}.log").read_text()[-3000:]
        yield Faulty(f"{addresses[0]}/v1", f"{addresses[1]}/v1", head)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def adapter_of_the_head(base: str, folder: Path) -> str:
    """Save an adapter that changes the output layer too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of output layers that share the embeddings' weights
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "lm_head"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def open_at(address: str, weights: Weights, name: str, **settings: Any) -> Canary:
    sides = {"base": Endpoint(address, "base"), "fine_tuned": Endpoint(address, name)}
    options = EngineOptions(kind="openai", reference_check=False, **sides, **settings)
    engine, canary = open_proved(weights, options, SEEDS)
    engine.close()
    return canary


def test_a_server_that_gives_the_bases_rows_the_adapter_is_refused(faulty: Faulty, weights: Weights) -> None:
    """vLLM's CPU kernels read the slot of "no adapter", -1, as the last adapter's, where rows of both share a step.

    One request at a time has no such steps: the same server then passes.
    """
    with pytest.raises(ModelError, match="with the adapter switched off the base still differs"):
        open_at(faulty.layers, weights, "F", batch_size=16)
    assert open_at(faulty.layers, weights, "F", batch_size=1).base_drift == 0


def test_an_output_layers_adapter_ends_a_server_on_a_cpu_which_is_told(faulty: Faulty, weights: Weights) -> None:
    """On a GPU vLLM leaves an output layer's adapter out of prompt log-probabilities, and the canary's gap shows it.

    On a CPU 0.32 does otherwise: on a Llama, whose output layer adapters may change, two prompts scored at once
    end the server, whatever the adapter changes. One at a time, both numbers have the adapter.
    """
    changed = replace(weights, adapter=faulty.changed_head)
    gap = open_at(faulty.head, changed, "H", batch_size=1).scoring_gap
    assert gap is not None
    assert gap < AGREEMENT
    with pytest.raises(ModelError, match=r"no answer|answers with status 500"):
        open_at(faulty.head, changed, "H", batch_size=16)
