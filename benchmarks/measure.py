"""What the benchmarks share: repeating both sides in turn, and one JSON document with the environment inside."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from tuneshift.run.manifest import environment


@dataclass(frozen=True)
class Work:
    """What a model's arithmetic costs, counted from its shapes: one multiplication and one addition a weight."""

    body: int  # weights that every token passes
    head: int  # weights that a token passes whose logits are wanted
    attention: int  # operations of one token looking at one other, over all layers
    cache_bytes: int  # keys and values of one token, over all layers
    weight_bytes: int

    @classmethod
    def of(cls, model: Any) -> Self:
        """Count a transformers model's weights."""
        config, head = model.config.get_text_config(), model.get_output_embeddings().weight
        weights = list(model.parameters())  # a tied embedding is listed once
        table = model.get_input_embeddings().weight
        looked_up = 0 if table is head else table.numel()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_head = config.num_hidden_layers * size
        return cls(
            body=sum(weight.numel() for weight in weights) - head.numel() - looked_up,
            head=head.numel(),
            attention=4 * per_head * config.num_attention_heads,
            cache_bytes=2 * per_head * config.num_key_value_heads * head.element_size(),
            weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights) - looked_up,
        )


def in_turn(sides: Mapping[str, Callable[[], float]], *, repeats: int) -> dict[str, list[float]]:
    """Return each side's figures of `repeats` rounds; a first round, which warms up, is left out."""
    rounds = [{name: side() for name, side in sides.items()} for _ in range(repeats + 1)][1:]
    return {name: [figures[name] for figures in rounds] for name in sides}


def spread(figures: Sequence[float]) -> dict[str, Any]:
    """Return median, smallest and largest of a side's figures."""
    return {"median": statistics.median(figures), "low": min(figures), "high": max(figures), "n": len(figures)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return how many times as large ours are, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def gemm_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """Return the floating-point operations a second of a large square product: what this processor can reach."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def bandwidth(size: int = 2**28) -> float:
    """Return the bytes a second that a sum reads from memory."""
    block = torch.ones(size // 4)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - started)
    return size / min(times)


def document(claim: str, **results: Any) -> None:
    """Print a benchmark's one JSON document."""
    print(json.dumps({"claim": claim, **results, "threads": torch.get_num_threads(), "environment": environment()}))
