"""The verdict: did the target improve, by how much, and how sure is that.

`before` is T, `after` is T with the new adapter, `source` is F; all answer the same items greedily, so comparisons are
paired. Improvement is claimed when T after beats T before and the exact McNemar test rejects "no difference".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

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


def shows_improvement(test: McNemar) -> bool:
    """Tell whether the second model beats the first: more right answers, and "no difference" rejected.

    Where there is no difference this happens in at most ALPHA / 2 of all cases.
    """
    return test.only_second > test.only_first and test.p_value < ALPHA


def judge(
    *, before: Sequence[Outcome], after: Sequence[Outcome], source: Sequence[Outcome], seed: int = 0
) -> dict[str, Any]:
    """Return the statistical part of `verdict.json`; every rate carries its n and a 95 % Wilson interval."""
    flags = {name: [o.correct for o in arm] for name, arm in _arms(before, after, source).items()}
    test = mcnemar_exact(flags["before"], flags["after"])
    gain = paired_difference(flags["before"], flags["after"], seed=seed)
    recovered = recovery(flags["before"], flags["after"], flags["source"], seed=seed)
    n = len(before)
    discordant = (test.only_first + test.only_second) / n
    return {
        **{name: _rate(arm) for name, arm in _arms(before, after, source).items()},
        "improved": shows_improvement(test),
        "difference": gain.difference,
        "difference_interval": asdict(gain.interval),
        "mcnemar_p": test.p_value,
        "gained_items": test.only_second,
        "lost_items": test.only_first,
        "source_right_after_wrong": sum(f and not t for f, t in zip(flags["source"], flags["after"], strict=True)),
        "recovery": recovered.ratio,
        "recovery_interval": asdict(recovered.interval) if recovered.interval else None,
        "recovery_reason": recovered.reason,
        "minimum_detectable_difference": minimum_detectable_difference(n, discordant) if discordant else None,
    }


def sentence(verdict: dict[str, Any]) -> str:
    """Return the verdict as one plain sentence."""
    if verdict["improved"] is None:
        return str(verdict["reason"])
    before, after = verdict["before"], verdict["after"]
    change = f"from {before['correct']} to {after['correct']} of {after['n']} items right (exact McNemar p = " + (
        f"{verdict['mcnemar_p']:.2g})"
    )
    if not verdict["improved"]:
        return f"No improvement shown: the target went {change}."
    if verdict["recovery"] is None:
        return f"The target improved {change}; recovery is undefined: {verdict['recovery_reason']}."
    share = f"{verdict['recovery']:.0%} of the distance to the fine-tuned source"
    return f"The target improved {change}, which recovers {share}."


def _arms(
    before: Sequence[Outcome], after: Sequence[Outcome], source: Sequence[Outcome]
) -> dict[str, Sequence[Outcome]]:
    return {"before": before, "after": after, "source": source}


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
