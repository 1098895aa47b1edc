"""Statistics of several trainings: the same items, answered by models that were trained with different seeds.

Outcomes are arrays [seeds, items] of True (right) and False (wrong): row s belongs to the same seed and column i to the
same item in every arm. An arm that no seed touches, such as the target before, has one row. Both seeds and items are
samples: a gain has to hold on other questions and for another training. All shares and differences are fractions.

The items are taken to be independent questions; several questions on one text tell less than these intervals say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING

from tuneshift.evaluate.stats import (
    Interval,
    Proportion,
    Recovery,
    percentile_interval,
    ratio_of_draws,
    resampled_counts,
)

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

    With one seed, or where all answers are alike, it is Wilson's interval over the items, which has a width at 0 and 1
    too: more seeds on the same items tell nothing of others.
    """
    (values,) = _arrays(outcomes=outcomes)
    found = _estimate([values.astype(int)], resamples=resamples, seed=seed, level=level)
    if len(values) > 1 and values.min() < values.max():
        return found
    return replace(found, interval=Proportion(int(values[0].sum()), found.items).interval(level))


def difference_over_seeds(
    first: Outcomes, second: Outcomes, *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> SeedEstimate:
    """Return the mean of second - first over seeds and items, with the two-level percentile bootstrap interval.

    A resample draws the seeds with replacement and, independently, the items with replacement, the same items for all
    drawn seeds, since all seeds answered the same questions: sum over s, i of w_s v_i d_si / (S n), where w and v count
    how often each was drawn. With one seed it is the item bootstrap of `paired_difference`, number for number.
    With few seeds it is too narrow where seeds differ much, since three cannot show how far a fourth may lie: at worst
    83 % of the intervals held the truth (three seeds, measured, benchmarks/results/false_positives.json). So a claim
    rests on `seed_test`.
    Source: Efron 1979 (percentile bootstrap); Owen 2007, arXiv 0712.1111 (rows and columns resampled independently).
    """
    a, b = _arrays(first=first, second=second)
    return _estimate([b.astype(int) - a], resamples=resamples, seed=seed, level=level)


def mean_over_cells(
    cells: Sequence[Outcomes], *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> SeedEstimate:
    """Return one arm's mean accuracy over cells that ask different questions, each cell with the same weight.

    `cells` hold the same seeds and any number of items each; `items` of the result is their sum. A resample draws the
    seeds once for all cells, so that an effect which a seed has in all of them stays in, and each cell's items by
    themselves: mean over c of sum over s, i of w_s v_ci x_csi / (S n_c). With one cell it is `accuracy_over_seeds`, but
    for the interval of one seed, which is the bootstrap's and has no width where all answers are alike.
    Source: Owen 2007, arXiv 0712.1111 (rows and columns resampled independently), here with strata of columns.
    """
    arrays = [_arrays(outcomes=values)[0].astype(int) for values in cells]
    return _estimate(arrays, resamples=resamples, seed=seed, level=level)


def mean_difference_over_cells(
    firsts: Sequence[Outcomes],
    seconds: Sequence[Outcomes],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> SeedEstimate:
    """Return the mean over cells of second - first; see `mean_over_cells` for the interval."""
    pairs = [_arrays(first=first, second=second) for first, second in zip(firsts, seconds, strict=True)]
    return _estimate([b.astype(int) - a for a, b in pairs], resamples=resamples, seed=seed, level=level)


def recovery_over_seeds(
    before: Outcomes,
    after: Outcomes,
    bound: Outcomes,
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Recovery:
    """Return (after - before) / (bound - before) with its two-level bootstrap interval.

    `bound` is what counts as all there is to gain: F, or a target that was trained on the original data. Each resample
    draws seeds and items as `difference_over_seeds` does, the same ones for all three, and takes the ratio of its sums;
    see `tuneshift.evaluate.stats.recovery` for where there is none.
    Source: as `difference_over_seeds`.
    """
    import numpy as np

    t0, t1, top = (values.astype(int) for values in _arrays(before=before, after=after, bound=bound))
    (seeds, items), gain, lead = t0.shape, t1 - t0, top - t0
    if lead.sum() <= 0:
        right = f"{top.sum() / seeds:g} right where {t0.sum() / seeds:g} were right before"
        return Recovery(None, None, reason=f"nothing to recover: of {items} items, the bound got {right}")
    columns, counts = np.unique(np.concatenate([gain, lead]), axis=1, return_counts=True)
    drawn_items = resampled_counts(counts, resamples=resamples, seed=seed)
    drawn_seeds = resampled_counts(np.ones(seeds, dtype=int), resamples=resamples, seed=seed + 1)
    gains, leads = ((drawn_items @ part.T * drawn_seeds).sum(axis=1) for part in (columns[:seeds], columns[seeds:]))
    return ratio_of_draws(float(gain.sum() / lead.sum()), gains, leads, n=items, level=level)


@dataclass(frozen=True)
class SeedTest:
    """Two-sided p values of "no difference".

    `p_items` is about these trainings on other items; `p_value` about other trainings too, and what a claim about a
    method rests on. With one seed both are about this training alone, and `reason` says so; it is None otherwise.
    """

    p_items: float
    p_value: float
    reason: str | None


def seed_test(first: Outcomes, second: Outcomes) -> SeedTest:
    """Test whether two arms are equally accurate, over seeds and items that are both samples.

    `p_items` is the exact paired sign-flip permutation test on the items' sums over seeds, k_i = sum over s of d_si:
    P[|sum of ± k_i| >= |sum of k_i|], every sign with probability 1/2. With one seed it is the exact McNemar test. It
    assumes that items are independent and takes the trainings as they are: a seed that shifts all items at once
    breaks it. A sign flip of whole seeds would need six of them to fall below 0.05, and takes the items as they are.

    `p_value` is the larger of `p_items` and of a t test on the crossed layout seeds x items, one difference a cell:
    t = mean(d) / sqrt((MS_seeds + MS_items) / (S n)), whose square is min F'. Each mean square has its own degrees
    of freedom, so p = w p_{S-1}(t) + (1 - w) p_{n-1}(t) with w = MS_seeds / (MS_seeds + MS_items). It assumes
    independent seeds and independent items with roughly normal means. With two seeds this would reject too often (up
    to 8 % for 5 %), so there w = 1. False positives, measured: benchmarks/results/false_positives.json.
    Source: Fisher 1935 (sign flips); Clark 1973 (min F', both factors random); Cochran and Cox 1957 (the weights, there
    of critical values in place of p values).
    """
    a, b = _arrays(first=first, second=second)
    return _test(b.astype(int) - a)


def interaction_over_seeds(
    first: tuple[Outcomes, Outcomes],
    second: tuple[Outcomes, Outcomes],
    *,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[SeedEstimate, SeedTest]:
    """Return by how much more the second pair's arms differ than the first's, (d - c) - (b - a), and its test.

    A pair is two arms under one condition: does a filter gain more with a weak generator than with a strong one? The
    interval is that of `difference_over_seeds` and the test that of `seed_test`, with one number from -2 to 2 a seed
    and item. The sign flips then assume that k is as likely as -k for each item.
    """
    a, b, c, d = (values.astype(int) for values in _arrays(a=first[0], b=first[1], c=second[0], d=second[1]))
    values = (d - c) - (b - a)
    return _estimate([values], resamples=resamples, seed=seed, level=level), _test(values)


def _test(values: NDArray[np.int_]) -> SeedTest:
    p_items = _sign_flip(values.sum(axis=0))
    seeds, items = values.shape
    if seeds == 1 or items == 1 or p_items == 1:
        return SeedTest(p_items, p_items, ONE_SEED if seeds == 1 else None)
    by_seed, by_item = _mean_squares(values)
    if by_seed + by_item == 0:  # every difference is the same
        return SeedTest(p_items, p_items, None)
    t = abs(float(values.mean())) / sqrt((by_seed + by_item) / values.size)
    return SeedTest(p_items, max(p_items, _p_crossed(t, by_seed, by_item, seeds, items)), None)


def _p_crossed(t: float, by_seed: float, by_item: float, seeds: int, items: int) -> float:
    """Return the p value of a mean that is `t` standard errors from 0, with the mean squares of the crossed layout."""
    from scipy.stats import t as student

    weight = by_seed / (by_seed + by_item) if seeds > 2 else 1.0
    return 2 * float(weight * student.sf(t, seeds - 1) + (1 - weight) * student.sf(t, items - 1))


def least_shown(difference: SeedEstimate, *, level: float = 0.05) -> float | None:
    """Return from which difference on `seed_test` would have given a p value of `level` with this one's variation.

    That is the difference which such a study shows every other time, whatever this study found. None where no
    variation over seeds and items was measured.
    Source: the t test of `seed_test`, solved for the mean.
    """
    from scipy.optimize import brentq

    seeds, items = difference.seeds, difference.items
    if not difference.seed_sd or not difference.item_se:
        return None
    by_seed, by_item = items * difference.seed_sd**2, seeds * items * difference.item_se**2
    t = brentq(lambda t: _p_crossed(t, by_seed, by_item, seeds, items) - level, 0, 1e6)
    return float(t) * sqrt((by_seed + by_item) / (seeds * items))


def _estimate(cells: Sequence[NDArray[np.int_]], *, resamples: int, seed: int, level: float) -> SeedEstimate:
    """Return the mean over cells of their arrays' means; the arrays [seeds, items] have the same seeds."""
    import numpy as np

    (seeds,) = {len(values) for values in cells}
    drawn_seeds = resampled_counts(np.ones(seeds, dtype=int), resamples=resamples, seed=seed + 1)
    draws = np.zeros(resamples)
    for place, values in enumerate(cells):
        # Items with equal columns are alike, so a resample of items is one multinomial draw of the columns' counts.
        columns, counts = np.unique(values, axis=1, return_counts=True)
        drawn_items = resampled_counts(counts, resamples=resamples, seed=seed + place + (place > 0))
        draws += (drawn_items @ columns.T * drawn_seeds).sum(axis=1) / values.size
    items = [values.shape[1] for values in cells]
    by_seed = np.mean([values.mean(axis=1) for values in cells], axis=0)
    return SeedEstimate(
        value=float(sum(values.sum() / values.size for values in cells) / len(cells)),
        interval=percentile_interval(draws / len(cells), level),
        seeds=seeds,
        items=sum(items),
        seed_sd=float(by_seed.std(ddof=1)) if seeds > 1 else None,
        item_se=_item_se(cells) if min(items) > 1 else None,
        reason="; ".join([ONE_SEED] * (seeds == 1) + ["one item: no item variation was measured"] * (min(items) == 1))
        or None,
    )


def _item_se(cells: Sequence[NDArray[np.int_]]) -> float:
    return sqrt(sum(values.mean(axis=0).var(ddof=1) / values.shape[1] for values in cells)) / len(cells)


def _mean_squares(values: NDArray[np.int_]) -> tuple[float, float]:
    """Return the mean squares of seeds and of items of a two-way layout with one value a cell."""
    seeds, items = values.shape
    by_seed, by_item = values.mean(axis=1), values.mean(axis=0)
    return float(items * by_seed.var(ddof=1)), float(seeds * by_item.var(ddof=1))


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
