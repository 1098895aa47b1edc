"""What a study of a task with original data starts from: its training pairs, and random seeds for each replicate."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tuneshift.distill import Pair
from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.evaluate.benchmarks.base import read_benchmark, split_held_out
from tuneshift.run.directory import jsonl, write_atomically

SEEDS = 5  # the paper, section 3.4


def bbh_pairs(subtask: str, data: Path | None) -> list[Pair]:
    """Return the pairs of a subtask's half that `evaluation.held_out: {fraction: 0.5, seed: 0}` does not ask.

    `data` is the folder with bbh/SUBTASK.json; None: the Hub.

    Raises:
        UserError: the data cannot be read.
    """
    file = None if data is None else str(data / "bbh" / f"{subtask}.json")
    items, _ = read_benchmark("bbh", BENCHMARKS["bbh"], data=file, subtask=subtask)
    _, left = split_held_out(items, fraction=0.5, seed=0)
    return [Pair(item.prompt, f" {item.reference}") for item in left]


def draw_pairs(pairs: Sequence[Pair], draw: int, size: int = SEEDS) -> list[Pair]:
    """Return random pairs, as many as a transfer has seeds; another `draw` gives others."""
    return random.Random(draw).sample(list(pairs), size)


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSONL with "prompt" and "response" a line, and the folder where it is missing."""
    write_atomically(path, jsonl([asdict(pair) for pair in pairs]))
