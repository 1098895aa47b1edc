"""Which kept pairs descend from which seed: a prompt's parents are the examples that the generator was shown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tuneshift.coverage import descents, families
from tuneshift.errors import RunDirectoryError
from tuneshift.report.page.variety import GROUPS, spans
from tuneshift.run.records import Candidate, GeneratorCall

MOST_PARENTS = 8  # kept prompts with the most descendants that the page lists; a guess at what people read
SEED_BANDS = 7  # seeds with a colour of their own: Okabe and Ito's palette (2008) without black
ROUND_BANDS = 6  # colours from the first rounds to the last, as on the map

Band = dict[str, Any]


def family(
    candidates: Sequence[Candidate], calls: Mapping[str, GeneratorCall], seeds: Mapping[str, str]
) -> dict[str, Any]:
    """Return depth, seeds' shares, what the kept pairs of each round come from, and the most fruitful prompts.

    `seeds` are texts by id. A seed's `share` is the part of all kept pairs that comes down to it. `generations` counts
    along each kept pair's longest line, from 1 for those whose parents are all seeds. `effective_seeds` is exp of the
    shares' entropy. `columns` are rounds with how many pairs they kept. The bands of `by_seed` divide each pair among
    the seeds that it comes down to, those of `by_parents` among its parents' rounds; `values` are sums by column.

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
    rounds = 1 + max(candidate.round for candidate in candidates)
    groups = spans(rounds, GROUPS)
    columns = [[c for c in kept if first <= c.round <= last] for _, first, last in groups]
    return {
        "depths": dict(sorted(Counter(depth[c.id] for c in kept).items())),
        "generations": {c.id: depth[c.id] for c in kept},
        "columns": [{"label": label, "kept": len(own)} for (label, *_), own in zip(groups, columns, strict=True)],
        "by_seed": _by_seed(columns, descents(kept, calls), [name for name, part in share.items() if part]),
        "by_parents": _by_parents(columns, parents, rounds),
        "seeds": [
            {"id": name, "text": seeds.get(name), "share": share.get(name, 0.0), "children": children[name]}
            for name in ids
        ],
        "effective_seeds": math.exp(-sum(p * math.log(p) for p in share.values() if p > 0)),
        "fruitful": _fruitful(kept, parents),
    }


def _by_seed(
    columns: Sequence[Sequence[Candidate]], shares: Mapping[str, Mapping[str, float]], seeds: Sequence[str]
) -> list[Band]:
    """Return how many pairs of each column come down to each seed; seeds behind the first share the last band."""

    def band(label: str, ids: Iterable[str]) -> Band:
        own = set(ids)
        parts = [
            math.fsum(part for c in column for seed, part in shares[c.id].items() if seed in own) for column in columns
        ]
        return {"label": label, "seeds": len(own), "values": [round(part, 3) for part in parts]}

    named, others = seeds[:SEED_BANDS], seeds[SEED_BANDS:]
    return [band(seed, [seed]) for seed in named] + ([band(f"{len(others)} other seeds", others)] if others else [])


def _by_parents(
    columns: Sequence[Sequence[Candidate]], parents: Mapping[str, Sequence[str]], rounds: int
) -> list[Band]:
    """Return how many pairs of each column were written from seeds, and from pairs of which rounds."""
    written_in = {c.id: c.round for column in columns for c in column}

    def band(label: str, first: int, last: int) -> Band:
        parts = [
            math.fsum(
                sum(first <= written_in.get(p, -1) <= last for p in own) / len(own)
                for c in column
                if (own := parents[c.id])
            )
            for column in columns
        ]
        return {"label": label, "values": [round(part, 3) for part in parts]}

    found = [band("seeds", -1, -1)]
    found += [
        band(f"rounds {label}" if last > first else f"round {label}", first, last)
        for label, first, last in spans(rounds, ROUND_BANDS)
    ]
    return [one for one in found if any(one["values"])]


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
