"""Statistics over seeds and items against scipy, statsmodels, cases worked by hand, and simulated truths."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pandas
import pytest
from false_positives import WORLDS, answers
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, norm, permutation_test
from scipy.stats import t as student
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from tuneshift.evaluate.seeds import (
    ONE_SEED,
    accuracy_over_seeds,
    difference_over_seeds,
    interaction_over_seeds,
    least_shown,
    mean_difference_over_cells,
    mean_over_cells,
    recovery_over_seeds,
    seed_test,
)
from tuneshift.evaluate.stats import Proportion, mcnemar_exact, paired_difference, recovery
from tuneshift.evaluate.verdict import ALPHA, shows_improvement

Flags = NDArray[np.bool_]


def table(seeds: int, items: int, *, seed: int = 0, chance: float = 0.5) -> Flags:
    return np.random.default_rng(seed).random((seeds, items)) < chance


arms = st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(0, 10_000)).map(
    lambda shape: (table(*shape[:2], seed=shape[2]), table(*shape[:2], seed=shape[2] + 1, chance=0.7))
)


# The two-level bootstrap


@given(st.integers(1, 40), st.integers(0, 10_000))
def test_with_one_seed_it_is_the_item_bootstrap(items: int, seed: int) -> None:
    first, second = table(1, items, seed=seed), table(1, items, seed=seed + 1)
    found = difference_over_seeds(first, second, resamples=300, seed=seed, level=0.9)
    expected = paired_difference(list(first[0]), list(second[0]), resamples=300, seed=seed, level=0.9)
    assert (found.value, found.interval) == (expected.difference, expected.interval)
    assert found.seed_sd is None
    assert found.reason is not None
    assert found.reason.startswith(ONE_SEED)


def test_the_interval_against_seeds_and_items_resampled_one_by_one() -> None:
    first, second = table(4, 60, seed=1), table(4, 60, seed=2, chance=0.7)
    d = second.astype(int) - first
    rng = np.random.default_rng(3)
    truth = [d[rng.integers(0, 4, 4)][:, rng.integers(0, 60, 60)].mean() for _ in range(20_000)]
    found = difference_over_seeds(first, second, resamples=20_000).interval
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(truth, [0.025, 0.975])), abs=0.01)


def test_the_split_into_seeds_and_items_by_hand() -> None:
    # Accuracies of the seeds 1/2 and 1; of the items 1, 1/2, 1, 1/2.
    found = accuracy_over_seeds([[True, False, True, False], [True] * 4])
    assert found.value == 0.75
    assert found.seed_sd == pytest.approx(sqrt(2 * 0.25**2))
    assert found.item_se == pytest.approx(sqrt(4 * 0.25**2 / 3) / 2)
    assert (found.seeds, found.items, found.reason) == (2, 4, None)


@given(arms)
def test_the_estimates_bounds_and_symmetry(pair: tuple[Flags, Flags]) -> None:
    first, second = pair
    found, swapped = (difference_over_seeds(*sides, resamples=100) for sides in ((first, second), (second, first)))
    assert -1 <= found.interval.low <= found.interval.high <= 1
    assert found.value == pytest.approx(-swapped.value)
    assert found.value == pytest.approx(accuracy_over_seeds(second).value - accuracy_over_seeds(first).value)
    assert found == difference_over_seeds(first, second, resamples=100)


def test_one_arms_accuracy_with_one_seed_has_wilsons_interval() -> None:
    found = accuracy_over_seeds([[False] * 20])
    assert (found.value, found.interval) == (0, Proportion(0, 20).interval())
    assert found.interval.high > 0.1


@pytest.mark.parametrize("right", [False, True])
def test_seeds_that_all_answer_alike_tell_nothing_of_other_items(right: bool) -> None:
    found = accuracy_over_seeds([[right] * 20] * 3)
    assert found.interval == Proportion(20 * right, 20).interval()


def test_seeds_that_differ_widen_the_interval() -> None:
    alike, apart = ([[True, False] * 50] * 2, [[True] * 100, [False] * 100])
    narrow, wide = accuracy_over_seeds(alike).interval, accuracy_over_seeds(apart).interval
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * 0.05, abs=0.03)
    assert (wide.low, wide.high) == (0, 1)


def test_an_arm_without_seeds_stands_beside_every_seed() -> None:
    before, after = table(1, 30, seed=1), table(3, 30, seed=2)
    assert difference_over_seeds(before, after) == difference_over_seeds(np.repeat(before, 3, axis=0), after)


# Differences of differences


def test_an_interaction_by_hand_and_against_arms_that_differ_in_one_condition_alone() -> None:
    # d - c = [1 1 0], [1 0 0]; b - a = [0 0 0], [0 0 -1]: in all 3/6 + 1/6.
    wrong, mixed = [[False] * 3] * 2, [[True, True, False], [True, False, False]]
    found, test = interaction_over_seeds(([[False] * 3, [False, False, True]], wrong), (wrong, mixed))
    assert found.value == pytest.approx(4 / 6)
    # Item sums 2, 1, 1: of eight signs two are as far out.
    assert test.p_items == pytest.approx(2 / 8)
    first, second = table(3, 40, seed=1), table(3, 40, seed=2, chance=0.8)
    alone, tested = interaction_over_seeds((first, first), (first, second))
    assert alone == difference_over_seeds(first, second)
    assert tested == seed_test(first, second)


def test_the_interval_of_an_interaction_against_seeds_and_items_resampled_one_by_one() -> None:
    a, b, c, d = (table(4, 60, seed=seed, chance=chance) for seed, chance in ((1, 0.4), (2, 0.5), (3, 0.4), (4, 0.7)))
    each = (d.astype(int) - c) - (b.astype(int) - a)
    rng = np.random.default_rng(3)
    truth = [each[rng.integers(0, 4, 4)][:, rng.integers(0, 60, 60)].mean() for _ in range(20_000)]
    found, test = interaction_over_seeds((a, b), (c, d), resamples=20_000)
    assert (found.interval.low, found.interval.high) == pytest.approx(
        tuple(np.quantile(truth, [0.025, 0.975])), abs=0.01
    )
    # With many items the sign flips are those of a normal sum.
    sums = each.sum(axis=0)
    assert test.p_items == pytest.approx(2 * norm.sf((abs(sums.sum()) - 0.5) / np.sqrt((sums**2).sum())), abs=0.02)


# Means over cells


def test_the_mean_over_cells_weighs_each_cell_alike() -> None:
    # Cells of 4 and 1 items. Seeds: (1/2 + 1) / 2 and (1 + 0) / 2; cells: 3/4 and 1/2.
    found = mean_over_cells([[[True, False, True, False], [True] * 4], [[True], [False]]])
    assert found.value == (3 / 4 + 1 / 2) / 2
    assert found.seed_sd == pytest.approx(sqrt(2 * 0.125**2))
    assert (found.seeds, found.items, found.item_se) == (2, 5, None)
    assert found.reason == "one item: no item variation was measured"
    # Items of the first cell 1, 1/2, 1, 1/2 and of the second 1, 0.
    both = mean_over_cells([[[True, False, True, False], [True] * 4], [[True, False], [True, False]]])
    assert both.item_se == pytest.approx(sqrt(0.25 / 3 / 4 + 0.5 / 2) / 2)


@given(arms)
def test_the_mean_over_one_cell_is_that_cells(pair: tuple[Flags, Flags]) -> None:
    first, second = pair
    assert mean_difference_over_cells([first], [second], resamples=50) == difference_over_seeds(*pair, resamples=50)
    assert mean_over_cells([first], resamples=50).value == accuracy_over_seeds(first, resamples=50).value


def test_the_interval_of_a_mean_against_seeds_and_each_cells_items_resampled_one_by_one() -> None:
    firsts = [table(4, items, seed=items) for items in (30, 80)]
    seconds = [table(4, items, seed=items + 1, chance=0.7) for items in (30, 80)]
    for one in (firsts, seconds):
        one[1][0] = one[0][0, 0]  # a seed that answers all alike in a cell, so that the seeds count
    d = [second.astype(int) - first for first, second in zip(firsts, seconds, strict=True)]
    rng, truth = np.random.default_rng(3), []
    for _ in range(20_000):
        seeds = rng.integers(0, 4, 4)
        truth.append(np.mean([one[seeds][:, rng.integers(0, one.shape[1], one.shape[1])].mean() for one in d]))
    found = mean_difference_over_cells(firsts, seconds, resamples=20_000)
    assert (found.interval.low, found.interval.high) == pytest.approx(
        tuple(np.quantile(truth, [0.025, 0.975])), abs=0.015
    )
    assert found.value == pytest.approx(np.mean([one.mean() for one in d]))
    assert found.seed_sd == pytest.approx(np.std(np.mean([one.mean(axis=1) for one in d], axis=0), ddof=1))


def test_a_seed_that_shifts_all_cells_widens_the_interval_of_their_mean() -> None:
    shifted = [[[True] * 50, [False] * 50]] * 4
    apart = [[[True] * 50, [False] * 50], [[False] * 50, [True] * 50]] * 2
    assert mean_over_cells(shifted).interval.high == 1
    assert mean_over_cells(apart).interval.high == pytest.approx(0.5)


def test_cells_of_other_seeds_have_no_mean() -> None:
    with pytest.raises(ValueError, match="too many values"):
        mean_over_cells([table(2, 5), table(3, 5)])


# Recovery


def test_recovery_over_seeds_by_hand() -> None:
    before, bound = [[False] * 4] * 2, [[True, True, True, False]] * 2
    after = [[True, True, False, False], [True, False, False, False]]
    found = recovery_over_seeds(before, after, bound)
    assert found.ratio == 3 / 6
    assert recovery_over_seeds(before[:1], after, bound[:1]) == found  # untrained models have one row
    assert recovery_over_seeds(before, bound, bound).ratio == 1
    assert recovery_over_seeds(before, before, bound).ratio == 0
    nothing = recovery_over_seeds(bound, after, before)
    assert (nothing.ratio, nothing.interval) == (None, None)
    assert nothing.reason == "nothing to recover: of 4 items, the bound got 0 right where 3 were right before"


def test_the_interval_of_the_recovery_against_seeds_and_items_resampled_one_by_one() -> None:
    t0, t1, top = (table(3, 80, seed=seed, chance=chance) for seed, chance in ((1, 0.1), (2, 0.5), (3, 0.9)))
    rng, truth = np.random.default_rng(4), []
    for _ in range(20_000):
        seeds, items = rng.integers(0, 3, 3), rng.integers(0, 80, 80)
        a, b, c = (one[seeds][:, items].mean() for one in (t0, t1, top))
        truth.append((b - a) / (c - a))
    found = recovery_over_seeds(t0, t1, top, resamples=20_000)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx(
        tuple(np.quantile(truth, [0.025, 0.975])), abs=0.01
    )


def test_with_one_seed_it_is_the_recovery_of_one_training() -> None:
    t0, t1, top = (table(1, 300, seed=seed, chance=chance) for seed, chance in ((1, 0.1), (2, 0.5), (3, 0.9)))
    found, single = recovery_over_seeds(t0, t1, top), recovery(list(t0[0]), list(t1[0]), list(top[0]))
    assert found.ratio == pytest.approx(single.ratio)
    assert found.interval is not None
    assert single.interval is not None
    assert found.interval.low == pytest.approx(single.interval.low, abs=0.01)
    assert found.interval.high == pytest.approx(single.interval.high, abs=0.01)


def test_a_lead_of_a_few_items_has_a_recovery_without_an_interval() -> None:
    before, bound = [[True] * 4 + [False] * 16], [[False] * 3 + [True] * 5 + [False] * 12]
    found = recovery_over_seeds(before, bound, bound)
    assert (found.ratio, found.interval) == (1, None)
    assert found.reason is not None
    assert "of the resamples there is no lead to recover; 20 items are too few" in found.reason


# The test of "no difference"


@given(arms)
def test_the_t_test_against_statsmodels_analysis_of_variance(pair: tuple[Flags, Flags]) -> None:
    d = pair[1].astype(int) - pair[0]
    assume(min(d.shape) > 1 and d.sum() != 0)
    seeds, items = (index.ravel() for index in np.indices(d.shape))
    frame = pandas.DataFrame({"d": d.ravel(), "seed": seeds, "item": items})
    of_seeds, of_items, _ = anova_lm(ols("d ~ C(seed) + C(item)", frame).fit())["mean_sq"]
    total = d.size * d.mean() ** 2
    assume(min(of_seeds, of_items) > 1e-12)
    min_f = (total / of_seeds) * (total / of_items) / (total / of_seeds + total / of_items)
    weight = of_seeds / (of_seeds + of_items) if len(d) > 2 else 1
    tails = [2 * student.sf(sqrt(min_f), size - 1) for size in d.shape]
    found = seed_test(*pair)
    assert found.p_value == pytest.approx(max(found.p_items, weight * tails[0] + (1 - weight) * tails[1]))


@given(arms)
def test_the_sign_flips_against_scipys_exact_permutation_test(pair: tuple[Flags, Flags]) -> None:
    sums = (pair[1].astype(int) - pair[0]).sum(axis=0)
    # scipy flips nothing where there is one item; two-sided there means twice the smaller tail, equal by symmetry.
    if len(sums) < 2:
        return
    expected = permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert seed_test(*pair).p_items == pytest.approx(expected)


@given(st.integers(1, 60), st.integers(0, 10_000))
def test_with_one_seed_it_is_mcnemars_test(items: int, seed: int) -> None:
    first, second = table(1, items, seed=seed), table(1, items, seed=seed + 1, chance=0.8)
    found = seed_test(first, second)
    assert found.p_items == pytest.approx(mcnemar_exact(list(first[0]), list(second[0])).p_value)
    assert (found.p_value, found.reason) == (found.p_items, ONE_SEED)


def test_p_by_hand() -> None:
    # Item sums 2, 2, 2: both tails of eight signs. All cells are equal, so the t test adds nothing.
    found = seed_test([[False] * 3] * 2, [[True] * 3] * 2)
    assert (found.p_items, found.p_value) == (2 / 8, 2 / 8)
    assert seed_test([[True, False]] * 2, [[True, False]] * 2).p_value == 1
    # d = [1 1 1 1 1 1 1 1], [1 1 1 1 0 0 0 0]: MS_seeds 1, MS_items 1/7, so t^2 = 0.75^2 / (8 / 7 / 16) = 7.875,
    # with one degree of freedom: p = 1 - 2 atan(t) / pi.
    found = seed_test([[False] * 8] * 2, [[True] * 8, [True] * 4 + [False] * 4])
    assert found.p_items == pytest.approx(2 / 2**8)
    assert found.p_value == pytest.approx(1 - 2 * np.arctan(sqrt(7.875)) / np.pi)
    assert found.reason is None


RUNS = 300
AT_MOST = binom.ppf(0.9999, RUNS, 0.05)  # of 300 true nulls, so that one of ten thousand sound tests fails


@pytest.mark.parametrize("items", [50, 200])
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("world", WORLDS)
def test_false_positives_over_seeds(world: str, seeds: int, items: int) -> None:
    rng = np.random.default_rng(seeds * items)
    p = [seed_test(*answers(rng, seeds, items, **WORLDS[world])).p_value for _ in range(RUNS)]
    assert sum(value <= 0.05 for value in p) <= AT_MOST


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("world", WORLDS)
def test_false_positives_of_interactions(world: str, seeds: int) -> None:
    rng, by_seed = np.random.default_rng(seeds), {} if seeds > 1 else {"by_seed": 0.0}  # one seed tells of itself alone
    pairs = [[answers(rng, seeds, 60, **WORLDS[world] | by_seed) for _ in range(2)] for _ in range(RUNS)]
    p = [interaction_over_seeds(*pair, resamples=1)[1].p_value for pair in pairs]
    assert sum(value <= 0.05 for value in p) <= AT_MOST


@pytest.mark.parametrize("seeds", [3, 5])
def test_false_positives_of_the_gain_over_one_untrained_model(seeds: int) -> None:
    rng, claims = np.random.default_rng(seeds), 0
    for _ in range(RUNS):
        ease, of_item, of_seed = rng.normal(0, 1, 60), rng.normal(0, 0.5, 60), rng.normal(0, 0.5, (seeds, 1))
        before = ease + rng.normal(0, sqrt(1 + 0.5**2 + 0.5**2), (1, 60)) > 0  # as often right as `after`
        after = ease + of_item + of_seed + rng.normal(0, 1, (seeds, 60)) > 0
        claims += seed_test(before, after).p_value <= 0.05
    assert claims <= AT_MOST


@pytest.mark.parametrize("items", [50, 200])
@pytest.mark.parametrize("world", ["independent", "correlated items"])
def test_false_positives_of_the_verdict_and_of_one_seed(world: str, items: int) -> None:
    rng = np.random.default_rng(items)
    drawn = [answers(rng, 1, items, **WORLDS[world]) for _ in range(3 * RUNS)]
    claimed = sum(shows_improvement(mcnemar_exact(list(a[0]), list(b[0]))) for a, b in drawn)
    most = binom.ppf(0.9999, 3 * RUNS, ALPHA / 2)  # what `shows_improvement` promises
    assert 0 < claimed <= most < 0.05 * 3 * RUNS
    assert sum(seed_test(a, b).p_items <= 0.05 for a, b in drawn) <= binom.ppf(0.9999, 3 * RUNS, 0.05)


def test_why_items_alone_do_not_tell_what_another_training_would_give() -> None:
    rng = np.random.default_rng(6)
    drawn = [answers(rng, 3, 200, **WORLDS["seed effects"]) for _ in range(RUNS)]
    assert sum(seed_test(*arms).p_items <= 0.05 for arms in drawn) > 4 * AT_MOST


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_least_difference_that_is_shown_is_where_the_test_turns(seeds: int) -> None:
    """The p value depends on the difference by its mean alone, so shifting all outcomes' differences moves it there."""
    rng = np.random.default_rng(seeds)
    d = (rng.random((seeds, 400)) < 0.3 + 0.1 * rng.random((seeds, 1))).astype(int)
    first, second = np.zeros(d.shape, dtype=bool), d.astype(bool)
    found = difference_over_seeds(first, second)
    least = least_shown(found)
    assert least is not None
    by_seed, by_item = 400 * d.mean(axis=1).var(ddof=1), seeds * d.mean(axis=0).var(ddof=1)
    t = least / sqrt((by_seed + by_item) / d.size)
    weight = by_seed / (by_seed + by_item) if seeds > 2 else 1.0
    p = 2 * (weight * student.sf(t, seeds - 1) + (1 - weight) * student.sf(t, 399))
    assert p == pytest.approx(0.05, rel=1e-6)
    assert (seed_test(first, second).p_value < 0.05) == (found.value > least)
    assert least_shown(difference_over_seeds(first[:1], second[:1])) is None  # one seed shows no variation


def test_seeds_that_agree_show_a_difference() -> None:
    first, second = [[False] * 40], [[True] * 10 + [False] * 30] * 3
    found = seed_test(first, second)
    assert found.p_items == pytest.approx(2 / 2**10)  # all ten items that differ have the same sign
    assert found.p_items == found.p_value  # the t test's is 0.0009


def test_a_large_gain_is_found_with_three_seeds() -> None:
    rng = np.random.default_rng(7)
    found = [
        seed_test(table(1, 200, seed=int(rng.integers(2**31)), chance=0.2), rng.random((3, 200)) < 0.5).p_value
        for _ in range(100)
    ]
    assert sum(p <= 0.05 for p in found) > 80


# What is refused


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([[]], [[]], "at least one each"),
        ([True], [False], r"arrays \[seeds, items\]"),
        ([[True, None]], [[True, False]], "of True and False"),
        ([[1, 0]], [[True, False]], "of True and False"),
        ([[True, False]], [[True]], "the same seeds and items"),
        ([[True]] * 2, [[True]] * 3, "the same seeds and items"),
    ],
)
def test_refused_outcomes(first, second, message) -> None:
    for statistic in (difference_over_seeds, seed_test):
        with pytest.raises(ValueError, match=message):
            statistic(first, second)
    with pytest.raises(ValueError, match="resamples = 0"):
        difference_over_seeds([[True]], [[False]], resamples=0)
