"""The paper's eq. 8 on a run's candidates: E[m_F] = (H(p_B) - H(p_F)) + KL(p_B || p_F), both sides as measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from tuneshift.run.ledger import RoundSummary
from tuneshift.run.records import Candidate
from tuneshift.scoring import margin

NEEDED = ("entropy_f", "entropy_b_yb", "kl_b")  # H(p_F) along y_f; H(p_B) and KL(p_B || p_F) along y_b
ROWS = {
    "margin": "margin m_F = l_F(y_f) - l_F(y_b)",
    "entropy_drop": "entropy drop H(p_B) - H(p_F)",
    "divergence": "divergence KL(p_B || p_F)",
    "sum": "entropy drop + divergence",
    "difference": "margin - (entropy drop + divergence)",
}


def decomposition(candidates: Sequence[Candidate], rounds: Sequence[RoundSummary]) -> dict[str, Any] | None:
    """Return the means of both sides with standard errors in nats a token; `None` where it was not measured.

    `n` of the `answered` candidates have both responses and all measures; only they count. `greedy` responses are no
    draws, and eq. 8 does not speak of them. See `tuneshift.measuring` for what is estimated on what.
    """
    values: dict[str, list[float]] = {name: [] for name in ROWS}
    for c in candidates:
        entropy_f, entropy_b, divergence = (c.measures.get(name) for name in NEEDED)
        if c.y_f is None or c.y_b is None or entropy_f is None or entropy_b is None or divergence is None:
            continue
        found, drop = margin(c.y_f.perplexity(), c.y_b.perplexity()), entropy_b - entropy_f
        if not math.isfinite(found):
            continue
        row = {"margin": found, "entropy_drop": drop, "divergence": divergence, "sum": drop + divergence}
        for name, value in {**row, "difference": found - drop - divergence}.items():
            values[name].append(value)
    n = len(values["margin"])
    if n == 0:
        return None
    return {
        "n": n,
        "answered": sum(c.y_f is not None for c in candidates),
        "greedy": any(summary.decoding.get("temperature") == 0 for summary in rounds),
        **{name: _mean(of_name) for name, of_name in values.items()},
    }


def decomposition_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return a row for each part: what it is, its mean, its standard error."""
    return [[label, f"{found[name]['mean']:+.3f}", _error(found[name])] for name, label in ROWS.items()]


def decomposition_title(found: dict[str, Any]) -> str:
    """Return what the rows are means of, and the reservation that belongs to them."""
    reservation = "; the responses are greedy, no draws, so the two sides need not agree" if found["greedy"] else ""
    return f"nats a token, over {found['n']} of {found['answered']} answered candidates{reservation}"


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def _error(part: dict[str, float | None]) -> str:
    return "n/a" if part["standard_error"] is None else f"{part['standard_error']:.3f}"
