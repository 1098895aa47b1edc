"""Answering held-out items and grading the answers; every outcome is kept, item by item."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tuneshift.datafiles import Item
from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import Completion, Decoding, Engine
from tuneshift.errors import ConfigError, DataError
from tuneshift.models import file_sha256
from tuneshift.prompts.screening import normalize
from tuneshift.run.records import FinishReason

Metric = Callable[[str, str], bool]
"""Takes (response, reference) and tells whether the response is right."""

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Outcome:
    """One item's result in one arm.

    `graded` tells by metric whether the response is right; `correct` is the verdict's metric among them. Where the
    answer is chosen by its likelihood, nothing is generated and `finish_reason` is `None`.
    """

    id: str
    response: str
    correct: bool
    finish_reason: FinishReason | None
    graded: dict[str, bool] = field(default_factory=dict)


def answer_items(
    engine: Engine,
    items: Sequence[Item],
    *,
    fine_tuned: bool,
    grade: Callable[[str, Item], dict[str, bool]],
    metric: str,
    max_new_tokens: int,
    stop: Sequence[str],
    at_a_time: int = 1,
) -> list[Outcome]:
    """Let a model answer every item greedily, and grade; `metric` names the grading that counts.

    `grade` is called from `at_a_time` threads, or from this one.

    Raises:
        DataError: a prompt and its answer do not fit into the model's context.
    """
    answers = complete_items(engine, items, fine_tuned=fine_tuned, max_new_tokens=max_new_tokens, stop=stop)
    texts = [answer.text for answer in answers]
    if at_a_time == 1:
        graded = list(map(grade, texts, items))
    else:
        with ThreadPoolExecutor(at_a_time) as pool:
            graded = list(pool.map(grade, texts, items))
    return [
        Outcome(item.id, answer.text, grades[metric], answer.finish_reason, grades)
        for item, answer, grades in zip(items, answers, graded, strict=True)
    ]


def complete_items(
    engine: Engine, items: Sequence[Item], *, fine_tuned: bool, max_new_tokens: int, stop: Sequence[str]
) -> list[Completion]:
    """Return a model's greedy answer to every item; see `answer_items` for what it raises."""
    decoding = Decoding(temperature=0, max_new_tokens=max_new_tokens, stop=tuple(stop))
    prompts = encode_items(engine, items, room=max_new_tokens)
    return engine.generate(prompts, seeds=[0] * len(items), decoding=decoding, fine_tuned=fine_tuned)


def encode_items(engine: Engine, items: Sequence[Item], *, room: int) -> list[list[int]]:
    """Return each item's token ids, which leave `room` tokens for the answer; see `answer_items` for what it raises."""
    prompts = [encode_prompt(engine.tokenizer, item.prompt) for item in items]
    for item, prompt in zip(items, prompts, strict=True):
        objection = engine.reader.objection(prompt, room=room)
        if objection is not None:
            raise DataError(f"{item.place}: {objection}. Shorten the prompt, or lower evaluation.max_new_tokens.")
    return prompts


def grade(metric: Metric, response: str, item: Item) -> bool:
    """Tell whether a response is right.

    Raises:
        ConfigError: the user's function fails.
    """
    try:
        return bool(metric(response, item.reference))
    except Exception as error:  # the user's function may raise anything
        raise ConfigError(
            f"evaluation.metric: the function raised {type(error).__name__}: {error}, for the response {response!r} "
            f"and the reference of {item.place}. Mend it, and start again."
        ) from error


def find_metric(name: str, *, pattern: str | None = None, folder: Path | None = None) -> Metric:
    """Return the named metric; a dotted path names a Python function, importable or in `folder`.

    Raises:
        ConfigError: there is no such function.
    """
    if name == "exact_match":
        return lambda response, reference: response.strip() == reference.strip()
    if name == "normalized_match":
        return lambda response, reference: normalize(response) == normalize(reference)
    if name == "numeric":
        return lambda response, reference: _last_number(response) == _last_number(reference) is not None
    if name == "regex" and pattern is not None:
        return lambda response, reference: _last_match(pattern, response) == reference.strip()
    module_name, _, function_name = name.rpartition(".")
    if folder is not None and str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(
            f"evaluation.metric: {name!r} cannot be imported ({type(error).__name__}: {error}). Give module.function, "
            "with the module installed or beside the YAML file."
        ) from error
    if not callable(function):
        raise ConfigError(f"evaluation.metric: {name!r} is no function but {type(function).__name__}.")
    metric: Metric = function
    return metric


def metric_digest(name: str) -> str | None:
    """Return the sha256 of the file that a user's own metric was imported from; `None` for one of ours."""
    module = sys.modules.get(name.rpartition(".")[0])
    path = getattr(module, "__file__", None)
    return file_sha256(Path(path)) if path else None


def _last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _last_match(pattern: str, text: str) -> str | None:
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    groups = [group for group in last.groups() if group is not None]  # of alternatives, the one that took part
    return (groups[0] if groups else last.group(0)).strip()
