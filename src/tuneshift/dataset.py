"""Step 3: the kept pairs as a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tuneshift.coverage import thin_out
from tuneshift.distill import Pair
from tuneshift.engines.base import derive_seed
from tuneshift.errors import RunDirectoryError
from tuneshift.run.directory import read_jsonl
from tuneshift.run.records import Candidate, GeneratorCall, Probe

Row = dict[str, Any]
Selection = Literal["first", "random", "balanced"]


def choose(
    kept: Sequence[Candidate], size: int, how: Selection, *, seed: int, probes: Sequence[Probe] = ()
) -> list[Candidate]:
    """Return `size` of the kept candidates, or all where there are not as many, in the order given.

    `first` takes the first ones; `random` draws by a hash of the seed and the ids; `balanced` is `thin_out`, which
    tells kinds beside F's answers to `probes`.
    """
    if how == "first" or len(kept) <= size:
        return list(kept[:size])
    if how == "balanced":
        return thin_out(kept, size, seed=seed, probes=probes)
    drawn = {c.id for c in sorted(kept, key=lambda c: derive_seed(seed, "draw", c.id))[:size]}
    return [candidate for candidate in kept if candidate.id in drawn]


def kept_rows(kept: Sequence[Candidate], calls: Sequence[GeneratorCall], *, count_eos: bool) -> list[Row]:
    """Return pairs with their provenance: how their calls asked, for what, and what these showed.

    `ppl_b` is `None` where the criterion needs no answer of B, and none was asked for.
    """
    by_id = {call.id: call for call in calls}
    return [
        {
            "id": candidate.id,
            "prompt": candidate.prompt,
            "response": candidate.y_f.text,
            "ppl_f": candidate.y_f.perplexity(count_eos=count_eos),
            "ppl_b": candidate.y_b and candidate.y_b.finite_perplexity(count_eos=count_eos),
            "strategy": by_id[candidate.call_id].strategy,
            "cue": by_id[candidate.call_id].cue,
            "parents": list(by_id[candidate.call_id].demos),
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
