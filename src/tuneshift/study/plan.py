"""What a study consists of, and how much of it is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tuneshift.study.arms import decide_arms, unmeasured_criteria
from tuneshift.study.grid import Arm, Study, Unit
from tuneshift.study.products import Products


def whats_to_do(study: Study, products: Products) -> dict[str, Any]:
    """Return what a study consists of and how much of it is there.

    What an arm chooses is known when its unit's candidates are there, answered and measured: until then it counts as a
    training of its own in `trainings_at_most`. Trainings that no arm asks for any more do not count as done.

    Raises:
        ResumeRefused: the directory holds candidates of another configuration.
    """
    units = study.units
    made = [unit for unit in units if products.synthesized(unit)]
    ready = [replace(unit, arms=[arm for arm in unit.arms if _decidable(unit, arm, products)]) for unit in made]
    decided = decide_arms(ready, products)
    trainings = {trial.training for trial in decided if trial.training is not None}
    done = [one for one in trainings if products.training_directory(one).training.exists()]
    return {
        "study": study.name,
        "directory": str(products.root),
        "cells": list(study.cells()),
        "replicates": list(study.section.replicates),
        "arms": list(study.section.arms),
        "candidates": len(units) * study.section.candidates,
        "syntheses": len(units),
        "syntheses_done": len(made),
        "trainings_at_most": len(trainings) + sum(len(unit.arms) for unit in units) - len(decided),
        "trainings_done": len(done),
        "pairs_per_training": study.section.size,
        "questions": {cell: len(members[0].inputs.items) for cell, members in study.cells().items()},
    }


def _decidable(unit: Unit, arm: Arm, products: Products) -> bool:
    """Tell whether everything is there that an arm of a unit with candidates chooses by."""
    if arm.prompts is not None:
        return products.answered(unit, arm).exists()
    alone = replace(unit, arms=[arm])
    return not any(unmeasured_criteria(alone, products, by_target=by_target) for by_target in (True, False))
