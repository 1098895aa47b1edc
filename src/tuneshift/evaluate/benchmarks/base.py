"""What a benchmark is, how its questions are read, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tuneshift.datafiles import Item, read_objects
from tuneshift.errors import DataError
from tuneshift.models import file_sha256
from tuneshift.sandbox import Sandbox

Grade = Callable[[str, Item], dict[str, bool]]
"""Takes (response, item) and tells by metric whether the response is right."""


class Question(BaseModel):
    """The fields of a benchmark's question, checked; others that a file has are left out."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, asked as lm-evaluation-harness 0.4.13, or for programs EvalPlus 0.3.1, asks it without examples.

    `hub` is its dataset there, and its configuration (`None`: the subtask's name); `None` where a file is needed. `ask`
    turns a question and the subtask into (prompt, reference, fields that grading or the harness's task reads); `bare`
    gives the question's own text, without what the prompt puts around it, and `stem` that without the options, where it
    has some. Of `metrics` the first is the default. `grade` is `None` where the harness alone grades, or where answers
    are programs: `grading` then makes it for some items, and tells which of them cannot be graded, by id with the
    reason. `harness_task` names an item's task in the harness, `None` where this project alone grades. `options` counts
    the answers that an item offers, `None` where it asks for a free answer. Where no subtask is named,
    `default_subtask` is asked (`None`: all).
    """

    hub: tuple[str, str | None] | None
    subtasks: Collection[str]
    question: type[Question]
    ask: Callable[[Any, str | None], tuple[str, str, dict[str, Any]]]
    bare: Callable[[Any], str]
    metrics: tuple[str, ...]
    grade: Grade | None
    stop: tuple[str, ...]
    max_new_tokens: int
    harness_task: Callable[[Item], str] | None
    options: Callable[[Item], int | None]
    grading: Callable[[Sequence[Item], Sandbox], tuple[Grade, dict[str, str]]] | None = None
    default_subtask: str | None = None
    stem: Callable[[Any], str] | None = None

    @property
    def native(self) -> bool:
        """Whether this project grades it, with or without the harness."""
        return self.grade is not None or self.grading is not None


def read_benchmark(name: str, benchmark: Benchmark, *, data: str | None, subtask: str | None) -> tuple[list[Item], str]:
    """Return a benchmark's questions and the sha256 of what they were read from: a file, or with `None` the Hub.

    A file's name may tell the subtask. Of a file with several subjects, `subtask` picks one.

    Raises:
        DataError: the file, a question or the subtask is wrong, or the Hub cannot be reached.
    """
    stem = Path(data).stem if data else None
    part = subtask or (stem if stem in benchmark.subtasks else None)
    rows = read_objects(Path(data)) if data else _hub_rows(benchmark, part)
    items, stems = [], []
    for number, (place, row) in enumerate(rows):
        try:
            question = benchmark.question.model_validate(row)
            prompt, reference, doc = benchmark.ask(question, part)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise DataError(f"{place}: {where}: {problem['msg']}. A question has {_fields(benchmark)}.") from error
        except ValueError as error:
            raise DataError(f"{place}: {error}") from error
        if subtask is None or doc.get("subject", subtask) == subtask:
            bare = (benchmark.bare(question),)
            items.append(Item(f"{part or name}-{number:05d}", place, prompt, reference, doc, bare))
            stems.append(benchmark.stem(question) if benchmark.stem else None)
    if not items:
        of = f" of subtask {subtask}" if subtask else ""
        raise DataError(f"{data or name}: no question{of} here. A question has {_fields(benchmark)}.")
    digest = file_sha256(Path(data)) if data else _digest([asdict(item) for item in items])
    _check_references(benchmark, items)
    return _with_stems(items, stems), digest


def _with_stems(items: Sequence[Item], stems: Sequence[str | None]) -> list[Item]:
    """Return the items, known by their stems too; a stem that several questions share tells none of them."""
    count = Counter(stems)
    return [
        item if stem is None or count[stem] > 1 else replace(item, bare=(*item.bare, stem))
        for item, stem in zip(items, stems, strict=True)
    ]


def split_held_out(items: Sequence[Item], *, fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Return (held out for the evaluation, left for seeds and training), each in the items' order.

    The `fraction` of the different prompts whose sha256 with the seed is smallest is held out, so the split does not
    depend on the order of the items, and equal prompts stay together.

    Raises:
        DataError: one of the parts would be empty.
    """
    ranked = sorted({item.prompt for item in items}, key=lambda prompt: _digest([seed, prompt]))
    held_out = set(ranked[: round(fraction * len(ranked))])
    parts = [item for item in items if item.prompt in held_out], [item for item in items if item.prompt not in held_out]
    if not all(parts):
        raise DataError(
            f"evaluation.held_out: a fraction of {fraction:g} leaves a part of {len(ranked)} questions empty. "
            "Give more questions or another fraction."
        )
    return parts


def chance_level(benchmark: Benchmark, items: Sequence[Item]) -> tuple[float | None, str | None]:
    """Return the expected share right of guessing among each item's options, or `None` and why there is none."""
    options = [benchmark.options(item) for item in items]
    counts = [count for count in options if count]
    if len(counts) < len(options):
        return None, "the answers are free, not chosen from options"
    return fmean(1 / count for count in counts), None


def gradable(
    benchmark: Benchmark, items: Sequence[Item], *, unsafe_no_sandbox: bool
) -> tuple[Grade, list[Item], dict[str, Any]]:
    """Return how answers that are programs are graded, the items that can be, and for the verdict what held them.

    Raises:
        SandboxError: programs cannot be run safely here. DataError: no item can be graded.
    """
    assert benchmark.grading is not None
    sandbox = Sandbox(unsafe=unsafe_no_sandbox)
    grade, left_out = benchmark.grading(items, sandbox)
    asked = [item for item in items if item.id not in left_out]
    if not asked:
        raise DataError(f"{items[0].place}: no question can be graded; this one: {left_out[items[0].id]}.")
    return grade, asked, {"sandbox": sandbox.describe(), "left_out": dict(Counter(left_out.values()))}


def _check_references(benchmark: Benchmark, items: Sequence[Item]) -> None:
    """Refuse questions of which no reference is graded right, as when the subtask is another one's."""
    if benchmark.grade is None:
        return
    metric = benchmark.metrics[0]
    try:
        right = [benchmark.grade(item.reference, item)[metric] for item in items]
    except ValueError as error:
        raise DataError(f"{items[0].place}: {error}") from error
    if not any(right):
        raise DataError(
            f"{items[0].place}: {metric} grades no reference as right, here {items[0].reference!r}, so no answer could "
            "be. Are evaluation.task and evaluation.subtask those of this file?"
        )


def _hub_rows(benchmark: Benchmark, part: str | None) -> list[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    assert benchmark.hub is not None  # the configuration is refused without a file
    path, configuration = benchmark.hub
    name = part or configuration
    try:
        rows = load_dataset(path, name, split="test")
    except Exception as error:  # offline, no such configuration, a proxy's answer: the libraries raise anything
        raise DataError(
            f"{path} ({name}): cannot be read from the Hub ({type(error).__name__}: {error}). Give evaluation.data, a "
            "file with its questions."
        ) from error
    return [(f"{path} ({name}), question {number}", dict(row)) for number, row in enumerate(rows)]


def _fields(benchmark: Benchmark) -> str:
    return ", ".join(f'"{name}"' for name in benchmark.question.model_fields)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
