"""What a study's replicates say together, from its settings, rows and outcomes alone.

A comparison is paired by item and, over seeds, by replicate. There are four families of them, each with p values
adjusted for itself (Holm): every arm with the reference, every arm with the target before, and between the cells of an
axis that ask the same questions every arm, and every arm's difference from the reference. Cells of an axis that ask
different questions are averaged instead, with intervals and without a test.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuneshift.evaluate.seeds import (
    SeedEstimate,
    SeedTest,
    accuracy_over_seeds,
    difference_over_seeds,
    interaction_over_seeds,
    least_shown,
    mean_difference_over_cells,
    mean_over_cells,
    recovery_over_seeds,
    seed_test,
)
from tuneshift.evaluate.stats import Interval, holm_family
from tuneshift.sections.study import MODELS, SEEDS
from tuneshift.study.grid import cell_name

Row = dict[str, Any]
Answers = dict[str, list[bool]]
"""An arm's outcomes, item by item, by replicate."""
BEFORE, SOURCE = MODELS[0], MODELS[2]


@dataclass(frozen=True)
class Cell:
    """A cell's outcomes by arm; `questions` is the fingerprint of what was asked, `chance` what guessing gets right.

    Both are None where they were not recorded, `chance` also where it is not known. `trainings` and
    `reasons` are each arm's by replicate: what it trained, or why nothing.
    """

    levels: Mapping[str, str]
    questions: str | None
    chance: float | None
    answers: Mapping[str, Answers]
    trainings: Mapping[str, Mapping[str, str]]
    reasons: Mapping[str, Mapping[str, str]]

    @property
    def name(self) -> str:
        """The cell's name."""
        return cell_name(self.levels)


def summarize(settings: Mapping[str, Any], rows: Sequence[Row], outcomes: Sequence[Row]) -> dict[str, Any]:
    """Return what `results.json` says beside its rows.

    `cells` holds each cell's arms, `across` each arm's comparisons between the levels of an axis, `interactions` those
    of its difference from the reference, and `means` the means over the levels of an axis. `settings` is the study file
    as written.
    """
    cells = _cells(settings, rows, outcomes)
    arms, reference = list(settings["arms"]), settings["reference"]
    given = {name: arm.get("prompts") or arm.get("pairs") for name, arm in settings["arms"].items()}
    bounds = [name for name, file in given.items() if file not in (None, SEEDS)]
    summaries = {
        cell.name: {
            "levels": dict(cell.levels),
            "chance": cell.chance,
            "reference": reference,
            "arms": {name: _model(cell, name) for name in MODELS}
            | {name: _arm(cell, name, reference, [SOURCE, *bounds]) for name in arms},
        }
        for cell in cells
    }
    across, interactions = list(_across(settings, cells)), list(_interactions(settings, cells))
    arms_of_all = [arm for found in summaries.values() for arm in found["arms"].values()]
    families = {
        "reference": [arm["difference"] for arm in arms_of_all],
        "target before": [arm["gain"] for arm in arms_of_all],
        "cells": across,
        "interactions": interactions,
    }
    sizes = {name: _adjust(comparisons) for name, comparisons in families.items()}
    return {
        "cells": summaries,
        "across": across,
        "interactions": interactions,
        "means": list(_means(settings, cells)),
        "families": sizes,
    }


def shown_arms(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what has arms to show in a figure, by name: the cells and the means over them."""
    return {**results["cells"], **{mean["name"]: mean for mean in results["means"]}}


def _cells(settings: Mapping[str, Any], rows: Sequence[Row], outcomes: Sequence[Row]) -> list[Cell]:
    """Return the cells in the order of the rows."""
    axes = list(settings.get("axes") or {})

    def place(row: Row) -> tuple[str, ...]:
        return tuple(row[axis] for axis in axes)

    answers: dict[tuple[str, ...], dict[str, Answers]] = {}
    for one in outcomes:
        arms = answers.setdefault(place(one), {})
        arms.setdefault(one["arm"], {}).setdefault(one["replicate"], []).append(one["correct"])
    cells = []
    for levels, group in itertools.groupby(rows, key=place):
        own = list(group)
        by_arm: dict[str, dict[str, dict[str, str]]] = {"training": {}, "reason": {}}
        for row, column in itertools.product(own, by_arm):
            if row[column] is not None:
                by_arm[column].setdefault(row["arm"], {})[row["replicate"]] = row[column]
        named = dict(zip(axes, levels, strict=True))
        asked = own[0].get("questions"), own[0].get("chance")
        cells.append(Cell(named, *asked, answers[levels], by_arm["training"], by_arm["reason"]))
    return cells


def _adjust(comparisons: Sequence[Row | None]) -> int:
    """Add `p_holm` to the comparisons of a family, and return how many were made."""
    made = dict(enumerate(one for one in comparisons if one is not None))
    for place, adjusted in holm_family({place: one["p"] for place, one in made.items()}).items():
        made[place]["p_holm"] = adjusted
    return sum(one["p"] is not None for one in made.values())


# --- one cell ---


def _model(cell: Cell, name: str) -> Row:
    """Return an untrained model's summary; one that answers alike in every replicate was measured once."""
    seeds = _different(cell.answers[name])
    return {**_accuracy(seeds), "gain": None, "difference": None, "recovery": None, "reason": None}


def _different(answers: Answers) -> list[list[bool]]:
    seeds = list(answers.values())
    return seeds[:1] if all(seed == seeds[0] for seed in seeds) else seeds


def _arm(cell: Cell, name: str, reference: str, bounds: Sequence[str]) -> Row:
    """Return an arm's summary; what has no value is None, with the `reason` for an arm that was not trained."""
    own = cell.answers.get(name, {})
    reason = "; ".join(f"replicate {one}: {why}" for one, why in cell.reasons.get(name, {}).items()) or None
    if not own:
        unknown = dict.fromkeys(("items", "accuracy", "interval", "seed_sd", "gain", "difference", "recovery"))
        return {"seeds": 0, **unknown, "reason": reason}
    return {
        **_accuracy(list(own.values())),
        "gain": _compared(cell, BEFORE, cell, name),
        "difference": None if name == reference else _compared(cell, reference, cell, name),
        "recovery": {
            bound: _recovery(cell.answers[BEFORE], own, cell.answers.get(bound, {}))
            for bound in bounds
            if bound != name
        },
        "reason": reason,
    }


def _accuracy(seeds: Sequence[Sequence[bool]]) -> Row:
    found = accuracy_over_seeds(_array(seeds))
    return {"seeds": found.seeds, "items": found.items, **_mean(found)}


def _mean(found: SeedEstimate) -> Row:
    return {"accuracy": found.value, "interval": _ends(found.interval), "seed_sd": found.seed_sd}


NOT_COMPARED = dict.fromkeys(("value", "interval", "seeds", "items", "seed_sd", "item_se", "p", "p_items"))
SAME_TRAININGS = {**NOT_COMPARED, "reason": "both train the same targets"}


def _compared(first: Cell, arm: str, second: Cell, other: str) -> Row | None:
    """Return `other` of the second cell less `arm` of the first, tested, over the replicates that both have.

    None where they share none, and without a value where all share their trainings. `alike` counts the replicates that
    do: there the difference is 0 since the pairs are the same, and was not measured. `least_shown` is the difference
    from which on p alone, without the adjustment, would have been below 0.05; None where some are alike.
    """
    before, after = first.answers.get(arm, {}), second.answers.get(other, {})
    both = [replicate for replicate in after if replicate in before]
    if not both:
        return None
    alike = sum(_same(first, arm, second, other, replicate) for replicate in both)
    if alike == len(both):
        return SAME_TRAININGS | {"alike": alike}
    arms = _array([before[each] for each in both]), _array([after[each] for each in both])
    found = difference_over_seeds(*arms)
    return {
        **_difference(found),
        **_tested(seed_test(*arms)),
        "alike": alike,
        "least_shown": least_shown(found) if alike == 0 else None,
    }


def _same(first: Cell, arm: str, second: Cell, other: str, replicate: str) -> bool:
    """Tell whether two arms share their training in a replicate."""
    training = first.trainings.get(arm, {}).get(replicate)
    return training is not None and training == second.trainings.get(other, {}).get(replicate)


def _tested(test: SeedTest) -> Row:
    return {"p": test.p_value, "p_items": test.p_items, "reason": test.reason}


def _difference(found: SeedEstimate) -> Row:
    return {
        "value": found.value,
        "interval": _ends(found.interval),
        "seeds": found.seeds,
        "items": found.items,
        "seed_sd": found.seed_sd,
        "item_se": found.item_se,
    }


def _recovery(before: Answers, after: Answers, bound: Answers) -> Row:
    both = [replicate for replicate in after if replicate in bound]
    if not both:
        return {"value": None, "interval": None, "seeds": 0, "reason": "the bound was not trained in these replicates"}
    found = recovery_over_seeds(*(_array([arm[one] for one in both]) for arm in (before, after, bound)))
    ends = None if found.interval is None else _ends(found.interval)
    return {"value": found.ratio, "interval": ends, "seeds": len(both), "reason": found.reason}


# --- between the cells of an axis ---


def _groups(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Iterator[tuple[str, dict[str, str], list[Cell]]]:
    """Yield (axis, the other axes' levels, cells by the axis' levels) for each axis with several levels."""
    for axis, levels in (settings.get("axes") or {}).items():
        groups: dict[tuple[str, ...], list[Cell]] = {}
        for cell in cells:
            groups.setdefault(tuple(level for name, level in cell.levels.items() if name != axis), []).append(cell)
        for group in groups.values() if len(levels) > 1 else ():
            yield axis, {name: level for name, level in group[0].levels.items() if name != axis}, group


def _pairs(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Iterator[tuple[Row, Cell, Cell]]:
    """Yield an axis' first cell with each other that asks the same questions, and what describes the two."""
    for axis, levels, (first, *others) in _groups(settings, cells):
        for other in others:
            if other.questions is not None and other.questions == first.questions:
                described = {"first": first.levels[axis], "level": other.levels[axis]}
                yield {"axis": axis, "levels": levels, **described}, first, other


NOT_TRAINED = {**NOT_COMPARED, "alike": 0, "reason": "no replicate was trained in both"}


def _across(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Iterator[Row]:
    """Yield each arm's comparison of an axis' first cell with the others."""
    for described, first, second in _pairs(settings, cells):
        for name in settings["arms"]:
            yield {**described, "arm": name, **(_compared(first, name, second, name) or NOT_TRAINED)}


def _interactions(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Iterator[Row]:
    """Yield by how much more each arm differs from the reference in the others than in an axis' first cell."""
    reference = settings["reference"]
    for described, first, second in _pairs(settings, cells):
        for name in settings["arms"]:
            if name == reference:
                continue
            four = [cell.answers.get(arm, {}) for cell in (first, second) for arm in (reference, name)]
            both = [replicate for replicate in four[0] if all(replicate in answers for answers in four)]
            compared: Row = NOT_TRAINED
            # Where the arm, or the reference, is the same in both cells, the leads differ by the other alone, which
            # `_across` compares; where arm and reference are the same within both, there is no lead.
            cells_of = ((first, name, second, name), (first, reference, second, reference))
            within = ((first, name, first, reference), (second, name, second, reference))
            alike = sum(
                any(_same(*two, one) for two in cells_of) or all(_same(*two, one) for two in within) for one in both
            )
            if both and alike == len(both):
                compared = SAME_TRAININGS | {"alike": alike}
            elif both:
                a, b, c, d = (_array([answers[one] for one in both]) for answers in four)
                found, test = interaction_over_seeds((a, b), (c, d))
                compared = {**_difference(found), **_tested(test), "alike": alike}
            yield {**described, "arm": name, "reference": reference, **compared}


def _means(settings: Mapping[str, Any], cells: Sequence[Cell]) -> Iterator[Row]:
    """Yield the means over the levels of each axis whose levels all ask different questions."""
    for axis, levels, group in _groups(settings, cells):
        asked = [cell.questions for cell in group]
        if None in asked or len(set(asked)) < len(asked):
            continue
        yield {
            "name": ",".join([f"mean_over_{axis}", *(f"{other}={level}" for other, level in levels.items())]),
            "axis": axis,
            "levels": levels,
            "cells": [cell.name for cell in group],
            "reference": settings["reference"],
            "arms": {name: _model_mean(group, name) for name in MODELS}
            | {name: _arm_mean(group, name, settings["reference"]) for name in settings["arms"]},
        }


def _model_mean(cells: Sequence[Cell], name: str) -> Row:
    seeds = [_different(cell.answers[name]) for cell in cells]
    if any(len(one) > 1 for one in seeds):  # then it differs by replicate in some cell
        return _arm_mean(cells, name, name) | {"gain": None}
    found = mean_over_cells([_array(one) for one in seeds])
    return {"seeds": 1, "items": found.items, **_mean(found), "gain": None, "difference": None, "reason": None}


def _arm_mean(cells: Sequence[Cell], name: str, reference: str) -> Row:
    """Return an arm's mean over cells, of the replicates that it was trained for in all of them."""
    own = _in_all(cells, name)
    if own is None:
        unknown = dict.fromkeys(("items", "accuracy", "interval", "seed_sd", "gain", "difference"))
        return {"seeds": 0, **unknown, "reason": "no replicate was trained in every cell"}
    found = mean_over_cells([_array(list(answers.values())) for answers in own])
    return {
        "seeds": found.seeds,
        "items": found.items,
        **_mean(found),
        "gain": _mean_difference([cell.answers[BEFORE] for cell in cells], own),
        "difference": None if name == reference else _mean_difference(_in_all(cells, reference), own),
        "reason": None,
    }


def _in_all(cells: Sequence[Cell], name: str) -> list[Answers] | None:
    """Return an arm's answers in each cell, of the replicates that all cells have; None where there is none."""
    answers = [cell.answers.get(name, {}) for cell in cells]
    common = [replicate for replicate in answers[0] if all(replicate in one for one in answers)]
    return [{replicate: one[replicate] for replicate in common} for one in answers] if common else None


def _mean_difference(firsts: Sequence[Answers] | None, seconds: Sequence[Answers]) -> Row | None:
    if firsts is None:
        return None
    both = [replicate for replicate in seconds[0] if replicate in firsts[0]]
    if not both:
        return None
    sides = [[_array([answers[one] for one in both]) for answers in cells] for cells in (firsts, seconds)]
    return _difference(mean_difference_over_cells(*sides))


def _array(seeds: Sequence[Sequence[bool]]) -> Any:
    """Return outcomes as an array [seeds, items]."""
    import numpy as np

    return np.array(seeds)


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]
