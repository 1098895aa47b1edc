"""A study file: which transfers are compared, and on what they differ."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from tuneshift.sections.base import PathText, Section, from_folder
from tuneshift.sections.synthesis import CriterionSection, name_alone

NAME = re.compile(r"^\w[\w.-]*$")
COLUMNS = (
    "replicate", "arm", "criterion", "candidates", "pairs", "steps", "correct", "n", "accuracy", "training", "reason",
    "questions", "chance", "item", "synthesis_seconds", "training_seconds",
)  # fmt: skip
"""Columns of a study's tables; an axis is a column too and needs another name."""
MODELS = ("target before", "base", "source")
"""The untrained models that every cell's table shows beside its arms."""
SEEDS = "seeds"
"""In place of a file of pairs: the configuration's seeds with their responses."""


def _file_or_seeds(value: str, info: ValidationInfo) -> str:
    return value if value == SEEDS else from_folder(value, info)


def _seeds_alone(value: Any) -> Any:
    """Turn a list of run seeds into named replicates."""
    if not isinstance(value, list):
        return value
    if not all(type(seed) is int and seed >= 0 for seed in value) or len(set(value)) < len(value):
        raise ValueError("expected different run seeds, whole numbers from 0 up, or a mapping of names to settings")
    return {str(seed): {"run": {"seed": seed}} for seed in value}


class ArmSection(Section):
    """An arm: what a target is trained on. Exactly one of the three; `{axis}` in a path stands for the cell's level."""

    criterion: Annotated[CriterionSection, BeforeValidator(name_alone)] | None = Field(
        None,
        description="A rule by name, or its settings, laid over the configuration's: `size` of the candidates that it "
        "keeps, drawn by a hash of their ids. `random` draws of all that are usable, as `none` does.",
    )
    best: bool = Field(
        False, description="Take the `size` candidates that a graded criterion ranks highest, whatever its threshold."
    )
    select: Literal["random", "balanced"] = Field(
        "random",
        description="How the `size` candidates are chosen among those that the rule keeps: by a hash of their ids, or "
        "as `synthesis.select: balanced` does. `synthesis.select` itself chooses nothing in a study.",
    )
    pairs: Annotated[str, AfterValidator(_file_or_seeds)] | None = Field(
        None,
        description='JSONL with {"prompt": ..., "response": ...} a line: `size` of these are drawn, by the run\'s '
        "seed. `seeds`: the configuration's seeds, all of them, however many.",
    )
    prompts: PathText | None = Field(
        None, description='JSONL with {"prompt": ...} a line: F answers `size` of these, drawn by the run\'s seed.'
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ArmSection:
        if sum(origin is not None for origin in (self.criterion, self.pairs, self.prompts)) != 1:
            raise ValueError("give exactly one of `criterion`, `pairs` and `prompts`")
        if self.best and self.criterion is None:
            raise ValueError("`best` ranks by a `criterion`, and none is given")
        if self.select == "balanced" and (self.criterion is None or self.best):
            raise ValueError("`select: balanced` chooses among what a `criterion` keeps, without `best`")
        return self


class StudySection(Section):
    """A grid of comparisons: each cell's candidates are made once a replicate, and every arm chooses among them."""

    config: PathText = Field(description="The configuration that all cells start from; it needs an `evaluation`.")
    axes: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict,
        description="What cells differ in: names of levels, each with the settings that it lays over `config`. Every "
        "combination of levels is a cell; none: there is one.",
    )
    replicates: Annotated[dict[str, dict[str, Any]], BeforeValidator(_seeds_alone)] = Field(
        default_factory=lambda: {"0": {"run": {"seed": 0}}},
        min_length=1,
        description="How often each cell is done: a list of run seeds, or names with settings.",
    )
    candidates: int = Field(ge=1, description="Candidates that F answers in each cell and replicate, for all arms.")
    size: int = Field(ge=1, description="Pairs that every arm trains on; an arm that has fewer is not trained.")
    arms: dict[str, ArmSection] = Field(min_length=1, description="What is compared, by names.")
    reference: str = Field(description="The arm with which every other is compared.")

    @model_validator(mode="after")
    def _names_fit(self) -> StudySection:
        names = [
            *self.axes,
            *self.replicates,
            *self.arms,
            *(level for levels in self.axes.values() for level in levels),
        ]
        wrong = [name for name in names if not NAME.match(name)]
        if wrong:
            raise ValueError(f"the name {wrong[0]!r} has other characters than letters, digits, `_`, `-` and `.`")
        taken = [name for name in self.axes if name in COLUMNS] + [name for name in self.arms if name in MODELS]
        if taken:
            raise ValueError(f"the name {taken[0]!r} is that of a column or row of the study's tables; take another")
        empty = [axis for axis, levels in self.axes.items() if not levels]
        if empty:
            raise ValueError(f"the axis {empty[0]!r} has no level")
        if self.reference not in self.arms:
            raise ValueError(f"`reference` is {self.reference!r}, but the arms are {', '.join(self.arms)}")
        return self
