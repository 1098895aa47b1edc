"""MBPP: short programming exercises with three asserts each (Austin et al. 2021, arXiv 2108.07732).

The questions are those of `mbpp.jsonl`, asked in EvalPlus' form, a docstring with the text and the first assert, and
graded by the file's own asserts. Of `assert call == value`, the call is made inside the sandbox, and the value that it
returns is compared outside. An assert of another form would have to be judged where the program runs, which could forge
it; a question with one is left out and counted.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from tuneshift.datafiles import Item
from tuneshift.evaluate.benchmarks.base import Benchmark, Grade, Question
from tuneshift.evaluate.benchmarks.programs import (
    MAX_NEW_TOKENS,
    SPLITS,
    STOP,
    Check,
    equals,
    failure,
    program_of,
    split_of,
)
from tuneshift.sandbox import Call, Limits, Sandbox

LIMITS = Limits(seconds=10.0, processor_seconds=10)
"""Measured: of the 974 reference solutions one takes over 3 s on two loaded cores (task 123), the others far less."""


class MbppQuestion(Question):
    """A line of `mbpp.jsonl`."""

    task_id: int
    text: str = Field(min_length=1)
    code: str
    test_list: list[str] = Field(min_length=1)
    test_setup_code: str = ""


def ask(question: MbppQuestion, _: str | None) -> tuple[str, str, dict[str, Any]]:
    """Return the prompt in EvalPlus' form, the reference solution, and what grading needs."""
    prompt = f'"""\n{question.text.strip()}\n{question.test_list[0].strip()}\n"""\n'
    return prompt, question.code, question.model_dump() | {"subject": split_of(question.task_id)}


def grading(items: Sequence[Item], sandbox: Sandbox) -> tuple[Grade, dict[str, str]]:
    """Return how programs are graded, and which items cannot be, by id with the reason."""
    left_out = {
        item.id: "an assert is not of the form call == value"
        for item in items
        if any(_sides(text) is None for text in item.doc["test_list"])
    }
    return lambda response, item: {"pass_at_1": wrong(response, item, sandbox) is None}, left_out


def wrong(response: str, item: Item, sandbox: Sandbox) -> str | None:
    """Return why a response is wrong, or `None` where its program passes every assert."""
    checks = [_check(text) for text in item.doc["test_list"]]
    program = f"{program_of(response)}\n{item.doc['test_setup_code']}"
    return failure(sandbox.run(program, [check.call for check in checks], LIMITS), checks)


def _check(text: str) -> Check:
    sides = _sides(text)
    assert sides is not None
    call, expected = sides
    return Check(Call(f"lambda: {call}"), equals(expected))


def _sides(text: str) -> tuple[str, Any] | None:
    """Return of `assert call == value` the call's text and the value, and `None` for another form."""
    try:
        (statement,) = ast.parse(text.strip()).body
        if (
            isinstance(statement, ast.Assert)
            and isinstance(statement.test, ast.Compare)
            and [type(operator) for operator in statement.test.ops] == [ast.Eq]
        ):
            return ast.unparse(statement.test.left), ast.literal_eval(statement.test.comparators[0])
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None
    return None


MBPP = Benchmark(
    hub=None,
    subtasks=SPLITS,
    question=MbppQuestion,
    ask=ask,
    bare=lambda question: question.text,
    metrics=("pass_at_1",),
    grade=None,
    stop=STOP,
    max_new_tokens=MAX_NEW_TOKENS,
    harness_task=None,
    options=lambda item: None,
    grading=grading,
    default_subtask=SPLITS[0],
)
