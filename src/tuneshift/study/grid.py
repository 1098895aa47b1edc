"""From a study file to its units: every combination of levels, once for each replicate, checked before anything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tuneshift.config import LoadedConfig, check_config, load_config, validate
from tuneshift.configfile import lay_over, read_mapping
from tuneshift.criteria import RULES
from tuneshift.datafiles import read_pairs, read_prompts
from tuneshift.dataset import Selection
from tuneshift.distill import Pair
from tuneshift.errors import ConfigError
from tuneshift.evaluate.evidence import Questions
from tuneshift.preflight import Inputs, check_criterion, read_inputs
from tuneshift.prompts.parsing import extract_text
from tuneshift.prompts.screening import normalize
from tuneshift.sections.study import SEEDS, StudySection
from tuneshift.wiring import evaluation_questions


def cell_name(levels: Mapping[str, str]) -> str:
    """Return the name of the cell of these levels, by axis."""
    return ",".join(f"{axis}={level}" for axis, level in levels.items()) or "all"


def unit_label(levels: Mapping[str, str], replicate: str) -> str:
    """Return the name of a unit, for people."""
    return f"{cell_name(levels)}, replicate {replicate}"


@dataclass(frozen=True)
class Arm:
    """What one target of a unit is trained on.

    Exactly one is set: `criterion` is the unit's configuration under the arm's rule, which with `best` ranks, and
    `select` tells how to choose among what it keeps; `pairs` are given ones, of which `size` are drawn, or all where
    `size` is `None`; `prompts` are those that F has to answer.
    """

    name: str
    size: int | None
    criterion: LoadedConfig | None = None
    best: bool = False
    select: Selection = "random"
    pairs: Sequence[Pair] | None = None
    prompts: Sequence[str] | None = None


@dataclass(frozen=True)
class Unit:
    """One replicate of one cell: a run's configuration and inputs, and the arms that share its candidates.

    `levels` are the cell's, by axis; `candidates` is how many F answers, and rules decide upon.
    """

    levels: Mapping[str, str]
    replicate: str
    loaded: LoadedConfig
    inputs: Inputs
    arms: Sequence[Arm]
    candidates: int

    @property
    def cell(self) -> str:
        """The cell's name, also that of its folder."""
        return cell_name(self.levels)

    @cached_property
    def questions(self) -> Questions:
        """What the models of the unit are asked."""
        questions = evaluation_questions(self.loaded, self.inputs)
        assert questions is not None  # a study without is refused
        return questions

    @property
    def label(self) -> str:
        """The unit's name, for people."""
        return unit_label(self.levels, self.replicate)


@dataclass(frozen=True)
class Study:
    """A checked study file; `raw` is the mapping as written."""

    path: Path
    raw: dict[str, Any]
    section: StudySection
    units: Sequence[Unit]

    @property
    def name(self) -> str:
        """The study's name, that of its file."""
        return self.path.stem

    @property
    def folder(self) -> Path:
        """Where the file's relative paths start."""
        return self.path.resolve().parent

    def cells(self) -> dict[str, list[Unit]]:
        """Return the units of each cell, in the order of the file."""
        cells: dict[str, list[Unit]] = {}
        for unit in self.units:
            cells.setdefault(unit.cell, []).append(unit)
        return cells


def load_study(path: Path) -> Study:
    """Read a study file, and check every configuration and file that it names.

    Raises:
        UserError: the first thing that is wrong; a wrong setting is named with its cell and replicate.
    """
    raw, folder = read_mapping(path), path.resolve().parent
    section = validate(StudySection, raw, folder=folder, shown_as=str(path))
    base = load_config(Path(section.config))
    levels = [[(axis, level) for level in section.axes[axis]] for axis in section.axes]
    units = []
    for combination, replicate in itertools.product(itertools.product(*levels), section.replicates):
        settings = [section.axes[axis][level] for axis, level in combination]
        settings += [section.replicates[replicate], _synthesis(section.candidates)]
        merged: dict[str, Any] = base.raw
        for one in settings:
            merged = lay_over(merged, one)
        units.append(_unit(path, section, base, merged, dict(combination), replicate))
    study = Study(path, raw, section, units)
    for cell, members in study.cells().items():
        if len({unit.questions.fingerprint() for unit in members}) > 1:
            raise ConfigError(
                f"{path}: {cell}: its replicates ask different questions, but answers to the same ones are compared. "
                "Let an axis set `evaluation`, not a replicate."
            )
    return study


def _synthesis(candidates: int) -> dict[str, Any]:
    """Return the settings with which F answers `candidates` ones, whatever is kept.

    No other limit is met before, unless rounds bring nothing new or a file of prompts is used up. `oversample` and
    `select` choose nothing in a study, so candidates do not depend on them.
    """
    limits = ("target_size", "max_candidates", "max_rounds", "patience")
    chosen_by_arms = {"oversample": 1, "select": "first"}
    return {"synthesis": {"complete_scores": True, **chosen_by_arms, **dict.fromkeys(limits, candidates)}}


def _unit(
    path: Path,
    section: StudySection,
    base: LoadedConfig,
    raw: Mapping[str, Any],
    levels: Mapping[str, str],
    replicate: str,
) -> Unit:
    label = unit_label(levels, replicate)
    shown_as = f"{path}: {label}"
    loaded = check_config(raw, folder=base.folder, name=f"{path.stem}: {label}", shown_as=shown_as)
    if loaded.config.evaluation is None:
        raise ConfigError(f"{shown_as}: a study compares accuracies. Add an `evaluation` section with data.")
    if loaded.config.evaluation.regression is not None:
        raise ConfigError(f"{shown_as}: a study asks no regression questions. Leave `evaluation.regression` out.")
    inputs = read_inputs(loaded.config, folder=loaded.folder)
    arms = list(_arms(section, loaded, inputs, levels, shown_as))
    return Unit(levels, replicate, loaded, inputs, arms, section.candidates)


def _arms(
    section: StudySection, loaded: LoadedConfig, inputs: Inputs, levels: Mapping[str, str], shown_as: str
) -> Iterator[Arm]:
    held_out, template = inputs.held_out, loaded.config.prompt_template

    def given_away(prompt: str) -> bool:
        return bool(held_out.given_away_by(prompt, extract_text(prompt, template) or prompt))

    for name, arm in section.arms.items():
        if arm.criterion is not None:
            raw = lay_over(loaded.raw, {"criterion": arm.criterion.model_dump(exclude_unset=True)})
            decided = check_config(raw, folder=loaded.folder, name=name, shown_as=f"{shown_as}, arm {name}")
            check_criterion(decided.config, inputs.seeds)
            if arm.best and RULES[decided.config.criterion.name].grade is None:
                graded = ", ".join(rule for rule, one in RULES.items() if one.grade is not None)
                raise ConfigError(f"{shown_as}, arm {name}: `best` needs a criterion that grades: {graded}.")
            yield Arm(name, section.size, criterion=decided, best=arm.best, select=arm.select)
        elif arm.pairs == SEEDS:
            seeds = [Pair(seed.prompt, seed.response) for seed in inputs.seeds if seed.response]
            if len(seeds) < len(inputs.seeds):
                raise ConfigError(
                    f"{shown_as}, arm {name}: {len(inputs.seeds) - len(seeds)} of {len(inputs.seeds)} seeds have no "
                    f"response to learn. Add them in {loaded.config.seeds}, or leave this arm out."
                )
            yield Arm(name, None, pairs=seeds)
        elif arm.pairs is not None:
            given = read_pairs(_in_cell(arm.pairs, levels))
            yield Arm(name, section.size, pairs=[pair for pair in given if not given_away(pair.prompt)])
        else:
            prompts = {normalize(prompt): prompt for prompt in read_prompts(_in_cell(arm.prompts or "", levels), None)}
            free = [prompt for prompt in prompts.values() if not given_away(prompt)]
            yield Arm(name, section.size, prompts=free)


def _in_cell(path: str, levels: Mapping[str, str]) -> Path:
    """Return an arm's path in a cell: `{axis}` stands for the level."""
    for axis, level in levels.items():
        path = path.replace(f"{{{axis}}}", level)
    return Path(path)
