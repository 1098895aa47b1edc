"""Non-inferiority against cases worked by hand, a numerical likelihood, and its exact false-claim rate."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom, multinomial

from tuneshift.evaluate.noninferiority import _largest_p, _score, non_inferior


def outcomes(n: int, only_first: int, only_second: int) -> tuple[list[bool], list[bool]]:
    alike = [True] * (n - only_first - only_second)
    return [True] * only_first + [False] * only_second + alike, [False] * only_first + [True] * only_second + alike


counts = st.integers(1, 40).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda b: st.tuples(st.just(n), st.just(b), st.integers(0, n - b)))
)


def test_without_a_discordant_pair_the_bound_is_the_binomial_one() -> None:
    # The likeliest way to lose D and gain nothing is that losses alone occur: (1 - D)^n = 0.05.
    found = non_inferior(*outcomes(200, 0, 0), 0.02)
    assert found.difference == 0
    assert found.lower_bound == pytest.approx(0.05 ** (1 / 200) - 1, abs=2e-4)
    assert found.shown
    few = non_inferior(*outcomes(50, 0, 0), 0.02)  # 0.98^50 = 0.36: fifty equal answers rule out no loss of 2 %
    assert few.p_value > 0.36
    assert not few.shown


@given(counts, st.floats(-0.9, 0.9))
def test_the_score_against_a_numerical_likelihood(case: tuple[int, int, int], difference: float) -> None:
    n, lost, gained = case

    def minus_log_likelihood(q: float) -> float:
        shares = np.array([q, q + difference, 1 - 2 * q - difference])
        observed = np.array([lost, gained, n - lost - gained])
        return -float(np.log(np.maximum(shares, 1e-300))[observed > 0] @ observed[observed > 0])

    low, high = max(0.0, -difference), (1 - difference) / 2
    q = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    variance = n * (2 * q + difference - difference**2)
    expected = (gained - lost - n * difference) / sqrt(variance)
    assert float(_score(np.array(lost), np.array(gained), n, difference)) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(counts, st.floats(0.01, 0.5))
def test_the_claim_is_what_the_bound_says(case: tuple[int, int, int], margin: float) -> None:
    found = non_inferior(*outcomes(*case), margin)
    assert -1 <= found.lower_bound <= found.difference
    assert found.shown == (found.p_value <= 0.05)
    if abs(found.lower_bound + margin) > 1e-3:
        assert found.shown == (found.lower_bound > -margin)


def test_a_clear_gain_is_shown_and_a_clear_loss_is_not() -> None:
    assert non_inferior(*outcomes(100, 0, 30), 0.02).lower_bound > 0.2
    assert not non_inferior(*outcomes(100, 30, 0), 0.02).shown
    assert non_inferior(*outcomes(30, 30, 0), 0.02).lower_bound == -1


@pytest.mark.parametrize(("n", "margin"), [(20, 0.1), (40, 0.05)])
def test_the_exact_rate_of_false_claims_is_at_most_five_percent(n: int, margin: float) -> None:
    """Every outcome of n items is tried; its probability where the true loss equals the margin is summed."""
    claimed = [
        (b, c, n - b - c)
        for b in range(n + 1)
        for c in range(n - b + 1)
        if _largest_p(b, c, n, -margin) <= 0.05  # what `shown` is
    ]
    assert claimed
    for discordant in np.linspace(margin, 1, 80):
        shares = [(discordant + margin) / 2, (discordant - margin) / 2, 1 - discordant]
        assert multinomial.pmf(claimed, n, shares).sum() <= 0.0502


@pytest.mark.parametrize("discordant", [0.02, 0.06, 0.3])
def test_the_simulated_rate_of_false_claims_with_few_discordant_pairs(discordant: float) -> None:
    n, margin, runs = 200, 0.02, 1000
    rng = np.random.default_rng(5)
    shares = [(discordant + margin) / 2, (discordant - margin) / 2, 1 - discordant]
    drawn, times = np.unique(rng.multinomial(n, shares, size=runs)[:, :2], axis=0, return_counts=True)
    false = sum(int(k) for (b, c), k in zip(drawn, times, strict=True) if _largest_p(b, c, n, -margin) <= 0.05)
    assert 0 < false <= binom.ppf(0.999, runs, 0.05)


@pytest.mark.parametrize("margin", [0, 1, -0.1, 2])
def test_an_impossible_margin_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        non_inferior([True], [True], margin)
