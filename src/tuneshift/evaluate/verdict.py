"""The verdict: did the target improve, by how much, and how sure is that.

`before` is T, `after` is T with the new adapter, `source` is F and `base` is B; all answer the same items greedily, so
comparisons are paired. Improvement is claimed when T after beats T before and the exact McNemar test rejects
"no difference". It is a claim about this adapter: what another training would give takes several seeds
(`tuneshift.evaluate.seeds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tuneshift.evaluate.noninferiority import non_inferior
from tuneshift.evaluate.stats import (
    McNemar,
    Proportion,
    mcnemar_exact,
    minimum_detectable_difference,
    paired_difference,
    recovery,
)
from tuneshift.evaluate.tasks import Outcome

ALPHA = 0.05  # the conventional level of a two-sided test
ARMS = {
    "base": "Source's base",
    "source": "Source, fine-tuned",
    "before": "Target before",
    "after": "Target after",
}
"""The models that answer: their names in `verdict.json`, and what reports call them, in the order of their tables."""
DISCORDANT = (0.2, 0.5)  # shares of answers that the training changes, to tell what a run could show. A guess


def shows_improvement(test: McNemar) -> bool:
    """Tell whether the second model beats the first: more right answers, and "no difference" rejected.

    Where there is no difference this happens in at most ALPHA / 2 of all cases.
    """
    return test.only_second > test.only_first and test.p_value < ALPHA


def judge(
    *,
    before: Sequence[Outcome],
    after: Sequence[Outcome],
    source: Sequence[Outcome],
    base: Sequence[Outcome],
    seed: int = 0,
) -> dict[str, Any]:
    """Return the statistical part of `verdict.json`; every rate carries its n and a 95 % Wilson interval."""
    arms = {"before": before, "after": after, "source": source, "base": base}
    flags = {name: _flags(arm) for name, arm in arms.items()}
    test = mcnemar_exact(flags["before"], flags["after"])
    gain = paired_difference(flags["before"], flags["after"], seed=seed)
    recovered = recovery(flags["before"], flags["after"], flags["source"], seed=seed)
    n = len(before)
    smallest, why_none = _smallest_gain(n, (test.only_first + test.only_second) / n)
    flips = {name: _negative_flips(flags[name], flags["after"]) for name in ("before", "source")}
    return {
        **{name: _rate(arm) for name, arm in arms.items()},
        "improved": shows_improvement(test),
        "difference": gain.difference,
        "difference_interval": asdict(gain.interval),
        "mcnemar_p": test.p_value,
        "mcnemar_mid_p": test.mid_p,
        "gained_items": test.only_second,
        "lost_items": test.only_first,
        "negative_flips": flips,
        "recovery": recovered.ratio,
        "recovery_interval": asdict(recovered.interval) if recovered.interval else None,
        "recovery_reason": recovered.reason,
        "minimum_detectable_difference": smallest,
        "minimum_detectable_reason": why_none,
    }


def judge_regression(
    *, before: Sequence[Outcome], after: Sequence[Outcome], margin: float, seed: int = 0
) -> dict[str, Any]:
    """Return the verdict's `regression`: what T lost on other questions, and whether that matters.

    `non_inferior` is true where a loss of `margin` is ruled out (exact test, 95 %), false where the interval of the
    difference shows a larger one, and null, with its reason, where neither is so.
    """
    first, second = _flags(before), _flags(after)
    change = paired_difference(first, second, seed=seed)
    test = non_inferior(first, second, margin)
    lost_more = change.interval.high < -margin
    undecided = f"{len(first)} questions do not rule out a loss of {margin * 100:g} points"
    return {
        "before": _rate(before),
        "after": _rate(after),
        "difference": change.difference,
        "difference_interval": asdict(change.interval),
        "negative_flips": _negative_flips(first, second),
        "margin": margin,
        "lower_bound": test.lower_bound,
        "non_inferior": True if test.shown else False if lost_more else None,
        "non_inferior_reason": None if test.shown or lost_more else undecided,
    }


def sentence(verdict: dict[str, Any]) -> str:
    """Return the verdict as one plain sentence, and one more for each thing that takes from it."""
    if verdict["improved"] is None:
        return str(verdict["reason"])
    before, after = verdict["before"], verdict["after"]
    change = f"from {before['correct']} to {after['correct']} of {after['n']} items right (exact McNemar p = " + (
        f"{verdict['mcnemar_p']:.2g})"
    )
    if not verdict["improved"]:
        said = f"No improvement shown: the target went {change}."
    elif verdict["recovery"] is None:
        said = f"The target improved {change}; recovery is undefined: {verdict['recovery_reason']}."
    else:
        said = f"The target improved {change}, which recovers {verdict['recovery']:.0%} of the distance to the "
        said += "fine-tuned source."
    return " ".join([said, *_reservations(verdict)])


def _reservations(verdict: dict[str, Any]) -> list[str]:
    chance, regression = verdict["chance"], verdict["regression"]
    found = []
    if chance is not None and verdict["after"]["interval"]["low"] <= chance:
        found.append(f"It is not shown to be above chance, {chance:.1%}.")
    if regression is not None and regression["non_inferior"] is False:
        lost = points(regression["difference"], regression["after"]["n"])
        margin = f"{regression['margin'] * 100:g} points"
        found.append(f"On the regression questions it lost more than the margin of {margin}: {lost}.")
    return found


def points(difference: float, n: int) -> str:
    """Return a difference of two accuracies on `n` items for people; one of less than an item is 0."""
    if abs(difference) * n < 1 - 1e-9:
        return "0 (below one item)" if difference else "0"
    return f"{difference * 100:+.1f} points"


def points_with_interval(difference: float, interval: dict[str, Any], n: int) -> str:
    """Return the same with its interval, whose ends lie between items."""
    ends = f"{interval['low'] * 100:+.1f} to {interval['high'] * 100:+.1f}"
    return f"{points(difference, n)}, {interval['level'] * 100:g} % interval {ends}"


def detectable_gains(n: int) -> list[dict[str, float | None]]:
    """Return the smallest gain that `n` questions show with 80 % power, by the share of answers that changes.

    A gain is None where it would be larger than that share: then so few questions can show none.
    """
    return [{"discordant": share, "gain": _smallest_gain(n, share)[0]} for share in DISCORDANT]


def _smallest_gain(n: int, discordant: float) -> tuple[float | None, str | None]:
    """Return the smallest gain that `n` questions show at a share of changed answers, or why they can show none."""
    if not discordant:
        return None, "no answer changed"
    gain = minimum_detectable_difference(n, discordant)
    if gain <= discordant:
        return gain, None
    return None, f"where {discordant:.1%} of the answers change, {n} items can show none"


def detectable_sentence(n: int) -> str:
    """Return what `n` questions can show, before they are asked."""
    parts = [
        (f"gains from {found['gain'] * 100:.1f} points up" if found["gain"] else "no gain")
        + f" if {found['discordant']:.0%} of the answers change"
        for found in detectable_gains(n)
    ]
    return f"{n} questions show {', '.join(parts)} (80 % power; how many change is a guess)"


def _flags(outcomes: Sequence[Outcome]) -> list[bool]:
    return [outcome.correct for outcome in outcomes]


def _rate(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return an arm's rate by the verdict's metric, and by every metric where items are graded by several."""
    written = [outcome.finish_reason for outcome in outcomes if outcome.finish_reason is not None]
    metrics = list(outcomes[0].graded)
    return {
        **_proportion([outcome.correct for outcome in outcomes]),
        "hit_length_limit": written.count("length") / len(written) if written else None,
        "by_metric": {metric: _proportion([outcome.graded[metric] for outcome in outcomes]) for metric in metrics},
    }


def _proportion(flags: Sequence[bool]) -> dict[str, Any]:
    rate = Proportion(sum(flags), len(flags))
    return {"correct": rate.correct, "n": rate.n, "accuracy": rate.accuracy, "interval": asdict(rate.interval())}


def _negative_flips(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """Return how many items the first model had right and the second has wrong, among all items."""
    flips = Proportion(sum(a and not b for a, b in zip(first, second, strict=True)), len(first))
    return {
        "items": flips.correct,
        "n": flips.n,
        "rate": flips.accuracy,
        "interval": asdict(flips.interval()),
        "were_right": sum(first),
    }
