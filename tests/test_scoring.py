"""Perplexity, margin and quadrants against values worked by hand and the definitions in words."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneshift.scoring import margin, perplexity, quadrant

positive = st.floats(min_value=1e-12, max_value=1e12)


def test_perplexity_of_three_tokens_by_hand() -> None:
    # log-probabilities -1, -2 and -0.5: exp(3.5 / 3)
    assert perplexity(-1 - 2 - 0.5, 3) == pytest.approx(3.2112705431535613, rel=1e-12)


def test_a_certain_response_has_perplexity_one() -> None:
    assert perplexity(0.0, 7) == 1.0


def test_a_uniform_choice_has_its_number_of_outcomes_as_perplexity() -> None:
    assert perplexity(5 * math.log(1 / 50), 5) == pytest.approx(50)


@given(st.lists(st.floats(min_value=1e-3, max_value=1), min_size=1, max_size=20))
def test_perplexity_is_the_inverse_geometric_mean_of_the_probabilities(probabilities: list[float]) -> None:
    geometric_mean = math.prod(probabilities) ** (1 / len(probabilities))
    assert perplexity(sum(map(math.log, probabilities)), len(probabilities)) == pytest.approx(1 / geometric_mean)


@pytest.mark.parametrize("sum_logprob", [-1e6, -1e300, -math.inf])
def test_a_perplexity_too_large_for_a_float_is_infinite(sum_logprob: float) -> None:
    assert perplexity(sum_logprob, 1) == math.inf


def test_a_nan_log_probability_gives_nan() -> None:
    assert math.isnan(perplexity(math.nan, 3))


@pytest.mark.parametrize("n_tokens", [0, -1])
def test_the_perplexity_of_nothing_is_refused(n_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"n_tokens={n_tokens}"):
        perplexity(-1.0, n_tokens)


def test_margin_by_hand() -> None:
    assert margin(2.0, 3.0) == pytest.approx(math.log(1.5))
    assert margin(1.0, math.e**2) == pytest.approx(2.0)
    assert margin(4.0, 1.0) == pytest.approx(-math.log(4))


@given(positive, positive)
def test_margin_is_positive_exactly_where_f_finds_the_base_response_less_likely(ppl_f: float, ppl_b: float) -> None:
    if abs(ppl_f - ppl_b) > 1e-9 * ppl_f:
        assert (margin(ppl_f, ppl_b) > 0) == (ppl_b > ppl_f)
    assert margin(ppl_f, ppl_f) == 0


@given(st.floats(0, 20), st.integers(1, 9), st.floats(0, 20), st.integers(1, 9))
def test_margin_is_the_difference_of_the_mean_negative_log_likelihoods(
    nll_f: float, n_f: int, nll_b: float, n_b: int
) -> None:
    assert margin(perplexity(-nll_f, n_f), perplexity(-nll_b, n_b)) == pytest.approx(nll_b / n_b - nll_f / n_f)


@given(positive, positive, positive)
def test_the_four_quadrants_partition_all_positive_perplexities(ppl_f: float, ppl_b: float, tau: float) -> None:
    members = {
        "low-high": ppl_f < tau and ppl_b >= tau,
        "low-low": ppl_f < tau and ppl_b < tau,
        "high-low": ppl_f >= tau and ppl_b < tau,
        "high-high": ppl_f >= tau and ppl_b >= tau,
    }
    assert [name for name, holds in members.items() if holds] == [quadrant(ppl_f, ppl_b, tau)]


def test_a_perplexity_of_exactly_tau_is_high() -> None:
    assert quadrant(1.5, 2.0, 1.5) == "high-high"
    assert quadrant(1.5, 1.4, 1.5) == "high-low"
    assert quadrant(1.4, 1.5, 1.5) == "low-high"
    assert quadrant(1.5, 1.5, 1.5) == "high-high"


def test_the_next_float_below_tau_is_low() -> None:
    below = math.nextafter(1.5, 0)
    assert quadrant(below, 1.5, 1.5) == "low-high"
    assert quadrant(below, below, 1.5) == "low-low"


def test_an_impossible_response_is_high() -> None:
    assert quadrant(1.1, math.inf, 1.5) == "low-high"
    assert quadrant(math.inf, math.inf, 1.5) == "high-high"
