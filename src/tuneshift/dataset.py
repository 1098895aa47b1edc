"""Step 3: the kept pairs as a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneshift.distill import Pair
from tuneshift.errors import RunDirectoryError
from tuneshift.run.directory import read_jsonl
from tuneshift.run.records import Candidate

Row = dict[str, Any]


def kept_rows(candidates: Sequence[Candidate], *, target_size: int, count_eos: bool) -> list[Row]:
    """Return the first `target_size` kept pairs with their provenance, in the order in which they were kept.

    `ppl_b` is `None` where the criterion needs no answer of B, and none was asked for.
    """
    kept = [candidate for candidate in candidates if candidate.kept][:target_size]
    return [
        {
            "id": candidate.id,
            "prompt": candidate.prompt,
            "response": candidate.y_f.text,
            "ppl_f": candidate.y_f.perplexity(count_eos=count_eos),
            "ppl_b": candidate.y_b and candidate.y_b.finite_perplexity(count_eos=count_eos),
        }
        for candidate in kept
        if candidate.y_f is not None
    ]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a kept dataset.

    Raises:
        RunDirectoryError: there is none yet.
    """
    if not path.is_file():
        raise RunDirectoryError(f"{path}: not there; the run has not kept its pairs yet. Finish `tuneshift transfer`.")
    return read_jsonl(path)


def pairs(rows: Sequence[Row]) -> list[Pair]:
    """Return what the target learns."""
    return [Pair(prompt=row["prompt"], response=row["response"]) for row in rows]
