"""Which kept pairs descend from which seed: a prompt's parents are the examples that the generator was shown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tuneshift.coverage import families
from tuneshift.errors import RunDirectoryError
from tuneshift.run.records import Candidate, GeneratorCall

MOST_PARENTS = 8  # kept prompts with the most descendants that the page lists; a guess at what people read


def family(
    candidates: Sequence[Candidate], calls: Mapping[str, GeneratorCall], seeds: Mapping[str, str]
) -> dict[str, Any]:
    """Return depth, seeds' shares and the most fruitful prompts; `seeds` are texts by id.

    A seed's `share` is the part of all kept pairs that comes down to it. `depth` counts generations along the longest
    line, from 1 for pairs whose parents are all seeds. `effective_seeds` is exp of the shares' entropy.

    Raises:
        RunDirectoryError: no kept pair has a parent.
    """
    kept = [candidate for candidate in candidates if candidate.kept]
    parents = {c.id: calls[c.call_id].demos for c in kept}
    if not any(parents.values()):
        raise RunDirectoryError("Nothing descends from anything: the prompts were not written from examples.")
    ids = list(dict.fromkeys([*seeds, *(p for own in parents.values() for p in own if p not in parents)]))
    depth: dict[str, int] = dict.fromkeys(ids, 0)
    for c in kept:  # a parent was kept in an earlier round, so it comes before
        depth[c.id] = 1 + max((depth[p] for p in parents[c.id]), default=0)
    share = families(kept, calls)
    children = Counter(p for own in parents.values() for p in own)
    return {
        "depths": dict(sorted(Counter(depth[c.id] for c in kept).items())),
        "seeds": [
            {"id": name, "text": seeds.get(name), "share": share.get(name, 0.0), "children": children[name]}
            for name in ids
        ],
        "effective_seeds": math.exp(-sum(p * math.log(p) for p in share.values() if p > 0)),
        "fruitful": _fruitful(kept, parents),
    }


def _fruitful(kept: Sequence[Candidate], parents: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Return the kept prompts with the most descendants: pairs that have it among their parents, theirs, and so on."""
    reached = {c.id: 0 for c in kept}  # by each pair: a bit for every descendant, at its place among the kept ones
    for place in reversed(range(len(kept))):  # a child comes after its parents, so its own are complete
        for p in parents[kept[place].id]:
            if p in reached:
                reached[p] |= reached[kept[place].id] | 1 << place
    most = sorted(kept, key=lambda c: -reached[c.id].bit_count())[:MOST_PARENTS]
    return [
        {"id": c.id, "text": c.text, "descendants": count} for c in most if (count := reached[c.id].bit_count()) > 0
    ]
