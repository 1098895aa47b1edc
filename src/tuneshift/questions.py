"""Step 5: from the evaluation's settings to questions that are read, asked and graded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tuneshift.config import Config, LoadedConfig
from tuneshift.datafiles import Item, read_items
from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.evaluate.benchmarks.base import chance_level, gradable, read_benchmark, split_held_out
from tuneshift.evaluate.benchmarks.harness import ask_through_harness, check_harness, harness_version
from tuneshift.evaluate.benchmarks.programs import processors
from tuneshift.evaluate.evidence import Ask, Questions, Regression
from tuneshift.evaluate.tasks import answer_items, find_metric, grade, metric_digest
from tuneshift.models import file_sha256
from tuneshift.sections.evaluation import EvaluationSection, RegressionSection


def read_questions(section: EvaluationSection, *, folder: Path) -> tuple[list[Item], str]:
    """Return the evaluation's items, checked as far as they can be without a model, and the sha256 of their data.

    Raises:
        UserError: the first thing that is wrong.
    """
    benchmark = BENCHMARKS.get(section.task)
    if benchmark is None:
        assert section.data is not None
        items, digest = read_own_questions(section.data, section, folder=folder)
    else:
        items, digest = read_benchmark(section.task, benchmark, data=section.data, subtask=section.subtask_name)
    if section.held_out is not None:
        items, _ = split_held_out(items, fraction=section.held_out.fraction, seed=section.held_out.seed)
    if benchmark is not None and section.harness == "lm_eval":
        check_harness(items, benchmark)
    if benchmark is not None and benchmark.grading is not None:
        gradable(benchmark, items, unsafe_no_sandbox=section.unsafe_no_sandbox)
    return items, digest


def read_own_questions(
    data: str, section: EvaluationSection | RegressionSection, *, folder: Path
) -> tuple[list[Item], str]:
    """Return the items of one's own file, with their metric tried on the first, and the file's sha256.

    Raises:
        UserError: the first thing that is wrong.
    """
    items = read_items(Path(data))
    metric = find_metric(section.metric_name, pattern=section.pattern, folder=folder)
    grade(metric, items[0].reference, items[0])
    return items, file_sha256(Path(data))


def questions_of(loaded: LoadedConfig, items: Sequence[Item], digests: Mapping[str, str]) -> Questions | None:
    """Return the configured questions, `None` where there are none; `digests` are those of `Inputs`."""
    section = loaded.config.evaluation
    if section is None:
        return None
    if section.task == "jsonl":
        return _own_questions(loaded, section, items, digests["evaluation.data"])
    benchmark = BENCHMARKS[section.task]
    limit = answer_limit(loaded.config)
    stop = benchmark.stop if section.stop is None else section.stop
    chance, chance_reason = chance_level(benchmark, items)
    asked, ask, programs = _asked(section, items, limit, stop)
    return Questions(
        items=asked,
        ask=ask,
        described={
            **section.model_dump(include={"task", "data", "pattern"}),
            "subtask": section.subtask_name,
            "sha256": digests["evaluation.data"],
            "harness": f"lm-eval {harness_version()}" if section.harness == "lm_eval" else "native",
            "held_out": section.held_out and section.held_out.model_dump(),
            "metric": section.metric_name,
            "metric_sha256": metric_digest(section.metric_name),
            "max_new_tokens": limit,
            "stop": list(stop),
            **programs,
        },
        chance=chance,
        chance_reason=chance_reason,
    )


def regression_of(loaded: LoadedConfig, items: Sequence[Item], digests: Mapping[str, str]) -> Regression | None:
    """Return the configured regression questions, `None` where there are none; `digests` are those of `Inputs`."""
    section = None if loaded.config.evaluation is None else loaded.config.evaluation.regression
    if section is None:
        return None
    own = _own_questions(loaded, section, items, digests["evaluation.regression.data"])
    return Regression(own, margin=section.margin)


def answer_limit(config: Config, *, regression: bool = False) -> int:
    """Return how many tokens an answer of the evaluation, or of its regression questions, may have."""
    section = config.evaluation
    if section is None or regression or section.task == "jsonl":
        asked = section and section.regression if regression else section
        return (asked and asked.max_new_tokens) or config.synthesis.max_new_tokens
    return section.max_new_tokens or BENCHMARKS[section.task].max_new_tokens


def _own_questions(
    loaded: LoadedConfig, section: EvaluationSection | RegressionSection, items: Sequence[Item], sha256: str
) -> Questions:
    synthesis, name = loaded.config.synthesis, section.metric_name
    stop = synthesis.stop if section.stop is None else section.stop
    limit = section.max_new_tokens or synthesis.max_new_tokens
    metric = find_metric(name, pattern=section.pattern, folder=loaded.folder)

    def grade_all(response: str, item: Item) -> dict[str, bool]:
        return {name: grade(metric, response, item)}

    held_out = section.held_out if isinstance(section, EvaluationSection) else None
    return Questions(
        items=items,
        ask=partial(answer_items, grade=grade_all, metric=name, max_new_tokens=limit, stop=stop),
        described={
            "task": "jsonl",
            "data": section.data,
            "sha256": sha256,
            "held_out": held_out and held_out.model_dump(),
            "metric": name,
            "metric_sha256": metric_digest(name),
            "pattern": section.pattern,
            "max_new_tokens": limit,
            "stop": list(stop),
        },
        chance=None,
        chance_reason="not known of one's own questions",
    )


def _asked(
    section: EvaluationSection, items: Sequence[Item], limit: int, stop: tuple[str, ...]
) -> tuple[Sequence[Item], Ask, dict[str, Any]]:
    """Return which questions of a benchmark are asked, how, and what held answers that are programs."""
    name, benchmark = section.metric_name, BENCHMARKS[section.task]
    if section.harness == "lm_eval":
        return items, partial(ask_through_harness, benchmark=benchmark, metric=name, max_new_tokens=limit), {}
    ask = partial(answer_items, metric=name, max_new_tokens=limit, stop=stop)
    if benchmark.grading is not None:
        grading, graded, programs = gradable(benchmark, items, unsafe_no_sandbox=section.unsafe_no_sandbox)
        return graded, partial(ask, grade=grading, at_a_time=processors()), programs
    assert benchmark.grade is not None  # the settings refuse the others without `lm_eval`
    return items, partial(ask, grade=benchmark.grade), {}
