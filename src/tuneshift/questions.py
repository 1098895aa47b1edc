"""From the configuration to questions: reading and checking them, and how they are asked and graded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tuneshift.config import Config, LoadedConfig
from tuneshift.datafiles import Item, read_items
from tuneshift.errors import SandboxError
from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.evaluate.benchmarks.base import chance_level, gradable, read_benchmark, split_held_out
from tuneshift.evaluate.benchmarks.harness import ask_through_harness, check_harness, harness_version
from tuneshift.evaluate.benchmarks.programs import processors
from tuneshift.evaluate.evidence import Ask, Questions
from tuneshift.evaluate.tasks import answer_items, find_metric, grade, metric_digest
from tuneshift.models import file_sha256
from tuneshift.sandbox import no_sandbox
from tuneshift.sections.evaluation import QuestionsSection


def question_sections(config: Config) -> dict[str, QuestionsSection]:
    """Return the sections that name questions, by their place in the configuration."""
    evaluation = config.evaluation
    named = {"evaluation": evaluation, "evaluation.regression": evaluation and evaluation.regression}
    return {name: section for name, section in named.items() if section is not None}


def read_questions(section: QuestionsSection, *, folder: Path, place: str) -> tuple[list[Item], str]:
    """Return a section's items, checked as far as they can be without a model, and the sha256 of their data.

    `place` is where the section stands in the configuration, for messages.

    Raises:
        UserError: the first thing that is wrong.
    """
    benchmark = BENCHMARKS.get(section.task)
    items, digest = read_items_of(section)
    if benchmark is None:
        metric = find_metric(section.metric_name, pattern=section.pattern, folder=folder)
        for response in (items[0].reference, "", "x"):  # a model may say anything
            grade(metric, response, items[0])
    if benchmark is not None and section.harness == "lm_eval":
        check_harness(items, benchmark)
    if benchmark is not None and benchmark.grading is not None:
        if not section.unsafe_no_sandbox and (problem := no_sandbox()) is not None:
            raise SandboxError(
                f"{problem} Or set {place}.unsafe_no_sandbox: true where losing this machine's data would not matter."
            )
        gradable(benchmark, items, unsafe_no_sandbox=section.unsafe_no_sandbox)
    return items, digest


def read_items_of(section: QuestionsSection) -> tuple[list[Item], str]:
    """Return a section's items, unchecked but for their form, and the sha256 of their data; see `read_questions`."""
    benchmark = BENCHMARKS.get(section.task)
    if benchmark is None:
        assert section.data is not None
        items, digest = read_items(Path(section.data)), file_sha256(Path(section.data))
    else:
        items, digest = read_benchmark(section.task, benchmark, data=section.data, subtask=section.subtask_name)
    if section.held_out is not None:
        items, _ = split_held_out(items, fraction=section.held_out.fraction, seed=section.held_out.seed)
    return items, digest


def questions_of(loaded: LoadedConfig, section: QuestionsSection, items: list[Item], sha256: str) -> Questions:
    """Return a section's questions; `items` are read from it, and `sha256` is their data's."""
    benchmark, stop = BENCHMARKS.get(section.task), section.stop
    if stop is None:
        stop = benchmark.stop if benchmark else loaded.config.synthesis.stop
    limit = answer_limit(loaded.config, section)
    chance = chance_level(benchmark, items) if benchmark else (None, "not known of one's own questions")
    asked, ask, programs = _asked(loaded, section, items, limit, stop)
    return Questions(
        items=asked,
        ask=ask,
        described={
            **section.model_dump(include={"task", "data", "pattern"}),
            "subtask": section.subtask_name,
            "sha256": sha256,
            "harness": f"lm-eval {harness_version()}" if section.harness == "lm_eval" else "native",
            "held_out": section.held_out and section.held_out.model_dump(),
            "metric": section.metric_name,
            "metric_sha256": metric_digest(section.metric_name),
            "max_new_tokens": limit,
            "stop": list(stop),
            **programs,
        },
        chance=chance[0],
        chance_reason=chance[1],
    )


def _asked(
    loaded: LoadedConfig, section: QuestionsSection, items: list[Item], limit: int, stop: tuple[str, ...]
) -> tuple[Sequence[Item], Ask, dict[str, Any]]:
    """Return which questions are asked, how they are asked and graded, and what held answers that are programs."""
    name, benchmark = section.metric_name, BENCHMARKS.get(section.task)
    if benchmark is not None and section.harness == "lm_eval":
        return items, partial(ask_through_harness, benchmark=benchmark, metric=name, max_new_tokens=limit), {}
    ask = partial(answer_items, metric=name, max_new_tokens=limit, stop=stop)
    if benchmark is not None and benchmark.grading is not None:
        grading, gradables, programs = gradable(benchmark, items, unsafe_no_sandbox=section.unsafe_no_sandbox)
        return gradables, partial(ask, grade=grading, at_a_time=processors()), programs
    if benchmark is not None and benchmark.grade is not None:
        return items, partial(ask, grade=benchmark.grade), {}
    metric = find_metric(name, pattern=section.pattern, folder=loaded.folder)
    return items, partial(ask, grade=lambda response, item: {name: grade(metric, response, item)}), {}


def answer_limit(config: Config, section: QuestionsSection | None) -> int:
    """Return how many tokens an answer to a section's questions may have; without questions, what synthesis allows."""
    if section is None or section.task == "jsonl":
        return (section and section.max_new_tokens) or config.synthesis.max_new_tokens
    return section.max_new_tokens or BENCHMARKS[section.task].max_new_tokens
