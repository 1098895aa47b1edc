"""Every statistic against scipy, a case worked by hand, or a simulation with a known truth."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from tuneshift.evaluate.stats import (
    Interval,
    McNemar,
    Proportion,
    holm,
    holm_family,
    mcnemar_exact,
    minimum_detectable_difference,
    paired_difference,
    recovery,
)

outcome_pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60).map(
    lambda pairs: ([a for a, _ in pairs], [b for _, b in pairs])
)
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def outcomes(**patterns: int) -> list[list[bool]]:
    """`outcomes(TF=3, FF=1)`: three items that only the first model got right, one that neither did."""
    items = [pattern for pattern, count in patterns.items() for _ in range(count)]
    return [[item[model] == "T" for item in items] for model in range(len(items[0]))]


def simulated(rng: np.random.Generator, n: int, only_first: float, only_second: float) -> list[list[bool]]:
    draws = rng.random(n)
    first, second = draws < only_first, (draws >= only_first) & (draws < only_first + only_second)
    return [first.tolist(), second.tolist()]


# Wilson


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 20), (396, 1319), (9999, 10_000)])
def test_wilson_against_scipy(correct: int, n: int, level: float) -> None:
    interval = Proportion(correct, n).interval(level)
    truth = binomtest(correct, n).proportion_ci(level, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((truth.low, truth.high), abs=1e-12)
    assert interval.level == level


def test_wilson_by_hand() -> None:
    # z = 1.959964, n = 4, p = 1/2: centre 1/2, half width sqrt(z^2 / (4 (n + z^2))).
    half = sqrt(3.841459 / (4 * (4 + 3.841459)))
    interval = Proportion(2, 4).interval()
    assert (interval.low, interval.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_and_symmetry(case: tuple[int, int]) -> None:
    correct, n = case
    proportion, mirrored = Proportion(correct, n), Proportion(n - correct, n).interval()
    interval = proportion.interval()
    assert 0 <= interval.low <= proportion.accuracy <= interval.high <= 1
    assert interval.low < interval.high
    assert (interval.low, interval.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low), abs=1e-12)


@pytest.mark.parametrize(("correct", "n", "message"), [(0, 0, "n = 0"), (3, 2, "correct = 3"), (-1, 2, "0 to n")])
def test_impossible_proportions(correct: int, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Proportion(correct, n)


# McNemar


def test_mcnemar_by_hand() -> None:
    # b = 1, c = 5: 2 (1 + 6) / 2^6, and for the mid-p value 6 / 2^6 less.
    found = mcnemar_exact(*outcomes(TF=1, FT=5, TT=7, FF=2))
    assert found == McNemar(1, 5, pytest.approx(14 / 64), pytest.approx(8 / 64))
    assert mcnemar_exact(*outcomes(TT=7, FF=2)) == McNemar(0, 0, 1.0, 1.0)
    assert mcnemar_exact(*outcomes(TF=4, FT=4)) == McNemar(4, 4, 1.0, pytest.approx(1.0))


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_against_scipy_and_exact_fractions(only_first: int, only_second: int) -> None:
    n = only_first + only_second
    p = mcnemar_exact(*outcomes(TF=only_first, FT=only_second, TT=1)).p_value
    tail = Fraction(sum(comb(n, k) for k in range(min(only_first, only_second) + 1)), 2**n)
    assert p == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)
    assert p == pytest.approx(binomtest(only_first, n).pvalue if n else 1.0, rel=1e-9)


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_against_statsmodels_and_its_mid_p_by_definition(only_first: int, only_second: int) -> None:
    test = mcnemar_exact(*outcomes(TF=only_first, FT=only_second, TT=1))
    assert test.p_value == pytest.approx(mcnemar([[1, only_first], [only_second, 0]], exact=True).pvalue, rel=1e-9)
    n, fewer = only_first + only_second, min(only_first, only_second)
    half = sum(comb(n, k) for k in range(fewer)) + Fraction(comb(n, fewer), 2)
    assert test.mid_p == pytest.approx(float(2 * half / 2**n), rel=1e-9)


@given(outcome_pairs)
def test_mcnemar_is_symmetric(pairs: tuple[list[bool], list[bool]]) -> None:
    test, swapped = mcnemar_exact(*pairs), mcnemar_exact(*reversed(pairs))
    assert 0 < test.p_value <= 1
    assert test.p_value == swapped.p_value
    assert (test.only_first, test.only_second) == (swapped.only_second, swapped.only_first)


def test_mcnemar_false_positive_rate() -> None:
    rng, runs = np.random.default_rng(1), 2000
    false = sum(mcnemar_exact(*simulated(rng, 200, 0.15, 0.15)).p_value <= 0.05 for _ in range(runs))
    assert 0 < false / runs <= 0.05 + 3 * sqrt(0.05 * 0.95 / runs)


# Paired difference


def test_paired_difference_by_hand() -> None:
    result = paired_difference(*outcomes(TF=10, FT=30, TT=40, FF=20))
    assert result.difference == pytest.approx(0.2)
    assert result.resamples == 10_000
    # Normal approximation: sd(d)^2 = 0.4 - 0.2^2, n = 100.
    half = 1.96 * sqrt(0.36 / 100)
    assert result.interval.low == pytest.approx(0.2 - half, abs=0.02)
    assert result.interval.high == pytest.approx(0.2 + half, abs=0.02)


def test_paired_difference_against_resampled_items() -> None:
    first, second = outcomes(TF=12, FT=20, TT=60, FF=28)
    rng = np.random.default_rng(3)
    d = np.array(second, dtype=int) - np.array(first, dtype=int)
    truth = np.quantile(d[rng.integers(0, len(d), (20_000, len(d)))].mean(axis=1), [0.05, 0.95])
    interval = paired_difference(first, second, resamples=20_000, level=0.9).interval
    assert (interval.low, interval.high) == pytest.approx(tuple(truth), abs=0.01)


@given(outcome_pairs, st.integers(0, 2**32))
def test_paired_difference_bounds(pairs: tuple[list[bool], list[bool]], seed: int) -> None:
    result = paired_difference(*pairs, resamples=200, seed=seed)
    swapped = paired_difference(*reversed(pairs), resamples=200, seed=seed)
    assert -1 <= result.interval.low <= result.interval.high <= 1
    assert result.difference == pytest.approx(-swapped.difference)
    assert result == paired_difference(*pairs, resamples=200, seed=seed)


def test_paired_difference_of_equal_models() -> None:
    result = paired_difference(*outcomes(TT=3, FF=4), level=0.9)
    assert (result.difference, result.interval) == (0.0, Interval(0.0, 0.0, 0.9))


def test_paired_bootstrap_coverage() -> None:
    rng, runs, truth = np.random.default_rng(2), 800, 0.08
    covered = 0
    for run in range(runs):
        interval = paired_difference(*simulated(rng, 300, 0.1, 0.18), resamples=2000, seed=run).interval
        covered += interval.low <= truth <= interval.high
    assert 0.93 <= covered / runs <= 0.97


# Recovery


def test_recovery_by_hand() -> None:
    # before 30 %, after 50 %, source 70 % of 100 items.
    result = recovery(*outcomes(TTT=25, FTT=20, FFT=25, TTF=5, FFF=25))
    assert result.ratio == pytest.approx(0.5)
    assert result.reason is None
    assert result.interval is not None
    assert 0.2 < result.interval.low < 0.5 < result.interval.high < 0.8


def test_recovery_against_resampled_items() -> None:
    before, after, source = outcomes(TTT=25, FTT=30, FFT=20, TTF=5, TFT=5, FTF=5, FFF=30)
    t0, t1, f = (np.array(x, dtype=int) for x in (before, after, source))
    picks = np.random.default_rng(3).integers(0, len(f), (20_000, len(f)))
    means = [x[picks].mean(axis=1) for x in (t0, t1, f)]
    truth = np.quantile((means[1] - means[0]) / (means[2] - means[0]), [0.025, 0.975])
    result = recovery(before, after, source, resamples=20_000)
    assert result.ratio == pytest.approx(30 / 45)
    assert result.interval is not None
    assert (result.interval.low, result.interval.high) == pytest.approx(tuple(truth), abs=0.02)


@given(st.integers(1, 30), st.integers(0, 30))
def test_recovery_of_all_none_and_harm(lead: int, shared: int) -> None:
    before, source = outcomes(FT=30 + lead, TT=shared)
    assert recovery(before, source, source, resamples=50).ratio == 1
    assert recovery(before, before, source, resamples=50).ratio == 0
    harmed = recovery(before, [False] * len(before), source, resamples=50)
    assert harmed.ratio == pytest.approx(-shared / (30 + lead))


@pytest.mark.parametrize("patterns", [{"TTT": 5, "FTF": 5}, {"TTF": 1, "FTF": 9}])
def test_recovery_without_a_lead(patterns: dict[str, int]) -> None:
    result = recovery(*outcomes(**patterns))
    assert (result.ratio, result.interval) == (None, None)
    assert result.reason is not None
    assert "nothing to recover: of 10 items" in result.reason


def test_recovery_with_an_uncertain_lead() -> None:
    # A lead of 2 among 10 discordant items vanishes in about a third of the resamples.
    result = recovery(*outcomes(FFT=6, TTF=4, TTT=20))
    assert result.ratio == 0
    assert result.interval is None
    assert result.reason is not None
    assert "of the resamples there is no lead" in result.reason


def test_recovery_leaves_few_undefined_resamples_out() -> None:
    # Lead 8 with 12 discordant items: z is about 2.3, so about one resample in a hundred is undefined.
    result = recovery(*outcomes(FTT=5, FFT=5, TTF=2, TTT=20, FFF=20))
    assert result.ratio == pytest.approx(5 / 8)
    assert result.interval is not None
    assert result.reason is None


# Minimum detectable difference


@pytest.mark.parametrize(
    ("n", "discordant", "gain"),
    [(1319, 0.2, 0.035), (1319, 0.3, 0.042), (378, 0.2, 0.064), (378, 0.3, 0.079), (250, 0.2, 0.079)],
)
def test_minimum_detectable_difference_known_figures(n: int, discordant: float, gain: float) -> None:
    assert minimum_detectable_difference(n, discordant) == pytest.approx(gain, abs=0.001)


def test_minimum_detectable_difference_has_its_power() -> None:
    rng, n, runs = np.random.default_rng(4), 378, 800
    gain = minimum_detectable_difference(n, 0.3)
    found = sum(
        mcnemar_exact(*simulated(rng, n, (0.3 - gain) / 2, (0.3 + gain) / 2)).p_value <= 0.05 for _ in range(runs)
    )
    assert 0.72 <= found / runs <= 0.85


def test_minimum_detectable_difference_shrinks_with_items_and_grows_with_demands() -> None:
    base = minimum_detectable_difference(400, 0.2)
    assert minimum_detectable_difference(1600, 0.2) == pytest.approx(base / 2)
    assert minimum_detectable_difference(400, 0.2, power=0.9) > base
    assert minimum_detectable_difference(400, 0.2, alpha=0.01) > base
    assert minimum_detectable_difference(10, 0.1) > 0.1


# Holm


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2]
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@settings(max_examples=20)  # statsmodels collects garbage in every call
@given(p_values)
def test_holm_against_statsmodels(values: list[float]) -> None:
    assert holm(values) == pytest.approx(multipletests(values, method="holm")[1], abs=1e-12)


def test_a_comparison_that_was_not_made_stays_none_and_makes_the_family_no_larger() -> None:
    assert holm_family({"a": 0.04, "b": None, "c": 0.01}) == {"a": 0.04, "b": None, "c": 0.02}
    assert holm_family({"a": None}) == {"a": None}


@given(p_values, st.floats(0.001, 0.999))
def test_holm_rejects_what_the_step_down_procedure_rejects(values: list[float], alpha: float) -> None:
    rejected = [False] * len(values)
    for step, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if (len(values) - step) * values[i] > alpha:
            break
        rejected[i] = True
    assert [p <= alpha for p in holm(values)] == rejected


@given(p_values)
def test_holm_is_monotone_and_never_below_the_raw_value(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(raw <= p <= 1 for raw, p in zip(values, adjusted, strict=True))
    by_raw = [p for _, p in sorted(zip(values, adjusted, strict=True))]
    assert by_raw == sorted(by_raw)


# What is refused


@pytest.mark.parametrize("statistic", [mcnemar_exact, paired_difference, lambda a, b: recovery(a, a, b)])
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([], [], "one or more items"),
        ([True], [True, False], "same one or more items"),
        ([True, None], [True, False], "leave unscored items out"),
        ([True, float("nan")], [True, False], "leave unscored items out"),
        ([True, 1], [True, False], "only True and False"),
    ],
)
def test_refused_outcomes(statistic, first, second, message) -> None:
    with pytest.raises(ValueError, match=message):
        statistic(first, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Proportion(1, 2).interval(1.0), "level = 1.0"),
        (lambda: Proportion(1, 2).interval(95), "level = 95"),
        (lambda: paired_difference([True], [False], level=0), "level = 0"),
        (lambda: paired_difference([True], [False], resamples=0), "resamples = 0"),
        (lambda: recovery([False], [True], [True], resamples=0), "resamples = 0"),
        (lambda: minimum_detectable_difference(0, 0.2), "n = 0"),
        (lambda: minimum_detectable_difference(10, 0), "discordant = 0"),
        (lambda: minimum_detectable_difference(10, 20), "discordant = 20"),
        (lambda: minimum_detectable_difference(10, 0.2, power=1), "power = 1"),
        (lambda: minimum_detectable_difference(10, 0.2, alpha=0), "alpha = 0"),
        (lambda: holm([]), "one or more p values"),
        (lambda: holm([0.1, 1.2]), "one or more p values from 0 to 1"),
        (lambda: holm([0.1, float("nan")]), "from 0 to 1"),
    ],
)
def test_refused_settings(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_the_module_loads_neither_numpy_nor_scipy() -> None:
    code = "import sys, tuneshift.evaluate.stats; print({'numpy', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
