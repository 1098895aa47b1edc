"""Step 3: the criterion decides which candidates are kept. Pure functions over stored records.

l_M(y) is the mean log-probability of y's tokens under a model M in nats, PPL_M(y) = exp(-l_M(y)), H the entropy of a
next-token distribution in nats, and "along y" the mean over the positions of y's tokens.

    ppl_diff       PPL_F(y_f) < tau <= PPL_F(y_b)                  the paper's rule (section 3.2), tau = 1.5
    asymmetric     PPL_F(y_f) < tau_f and PPL_F(y_b) > tau_b       Table 8(b), 1.2 and 1.6
    ratio          ratio * PPL_F(y_f) <= PPL_F(y_b)                Table 8(c), 1.5: the margin rule m_F >= log 1.5
    low_low, high_low, high_high                                   the other quadrants (Table 9)
    none           all that both models gave a usable answer to    Table 9
    random         each with probability `keep_rate`               control: any rule must beat it
    length         as many of each length as ppl_diff keeps        control: lengths alone, drawn at random
    disagree       y_f and y_b differ in their text                control: no likelihood at all

The next ones look at measures that need another pass of a model (`tuneshift.measuring`); none of them needs y_b.

    lift           l_F(y_f) - l_B(y_f) >= threshold                one draw of KL(p_F || p_B) along y_f
    kl             KL(p_F || p_B) along y_f >= threshold           the same, summed over the vocabulary
    entropy_drop   H(p_B) - H(p_F) along y_f >= threshold          how much the fine-tuning sharpened F's own answer
    few_shot_base  PPL_F(y_f) < tau <= PPL_F(y_b5)                 y_b5: B's answer after demonstrations; form aside
    target_gap     l_F(y_f) - l_T(y_f) per byte >= threshold       what T would not have said; tokenizers may differ
    vote           share of `samples` new answers of F that        self-consistency (arXiv 2203.11171)
                   say the same as y_f >= vote_share
    exec           y_f is a program that runs                      the sandbox's word; nothing is compared

A decision looks at one record only, so any rule can be applied again later without touching a model. `length` alone
looks at the whole list of candidates that `decide_all` is given: in a run those of a round, in `reselect` all of them.
Measures leave the EOS out, whatever `count_eos` says, but for `few_shot_base`, which has both perplexities.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tuneshift.run.records import Candidate, Response
from tuneshift.scoring import Quadrant, margin, quadrant

TOO_LONG = "too long for the target"
"""The reason of a candidate that the target cannot read with F's response, so that no rule may keep it."""


@dataclass(frozen=True)
class Criterion:
    """A rule's name with its thresholds.

    `tau`, `tau_f` and `tau_b` are perplexities; `ratio` is a quotient of two; `threshold` is in nats a token, for
    `target_gap` a byte; `vote_share` is a share of `samples`; `keep_rate` is a probability, used by `random` and by the
    calibration of an automatic tau. `count_eos` counts the EOS as a response token.
    """

    name: str = "ppl_diff"
    tau: float = 1.5
    tau_f: float = 1.2
    tau_b: float = 1.6
    ratio: float = 1.5
    threshold: float = 0.405
    vote_share: float = 0.6
    samples: int = 5
    keep_rate: float = 0.2
    count_eos: bool = False
    seed: int = 0

    @property
    def rule(self) -> Rule:
        """The rule of this name."""
        return RULES[self.name]

    def needs(self) -> tuple[str, ...]:
        """Return the names of the measures that the rule reads; a rule that reads measures reads no y_b."""
        return self.rule.measures(self)

    def label(self) -> str:
        """Return a short name of the rule with what it reads, for files and tables."""
        thresholds = [f"{key}{getattr(self, key):g}" for key in self.rule.reads]
        return "-".join([self.name, *thresholds, *(["eos"] if self.count_eos else [])])

    def with_tau(self, tau: float) -> Criterion:
        """Return the same rule with another tau."""
        return replace(self, tau=tau)


@dataclass(frozen=True)
class Scores:
    """What a rule may look at of one candidate.

    `ppl_f` and `ppl_b` are PPL_F(y_f) and PPL_F(y_b), NaN where there is none and the rule does not need it;
    `logprob_f` and `logprob_f_byte` are l_F(y_f) in nats a token and in nats a UTF-8 byte, without EOS; `measures`
    holds what the rule needs, all finite, in the order of `Criterion.needs`.
    """

    candidate_id: str
    ppl_f: float
    ppl_b: float
    same_text: bool
    logprob_f: float
    logprob_f_byte: float
    measures: tuple[float, ...]


@dataclass(frozen=True)
class Rule:
    """How one criterion decides.

    `keeps` decides, and `reads` names the thresholds that it looks at. `gate` is what PPL_F(y_f) must meet, whatever
    else is true; without one y_f alone settles nothing. `grade` ranks: the more, the rather kept. `measures` names the
    measures that the rule reads in place of y_b.
    """

    keeps: Callable[[Scores, Criterion], bool]
    reads: tuple[str, ...] = ()
    gate: Callable[[float, Criterion], bool] | None = None
    grade: Callable[[Scores], float] | None = None
    measures: Callable[[Criterion], tuple[str, ...]] = lambda criterion: ()


def _quadrant_rule(name: Quadrant) -> Rule:
    def gate(ppl_f: float, criterion: Criterion) -> bool:
        return (ppl_f < criterion.tau) == name.startswith("low")

    return Rule(lambda s, c: quadrant(s.ppl_f, s.ppl_b, c.tau) == name, ("tau",), gate)


def _threshold_rule(grade: Callable[[Scores], float], *measures: str) -> Rule:
    return Rule(lambda s, c: grade(s) >= c.threshold, ("threshold",), grade=grade, measures=lambda c: measures)


RULES: dict[str, Rule] = {
    "ppl_diff": _quadrant_rule("low-high"),
    "low_low": _quadrant_rule("low-low"),
    "high_low": _quadrant_rule("high-low"),
    "high_high": _quadrant_rule("high-high"),
    "asymmetric": Rule(
        lambda s, c: s.ppl_f < c.tau_f and s.ppl_b > c.tau_b,
        reads=("tau_f", "tau_b"),
        gate=lambda ppl_f, c: ppl_f < c.tau_f,
    ),
    "ratio": Rule(
        lambda s, c: c.ratio * s.ppl_f <= s.ppl_b, reads=("ratio",), grade=lambda s: margin(s.ppl_f, s.ppl_b)
    ),
    "none": Rule(lambda s, c: True),
    "random": Rule(lambda s, c: _uniform(c.seed, s.candidate_id) < c.keep_rate, reads=("keep_rate",)),
    # Of one candidate alone; which of several have its length is for `decide_all` to see.
    "length": Rule(lambda s, c: quadrant(s.ppl_f, s.ppl_b, c.tau) == "low-high", reads=("tau",)),
    "disagree": Rule(lambda s, c: not s.same_text),
    "lift": _threshold_rule(lambda s: s.logprob_f - s.measures[0], "logprob_b_f"),
    "kl": _threshold_rule(lambda s: s.measures[0], "kl"),
    "entropy_drop": _threshold_rule(lambda s: s.measures[0] - s.measures[1], "entropy_b", "entropy_f"),
    "few_shot_base": Rule(
        lambda s, c: quadrant(s.ppl_f, s.measures[0], c.tau) == "low-high",
        reads=("tau",),
        gate=lambda ppl_f, c: ppl_f < c.tau,
        grade=lambda s: margin(s.ppl_f, s.measures[0]),
        measures=lambda c: ("few_shot_ppl_eos" if c.count_eos else "few_shot_ppl",),
    ),
    "target_gap": _threshold_rule(lambda s: s.logprob_f_byte - s.measures[0], "logprob_t_byte"),
    "vote": Rule(
        lambda s, c: s.measures[0] >= c.vote_share,
        reads=("vote_share", "samples"),
        grade=lambda s: s.measures[0],
        measures=lambda c: (f"vote_{c.samples}",),
    ),
    "exec": Rule(lambda s, c: s.measures[0] == 1, measures=lambda c: ("exec",)),
}


def decidable(candidate: Candidate) -> Response | None:
    """Return F's response where a rule may decide on it: there is one, and the target can read it."""
    return None if candidate.reason == TOO_LONG else candidate.y_f


def may_keep(y_f: Response, criterion: Criterion) -> bool:
    """Tell whether the rule could still keep a candidate with this y_f, so that the rest is worth asking for."""
    if _unusable_f(y_f, criterion) is not None:
        return False
    gate = criterion.rule.gate
    return gate is None or gate(y_f.perplexity(count_eos=criterion.count_eos), criterion)


def unmeasured(candidates: Sequence[Candidate], criterion: Criterion, *, gated: bool) -> list[Candidate]:
    """Return the candidates that lack a measure that the rule needs, and that no rule drops for their y_f.

    With `gated` those are left out that this rule drops for their y_f's perplexity.
    """
    asks = criterion if gated else replace(criterion, name="none")  # which has no gate
    needs = set(criterion.needs())
    return [c for c in candidates if needs - set(c.measures) and (y_f := decidable(c)) and may_keep(y_f, asks)]


def decide_all(candidates: Sequence[Candidate], criterion: Criterion) -> list[Candidate]:
    """Return the candidates with `kept` and `reason` decided anew; see `decide`.

    `length` keeps of each length of y_f, in tokens, as many as `ppl_diff` keeps with the same tau, drawn by a hash of
    seed and id among all that a rule can judge.
    """
    decided = [decide(candidate, criterion) for candidate in candidates]
    if criterion.name != "length":
        return decided
    wanted = Counter(c.y_f.n_tokens for c in decided if c.kept and c.y_f is not None)
    judged = [c for c in candidates if decide(c, replace(criterion, name="none")).kept]
    chosen = set()
    for candidate in sorted(judged, key=lambda c: _uniform(criterion.seed, f"length:{c.id}")):
        if candidate.y_f is not None and wanted[candidate.y_f.n_tokens] > 0:
            wanted[candidate.y_f.n_tokens] -= 1
            chosen.add(candidate.id)
    return [
        replace(c, kept=True, reason="kept")
        if c.id in chosen
        else replace(c, kept=False, reason="not length (low-high)" if c.kept else c.reason)
        for c in decided
    ]


def decide(candidate: Candidate, criterion: Criterion) -> Candidate:
    """Return the candidate with `kept` and `reason` decided anew, by a rule that looks at one candidate.

    A candidate that was dropped before it was answered stays as it is, and so does one that the target cannot read. One
    whose y_b or measure was not asked for is never kept by a rule that needs it: no rule can judge what was not
    measured.
    """
    if decidable(candidate) is None:
        return candidate
    scores = _scores(candidate, criterion)
    if isinstance(scores, str):
        return replace(candidate, kept=False, reason=scores)
    if criterion.rule.keeps(scores, criterion):
        return replace(candidate, kept=True, reason="kept")
    if math.isnan(scores.ppl_b):
        return replace(candidate, kept=False, reason=f"not {criterion.name}")
    found = quadrant(scores.ppl_f, scores.ppl_b, criterion.tau)
    decides = criterion.name in ("ppl_diff", "low_low", "high_low", "high_high")
    return replace(candidate, kept=False, reason=found if decides else f"not {criterion.name} ({found})")


def score_of(candidate: Candidate, criterion: Criterion) -> float | None:
    """Return the number by which a graded rule ranks a candidate, `None` where the rule cannot judge it.

    In nats a token: m_F (`ratio`), l_F(y_f) - l_B(y_f) (`lift`), KL (`kl`), the entropies' difference
    (`entropy_drop`), log PPL_F(y_b5) - log PPL_F(y_f) (`few_shot_base`); in nats a byte: `target_gap`; a share: `vote`.

    Raises:
        ValueError: the rule only says yes or no.
    """
    grade = criterion.rule.grade
    if grade is None:
        graded = ", ".join(name for name, rule in RULES.items() if rule.grade is not None)
        raise ValueError(f"{criterion.name} does not grade; {graded} do")
    scores = None if decidable(candidate) is None else _scores(candidate, criterion)
    return grade(scores) if isinstance(scores, Scores) else None


def calibrate_tau(candidates: Sequence[Candidate], criterion: Criterion) -> float | None:
    """Return the tau above 1 whose keep rate over `candidates` comes closest to `criterion.keep_rate`.

    Every decision changes only where tau passes a measured perplexity, so those are all the taus there are to try;
    of equally good ones the smallest is taken. `None` when no candidate was answered.
    """
    answered = [c for c in candidates if c.y_f is not None and (c.y_b is not None or criterion.needs())]
    responses = [r for c in answered for r in (c.y_f, c.y_b) if r is not None and r.n_tokens]
    marks = {response.perplexity(count_eos=criterion.count_eos) for response in responses}
    if "tau" in criterion.rule.reads:  # then a measure is a perplexity
        marks |= {value for c in answered for name in criterion.needs() if (value := c.measures.get(name)) is not None}
    taus = sorted(mark for mark in marks if 1 < mark < math.inf)
    if not taus:
        return None

    def distance(tau: float) -> float:
        kept = sum(candidate.kept for candidate in decide_all(answered, criterion.with_tau(tau)))
        return abs(kept / len(answered) - criterion.keep_rate)

    return min(taus, key=lambda tau: (distance(tau), tau))


def _scores(candidate: Candidate, criterion: Criterion) -> Scores | str:
    """Return what the rule may look at, or why no rule, or not this one, can judge the candidate."""
    y_f, y_b = candidate.y_f, candidate.y_b
    assert y_f is not None
    unusable = _unusable_f(y_f, criterion)
    if unusable is not None:
        return unusable
    needs = criterion.needs()
    ppl_f, ppl_b = y_f.perplexity(count_eos=criterion.count_eos), math.nan
    if (y_b is None and not needs) or not set(needs) <= set(candidate.measures):
        return f"{'low' if ppl_f < criterion.tau else 'high'}-unscored"
    if y_b is not None:
        unusable = _unusable_b(y_b, criterion)
        if unusable is not None and not needs:
            return unusable
        ppl_b = math.nan if unusable else y_b.perplexity(count_eos=criterion.count_eos)
    measures = {name: candidate.measures[name] for name in needs}
    finite = tuple(value for value in measures.values() if value is not None)
    if len(finite) < len(measures):
        return f"no finite {next(name for name, value in measures.items() if value is None)}"
    return Scores(
        candidate_id=candidate.id,
        ppl_f=ppl_f,
        ppl_b=ppl_b,
        same_text=y_b is not None and y_f.text.strip() == y_b.text.strip(),
        logprob_f=y_f.sum_logprob / y_f.n_tokens,
        logprob_f_byte=y_f.sum_logprob / len(y_f.text.encode()),
        measures=finite,
    )


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
