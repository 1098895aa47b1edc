"""MBPP: short programming exercises with three asserts each (Austin et al. 2021, arXiv 2108.07732).

The questions are those of `mbpp.jsonl`, asked in EvalPlus' form, a docstring with the text and the first assert, and
graded by the file's own asserts. Of `assert call == value`, the call is made inside the sandbox, and the value that it
returns is compared outside. An assert of another form would have to be judged where the program runs, which could forge
it; a question with one is left out and counted.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneshift.datafiles import Item, read_objects
from tuneshift.errors import DataError
from tuneshift.evaluate.programs import Check, equals, failure, program_of
from tuneshift.sandbox import Call, Limits, Sandbox

TEST_SPLIT = (11, 510)  # Austin et al., section 2: 1-10 for prompts, 511-600 validation, 601-974 training
STOP = ("\nif __name__", "\ndef main(", "\nprint(", '\n"""', "\nassert")  # EvalPlus 0.3.1, provider/utility.py
MAX_NEW_TOKENS = 768  # EvalPlus 0.3.1, provider/base.py
LIMITS = Limits(seconds=10.0, processor_seconds=10)
"""Measured: of the 974 reference solutions one takes over 3 s on two loaded cores (task 123), the others far less."""


class MbppQuestion(BaseModel):
    """A line of `mbpp.jsonl`; further fields are left out."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    task_id: int
    text: str = Field(min_length=1)
    code: str
    test_list: list[str] = Field(min_length=1)
    test_setup_code: str = ""


def read_mbpp(path: Path, *, ids: tuple[int, int] = TEST_SPLIT) -> tuple[list[Item], dict[str, int]]:
    """Return the questions with task ids from `ids[0]` to `ids[1]`, and how many were left out, by reason.

    An item's `doc` holds what grading needs: the setup and the asserts.

    Raises:
        DataError: the file or a line is wrong, or no question is left.
    """
    items, left_out = [], Counter[str]()
    for place, row in read_objects(path):
        try:
            question = MbppQuestion.model_validate(row)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            fields = ", ".join(f'"{name}"' for name in MbppQuestion.model_fields)
            raise DataError(f"{place}: {where}: {problem['msg']}. A question has {fields}.") from error
        if not ids[0] <= question.task_id <= ids[1]:
            continue
        if any(_sides(text) is None for text in question.test_list):
            left_out["an assert is not of the form call == value"] += 1
            continue
        prompt = prompt_of(question.text, question.test_list[0])
        doc = {"setup": question.test_setup_code, "asserts": question.test_list}
        items.append(Item(f"mbpp-{question.task_id:05d}", place, prompt, question.code, doc))
    if not items:
        raise DataError(f"{path}: no question with a task_id from {ids[0]} to {ids[1]}, and asserts call == value.")
    return items, dict(left_out)


def prompt_of(text: str, first_assert: str) -> str:
    """Return the prompt in EvalPlus' form."""
    return f'"""\n{text.strip()}\n{first_assert.strip()}\n"""\n'


def grade_mbpp(response: str, item: Item, sandbox: Sandbox) -> str | None:
    """Return why a response is wrong, or `None` where its program passes every assert."""
    checks = [_check(text) for text in item.doc["asserts"]]
    program = f"{program_of(response)}\n{item.doc['setup']}"
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
