"""What several seeds on the same items say together: an arm's mean accuracy, and its difference from another arm's.

Outcomes are arrays [seeds, items] of right (True) and wrong (False), with the same items in every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuneshift.evaluate.stats import Interval, Proportion, mcnemar_exact

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 10_000  # of the bootstrap and of the permutation test, as in `paired_difference`
CHUNK = 1_000  # resamples that are in memory together


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and, for a difference, the two-sided p value of "no difference"."""

    value: float
    interval: Interval
    p_value: float | None = None


def mean_accuracy(outcomes: NDArray[np.bool_]) -> Estimate:
    """Return the mean accuracy over seeds and items, with a two-level bootstrap interval; Wilson's for one seed."""
    if len(outcomes) == 1:
        rate = Proportion(int(outcomes.sum()), outcomes.size)
        return Estimate(rate.accuracy, rate.interval())
    return Estimate(float(outcomes.mean()), _bootstrap(outcomes.astype(float)))


def difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Estimate:
    """Return mean(second) - mean(first), with a two-level paired bootstrap interval and a p value.

    With one seed the test is the exact McNemar test. With several it flips the sign of each item's difference of means
    over the seeds; that is valid where, without a difference, an item's two outcomes could be exchanged. It asks about
    these seeds: the interval, which draws seeds too, is the wider answer.
    """
    import numpy as np

    items = second.astype(float) - first.astype(float)  # [seeds, items]
    if len(items) == 1:
        p_value = mcnemar_exact(first[0].tolist(), second[0].tolist()).p_value
    else:
        means = items.mean(axis=0)
        rng, reached, observed = np.random.default_rng(0), 0, abs(means.sum()) - 1e-9
        for _ in range(RESAMPLES // CHUNK):
            signs = rng.integers(0, 2, size=(CHUNK, len(means))) * 2 - 1
            reached += int((np.abs(signs @ means) >= observed).sum())
        p_value = (reached + 1) / (RESAMPLES + 1)
    return Estimate(float(items.mean()), _bootstrap(items), p_value)


def shown_difference(value: float, items: int) -> str:
    """Return a difference of accuracies for people; what is less than one item is none."""
    return f"{value:+.1%}" if abs(value) * items >= 1 - 1e-9 else "0 (below one item)"


def _bootstrap(values: NDArray[np.float64]) -> Interval:
    """Return the 95 % percentile interval of the mean of `values` [seeds, items], both drawn with replacement."""
    import numpy as np

    seeds, items = values.shape
    rng, means = np.random.default_rng(0), []
    for _ in range(RESAMPLES // CHUNK):
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=CHUNK) / seeds
        of_items = rng.multinomial(items, np.full(items, 1 / items), size=CHUNK) / items
        means.append(((of_seeds @ values) * of_items).sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(low), float(high), 0.95)
