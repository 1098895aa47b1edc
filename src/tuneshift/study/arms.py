"""What each arm of a unit trains on: a choice among the unit's candidates, or what the user has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tuneshift.criteria import Criterion, decide, decide_all, may_keep, score_of, unmeasured
from tuneshift.dataset import Selection, choose
from tuneshift.distill import Pair, inspect_target
from tuneshift.encoding import Reader
from tuneshift.engines.base import Decoding, derive_seed
from tuneshift.engines.source import Source
from tuneshift.measuring import BY_TARGET
from tuneshift.preflight import objection
from tuneshift.progress import SILENT, Progress
from tuneshift.run.directory import read_jsonl
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate, Probe
from tuneshift.study.grid import Arm, Unit
from tuneshift.study.products import Products
from tuneshift.wiring import criterion_of, criterion_on, training_settings

Drawn = TypeVar("Drawn")
USABLE = Criterion(name="none")


@dataclass(frozen=True)
class Trial:
    """An arm of a unit: the pairs that it trains on, and the training's fingerprint; or the `reason` for none.

    `criterion` names the rule with its thresholds, and `candidates` counts those of the unit; both are `None` for an
    arm that has its pairs from elsewhere.
    """

    unit: Unit
    arm: str
    criterion: str | None
    candidates: int | None
    pairs: Sequence[Pair]
    training: str | None
    reason: str | None


def rule_label(criterion: Criterion, arm: Arm) -> str:
    """Return the name of a rule with its thresholds, as it is used here: `random` draws as many as are wanted."""
    if arm.best:
        return f"best {criterion.name}"
    name = "random" if criterion.name == "random" else criterion.label()
    return name if arm.select == "random" else f"{name}, {arm.select}"


def choose_for_arm(
    candidates: Sequence[Candidate],
    criterion: Criterion,
    size: int,
    *,
    best: bool = False,
    select: Selection = "random",
    probes: Sequence[Probe] = (),
) -> list[Candidate] | str:
    """Return `size` candidates in the order in which they were written, or why there are not as many.

    A rule draws `size` of those that it keeps, by a hash of their ids that is the same for all rules, or chooses them
    as `select` says; with `best` it takes those that it grades highest. All decide upon the same candidates, those that
    both models gave a usable answer to, whether a rule reads B's or not; `random` draws of all of them. So arms differ
    in their rules alone: the first ones kept would also be those of the early rounds.
    """
    candidates = [candidate for candidate in candidates if decide(candidate, replace(criterion, name="none")).kept]
    if best:
        grades = {c.id: grade for c in candidates if (grade := score_of(c, criterion)) is not None}
        if len(grades) < size:
            return f"graded {len(grades)} of {size} wanted"
        ranked = sorted(grades, key=lambda name: (-grades[name], derive_seed(criterion.seed, "draw", name)))
        highest = set(ranked[:size])
        return [candidate for candidate in candidates if candidate.id in highest]
    rule = replace(criterion, name="none") if criterion.name == "random" else criterion
    kept = [candidate for candidate in decide_all(candidates, rule) if candidate.kept]
    if len(kept) < size:
        return f"kept {len(kept)} of {size} wanted"
    return choose(kept, size, select, seed=criterion.seed, probes=probes)


def draw(items: Sequence[Drawn], size: int, seed: int, name: Callable[[Drawn], str]) -> list[Drawn]:
    """Return `size` of the items, drawn by a hash of the seed and their names, in the order given."""
    places = sorted(range(len(items)), key=lambda place: derive_seed(seed, "draw", name(items[place])))[:size]
    return [items[place] for place in sorted(places)]


def given_pairs(pairs: Sequence[Pair], size: int, seed: int) -> list[Pair] | str:
    """Return `size` of the given pairs, or why there are not as many."""
    if len(pairs) < size:
        return f"{len(pairs)} of {size} wanted pairs are in the file"
    return draw(pairs, size, seed, lambda pair: f"{pair.prompt}\x1f{pair.response}")


def answered_pairs(
    source: Source, prompts: Sequence[str], size: int, *, decoding: Decoding, target: Reader, run_seed: int
) -> list[Pair]:
    """Let F answer prompts, drawn by the seed, until `size` answers are usable or no prompt is left.

    What makes an answer usable is what makes a candidate's: it is not empty, ends, and fits into the target.
    """
    readers, room = [source.engine.reader], decoding.max_new_tokens
    fitting = [prompt for prompt in prompts if objection(prompt, readers, room=room) is None]
    left = sorted(fitting, key=lambda prompt: derive_seed(run_seed, "draw", prompt))
    pairs: list[Pair] = []
    while left and len(pairs) < size:
        asked, left = left[: size - len(pairs)], left[size - len(pairs) :]
        answers = source.answer(
            {prompt: prompt for prompt in asked}, decoding=decoding, run_seed=run_seed, worth=lambda y_f: False
        )
        pairs += [
            Pair(prompt, y_f.text)
            for prompt in asked
            if may_keep(y_f := answers[prompt].y_f, USABLE) and target.can_learn(prompt, y_f.text)
        ]
    return pairs


def decide_arms(units: Sequence[Unit], products: Products, progress: Progress = SILENT) -> list[Trial]:
    """Return the trials of all units, in the order of the study file."""
    targets: dict[str, Reader] = {}
    trials = []
    for unit in units:
        target = unit.loaded.config.target.model
        if target not in targets:
            targets[target] = inspect_target(training_settings(unit.loaded))
        with Ledger(products.synthesis(unit).ledger) as ledger:
            candidates = [c for c in ledger.candidates() if c.y_f is not None][: unit.candidates]
            probes = ledger.probes() or ()
        reader = targets[target]
        for arm in unit.arms:
            criterion = None if arm.criterion is None else criterion_on(arm.criterion, candidates)
            if criterion is not None and arm.size is not None:
                chosen = choose_for_arm(
                    candidates, criterion, arm.size, best=arm.best, select=arm.select, probes=probes
                )
                kept = chosen if isinstance(chosen, str) else [Pair(c.prompt, c.y_f.text) for c in chosen if c.y_f]
            else:
                kept = _elsewhere(unit, arm, products, reader, progress)
            pairs, reason = ([], kept) if isinstance(kept, str) else (kept, None)
            trials.append(
                Trial(
                    unit,
                    arm.name,
                    None if criterion is None else rule_label(criterion, arm),
                    None if criterion is None else len(candidates),
                    pairs,
                    None if reason is not None else products.training(unit, pairs),
                    reason,
                )
            )
    return trials


def _elsewhere(unit: Unit, arm: Arm, products: Products, target: Reader, progress: Progress) -> list[Pair] | str:
    """Return the pairs of an arm that does not choose among candidates, or why there are not as many as it wants."""
    if arm.pairs is not None:
        fitting = [pair for pair in arm.pairs if target.can_learn(pair.prompt, pair.response)]
        drawn = given_pairs(fitting, arm.size or len(arm.pairs), unit.loaded.config.run.seed)
        if len(fitting) == len(arm.pairs):
            return drawn
        lost = f"{len(arm.pairs) - len(fitting)} of {len(arm.pairs)} are too long for the target"
        if isinstance(drawn, str):
            return f"{drawn}; {lost}"
        progress.note(f"{unit.label}, arm {arm.name}: of its pairs, {lost} and left out")
        return drawn
    pairs = [Pair(**row) for row in read_jsonl(products.answered(unit, arm))]
    enough = arm.size is not None and len(pairs) == arm.size
    return pairs if enough else f"F answered {len(pairs)} of {arm.size} wanted prompts usably"


def unmeasured_criteria(unit: Unit, products: Products, *, by_target: bool) -> list[Criterion]:
    """Return the criteria of a unit's arms whose measures its candidates lack: those that T takes, or F and B."""
    with Ledger(products.synthesis(unit).ledger) as ledger:
        candidates = ledger.candidates()
    criteria = [criterion_of(arm.criterion) for arm in unit.arms if arm.criterion is not None]
    return [
        criterion
        for criterion in criteria
        if (criterion.name in BY_TARGET) == by_target and unmeasured(candidates, criterion, gated=False)
    ]
