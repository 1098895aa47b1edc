"""What a run's models need and how long they take, from its configuration alone; `tuneshift.sizing` has the arithmetic.

Nothing is loaded and nothing measured: it tells whether a machine is large enough, before anything is downloaded.
`tuneshift plan` measures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuneshift.config import LoadedConfig
from tuneshift.engines.batching import BATCH_TOKENS, LOGIT_BYTES
from tuneshift.errors import ConfigError
from tuneshift.launch import is_sharded, read_processes
from tuneshift.loss import logit_bytes
from tuneshift.models import read_config
from tuneshift.sizing import (
    DEVICES,
    TRAINED_BYTES,
    AdapterSize,
    Device,
    ModelSize,
    activation_bytes,
    adapter_size,
    compute_seconds,
    decode_seconds,
    kv_cache_bytes,
    model_size,
    score_flops,
    train_flops,
)
from tuneshift.wiring import load_options

OVERHEAD = 2**30  # bytes of a device for libraries and what fragments; a guess
GATHERED_LAYERS = 2  # that FSDP holds whole on each device: the one at work and the next
MOST_DEVICES = 64  # beyond which "fewest devices" is not looked for


def estimate(loaded: LoadedConfig, *, device: str, prompt_tokens: int, keep_rate: float) -> dict[str, Any]:
    """Compute memory by role and time on a device.

    Every prompt is taken to have `prompt_tokens` tokens, every response as many as it may have at most, and a share
    `keep_rate` of the candidates to be kept. Seconds leave out reading the weights, and the evaluation, whose questions
    are not read.

    Raises:
        ConfigError: the device is not in the table.
        ModelError: a model's configuration cannot be read, or is no dense decoder's.
    """
    if device not in DEVICES:
        raise ConfigError(f"--device {device}: not in the table. Known are {', '.join(DEVICES)}.")
    config = loaded.config
    trusted = load_options(loaded).trust_remote_code
    source = model_size(read_config(config.source.base, trust_remote_code=trusted))
    target_config = read_config(config.target.model, trust_remote_code=trusted)
    target = model_size(target_config)
    adapter = adapter_size(target_config, r=config.distill.r, target_modules=config.distill.target_modules)
    given = config.generator.model
    writer = {"source": source, "base": source, "target": target}.get(given)
    if not config.generator.opens_model:
        writer = None
    elif writer is None:
        writer = model_size(read_config(given, trust_remote_code=trusted))
    peaks, dtype_bytes = DEVICES[device], 4 if config.run.dtype == "float32" else 2
    assumed = {"device": device, "prompt_tokens": prompt_tokens, "keep_rate": keep_rate, "dtype_bytes": dtype_bytes}
    assumed["response_tokens"] = config.synthesis.max_new_tokens
    return {
        "assumed": assumed,
        "synthesis": _serving(loaded, [source] + ([writer] if writer not in (None, source) else []), peaks, assumed),
        "distillation": _training(loaded, target, adapter, peaks, assumed),
        "seconds": _seconds(loaded, source, writer, target, peaks, assumed),
    }


def _rows(loaded: LoadedConfig, context: int) -> int:
    """Return how many texts a batch has."""
    engine = loaded.config.engine
    return min(engine.batch_size, max(1, BATCH_TOKENS // context)) if engine.kind == "hf" else engine.batch_size


def _serving(loaded: LoadedConfig, opened: list[ModelSize], peaks: Device, assumed: dict[str, Any]) -> dict[str, Any]:
    """Return the memory of F, B and a G of its own; an adapter shares B's weights, a full checkpoint has its own."""
    engine, dtype_bytes = loaded.config.engine, assumed["dtype_bytes"]
    context = assumed["prompt_tokens"] + assumed["response_tokens"]
    rows = _rows(loaded, context)
    models = opened[:1] * (2 if loaded.config.source.model else 1) + opened[1:]
    caches = [kv_cache_bytes(model, tokens=context, rows=rows, dtype_bytes=dtype_bytes) for model in opened]
    logits = LOGIT_BYTES if engine.kind == "hf" else rows * max(model.vocabulary for model in opened) * 4
    divided = {
        "weight_bytes": sum(model.parameters for model in models) * dtype_bytes,
        "kv_cache_bytes": max(caches),
        "logit_bytes": logits,
    }
    devices = engine.tensor_parallel_size if engine.kind == "vllm" else 1
    available = peaks.memory * (engine.gpu_memory_utilization if engine.kind == "vllm" else 1)
    return {
        "devices": devices,
        "copies": engine.workers,
        "parameters": opened[0].parameters,
        **divided,
        "kv_cache_bytes_per_token": kv_cache_bytes(opened[0], tokens=1, rows=1, dtype_bytes=dtype_bytes),
        **_fit(divided, {}, devices, available),
    }


def _training(
    loaded: LoadedConfig, target: ModelSize, adapter: AdapterSize, peaks: Device, assumed: dict[str, Any]
) -> dict[str, Any]:
    """Return the memory of T while it is trained; with FSDP weights and optimizer are divided, activations never."""
    section, dtype_bytes = loaded.config.distill, assumed["dtype_bytes"]
    pairs, path = section.per_device_train_batch_size, section.accelerate and Path(section.accelerate)
    weights = {"weight_bytes": target.parameters * dtype_bytes, "adapter_bytes": adapter.parameters * TRAINED_BYTES}
    tokens = pairs * (assumed["prompt_tokens"] + assumed["response_tokens"] + 1)
    whole = {
        "activation_bytes": activation_bytes(
            target,
            adapter,
            tokens=tokens,
            dtype_bytes=dtype_bytes,
            checkpointed=bool(section.trainer_args.get("gradient_checkpointing")),
        ),
        "logit_bytes": logit_bytes(pairs * (assumed["response_tokens"] + 1), target.vocabulary),
    }
    devices, sharded = (read_processes(path), is_sharded(path)) if path else (1, False)
    if sharded:
        whole["gathered_bytes"] = (target.body // target.layers * GATHERED_LAYERS + target.head) * dtype_bytes
    divided, fixed = (weights, whole) if sharded else ({}, weights | whole)
    fit = _fit(divided, fixed, devices, peaks.memory)
    return {"devices": devices, "parameters": target.parameters, **weights, **whole, **fit}


def _fit(divided: dict[str, int], fixed: dict[str, int], devices: int, available: float) -> dict[str, Any]:
    """Return the bytes of each device, whether it has them, and on how many devices they would fit: a power of two."""

    def needed(count: int) -> float:
        return sum(divided.values()) / count + sum(fixed.values()) + OVERHEAD

    counts = (2**power for power in range(MOST_DEVICES.bit_length()))
    return {
        "bytes_per_device": round(needed(devices)),
        "available_bytes": round(available),
        "fits": needed(devices) <= available,
        "fewest_devices": next((count for count in counts if needed(count) <= available), None),
    }


def _seconds(
    loaded: LoadedConfig,
    source: ModelSize,
    writer: ModelSize | None,
    target: ModelSize,
    peaks: Device,
    assumed: dict[str, Any],
) -> dict[str, float | None]:
    """Return the seconds of each stage; `None` for prompts that no model of the run writes."""
    config, response = loaded.config, assumed["response_tokens"]
    context = assumed["prompt_tokens"] + response
    engine, synthesis = config.engine, config.synthesis
    candidates = synthesis.oversample * synthesis.target_size / assumed["keep_rate"]
    devices = engine.workers * (engine.tensor_parallel_size if engine.kind == "vllm" else 1)
    decoding = {
        "devices": devices, "rows": _rows(loaded, context), "context": context, "dtype_bytes": assumed["dtype_bytes"]
    }  # fmt: skip
    scoring = candidates * score_flops(source, tokens=context, scored=response)
    prompts = candidates * config.generator.max_new_tokens
    again = 4 / 3 if config.distill.trainer_args.get("gradient_checkpointing") else 1  # the forward pass, twice
    flops = train_flops(target, tokens=context + 1, labels=response + 1) * config.synthesis.target_size * again
    trainers = read_processes(Path(config.distill.accelerate)) if config.distill.accelerate else 1
    return {
        "prompts": decode_seconds(writer, peaks, tokens=prompts, **decoding) if writer else None,
        "answers": decode_seconds(source, peaks, tokens=2 * candidates * response, **decoding),
        "scores": compute_seconds(scoring, peaks, devices=devices),
        "training": compute_seconds(flops * config.distill.num_train_epochs, peaks, devices=trainers),
    }
