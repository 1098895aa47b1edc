"""Every rule against its formula on made-up records; an automatic tau and the length control against brute force."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tuneshift.criteria import RULES, Criterion, calibrate_tau, decide, decide_all, may_keep, score_of, unmeasured
from tuneshift.measuring import PASSES
from tuneshift.run.records import Candidate, FinishReason, Response
from tuneshift.sections.synthesis import CriterionSection

MEASURED = sorted(PASSES)
UNMEASURED = sorted(set(RULES) - set(PASSES))
QUADRANT_RULES = {"ppl_diff": "low-high", "low_low": "low-low", "high_low": "high-low", "high_high": "high-high"}


def response(
    *logprobs: float, text: str = "an answer", finish: FinishReason = "eos", eos: float | None = None
) -> Response:
    ids = tuple(range(len(logprobs)))
    return Response(text, ids, logprobs, eos_logprob=eos, finish_reason=finish, reencoded=False)


def with_perplexity(ppl: float) -> Response:
    return response(-math.log(ppl))


def candidate(y_f: Response | None, y_b: Response | None, *, id_: str = "r0000-c000-p000") -> Candidate:
    return Candidate(id_, 0, "r0000-c000", "text", "prompt", kept=False, reason="unanswered", y_f=y_f, y_b=y_b)


def mean_nll(answer: Response | None) -> float:
    assert answer is not None
    return -sum(answer.token_logprobs) / len(answer.token_logprobs)


def measured(record: Candidate, score: float, rule: str) -> Candidate:
    """Return the record with the measures of a rule, such that the rule's score is `score`."""
    assert record.y_f is not None
    total, n = record.y_f.sum_logprob, max(1, record.y_f.n_tokens)
    perplexity = math.exp(min(700.0, score - total / n)) if math.isfinite(total) else math.nan
    measures: dict[str, dict[str, float | None]] = {
        "lift": {"logprob_b_f": total / n - score},
        "kl": {"kl": score},
        "entropy_drop": {"entropy_b": 1.0 + score, "entropy_f": 1.0},
        "few_shot_base": {"few_shot_ppl": perplexity, "few_shot_ppl_eos": perplexity},
        "target_gap": {"logprob_t_byte": total / max(1, len(record.y_f.text.encode())) - score},
        "vote": {"vote_5": score},
        "exec": {"exec": float(score > 1)},
    }
    return replace(record, measures=measures.get(rule, {}))


logprob_lists = st.lists(st.floats(-4, 0), min_size=1, max_size=6)
usable_responses = st.builds(
    lambda logprobs, text, eos: response(*logprobs, text=text, eos=eos),
    logprob_lists,
    st.sampled_from(["yes", " yes ", "no", "a longer answer"]),
    st.none() | st.floats(-4, 0),
)
usable_candidates = st.builds(candidate, usable_responses, usable_responses)
unsure_responses = st.builds(
    lambda logprobs, finish: response(*logprobs, finish=finish),
    st.lists(st.floats(-4, -1e-3), min_size=1, max_size=6),  # every perplexity above 1
    st.sampled_from(["eos", "eos", "stop", "length"]),
)
unsure_candidates = st.builds(candidate, unsure_responses, unsure_responses)
taus = st.floats(1.01, 20)


# Quadrant rules


@given(usable_candidates, taus)
def test_exactly_one_quadrant_rule_keeps_each_usable_record(record: Candidate, tau: float) -> None:
    keepers = [name for name in QUADRANT_RULES if decide(record, Criterion(name, tau=tau)).kept]
    low_f, low_b = (math.exp(mean_nll(answer)) < tau for answer in (record.y_f, record.y_b))
    truth = {(True, False): "ppl_diff", (True, True): "low_low", (False, True): "high_low", (False, False): "high_high"}
    assert keepers == [truth[low_f, low_b]]


@given(usable_candidates, taus, st.sampled_from(sorted(QUADRANT_RULES)))
def test_a_record_that_a_rule_drops_tells_its_quadrant(record: Candidate, tau: float, rule: str) -> None:
    sides = ["low" if math.exp(mean_nll(answer)) < tau else "high" for answer in (record.y_f, record.y_b)]
    decided = decide(record, Criterion(rule, tau=tau))
    assert decided.reason == ("kept" if decided.kept else "-".join(sides))
    assert replace(decided, kept=record.kept, reason=record.reason) == record  # nothing else changes


def test_the_paper_rule_keeps_a_base_response_at_exactly_tau() -> None:
    # perplexities 1 and 2 are exact: exp(0) and tau read from the same response
    y_b = response(-0.5, -0.25)
    tau = y_b.perplexity()
    assert decide(candidate(response(0.0), y_b), Criterion("ppl_diff", tau=tau)).kept
    assert not decide(candidate(y_b, y_b), Criterion("ppl_diff", tau=tau)).kept
    assert not decide(candidate(response(0.0), y_b), Criterion("ppl_diff", tau=math.nextafter(tau, 9))).kept


# The other rules


@given(usable_candidates)
def test_the_ratio_rule_is_the_margin_rule(record: Candidate) -> None:
    margin = mean_nll(record.y_b) - mean_nll(record.y_f)
    assume(abs(margin - math.log(1.5)) > 1e-9)
    assert decide(record, Criterion("ratio", ratio=1.5)).kept == (margin >= math.log(1.5))


@given(usable_candidates)
def test_the_asymmetric_rule_wants_f_below_one_threshold_and_b_above_another(record: Candidate) -> None:
    low, high = math.exp(mean_nll(record.y_f)), math.exp(mean_nll(record.y_b))
    assert decide(record, Criterion("asymmetric", tau_f=1.3, tau_b=1.9)).kept == (low < 1.3 and high > 1.9)


def test_the_asymmetric_rule_drops_what_lies_exactly_on_a_threshold() -> None:
    y_f, y_b = response(-0.1), response(-0.7)
    on_f = Criterion("asymmetric", tau_f=y_f.perplexity(), tau_b=1.6)
    on_b = Criterion("asymmetric", tau_f=1.2, tau_b=y_b.perplexity())
    assert not decide(candidate(y_f, y_b), on_f).kept
    assert not decide(candidate(y_f, y_b), on_b).kept
    assert decide(candidate(y_f, y_b), Criterion("asymmetric", tau_f=1.2, tau_b=1.6)).kept


@given(usable_candidates)
def test_the_rule_none_keeps_every_usable_record(record: Candidate) -> None:
    assert decide(record, Criterion("none")).kept


@pytest.mark.parametrize(
    ("text_f", "text_b", "kept"),
    [("yes", "no", True), ("yes", "yes", False), (" yes\n", "yes", False), ("Yes", "yes", True)],
)
def test_the_rule_disagree_looks_at_the_texts_alone(text_f: str, text_b: str, kept: bool) -> None:
    for logprob in (-0.01, -3.0):
        record = candidate(response(logprob, text=text_f), response(-0.5, text=text_b))
        assert decide(record, Criterion("disagree")).kept is kept


def test_the_rule_random_keeps_about_its_rate() -> None:
    ids = [f"r{n // 20:04d}-c{n % 20:03d}-p{n % 7:03d}" for n in range(5000)]
    records = [candidate(response(-0.1), response(-1.0), id_=id_) for id_ in ids]
    for rate in (0.2, 0.7):
        kept = sum(decide(record, Criterion("random", keep_rate=rate)).kept for record in records)
        assert kept == pytest.approx(5000 * rate, abs=5 * math.sqrt(5000 * rate * (1 - rate)))  # five sigma


@pytest.mark.parametrize(("rate", "share"), [(0.0, 0), (1.0, 300)])
def test_the_rule_random_keeps_nothing_at_rate_zero_and_all_at_rate_one(rate: float, share: int) -> None:
    records = [candidate(response(-0.1), response(-1.0), id_=str(n)) for n in range(300)]
    assert sum(decide(record, Criterion("random", keep_rate=rate)).kept for record in records) == share


@given(usable_candidates, usable_candidates, st.integers(0, 99), st.text(max_size=12))
def test_the_rule_random_looks_at_seed_and_id_alone(one: Candidate, other: Candidate, seed: int, id_: str) -> None:
    rule = Criterion("random", keep_rate=0.5, seed=seed)
    twin = replace(other, id=id_, round=8, text="another", prompt="prompt")
    assert decide(replace(one, id=id_), rule).kept == decide(twin, replace(rule, tau=9.0)).kept


def test_the_rule_random_chooses_the_same_ids_in_every_process() -> None:
    # Written down once: what a run kept must not depend on Python's hash seed or on the release.
    records = [candidate(response(-0.1), response(-1.0), id_=f"r0000-c000-p{n:03d}") for n in range(20)]
    kept = [n for n, record in enumerate(records) if decide(record, Criterion("random", keep_rate=0.3, seed=0)).kept]
    assert kept == [1, 6, 9, 11, 12, 18]


def test_the_rule_random_chooses_others_with_another_seed() -> None:
    records = [candidate(response(-0.1), response(-1.0), id_=str(n)) for n in range(1000)]
    first, second = (
        {record.id for record in records if decide(record, Criterion("random", keep_rate=0.5, seed=seed)).kept}
        for seed in (0, 1)
    )
    assert len(first & second) == pytest.approx(250, abs=5 * math.sqrt(1000 * 0.25 * 0.75))  # independent choices


# What no rule can judge

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize(
    ("y_f", "reason"),
    [
        (response(text=""), "empty y_f"),
        (response(-0.1, text=" \n"), "empty y_f"),
        (response(-0.1, finish="length"), "y_f hit max_new_tokens"),
        (response(-0.1, NAN), "non-finite score"),
        (response(-0.1, -INF), "non-finite score"),
        (response(-INF, INF), "non-finite score"),
    ],
)
def test_an_unusable_y_f_is_dropped_by_every_rule_with_its_reason(y_f: Response, reason: str, rule: str) -> None:
    record = measured(candidate(y_f, response(-1.0)), 9.0, rule)
    decided = decide(record, Criterion(rule, keep_rate=1.0, vote_share=0.0))
    assert (decided.kept, decided.reason) == (False, reason)


UNUSABLE_Y_B = [
    (response(text=""), "empty y_b"),
    (response(-1.0, NAN), "non-finite score"),
    (response(-1.0, -INF), "non-finite score"),
]


@pytest.mark.parametrize("rule", UNMEASURED)
@pytest.mark.parametrize(("y_b", "reason"), UNUSABLE_Y_B)
def test_an_unusable_y_b_is_dropped_by_every_rule_that_reads_it(y_b: Response, reason: str, rule: str) -> None:
    decided = decide(candidate(response(-0.1), y_b), Criterion(rule, keep_rate=1.0))
    assert (decided.kept, decided.reason) == (False, reason)


@pytest.mark.parametrize("rule", MEASURED)
@pytest.mark.parametrize("y_b", [None, *(y_b for y_b, _ in UNUSABLE_Y_B)])
def test_a_rule_that_measures_reads_no_y_b(y_b: Response | None, rule: str) -> None:
    high = measured(candidate(response(-0.1), y_b), 9.0, rule)
    assert decide(high, Criterion(rule)).reason == "kept"
    low = measured(candidate(response(-0.1), y_b), 0.01, rule)
    assert decide(low, Criterion(rule)).reason == f"not {rule}"


@pytest.mark.parametrize("side", ["y_f", "y_b"])
def test_an_infinitely_positive_log_probability_is_no_certainty(side: str) -> None:
    record = replace(candidate(response(-0.1), response(-1.0)), **{side: response(-0.1, INF)})
    assert decide(record, Criterion("none")).reason == "non-finite score"


@pytest.mark.parametrize("eos", [NAN, -INF])
@pytest.mark.parametrize("side", ["y_f", "y_b"])
def test_a_non_finite_eos_is_a_non_finite_score_where_it_counts(side: str, eos: float) -> None:
    record = replace(candidate(response(-0.1), response(-1.0)), **{side: response(-0.1, eos=eos)})
    assert decide(record, Criterion("none", count_eos=True)).reason == "non-finite score"
    assert decide(record, Criterion("none", count_eos=False)).kept


def test_a_base_response_may_hit_the_length_limit() -> None:
    record = candidate(response(-0.1), response(-1.0, -1.0, finish="length"))
    assert decide(record, Criterion("ppl_diff", tau=1.5)).kept


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("y_b", [None, response(-1.0)], ids=["neither", "only b"])
def test_a_record_without_an_answer_of_f_stays_as_it_is(y_b: Response | None, rule: str) -> None:
    record = replace(candidate(None, y_b), reason="duplicate")
    assert decide(record, Criterion(rule, keep_rate=1.0)) == record


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize(("ppl_f", "side"), [(1.4, "low"), (1.5, "high")])
def test_a_record_without_what_the_rule_reads_is_never_kept_and_says_so(rule: str, ppl_f: float, side: str) -> None:
    decided = decide(candidate(with_perplexity(ppl_f), None), Criterion(rule, tau=1.5, keep_rate=1.0))
    assert (decided.kept, decided.reason) == (False, f"{side}-unscored")
    capped = decide(candidate(response(-0.1, finish="length"), None), Criterion(rule))
    assert (capped.kept, capped.reason) == (False, "y_f hit max_new_tokens")


@given(usable_candidates | unsure_candidates, st.sampled_from(sorted(RULES)), taus)
def test_the_base_is_asked_wherever_its_answer_could_matter(record: Candidate, rule: str, tau: float) -> None:
    criterion = Criterion(rule, tau=tau, tau_f=tau, keep_rate=1.0)
    assert record.y_f is not None
    if decide(measured(record, 9.0, rule), criterion).kept:
        assert may_keep(record.y_f, criterion)


@pytest.mark.parametrize(
    ("rule", "low", "high"),
    [("ppl_diff", True, False), ("low_low", True, False), ("high_low", False, True), ("high_high", False, True),
     ("asymmetric", True, False), ("ratio", True, True), ("none", True, True), ("random", True, True),
     ("length", True, True), ("lift", True, True), ("few_shot_base", True, False)],
)  # fmt: skip
def test_which_side_of_tau_makes_the_base_worth_asking(rule: str, low: bool, high: bool) -> None:
    criterion = Criterion(rule, tau=1.5, tau_f=1.5)
    assert [may_keep(with_perplexity(ppl), criterion) for ppl in (1.4, 1.6)] == [low, high]
    assert not may_keep(response(-0.1, finish="length"), criterion)


# Rules that read measures


def test_the_configuration_knows_every_rule_and_every_rule_that_measures_has_its_pass() -> None:
    assert set(get_args(CriterionSection.model_fields["name"].annotation)) == set(RULES)
    assert {name for name in RULES if Criterion(name).needs()} == set(PASSES)


scores = st.floats(-3, 3)


@given(usable_candidates, scores, st.floats(-2, 2), st.sampled_from(["lift", "kl", "entropy_drop", "target_gap"]))
def test_a_threshold_rule_keeps_what_scores_at_least_its_threshold(
    record: Candidate, score: float, threshold: float, rule: str
) -> None:
    assume(abs(score - threshold) > 1e-9)
    record, criterion = measured(record, score, rule), Criterion(rule, threshold=threshold)
    assert score_of(record, criterion) == pytest.approx(score, abs=1e-9)
    assert decide(record, criterion).kept == (score >= threshold)


def test_a_score_at_exactly_its_threshold_is_kept() -> None:
    record = replace(candidate(response(-0.5), None), measures={"kl": 0.25, "vote_5": 0.6})
    assert decide(record, Criterion("kl", threshold=0.25)).kept
    assert not decide(record, Criterion("kl", threshold=math.nextafter(0.25, 1))).kept
    assert decide(record, Criterion("vote", vote_share=0.6)).kept
    assert not decide(record, Criterion("vote", vote_share=0.8)).kept


def test_lift_and_target_gap_on_a_worked_case() -> None:
    record = candidate(response(-0.5, -1.5, text="äb"), None)  # two tokens, three bytes
    record = replace(record, measures={"logprob_b_f": -2.25, "logprob_t_byte": -1.0})
    assert score_of(record, Criterion("lift")) == pytest.approx(-1.0 + 2.25)
    assert score_of(record, Criterion("target_gap")) == pytest.approx(-2.0 / 3 + 1.0)


@given(usable_candidates, st.floats(1, 20), taus)
def test_few_shot_base_is_the_paper_rule_with_another_base_response(record: Candidate, ppl: float, tau: float) -> None:
    twin = replace(record, y_b=with_perplexity(ppl))
    assert twin.y_b is not None
    record = replace(record, y_b=None, measures={"few_shot_ppl": twin.y_b.perplexity()})
    assert decide(record, Criterion("few_shot_base", tau=tau)).kept == decide(twin, Criterion("ppl_diff", tau=tau)).kept
    margin = math.log(ppl) - mean_nll(record.y_f)
    assert score_of(record, Criterion("few_shot_base")) == pytest.approx(margin, abs=1e-9)


def test_few_shot_base_counts_the_eos_on_both_sides() -> None:
    record = candidate(response(-0.1, eos=-3.0), None)
    record = replace(record, measures={"few_shot_ppl": 9.0, "few_shot_ppl_eos": 1.2})
    assert decide(record, Criterion("few_shot_base")).kept
    assert decide(record, Criterion("few_shot_base", count_eos=True)).reason == "not few_shot_base"
    assert score_of(record, Criterion("few_shot_base", count_eos=True)) == pytest.approx(math.log(1.2) - 3.1 / 2)


@pytest.mark.parametrize("rule", MEASURED)
def test_what_was_tried_and_is_not_finite_is_never_kept_and_says_what(rule: str) -> None:
    criterion = Criterion(rule)
    record = replace(candidate(response(-0.1), None), measures=dict.fromkeys(criterion.needs()))
    assert decide(record, criterion).reason == f"no finite {criterion.needs()[0]}"
    assert criterion.rule.grade is None or score_of(record, criterion) is None
    assert unmeasured([record], criterion, gated=True) == []  # trying again would give the same


def test_another_number_of_samples_is_another_measure() -> None:
    record = replace(candidate(response(-0.1), None), measures={"vote_5": 1.0})
    assert decide(record, Criterion("vote", samples=5)).kept
    assert decide(record, Criterion("vote", samples=9)).reason == "low-unscored"
    assert unmeasured([record], Criterion("vote", samples=9), gated=True) == [record]


@given(usable_candidates)
def test_the_score_of_the_ratio_rule_is_the_margin(record: Candidate) -> None:
    margin = mean_nll(record.y_b) - mean_nll(record.y_f)
    assert score_of(record, Criterion("ratio")) == pytest.approx(margin, abs=1e-9)


@pytest.mark.parametrize("rule", sorted(name for name in RULES if RULES[name].grade))
def test_what_a_rule_cannot_judge_has_no_score(rule: str) -> None:
    assert score_of(candidate(None, None), Criterion(rule)) is None
    assert score_of(candidate(response(-0.1), None), Criterion(rule)) is None
    capped = measured(candidate(response(-0.1, finish="length"), response(-1.0)), 1.0, rule)
    assert score_of(capped, Criterion(rule)) is None


def test_a_rule_that_only_says_yes_or_no_has_no_score() -> None:
    with pytest.raises(ValueError, match="ppl_diff does not grade; ratio, lift, kl, "):
        score_of(candidate(response(-0.1), response(-1.0)), Criterion("ppl_diff"))


def test_measured_is_what_the_rule_could_keep() -> None:
    sure, unsure = candidate(with_perplexity(1.2), None), candidate(with_perplexity(4.0), None)
    records = [sure, unsure, candidate(None, None), candidate(response(-0.1, finish="length"), None)]
    assert unmeasured(records, Criterion("few_shot_base"), gated=True) == [sure]
    assert unmeasured(records, Criterion("few_shot_base"), gated=False) == [sure, unsure]
    assert unmeasured(records, Criterion("kl"), gated=True) == [sure, unsure]
    assert unmeasured(records, Criterion("ppl_diff"), gated=False) == []


# The length control


def numbered(records: list[Candidate]) -> list[Candidate]:
    return [replace(record, id=f"r0000-c000-p{n:03d}") for n, record in enumerate(records)]


def lengths(records: list[Candidate]) -> Counter[int]:
    return Counter(record.y_f.n_tokens for record in records if record.kept and record.y_f is not None)


@given(st.lists(usable_candidates | unsure_candidates, max_size=20).map(numbered), taus, st.integers(0, 3))
def test_the_length_control_keeps_the_lengths_of_the_paper_rule(
    records: list[Candidate], tau: float, seed: int
) -> None:
    control = decide_all(records, Criterion("length", tau=tau, seed=seed))
    assert lengths(control) == lengths(decide_all(records, Criterion("ppl_diff", tau=tau)))
    assert [record.id for record in control] == [record.id for record in records]
    for record in control:
        assert record.kept <= decide(record, Criterion("none")).kept  # never what no rule can judge


def test_the_length_control_draws_among_all_of_a_length() -> None:
    # Of 400 with one token ppl_diff keeps 100, of 400 with two tokens none.
    short = [candidate(with_perplexity(1.1), with_perplexity(9.0 if n < 100 else 1.2)) for n in range(400)]
    long = [candidate(response(-1.0, -1.0), with_perplexity(9.0)) for n in range(400)]
    records = numbered([*short, *long])
    drawn = [{c.id for c in decide_all(records, Criterion("length", seed=seed)) if c.kept} for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    paper = {c.id for c in decide_all(records, Criterion("ppl_diff")) if c.kept}
    assert len(drawn[0]) == len(paper) == 100
    assert len(drawn[0] & paper) == pytest.approx(25, abs=5 * math.sqrt(100 * 0.25 * 0.75))
    reasons = {c.reason for c in decide_all(records, Criterion("length"))}
    assert reasons == {"kept", "not length (low-high)", "not length (low-low)", "not length (high-high)"}


def test_all_other_rules_decide_each_candidate_by_itself() -> None:
    records = numbered([candidate(with_perplexity(f), with_perplexity(b)) for f in (1.1, 2.0) for b in (1.2, 3.0)])
    for rule in sorted(set(RULES) - {"length"}):
        graded = [measured(record, 1.0, rule) for record in records]
        assert decide_all(graded, Criterion(rule)) == [decide(record, Criterion(rule)) for record in graded]


# EOS


def test_counting_the_eos_adds_one_token_and_its_log_probability() -> None:
    answer = response(-1.0, -2.0, eos=-6.0)
    assert (answer.n_tokens, answer.sum_logprob) == (2, -3.0)
    assert answer.perplexity() == pytest.approx(math.exp(3 / 2))
    assert answer.perplexity(count_eos=True) == pytest.approx(math.exp(9 / 3))


def test_counting_the_eos_changes_nothing_where_none_was_written() -> None:
    assert response(-1.0, -2.0).perplexity(count_eos=True) == pytest.approx(math.exp(3 / 2))


def test_counting_the_eos_can_change_a_decision() -> None:
    record = candidate(response(-0.1, eos=-0.1), response(-0.3, eos=-0.7))  # exp(0.3) < 1.5 < exp(0.5)
    assert decide(record, Criterion("ppl_diff", tau=1.5)).reason == "low-low"
    assert decide(record, Criterion("ppl_diff", tau=1.5, count_eos=True)).reason == "kept"


# Automatic tau


def brute_force(records: list[Candidate], rate: float) -> float:
    """Return how close a keep rate can come to `rate`, over a fine grid of taus above 1."""
    values = [
        (math.exp(mean_nll(r.y_f)), math.exp(mean_nll(r.y_b)), r.y_f is not None and r.y_f.finish_reason != "length")
        for r in records
    ]
    grid = [1 + n / 200 for n in range(1, 11_000)]  # exp(4) = 54.6 is the largest perplexity
    return min(abs(sum(ok and f < tau <= b for f, b, ok in values) / len(values) - rate) for tau in grid)


@settings(deadline=None)
@given(st.lists(unsure_candidates, min_size=1, max_size=8), st.floats(0.05, 0.95))
def test_a_calibrated_tau_comes_as_close_to_the_wanted_rate_as_any(records: list[Candidate], rate: float) -> None:
    criterion = Criterion("ppl_diff", keep_rate=rate)
    tau = calibrate_tau(records, criterion)
    assert tau is not None
    assert tau > 1
    kept = sum(decide(record, criterion.with_tau(tau)).kept for record in records)
    assert abs(kept / len(records) - rate) <= brute_force(records, rate) + 1e-12


def test_of_equally_good_taus_the_smallest_is_taken() -> None:
    # tau 1.3 keeps the first record alone and tau 3 the second alone
    records = [candidate(with_perplexity(f), with_perplexity(b)) for f, b in [(1.1, 2.0), (1.3, 3.0), (1.6, 1.7)]]
    assert calibrate_tau(records, Criterion("ppl_diff", keep_rate=1 / 3)) == pytest.approx(1.3)


def test_calibration_looks_at_answered_records_alone() -> None:
    answered = [candidate(with_perplexity(f), with_perplexity(9.0)) for f in (1.1, 1.2, 1.4, 1.8)]
    criterion = Criterion("ppl_diff", keep_rate=0.5)
    assert calibrate_tau([*answered, *[candidate(None, None)] * 20], criterion) == pytest.approx(1.4)
    assert calibrate_tau([candidate(None, None)] * 3, criterion) is None
    assert calibrate_tau([], criterion) is None


def test_calibration_of_few_shot_base_looks_at_its_own_perplexities() -> None:
    pairs = [(1.1, 2.0), (1.2, 1.3), (1.4, 5.0), (1.8, 1.9)]
    records = [replace(candidate(with_perplexity(f), None), measures={"few_shot_ppl": ppl}) for f, ppl in pairs]
    tau = calibrate_tau(records, Criterion("few_shot_base", keep_rate=0.5))
    assert tau is not None
    assert sum(f < tau <= ppl for f, ppl in pairs) == 2


def test_calibration_counts_the_eos_where_the_criterion_does() -> None:
    records = [
        candidate(response(-math.log(ppl), eos=-3 * math.log(ppl)), response(-3.0, eos=-3.0))
        for ppl in (1.1, 1.2, 1.4, 1.8)
    ]
    tau = calibrate_tau(records, Criterion("ppl_diff", keep_rate=0.5, count_eos=True))
    assert tau == pytest.approx(1.4**2)  # (1 + 3) / 2 times the log


def test_a_label_tells_all_that_decides() -> None:
    assert Criterion().label() == "ppl_diff-tau1.5"
    assert Criterion(count_eos=True).label() == "ppl_diff-tau1.5-eos"
