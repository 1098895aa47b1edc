"""Prompts that the user already has, for example logged requests, in place of a generator.

They go through the same screening as written ones, so a copy of a seed or of an evaluation prompt is dropped. No model
writes, so the pool steers nothing: the criterion decides what is kept, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tuneshift.engines.base import derive_seed
from tuneshift.prompts.pool import PoolItem
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import GeneratorCall, call_id


@dataclass(frozen=True)
class ListedPrompts:
    """Draws from `texts` without replacement, `per_call` at a time, in an order that `run_seed` sets."""

    texts: Sequence[str]
    per_call: int
    run_seed: int

    def check(self, texts: Sequence[str]) -> None:
        """Do nothing: there is no model that would have to read the examples."""

    def write(self, pool: Sequence[PoolItem], *, round_index: int, calls: int, ledger: Ledger) -> list[GeneratorCall]:
        """Return the next `calls` calls' texts, behind those that the ledger holds; fewer calls where they end."""
        order = random.Random(derive_seed(self.run_seed, "prompts")).sample(self.texts, len(self.texts))
        left = order[sum(len(call.raw) for call in ledger.calls()) :]
        drawn = [left[start : start + self.per_call] for start in range(0, calls * self.per_call, self.per_call)]
        return [
            GeneratorCall(
                id=call_id(round_index, index),
                round=round_index,
                demos=(),
                prompt="",
                raw=tuple(texts),
                finished=(True,) * len(texts),
                generated_tokens=0,
                seconds=0.0,
                decoding={},
                strategy="listed",
            )
            for index, texts in enumerate(drawn)
            if texts
        ]

    def parse(self, call: GeneratorCall) -> list[str | None]:
        """Return the texts of a call as they are."""
        return list(call.raw)
