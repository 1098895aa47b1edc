"""Statistics of several trainings: the same items, answered by models that were trained with different seeds.

Outcomes are arrays [seeds, items] of True (right) and False (wrong): row s belongs to the same seed and column i to the
same item in every arm. An arm that no seed touches, such as the target before, has one row. Both seeds and items are
samples: a gain has to hold on other questions and for another training. All shares and differences are fractions.

The items are taken to be independent questions; several questions on one text tell less than these intervals say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING

from tuneshift.evaluate.stats import Interval, holm_family, percentile_interval, resampled_counts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Outcomes = Sequence[Sequence[bool]] | NDArray[np.bool_]

ONE_SEED = "one seed: how much another training would change was not measured"


@dataclass(frozen=True)
class SeedEstimate:
    """A mean over `seeds` and `items` with its two-level bootstrap interval, and where its variation comes from.

    `seed_sd` is the standard deviation of the seeds' means, the chance of which items were asked left in; `item_se` the
    standard error of the mean over items, the seeds taken as they are. Each is None where there is one seed or one item
    only; `reason` says so, and is None otherwise.
    """

    value: float
    interval: Interval
    seeds: int
    items: int
    seed_sd: float | None
    item_se: float | None
    reason: str | None


def accuracy_over_seeds(
    outcomes: Outcomes, *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> SeedEstimate:
    """Return one arm's mean accuracy; see `difference_over_seeds` for the interval.

    With one seed `Proportion.interval` is the better interval: it has a width at 0 and 1.
    """
    (values,) = _arrays(outcomes=outcomes)
    return _estimate(values.astype(int), resamples=resamples, seed=seed, level=level)


def difference_over_seeds(
    first: Outcomes, second: Outcomes, *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> SeedEstimate:
    """Return the mean of second - first over seeds and items, with the two-level percentile bootstrap interval.

    A resample draws the seeds with replacement and, independently, the items with replacement, the same items for all
    drawn seeds, since all seeds answered the same questions: sum over s, i of w_s v_i d_si / (S n), where w and v count
    how often each was drawn. With one seed it is the item bootstrap of `paired_difference`, number for number.
    With few seeds it is too narrow where seeds differ much: three seeds cannot show how far a fourth may lie (measured
    coverage in benchmarks/results/false_positives.json), so a claim rests on `seed_test`.
    Source: Efron 1979 (percentile bootstrap); Owen 2007, arXiv 0712.1111 (rows and columns resampled independently).
    """
    a, b = _arrays(first=first, second=second)
    return _estimate(b.astype(int) - a, resamples=resamples, seed=seed, level=level)


@dataclass(frozen=True)
class SeedTest:
    """Two-sided p values of "no difference".

    `p_items` is about these trainings on other items; `p_value` about other trainings too, and what a claim about a
    method rests on. With one seed `p_value` is None, for the `reason` given.
    """

    p_items: float
    p_value: float | None
    reason: str | None


def seed_test(first: Outcomes, second: Outcomes) -> SeedTest:
    """Test whether two arms are equally accurate, over seeds and items that are both samples.

    `p_items` is the exact paired sign-flip permutation test on the items' sums over seeds, k_i = sum over s of d_si:
    P[|sum of ± k_i| >= |sum of k_i|], every sign with probability 1/2. With one seed it is the exact McNemar test. It
    assumes that items are independent and takes the trainings as they are: a seed that shifts all items at once
    breaks it. A sign flip of whole seeds would need six of them to fall below 0.05, and takes the items as they are.

    `p_value` is therefore the larger of `p_items` and of a t test with S - 1 degrees of freedom,
    t = mean(d) / sqrt(V / (S n)), V = max(MS_seeds + MS_items - MS_rest, MS_seeds, MS_items), with the mean squares of
    the crossed two-way layout seeds x items, one difference a cell. It assumes independent seeds and independent items
    with roughly normal means. The usual degrees of freedom (Satterthwaite's) reject too often with two or three seeds
    (measured, 7 to 12 % for 5 %); the smaller of the two kinds' is never too few, at the price of power.
    Source: Fisher 1935 (sign flips); Clark 1973 (both factors random, quasi-F); Mickey and Brown 1966 (least degrees).
    """
    from scipy.stats import t as student

    a, b = _arrays(first=first, second=second)
    values = b.astype(int) - a
    p_items = _sign_flip(values.sum(axis=0))
    seeds, items = values.shape
    if seeds == 1:
        return SeedTest(p_items, None, ONE_SEED)
    if items == 1 or p_items == 1:
        return SeedTest(p_items, p_items, None)
    by_seed, by_item, rest = _mean_squares(values)
    variance = max(by_seed + by_item - rest, by_seed, by_item) / values.size
    p_seeds = 2 * float(student.sf(abs(values.mean()) / sqrt(variance), seeds - 1)) if variance > 0 else 0.0
    return SeedTest(p_items, max(p_items, p_seeds), None)


@dataclass(frozen=True)
class Comparison:
    """One arm against the reference; `p_adjusted` is Holm's over all arms, of `SeedTest.p_value`, None with it."""

    difference: SeedEstimate
    test: SeedTest
    p_adjusted: float | None


def compare_arms(arms: Mapping[str, Outcomes], *, reference: str, seed: int = 0) -> dict[str, Comparison]:
    """Compare every other arm with the reference: arm minus reference, one family of tests."""
    if reference not in arms:
        raise ValueError(f"reference = {reference!r}: expected one of {', '.join(arms)}")
    found = {
        name: Comparison(difference_over_seeds(arms[reference], arm, seed=seed), seed_test(arms[reference], arm), None)
        for name, arm in arms.items()
        if name != reference
    }
    adjusted = holm_family({name: comparison.test.p_value for name, comparison in found.items()})
    return {name: replace(comparison, p_adjusted=adjusted[name]) for name, comparison in found.items()}


def _estimate(values: NDArray[np.int_], *, resamples: int, seed: int, level: float) -> SeedEstimate:
    import numpy as np

    seeds, items = values.shape
    # Items with equal columns are alike, so a resample of items is one multinomial draw of the columns' counts.
    columns, counts = np.unique(values, axis=1, return_counts=True)
    drawn_items = resampled_counts(counts, resamples=resamples, seed=seed)
    drawn_seeds = resampled_counts(np.ones(seeds, dtype=int), resamples=resamples, seed=seed + 1)
    draws = (drawn_items @ columns.T * drawn_seeds).sum(axis=1) / values.size
    return SeedEstimate(
        value=float(values.sum() / values.size),
        interval=percentile_interval(draws, level),
        seeds=seeds,
        items=items,
        seed_sd=float(values.mean(axis=1).std(ddof=1)) if seeds > 1 else None,
        item_se=float(values.mean(axis=0).std(ddof=1) / sqrt(items)) if items > 1 else None,
        reason="; ".join([ONE_SEED] * (seeds == 1) + ["one item: no item variation was measured"] * (items == 1))
        or None,
    )


def _mean_squares(values: NDArray[np.int_]) -> tuple[float, float, float]:
    """Return the mean squares of seeds, items and the rest of a two-way layout with one value a cell."""
    seeds, items = values.shape
    by_seed, by_item = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    mean = values.mean()
    rest = values - by_seed - by_item + mean
    return (
        float(items * ((by_seed - mean) ** 2).sum() / (seeds - 1)),
        float(seeds * ((by_item - mean) ** 2).sum() / (items - 1)),
        float((rest**2).sum() / ((seeds - 1) * (items - 1))),
    )


def _sign_flip(sums: NDArray[np.int_]) -> float:
    """Return P[|sum of ± k_i| >= |sum of k_i|] for independent fair signs, exactly, by convolution."""
    import numpy as np
    from scipy.stats import binom

    distribution = np.ones(1)  # of (sum + total) / 2, the sum of those k_i that got a plus
    for size, count in zip(*np.unique(np.abs(sums[sums != 0]), return_counts=True), strict=True):
        spread = np.zeros(size * count + 1)
        spread[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        distribution = np.convolve(distribution, spread)
    total = len(distribution) - 1
    beyond = np.abs(2 * np.arange(total + 1) - total) >= abs(int(sums.sum()))
    return min(1.0, float(distribution[beyond].sum()))


def _arrays(**outcomes: Outcomes) -> list[NDArray[np.bool_]]:
    """Return the arms as arrays [seeds, items], an arm of one row repeated for all seeds."""
    import numpy as np

    arrays = [np.asarray(values) for values in outcomes.values()]
    # A cast would count None as wrong and NaN as right.
    if any(array.dtype != np.bool_ or array.ndim != 2 or array.size == 0 for array in arrays):
        raise ValueError(f"{', '.join(outcomes)}: expected arrays [seeds, items] of True and False, at least one each")
    seeds = max(len(array) for array in arrays)
    if len({array.shape[1] for array in arrays}) > 1 or any(len(array) not in (1, seeds) for array in arrays):
        shapes = {name: array.shape for name, array in zip(outcomes, arrays, strict=True)}
        raise ValueError(f"expected the same seeds and items in every arm, one seed where none matters, got {shapes}")
    return [np.broadcast_to(array, (seeds, array.shape[1])) for array in arrays]
