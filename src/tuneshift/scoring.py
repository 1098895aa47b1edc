"""Perplexity, margin and quadrants: pure maths on sums of log-probabilities.

    PPL(y | x) = exp( -1/N * sum_i log p(y_i | y_<i, x) )            (paper, eq. 2 to 4)
    m_F(x)     = log PPL_F(y_b) - log PPL_F(y_f)                     (paper, eq. 6)

N counts the response's tokens without EOS. Records keep the sum and N, never the perplexity alone, so that any
other average can be computed later. Log-probabilities are natural (nats).
"""

from __future__ import annotations

import math
from typing import Literal

Quadrant = Literal["low-high", "low-low", "high-low", "high-high"]


def perplexity(sum_logprob: float, n_tokens: int) -> float:
    """Return exp(-sum_logprob / n_tokens); infinite where the response is impossible or the sum overflows.

    Raises:
        ValueError: `n_tokens` is not positive: the perplexity of nothing is undefined.
    """
    if n_tokens < 1:
        raise ValueError(f"perplexity needs at least one token, got n_tokens={n_tokens}")
    try:
        return math.exp(-sum_logprob / n_tokens)
    except OverflowError:
        return math.inf


def margin(ppl_f: float, ppl_b: float) -> float:
    """Return m_F in nats per token (paper, eq. 6): how much less likely F finds the base's response."""
    return math.log(ppl_b) - math.log(ppl_f)


def quadrant(ppl_f: float, ppl_b: float, tau: float) -> Quadrant:
    """Return where a candidate lies: PPL_F(y_f) first, PPL_F(y_b) second, each low when below `tau`.

    `low-high` is the paper's rule PPL_F(y_f) < tau <= PPL_F(y_b); the four quadrants partition all records.
    """
    if ppl_f < tau:
        return "low-high" if tau <= ppl_b else "low-low"
    return "high-high" if tau <= ppl_b else "high-low"
