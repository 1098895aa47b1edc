"""What vLLM is given, and that no server outlives its run: without vLLM itself, which tests/test_real_vllm.py runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from completions_server import BASE, TUNED, CompletionsServer
from conftest import CORPUS, Tiny, make_adapter
from peft import LoraConfig, get_peft_model
from test_ray import marked, soon
from transformers import LlamaForCausalLM

from tuneshift import guard
from tuneshift.engines.base import Weights
from tuneshift.engines.opening import open_proved
from tuneshift.engines.options import Endpoint, EngineOptions
from tuneshift.engines.vllm import VllmEngine, VllmOptions, check_python, servable, server_environment, telling
from tuneshift.errors import ConfigError, ModelError
from tuneshift.models import LoadOptions

PLAIN = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
HEAD = "it changes the output layer or the embeddings"


def saved(tiny: Tiny, folder: Path, **settings: Any) -> str:
    """Save an adapter as peft does it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of some of these settings
        model = LlamaForCausalLM.from_pretrained(tiny.llama)
        config = LoraConfig(task_type="CAUSAL_LM", **{**PLAIN, **settings})
        get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({}, 8),
        ({"r": 8}, 8),
        ({"r": 9}, 16),
        ({"target_modules": "all-linear"}, 8),  # peft leaves the output layer out
        ({"target_modules": r".*\.(q|v)_proj"}, 8),
        ({"rank_pattern": {"q_proj": 20}}, 32),
        ({"use_rslora": True}, 8),
        ({"init_lora_weights": "gaussian"}, 8),
    ],
    ids=str,
)
def test_a_plain_lora_is_served_with_the_rank_that_vllm_pads_it_to(
    tiny: Tiny, tmp_path: Path, settings: dict[str, Any], rank: int
) -> None:
    assert servable(saved(tiny, tmp_path, **settings)).rank == rank


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, HEAD),
        ({"target_modules": ["q_proj", "embed_tokens"]}, HEAD),
        ({"target_modules": r".*(q_proj|_head)"}, HEAD),  # a pattern that does not name it
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
        ({"trainable_token_indices": [5, 6]}, "single tokens"),
        ({"alora_invocation_tokens": [5]}, "aLoRA"),
        ({"r": 513}, "rank 513 is above 512"),
        ({"rank_pattern": {"q_proj": 600}}, "rank 600 is above 512"),
    ],
    ids=str,
)
def test_an_adapter_that_vllm_would_get_wrong_is_refused_with_the_reason(
    tiny: Tiny, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match="vLLM cannot serve this adapter") as refused:
        servable(saved(tiny, tmp_path, **settings))
    assert reason in str(refused.value)
    assert "engine.kind: hf" in str(refused.value)


def test_a_damaged_adapter_is_named(tiny: Tiny, tmp_path: Path) -> None:
    weights = Path(saved(tiny, tmp_path)) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: is damaged"):
        servable(str(tmp_path))


def test_a_retrained_adapter_has_another_name_since_servers_keep_what_they_have_read_under_one(
    tiny: Tiny, tmp_path: Path
) -> None:
    first = servable(str(make_adapter(tiny.llama, tmp_path, scale=0.1)))
    again = servable(str(make_adapter(tiny.llama, tmp_path, scale=0.1)))
    other = servable(str(make_adapter(tiny.llama, tmp_path, scale=0.1, seed=2)))
    assert first.name == again.name != other.name


SERVER = """#!/bin/sh
# Notes how it was started, waits until all of its kind have, and fails as vLLM does.
{ printf '%s\\n' "$@"; } > "$0.$$.part"
echo "$VLLM_API_KEY" > "$0.$$.key"
mv "$0.$$.part" "$0.$$.arguments"
while [ "$(ls "$0".*.arguments | wc -l)" -lt "$SERVERS" ]; do sleep 0.05; done
echo "(EngineCore pid=7) ERROR 01-01 10:00:00 [core.py:1] ValueError: there is no room"
exit 1
"""


def started(
    weights: Weights, folder: Path, monkeypatch: pytest.MonkeyPatch, *, servers: int, **settings: Any
) -> list[dict[str, str]]:
    """Return the settings of each server that an engine starts."""
    python = folder / "python"
    python.write_text(SERVER)
    python.chmod(0o755)
    monkeypatch.setenv("SERVERS", str(servers))
    options = {
        "python": str(python), "load": LoadOptions("auto", "float32"), "tensor_parallel_size": 1, "memory": 0.8,
        "max_model_len": 4096, "concurrency": 5, "threads": None,
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"the server did not start(.|\n)*ValueError: there is no room"):
        VllmEngine(weights, VllmOptions(**{**options, **settings}))
    written = [path.read_text().splitlines() for path in sorted(folder.glob("*.arguments"))]
    keys = [path.read_text().strip() for path in folder.glob("*.key")]
    assert len(set(keys)) == len(written)
    assert all(len(key) == 32 and key not in str(written) for key in keys)  # any user may read a command line
    return [as_settings(arguments) for arguments in written]


def as_settings(arguments: list[str]) -> dict[str, str]:
    assert arguments[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    pairs = zip(arguments[2:], [*arguments[3:], "--"], strict=True)
    return {name: "" if value.startswith("--") else value for name, value in pairs if name.startswith("--")}


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneshift.engines.vllm.pick_device", lambda name: torch.device("cuda"))


def test_on_a_gpu_one_server_holds_the_base_and_switches_the_adapter(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch)
    weights = Weights("tiny", str(tiny.llama), adapter=str(tiny.adapter))
    (found,) = started(weights, tmp_path, monkeypatch, servers=1, tensor_parallel_size=4)
    port = found.pop("--port")
    assert 1024 <= int(port) < 65536
    name = servable(str(tiny.adapter)).name
    assert json.loads(found.pop("--lora-modules")) == {"name": name, "path": str(tiny.adapter)}
    assert found == {
        "--model": str(tiny.llama), "--served-model-name": "base", "--host": "127.0.0.1", "--dtype": "float32",
        "--max-model-len": "256", "--max-num-batched-tokens": "2048", "--max-num-seqs": "5",
        "--generation-config": "vllm", "--logprobs-mode": "raw_logprobs", "--tensor-parallel-size": "4",
        "--gpu-memory-utilization": "0.8", "--enable-lora": "", "--max-loras": "1", "--max-lora-rank": "8",
    }  # fmt: skip


def test_on_a_gpu_a_checkpoint_is_a_server_of_its_own_and_both_share_the_memory(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch)
    weights = Weights("tiny", str(tiny.llama), checkpoint=str(tiny.gemma))
    found = started(weights, tmp_path, monkeypatch, servers=2)
    assert {each["--model"] for each in found} == {str(tiny.llama), str(tiny.gemma)}
    assert [each["--gpu-memory-utilization"] for each in found] == ["0.4", "0.4"]
    assert not any("--enable-lora" in each for each in found)


def test_on_a_cpu_the_adapter_is_merged_since_vllms_kernels_there_give_it_to_the_base_too(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Weights("tiny", str(tiny.llama), adapter=str(tiny.adapter))
    load = LoadOptions("cpu", "float32")
    found = started(weights, tmp_path, monkeypatch, servers=2, load=load, max_model_len=100)
    assert len({each["--model"] for each in found} - {str(tiny.llama)}) == 1
    for each in found:
        assert each["--max-model-len"] == "100"
        assert "--enforce-eager" in each
        assert not {"--enable-lora", "--gpu-memory-utilization"} & set(each)


def test_a_servers_environment_has_no_telemetry_and_all_cores_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def environment(device: str, threads: int | None) -> Mapping[str, str]:
        options = VllmOptions("python", LoadOptions(device), 1, 0.8, 4096, 5, threads)
        return server_environment(options)

    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    cpu = environment("cpu", 3)
    assert (cpu["VLLM_NO_USAGE_STATS"], cpu["DO_NOT_TRACK"]) == ("1", "1")
    assert (cpu["OMP_NUM_THREADS"], cpu["VLLM_CPU_OMP_THREADS_BIND"]) == ("3", "nobind")
    assert cpu["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert environment("cpu", None)["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert environment("cpu", None)["VLLM_CPU_KVCACHE_SPACE"] == "7"
    on_a_gpu(monkeypatch)
    gpu = environment("auto", None)
    assert (gpu["VLLM_NO_USAGE_STATS"], gpu["OMP_NUM_THREADS"]) == ("1", "77")


def test_a_python_without_vllm_is_refused_with_the_way_to_get_one() -> None:
    with pytest.raises(ConfigError, match="has no vLLM"):
        check_python(sys.executable)
    with pytest.raises(ConfigError, match=r"engine\.python: /no/such/python cannot be run"):
        check_python("/no/such/python")
    with pytest.raises(ConfigError, match=r"engine\.python: /bin/false cannot be run"):
        check_python("/bin/false")


def test_of_a_log_only_the_exceptions_are_told() -> None:
    log = [
        "(APIServer pid=1) INFO 11-22 23:58:38 [api.py:1] starting; errors like `OSError: [Errno 24]` may come",
        "(Worker pid=3) ERROR 11-22 23:59:14 [executor.py:953] Traceback (most recent call last):",
        '(Worker pid=3) ERROR 11-22 23:59:14 [executor.py:953]   File "/v/llama.py", line 1, in load',
        "(Worker pid=3) ERROR 11-22 23:59:14 [executor.py:953]     raise ValueError(why)",
        "(Worker pid=3) ERROR 11-22 23:59:14 [executor.py:953] safetensors_rust.SafetensorError: Error in the header",
        "",
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig",
        "  Value error, heads (9) must be divisible by tensor parallel size (2).",
        "    For further information visit https://errors.pydantic.dev",
    ]
    assert telling(log) == ["safetensors_rust.SafetensorError: Error in the header", *log[6:8]]
    assert telling(["api_server.py: error: unrecognized arguments: --x"])[0].startswith("api_server.py: error")


def test_a_proxy_of_the_environment_is_not_asked_for_this_machines_loopback(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with CompletionsServer(str(tiny.llama), str(tiny.adapter)) as server:
        sides = {"base": Endpoint(server.url, BASE), "fine_tuned": Endpoint(server.url, TUNED)}
        options = EngineOptions(kind="openai", load=LoadOptions("cpu", "float32"), **sides)
        weights = Weights("tiny", str(tiny.llama), adapter=str(tiny.adapter))
        engine, canary = open_proved(weights, options, CORPUS[:2])
        engine.close()
    assert canary.adapter_effect > 0.1


FAMILY = "sleep 1000 & sleep 1000"  # a shell with two children, and then
STUBBORN = "trap '' TERM; sleep 1000 & while true; do sleep 1; done"
PARENT = """
import os, sys, time
from tuneshift import guard
guard.start(["sh", "-c", sys.argv[1]], output=open(os.devnull, "w"), env=os.environ)
time.sleep(1000)
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """What the processes of a test have in their environment."""
    value = uuid4().hex
    monkeypatch.setenv("TUNESHIFT_TEST_MARK", value)
    return value


def running(mark: str, name: str) -> int:
    return sum(name in command for command in marked(mark).values())


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_a_guarded_command_passes_its_exit_code_on(script: str, code: int, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        process = guard.start(["sh", "-c", f"echo said; {script}"], output=log, env=os.environ)
        assert process.wait(30) == code
        guard.stop(process)  # after its end too
    assert (tmp_path / "log").read_text() == "said\n"


def test_what_a_command_leaves_running_ends_with_it(mark: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        process = guard.start(["sh", "-c", "sleep 1000 & exit 3"], output=log, env=os.environ)
        assert process.wait(30) == 3
        guard.stop(process)
    assert soon(lambda: not marked(mark), 10)


def test_stopping_ends_the_command_and_its_children(mark: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        process = guard.start(["sh", "-c", FAMILY], output=log, env=os.environ)
        assert soon(lambda: running(mark, "sleep 1000") >= 2, 30)
        guard.stop(process)
    assert soon(lambda: not marked(mark), 10)


def test_a_command_that_ignores_sigterm_is_killed(mark: str) -> None:
    quick = "from tuneshift import guard; guard.GRACE = 0.5; guard.main()"
    process = subprocess.Popen([sys.executable, "-c", quick, "sh", "-c", STUBBORN], stdin=subprocess.PIPE)
    assert soon(lambda: running(mark, "sleep 1000") >= 2, 30)
    guard.stop(process)
    assert process.returncode == 137
    assert soon(lambda: not marked(mark), 10)


def test_a_killed_parent_leaves_no_orphans(mark: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, FAMILY])
    assert soon(lambda: running(mark, "sleep 1000") >= 2, 30)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert soon(lambda: not marked(mark), 10)
