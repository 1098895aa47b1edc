"""GSM8K: maths word problems with one number as the answer (Cobbe et al. 2021, arXiv 2110.14168).

Prompt, stop strings and both gradings are those of the harness's task `gsm8k`, version 3, with no examples.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tuneshift.datafiles import Item
from tuneshift.evaluate.benchmarks.base import Benchmark, Question
from tuneshift.evaluate.benchmarks.filters import exact_match, extract

STRICT = r"#### (\-?[0-9\.\,]+)"
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


class Gsm8kQuestion(Question):
    """A problem, and its worked answer with "#### number" at the end."""

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)


def ask(question: Gsm8kQuestion, _: str | None) -> tuple[str, str, dict[str, Any]]:
    """Return prompt, reference and the harness's fields.

    Raises:
        ValueError: the answer has no "#### ".
    """
    if "#### " not in question.answer:
        raise ValueError(f'answer: expected "#### " and a number at its end, got {question.answer!r}.')
    return f"Question: {question.question}\nAnswer:", question.answer, question.model_dump()


def grade(response: str, item: Item) -> dict[str, bool]:
    """Grade by the last number (`flexible_extract`) and by the first one behind "#### " (`strict_match`)."""
    found = {"flexible_extract": extract(FLEXIBLE, response, index=-1), "strict_match": extract(STRICT, response)}
    return {metric: exact_match(answer, item.reference, ignored=IGNORED) for metric, answer in found.items()}


GSM8K = Benchmark(
    hub=("openai/gsm8k", "main"),
    subtasks=(),
    question=Gsm8kQuestion,
    ask=ask,
    bare=lambda question: question.question,
    metrics=("flexible_extract", "strict_match"),
    grade=grade,
    stop=("Question:", "</s>", "<|im_end|>"),
    max_new_tokens=256,  # the harness's default, `max_gen_toks`
    harness_task=lambda item: "gsm8k",
    options=lambda item: None,
)
