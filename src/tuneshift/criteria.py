"""Step 3: the criterion decides which candidates are kept. Pure functions over stored records.

    ppl_diff     PPL_F(y_f) < tau <= PPL_F(y_b)                the paper's rule (section 3.2), tau = 1.5
    asymmetric   PPL_F(y_f) < tau_f and PPL_F(y_b) > tau_b     Table 8(b), 1.2 and 1.6
    ratio        ratio * PPL_F(y_f) <= PPL_F(y_b)              Table 8(c), 1.5: the margin rule m_F >= log 1.5
    low_low, high_low, high_high                               the other quadrants (Table 9)
    none         every answered candidate                      Table 9
    random       each with probability `keep_rate`             control: any rule must beat it
    disagree     y_f and y_b differ in their text              control: no likelihood at all

A decision looks at one record only, so any rule can be applied again later without touching a model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tuneshift.run.records import Candidate, Response
from tuneshift.scoring import quadrant


@dataclass(frozen=True)
class Criterion:
    """A rule's name with its thresholds.

    `tau`, `tau_f` and `tau_b` are perplexities; `ratio` is a quotient of two; `keep_rate` is a probability, used
    by `random` and by the calibration of an automatic tau. `count_eos` counts the EOS as a response token.
    """

    name: str = "ppl_diff"
    tau: float = 1.5
    tau_f: float = 1.2
    tau_b: float = 1.6
    ratio: float = 1.5
    keep_rate: float = 0.2
    count_eos: bool = False
    seed: int = 0

    def label(self) -> str:
        """Return a short name of the rule with the thresholds it reads, for files and tables."""
        reads = {"asymmetric": ("tau_f", "tau_b"), "ratio": ("ratio",), "random": ("keep_rate",)}
        named = reads.get(self.name, () if self.name in ("none", "disagree") else ("tau",))
        return "-".join([self.name, *(f"{key}{getattr(self, key):g}" for key in named)])

    def with_tau(self, tau: float) -> Criterion:
        """Return the same rule with another tau."""
        return replace(self, tau=tau)


@dataclass(frozen=True)
class Scores:
    """What a rule may look at: both perplexities under F, whether the texts agree, and the candidate's id."""

    candidate_id: str
    ppl_f: float
    ppl_b: float
    same_text: bool


RULES: dict[str, Callable[[Scores, Criterion], bool]] = {
    "ppl_diff": lambda s, c: quadrant(s.ppl_f, s.ppl_b, c.tau) == "low-high",
    "low_low": lambda s, c: quadrant(s.ppl_f, s.ppl_b, c.tau) == "low-low",
    "high_low": lambda s, c: quadrant(s.ppl_f, s.ppl_b, c.tau) == "high-low",
    "high_high": lambda s, c: quadrant(s.ppl_f, s.ppl_b, c.tau) == "high-high",
    "asymmetric": lambda s, c: s.ppl_f < c.tau_f and s.ppl_b > c.tau_b,
    "ratio": lambda s, c: c.ratio * s.ppl_f <= s.ppl_b,
    "none": lambda s, c: True,
    "random": lambda s, c: _uniform(c.seed, s.candidate_id) < c.keep_rate,
    "disagree": lambda s, c: not s.same_text,
}


GATES: dict[str, Callable[[float, Criterion], bool]] = {
    "ppl_diff": lambda ppl_f, c: ppl_f < c.tau,
    "low_low": lambda ppl_f, c: ppl_f < c.tau,
    "high_low": lambda ppl_f, c: ppl_f >= c.tau,
    "high_high": lambda ppl_f, c: ppl_f >= c.tau,
    "asymmetric": lambda ppl_f, c: ppl_f < c.tau_f,
}
"""What PPL_F(y_f) must meet for a rule to keep, whatever y_b is; the other rules need both responses."""


def may_keep(y_f: Response, criterion: Criterion) -> bool:
    """Tell whether the rule could still keep a candidate with this y_f, so that B's answer is worth asking for."""
    if _unusable_f(y_f, criterion) is not None:
        return False
    gate = GATES.get(criterion.name)
    return gate is None or gate(y_f.perplexity(count_eos=criterion.count_eos), criterion)


def decide(candidate: Candidate, criterion: Criterion) -> Candidate:
    """Return the candidate with `kept` and `reason` decided anew.

    A candidate that was dropped before it was answered stays as it is, and one whose y_b was not asked for is never
    kept: no rule can judge what was not measured.
    """
    if candidate.y_f is None:
        return candidate
    if candidate.y_b is None:
        side = "low" if may_keep(candidate.y_f, Criterion(tau=criterion.tau, count_eos=criterion.count_eos)) else "high"
        reason = _unusable_f(candidate.y_f, criterion) or f"{side}-unscored"
        return replace(candidate, kept=False, reason=reason)
    unusable = _unusable_f(candidate.y_f, criterion) or _unusable_b(candidate.y_b, criterion)
    if unusable is not None:
        return replace(candidate, kept=False, reason=unusable)
    scores = Scores(
        candidate_id=candidate.id,
        ppl_f=candidate.y_f.perplexity(count_eos=criterion.count_eos),
        ppl_b=candidate.y_b.perplexity(count_eos=criterion.count_eos),
        same_text=candidate.y_f.text.strip() == candidate.y_b.text.strip(),
    )
    if RULES[criterion.name](scores, criterion):
        return replace(candidate, kept=True, reason="kept")
    found = quadrant(scores.ppl_f, scores.ppl_b, criterion.tau)
    decides = criterion.name in ("ppl_diff", "low_low", "high_low", "high_high")
    return replace(candidate, kept=False, reason=found if decides else f"not {criterion.name} ({found})")


def calibrate_tau(candidates: Sequence[Candidate], criterion: Criterion) -> float | None:
    """Return the tau above 1 whose keep rate over `candidates` comes closest to `criterion.keep_rate`.

    Every decision changes only where tau passes a measured perplexity, so those are all the taus there are to try;
    of equally good ones the smallest is taken. `None` when no candidate was answered.
    """
    answered = [c for c in candidates if c.y_f is not None and c.y_b is not None]
    marks = {c.y_f.perplexity(count_eos=criterion.count_eos) for c in answered if c.y_f and c.y_f.n_tokens}
    marks |= {c.y_b.perplexity(count_eos=criterion.count_eos) for c in answered if c.y_b and c.y_b.n_tokens}
    taus = sorted(mark for mark in marks if 1 < mark < math.inf)
    if not taus:
        return None

    def distance(tau: float) -> float:
        kept = sum(decide(c, criterion.with_tau(tau)).kept for c in answered)
        return abs(kept / len(answered) - criterion.keep_rate)

    return min(taus, key=lambda tau: (distance(tau), tau))


def _unusable_f(y_f: Response, criterion: Criterion) -> str | None:
    """Return why no rule applies to F's response, or `None`."""
    if not y_f.text.strip() or y_f.n_tokens == 0:
        return "empty y_f"
    if y_f.finish_reason == "length":
        return "y_f hit max_new_tokens"
    return None if _finite(y_f, criterion) else "non-finite score"


def _unusable_b(y_b: Response, criterion: Criterion) -> str | None:
    if y_b.n_tokens == 0:
        return "empty y_b"
    return None if _finite(y_b, criterion) else "non-finite score"


def _finite(response: Response, criterion: Criterion) -> bool:
    """Tell whether the sum (an infinite one would pass for a perplexity of 0) and the perplexity are finite.

    By the bare rule an infinite PPL_F(y_b) would be kept, and a NaN dropped without a word.
    """
    ppl = response.perplexity(count_eos=criterion.count_eos)
    return math.isfinite(response.sum_logprob) and math.isfinite(ppl)


def _uniform(seed: int, candidate_id: str) -> float:
    digest = hashlib.sha256(f"{seed}:{candidate_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
