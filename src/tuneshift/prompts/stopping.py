"""When the synthesis loop ends, and how large its next round is: pure functions of what was counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tuneshift.coverage import in_kinds
from tuneshift.run.records import Candidate, Probe

FEWEST_NEW = 0.1
"""Share of what the generator writes that has to be worth an answer; a guess."""
ANOTHER = "use another generator, or more varied seeds"
WRITTEN = {
    "duplicate": "the generator repeats itself; raise generator.temperature or give more varied seeds",
    "copy of a seed": "the generator repeats the seeds; raise generator.temperature or give more of them",
    "unfinished or unreadable prompt": "the generator's text cannot be read; raise generator.max_new_tokens or use "
    "another generator.kind",
}
"""What to change where most of what the generator wrote was dropped before F was asked, by the reason."""


@dataclass(frozen=True)
class Limits:
    """The loop's limits; see the `synthesis` section of the configuration.

    `target_size` is how many pairs are to be kept: those that are to be learnt, and what `oversample` adds to them.
    `unbalanced` is how many are enough where responses fall into no kinds that could be balanced.
    `max_candidates` counts those that F answered: what is dropped before, such as a duplicate, costs next to nothing.
    `supply` is how many prompts the generator has, `None` where it writes as many as are asked for.
    """

    target_size: int
    max_candidates: int
    max_rounds: int
    patience: int
    supply: int | None = None
    unbalanced: int | None = None


def answered(candidates: Sequence[Candidate]) -> int:
    """Return how many candidates F answered."""
    return sum(candidate.y_f is not None for candidate in candidates)


def stop_reason(
    candidates: Sequence[Candidate], *, rounds: int, limits: Limits, probes: Sequence[Probe] = ()
) -> str | None:
    """Return why the loop ends, or `None` when it goes on."""
    kept = [candidate for candidate in candidates if candidate.kept]
    if len(kept) >= limits.target_size:
        return "target_size reached"
    if limits.unbalanced is not None and len(kept) >= limits.unbalanced and not in_kinds(kept, probes):
        return "target_size reached; hardly two responses are alike, so more would give nothing to balance"
    if answered(candidates) >= limits.max_candidates:
        return "max_candidates reached"
    if limits.supply is not None and len(candidates) >= limits.supply:
        return "generator.prompts used up"
    if rounds >= limits.max_rounds:
        return "max_rounds reached"
    recent = [candidate for candidate in candidates if candidate.round >= rounds - limits.patience]
    if rounds >= limits.patience and not any(candidate.kept for candidate in recent):
        return f"nothing kept in {limits.patience} rounds"
    if limits.supply is None and rounds >= limits.patience and answered(recent) < FEWEST_NEW * len(recent):
        (why, _), *_ = Counter(candidate.reason for candidate in recent if candidate.y_f is None).most_common()
        return f"hardly anything new in {limits.patience} rounds, most often {why}: {WRITTEN.get(why, ANOTHER)}"
    return None


def next_calls(candidates: Sequence[Candidate], *, per_call: int, calls_per_round: int, limits: Limits) -> int:
    """Return how many generator calls the next round makes.

    A full round, but no more than the keep rate so far says are needed, plus a fifth.
    """
    wanted = limits.max_candidates - answered(candidates)
    if limits.supply is not None:
        wanted = min(wanted, limits.supply - len(candidates))
    kept = sum(candidate.kept for candidate in candidates)
    if kept:
        needed = (limits.target_size - kept) / (kept / len(candidates))
        wanted = min(wanted, math.ceil(1.2 * needed))  # a fifth more: a guess that mostly saves a tiny last round
    return max(1, min(calls_per_round, math.ceil(wanted / per_call)))


def diagnosis(candidates: Sequence[Candidate], *, tau: float) -> str:
    """Return what became of the candidates and what to change, for a loop that kept nothing."""
    counts = Counter(candidate.reason for candidate in candidates)
    listed = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    unsure = f"F is not confident: raise criterion.tau (now {tau:g}), or use synthesis.decoding: greedy"
    advice = {
        **dict.fromkeys(("high-high", "high-low", "high-unscored"), unsure),
        "low-low": "F and B agree: the prompts miss what the adapter knows; look at the seeds and at the prompts "
        "with `tuneshift show`",
        "y_f hit max_new_tokens": "responses do not end: set synthesis.stop or raise synthesis.max_new_tokens",
        "empty y_f": "F's responses are empty: check prompt_template and synthesis.stop",
        **WRITTEN,
    }
    main = counts.most_common(1)[0][0] if counts else ""
    return (
        f"{len(candidates)} candidates: {listed or 'none'}. {advice.get(main, 'Look at them with `tuneshift show`')}."
    )
