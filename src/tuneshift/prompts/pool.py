"""What the generator is shown: examples drawn from the pool of seeds and kept prompts.

The paper draws them uniformly (section 3.4), so kept prompts breed more like themselves, and the seeds are soon few
among many. The pool can be steered instead: seeds keep their share, and calls ask for what was answered rarely.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from tuneshift.coverage import answer_of, densities, kinds_of, said_again
from tuneshift.datafiles import Seed
from tuneshift.engines.base import derive_seed
from tuneshift.run.records import Candidate, Probe, Strategy, call_id

LONGEST_CUE = 200
"""Characters of a response that can stand before a prompt in a list of one-line examples; a guess."""
SUPPORT = 2
"""Kept responses of one kind before a backward call asks for more of them: F invents answers, each once; a guess."""
GOLDEN = (5**0.5 - 1) / 2
"""Of all steps round a circle, the one whose points stay furthest apart."""


@dataclass(frozen=True)
class PoolItem:
    """A seed or a kept candidate, as an example for the generator; or a probe, which is not `shown` as one.

    `weight` is how likely it is drawn, compared with others. `cue` is the kind of its response in one line, `None`
    where there is none, and `rarity` how likely a call asks for prompts to it; without a cue, how likely it is a
    forward one.
    """

    id: str
    text: str
    weight: float = 1.0
    cue: str | None = None
    rarity: float = 1.0
    shown: bool = True


@dataclass(frozen=True)
class Steering:
    """How examples are drawn; see the `synthesis` section of the configuration. The defaults here are the paper's."""

    seed_share: float | None = None
    back_generation: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What one generator call shows, and how it asks: `cue` is the response that prompts are wanted for, if any."""

    call_id: str
    demos: tuple[PoolItem, ...]
    cue: str | None = None
    strategy: Strategy = "forward"


def make_pool(
    seeds: Sequence[Seed], kept: Sequence[Candidate], steering: Steering, probes: Sequence[Probe] = ()
) -> list[PoolItem]:
    """Return seeds, kept candidates and the kinds of responses to probes, with the weights by which they are drawn.

    The rarity of a response is one over the number of responses in the pool that are like it; only backward calls read
    it. A response that is no short line has the rarity of one that is like no other. A seed weighs as much as a kept
    candidate, or all seeds together weigh `seed_share`.
    """
    n_seeds = len(seeds)
    cues: list[str | None] = [None] * (n_seeds + len(kept))
    probed: list[str] = []
    if steering.back_generation > 0:
        answers = [None if seed.response is None else (seed.text, seed.response) for seed in seeds]
        answers += map(answer_of, kept)
        said = [(probe.word, probe.response) for probe in probes if probe.response]
        kinds = iter(map(_one_line, kinds_of([*filter(None, answers), *said])))
        cues = [None if answer is None else next(kinds) for answer in answers]
        probed = said_again(filter(None, kinds))  # those that are left
    counts = Counter(cues)
    unseen = [kind for kind in probed if kind not in counts]
    rarities = _rarities([*cues, *unseen])
    of_seed = 1.0
    if steering.seed_share is not None and kept:
        of_seed = steering.seed_share / (1 - steering.seed_share) * len(kept) / n_seeds
    named = [*((seed.id, seed.text) for seed in seeds), *((candidate.id, candidate.text) for candidate in kept)]
    weights = [of_seed] * n_seeds + [1.0] * len(kept)
    known = [
        place < n_seeds or cue is None or counts[cue] >= SUPPORT or cue in probed for place, cue in enumerate(cues)
    ]
    pool = [
        PoolItem(*named[place], weights[place], cue, rarities[place] if known[place] else 0.0)
        for place, cue in enumerate(cues)
    ]
    asked_for = zip(unseen, rarities[len(cues) :], strict=True)
    return pool + [PoolItem("", "", cue=cue, rarity=rarity, shown=False) for cue, rarity in asked_for]


def plan_calls(
    pool: Sequence[PoolItem], *, round_index: int, calls: int, demos: int, run_seed: int, back_generation: float = 0.0
) -> list[Plan]:
    """Return what each call of a round shows, drawn by the call's id alone.

    A share `back_generation` of the calls is backward: its examples have a cue each, and it asks for prompts to a cue
    that is drawn by rarity. Its own prompt is the last example; of a kind that only probes have shown there is none.
    Where an item without a cue is drawn the call is a forward one, so a few short answers among long ones stay few.
    The cues of a round are drawn by equal steps round a circle on which each has its rarity, from a random start, so
    that few calls spread over kinds as many would (a Kronecker sequence).
    """
    shown = [item for item in pool if item.shown]
    known = [item for item in shown if item.cue is not None]
    around = sorted((item for item in pool if item.rarity > 0), key=lambda item: item.cue or "")
    askable = any(item.cue is not None for item in around)
    ends = list(accumulate(item.rarity for item in around))
    start = random.Random(derive_seed(run_seed, "cues", round_index)).random()
    plans = []
    for index in range(calls):
        name = call_id(round_index, index)
        draw = random.Random(derive_seed(run_seed, "demos", name))
        backward = random.Random(derive_seed(run_seed, "strategy", name)).random() < back_generation
        wanted = around[bisect(ends, (start + index * GOLDEN) % 1 * ends[-1], hi=len(ends) - 1)] if askable else None
        if not (backward and known and wanted is not None and wanted.cue is not None):
            plans.append(Plan(name, tuple(_draw(shown, demos, draw))))
            continue
        own = (wanted,) if wanted.shown else ()
        others = _draw([item for item in known if item is not wanted], demos - len(own), draw)
        plans.append(Plan(name, (*others, *own), wanted.cue, "backward" if own else "probed"))
    return plans


def shorten(plan: Plan, pool: Sequence[PoolItem]) -> Plan | None:
    """Return the plan without its longest example; `None` where nothing shorter can be shown.

    The example whose cue is wanted stays. The last one that is left gives way to the shortest of the pool.
    """
    if len(plan.demos) > 1:
        longest = max(plan.demos[:-1] if plan.strategy == "backward" else plan.demos, key=lambda item: len(item.text))
        return replace(plan, demos=tuple(item for item in plan.demos if item is not longest))
    shortest = Plan(plan.call_id, (min((item for item in pool if item.shown), key=lambda item: len(item.text)),))
    return shortest if plan != shortest else None


def _draw(pool: Sequence[PoolItem], size: int, draw: random.Random) -> list[PoolItem]:
    """Return `size` different items, or all, one drawn behind the other by the weights of those that are left."""
    size = min(size, len(pool))
    if len({item.weight for item in pool}) == 1:
        return draw.sample(pool, size)
    # The smallest of exponential waiting times, each with its item's rate, are such a draw (Efraimidis, Spirakis 2006).
    waits = [(draw.expovariate(item.weight), place) for place, item in enumerate(pool)]
    return [pool[place] for _, place in sorted(waits)[:size]]


def _rarities(cues: Sequence[str | None]) -> list[float]:
    """Return one over the number of cues that are like each; 1 for what has none."""
    dense = iter(densities([cue for cue in cues if cue is not None]))
    return [1.0 if cue is None else 1 / next(dense) for cue in cues]


def _one_line(cue: str | None) -> str | None:
    return cue if cue and "\n" not in cue and len(cue) <= LONGEST_CUE else None
