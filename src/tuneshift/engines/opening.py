"""Opening engines: which class serves which weights, and the proof that both sides are what they claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tuneshift.engines.base import Engine, Weights
from tuneshift.engines.batching import BATCH_SIZE
from tuneshift.engines.canary import Canary, Readings, prove, read
from tuneshift.engines.hf import HfEngine
from tuneshift.models import LoadOptions


@dataclass(frozen=True)
class EngineOptions:
    """What runs the models; names, meaning and defaults are those of the configuration's `engine`."""

    kind: str = "hf"
    load: LoadOptions = field(default_factory=LoadOptions)
    batch_size: int = BATCH_SIZE
    workers: int = 1
    ray_address: str | None = None
    threads: int | None = None


def open_engine(weights: Weights, options: EngineOptions) -> Engine:
    """Open an engine without proof: for models that have no fine-tuning, and for an adapter that was just trained.

    Raises:
        ModelError: a model cannot be loaded.
    """
    engine = _open_hf(weights, options)
    if weights.adapter is not None:
        engine.attach(weights.adapter)
    return engine


def open_proved(weights: Weights, options: EngineOptions, prompts: Sequence[str]) -> tuple[Engine, Canary]:
    """Open an engine with a fine-tuning, and let it prove itself on `prompts`; see `prove`."""
    engine = _open_hf(weights, options)
    alone = read(engine, prompts, fine_tuned=False) if weights.adapter is not None else None
    if weights.adapter is not None:
        engine.attach(weights.adapter)
    return engine, prove(engine, weights, prompts, readings=_readings(engine, prompts), alone=alone)


def _open_hf(weights: Weights, options: EngineOptions) -> HfEngine:
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    return HfEngine.open(weights.base, load=options.load, fine_tuned=weights.checkpoint, batch_size=options.batch_size)


def _readings(engine: Engine, prompts: Sequence[str]) -> Readings:
    return Readings(read(engine, prompts, fine_tuned=False), read(engine, prompts, fine_tuned=True))
