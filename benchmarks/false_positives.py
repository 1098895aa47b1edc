"""Claim: where there is no difference, the tests of the verdict and of several seeds claim one in at most 5 % of runs.

    python benchmarks/false_positives.py [--runs 4000]

Two equally good arms answer the same items, in worlds where items and seeds matter more or less. Printed is how often
each test claims a difference at the 5 % level, how often the two-level bootstrap's 95 % interval holds the truth, and
how often a loss of exactly the margin passes as non-inferior. Prints one JSON document; needs no model.
"""

import argparse
from math import sqrt
from typing import Any

import numpy as np
from measure import document
from numpy.typing import NDArray

from tuneshift.evaluate.noninferiority import non_inferior
from tuneshift.evaluate.seeds import difference_over_seeds, seed_test
from tuneshift.evaluate.stats import mcnemar_exact
from tuneshift.evaluate.verdict import shows_improvement

Flags = NDArray[np.bool_]

# Standard deviations in units of one answer's noise; `level` shifts how many answers are right.
WORLDS = {
    "independent": {"by_item": 0.0, "by_seed": 0.0, "level": 0.0},
    "correlated items": {"by_item": 0.7, "by_seed": 0.0, "level": 0.0},
    "seed effects": {"by_item": 0.0, "by_seed": 0.5, "level": 0.0},
    "both": {"by_item": 0.7, "by_seed": 0.3, "level": 0.0},
    "few right": {"by_item": 0.3, "by_seed": 0.3, "level": -2.0},
}
SEEDS, ITEMS = (1, 2, 3, 5), (50, 200)
MARGIN, DISCORDANT = 0.02, (0.02, 0.06, 0.3)


def answers(
    rng: np.random.Generator, seeds: int, items: int, *, by_item: float, by_seed: float, level: float
) -> tuple[Flags, Flags]:
    """Return two equally good arms [seeds, items]: right where ease, item x arm, seed x arm and noise exceed 0.

    With `by_item` an item's ease is common to both arms and all seeds, so that answers to one item are alike.
    """
    ease = level + rng.normal(0, 1.5 * bool(by_item), items)

    def arm() -> Flags:
        own = rng.normal(0, by_item, items) + rng.normal(0, by_seed, (seeds, 1))
        return np.asarray(ease + own + rng.normal(0, 1, (seeds, items)) > 0)

    return arm(), arm()


def claims(world: dict[str, float], *, seeds: int, items: int, runs: int) -> dict[str, Any]:
    """Return the rates of false claims in one world."""
    rng = np.random.default_rng([seeds, items])
    drawn = [answers(rng, seeds, items, **world) for _ in range(runs)]
    tests = [seed_test(*arms) for arms in drawn]
    found: dict[str, Any] = {"p_items": rate([test.p_items <= 0.05 for test in tests])}
    if seeds == 1:
        mcnemar = [mcnemar_exact(list(first[0]), list(second[0])) for first, second in drawn]
        found |= {
            "verdict_improved": rate([shows_improvement(test) for test in mcnemar]),
            "mid_p": rate([test.mid_p <= 0.05 for test in mcnemar]),
        }
    else:
        found |= {f"p_value_at_{level}": rate([test.p_value <= level for test in tests]) for level in (0.05, 0.01)}
    intervals = [difference_over_seeds(*arms, resamples=1000).interval for arms in drawn[: runs // 10]]
    return {**found, "bootstrap_coverage": rate([interval.low <= 0 <= interval.high for interval in intervals])}


def false_non_inferiority(discordant: float, *, items: int, runs: int) -> dict[str, float]:
    """Return how often a second arm that is worse by the whole margin passes."""
    rng = np.random.default_rng(items)
    shares = [(discordant + MARGIN) / 2, (discordant - MARGIN) / 2, 1 - discordant]
    drawn, times = np.unique(rng.multinomial(items, shares, size=runs), axis=0, return_counts=True)
    passed: list[bool] = []
    for (lost, gained, alike), k in zip(drawn, times, strict=True):
        first = [True] * lost + [False] * gained + [True] * alike
        second = [False] * lost + [True] * (gained + alike)
        passed += [non_inferior(first, second, MARGIN).shown] * k
    return rate(passed)


def rate(flags: list[bool]) -> dict[str, float]:
    """Return the share of true flags, with its Monte Carlo standard error and how many there are."""
    share = sum(flags) / len(flags)
    return {"rate": share, "standard_error": sqrt(share * (1 - share) / len(flags)), "n": len(flags)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3000)
    options = parser.parse_args()
    document(
        "where there is no difference the tests claim one in at most 5 % of runs",
        false_claims=[
            {
                "world": name,
                "seeds": seeds,
                "items": items,
                **claims(world, seeds=seeds, items=items, runs=options.runs),
            }
            for name, world in WORLDS.items()
            for seeds in SEEDS
            for items in ITEMS
        ],
        worlds=WORLDS,
        non_inferiority=[
            {
                "margin": MARGIN,
                "discordant": discordant,
                "items": items,
                **false_non_inferiority(discordant, items=items, runs=options.runs),
            }
            for discordant in DISCORDANT
            for items in ITEMS
        ],
    )


if __name__ == "__main__":
    main()
