"""Opening engines: which class serves which weights, and the proof that both sides are what they claim."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from tuneshift.engines.base import Engine, Weights
from tuneshift.engines.canary import AGREEMENT, Canary, Logprobs, Readings, mean_distance, prove, read, requests_of
from tuneshift.engines.hf import HfEngine
from tuneshift.engines.openai import OpenAIEngine
from tuneshift.engines.options import EngineOptions
from tuneshift.engines.ray import RayEngine
from tuneshift.engines.vllm import VllmEngine, VllmOptions, check_python
from tuneshift.models import load_tokenizer, read_config, read_generation_config, text_ends


def open_engine(weights: Weights, options: EngineOptions) -> Engine:
    """Open an engine without proof: for models that have no fine-tuning, and for an adapter that was just trained.

    Raises:
        ModelError: a model cannot be loaded or served.
    """
    if options.distributed:
        return RayEngine(weights, options, open_in_worker)
    if options.kind == "vllm":
        return _open_vllm(weights, options)
    engine = _open_hf(weights, options)  # `openai` serves F and B alone
    if weights.adapter is not None:
        engine.attach(weights.adapter)
    return engine


def open_proved(weights: Weights, options: EngineOptions, prompts: Sequence[str]) -> tuple[Engine, Canary]:
    """Open an engine with a fine-tuning, and let it prove itself on `prompts`; see `prove`."""
    if options.distributed:
        workers = RayEngine(weights, options, open_in_worker, prompts)
        assert workers.canary is not None  # every worker has proved itself
        return workers, workers.canary
    if options.kind != "hf":
        return _open_served(weights, options, prompts)
    engine = _open_hf(weights, options)
    alone = read(engine, prompts, fine_tuned=False) if weights.adapter is not None else None
    if weights.adapter is not None:
        engine.attach(weights.adapter)
    readings = Readings(read(engine, prompts, fine_tuned=False), read(engine, prompts, fine_tuned=True))
    return engine, prove(engine, weights, prompts, readings=readings, alone=alone)


def open_reference(weights: Weights, options: EngineOptions) -> HfEngine:
    """Open what others are compared with: transformers, and peft with the adapter switched on and off."""
    engine = _open_hf(weights, options)
    if weights.adapter is not None:
        engine.attach(weights.adapter, merge=False)
    return engine


def _open_served(weights: Weights, options: EngineOptions, prompts: Sequence[str]) -> tuple[Engine, Canary]:
    """Open an engine behind a server; what transformers reads is read before, and its memory freed."""
    reference = None
    if options.reference_check and weights.fine_tuning is not None:
        with closing(open_reference(weights, options)) as hf:
            reference = Readings(read(hf, prompts, fine_tuned=False), read(hf, prompts, fine_tuned=True))
    engine = _open_vllm(weights, options) if options.kind == "vllm" else _open_openai(weights, options)
    try:
        alone = read(engine, prompts, fine_tuned=False)
        readings = _read_together(engine, prompts)
        # A server's rows round by who shares their batch; a leak is as large as what the adapter does.
        limit = min(AGREEMENT, mean_distance(alone, readings.fine_tuned) / 2)
        canary = prove(engine, weights, prompts, readings=readings, alone=alone, drift_limit=limit, reference=reference)
        return engine, canary
    except BaseException:
        engine.close()
        raise


def _read_together(engine: OpenAIEngine, prompts: Sequence[str]) -> Readings:
    """Read both sides at the same time, so that the server has rows of both in one batch."""
    requests = requests_of(engine, prompts)
    mixed = engine.score_mixed([(request, side) for request in requests for side in (False, True)])
    base: Logprobs = mixed[0::2]
    return Readings(base, mixed[1::2])


def open_in_worker(
    weights: Weights, options: EngineOptions, prompts: Sequence[str] | None
) -> tuple[Engine, Canary | None]:
    """Open an engine in this process, with proof where there are `prompts`: what every worker does."""
    return (open_engine(weights, options), None) if prompts is None else open_proved(weights, options, prompts)


def _open_hf(weights: Weights, options: EngineOptions) -> HfEngine:
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    return HfEngine.open(weights.base, load=options.load, fine_tuned=weights.checkpoint, batch_size=options.batch_size)


def _open_vllm(weights: Weights, options: EngineOptions) -> VllmEngine:
    return VllmEngine(
        weights,
        VllmOptions(
            python=check_python(options.python),
            load=options.load,
            tensor_parallel_size=options.tensor_parallel_size,
            memory=options.memory,
            max_model_len=options.max_model_len,
            concurrency=options.batch_size,
            threads=options.threads,
        ),
    )


def _open_openai(weights: Weights, options: EngineOptions) -> OpenAIEngine:
    assert options.base is not None
    assert options.fine_tuned is not None
    trust = options.load.trust_remote_code
    tokenizer = load_tokenizer(weights.checkpoint or weights.base, trust_remote_code=trust)
    return OpenAIEngine(
        base=options.base,
        fine_tuned=options.fine_tuned,
        tokenizer=tokenizer,
        vocabulary_size=read_config(weights.base, trust_remote_code=trust).get_text_config().vocab_size,
        eos_ids=text_ends([read_generation_config(weights.base)], tokenizer),
        concurrency=options.batch_size,
    )
