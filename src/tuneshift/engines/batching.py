"""Which requests share a batch: decided by the list of requests alone.

A repeated call, another process and a worker on another machine form the same batches of the same list, whatever was
done before and whoever runs them. Floats depend on who shares a batch, so this is what makes a run repeatable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from tuneshift.engines.base import ScoreRequest

BATCH_SIZE = 128  # rows; measured, see benchmarks/results/decode.json: 856 tokens/s at 128 rows, 461 at 32
BATCH_TOKENS = 16_384  # prompt and response tokens of a batch; a guess that keeps a 7B model's cache under 8 GiB
# A scoring batch's padded tokens on a CPU; 8,192 took 1.3 times as long a token (measured once, no result kept).
CPU_SCORING_TOKENS = 4096
# Padding tokens of a scoring batch: what a batch costs by itself on two cores (measured once, no result kept).
PADDING = 400
LOGIT_BYTES = 2**28  # fp32 logits of one scoring batch, 256 MiB: 256 rows of a 262k vocabulary

Item = TypeVar("Item")


def generation_batches(
    items: Sequence[Item], *, length: Callable[[Item], int], max_new_tokens: int, batch_size: int
) -> list[list[Item]]:
    """Return prompts that are continued together; `length` is an item's prompt tokens."""
    return _batches(items, length=length, extra=max_new_tokens, max_rows=batch_size, max_tokens=BATCH_TOKENS)


def scoring_batches(
    items: Sequence[Item],
    *,
    request: Callable[[Item], ScoreRequest],
    vocabulary_size: int,
    batch_size: int,
    on_cpu: bool,
    sides: int = 1,
) -> list[list[Item]]:
    """Return requests that are scored together, of alike lengths and with bounded logits, those of `sides` models."""
    return _batches(
        items,
        length=lambda item: len(request(item).prompt_ids) + len(request(item).response_ids),
        head_rows=lambda item: len(request(item).response_ids),
        max_head_rows=max(1, LOGIT_BYTES // (4 * vocabulary_size * sides)),
        max_rows=batch_size,
        max_tokens=CPU_SCORING_TOKENS if on_cpu else BATCH_TOKENS,
        padding=PADDING,
    )


def _batches(
    items: Sequence[Item],
    *,
    length: Callable[[Item], int],
    max_rows: int,
    max_tokens: int,
    extra: int = 0,
    head_rows: Callable[[Item], int] = lambda item: 0,
    max_head_rows: int = 0,
    padding: float = math.inf,
) -> list[list[Item]]:
    """Sort by length and cut where a batch would pass its rows, its tokens, its head rows or its padding."""
    batches: list[list[Item]] = []
    used = real = 0  # head rows and tokens without padding of the last batch
    for item in sorted(items, key=length):  # stable: equal lengths stay in order
        batch = batches[-1] if batches else []
        tokens = (len(batch) + 1) * (length(item) + extra)
        used, real = used + head_rows(item), real + length(item) + extra
        full = len(batch) == max_rows or tokens > max_tokens or 0 < max_head_rows < used
        if not batch or full or tokens - real > padding:
            batches.append([item])
            used, real = head_rows(item), length(item) + extra
        else:
            batch.append(item)
    return batches
