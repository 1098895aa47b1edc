"""MBPP and MBPP+ as EvalPlus 0.3.1 grades them (Liu et al. 2023, arXiv 2305.01210), without trusting the program.

The questions are those of the user's `MbppPlus.jsonl`. EvalPlus judges in the process that runs the program, which can
forge that. Here the reference solution is run in one sandbox and the model's program in another, on the same inputs,
and the values that came back are compared outside, by EvalPlus' rules: equality, a tolerance for floats, exceptions for
single tasks. What happens to the inputs, and to a response before it is run, is EvalPlus' own code.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pydantic import Field

from tuneshift.datafiles import Item
from tuneshift.errors import ConfigError
from tuneshift.evaluate.benchmarks.base import Benchmark, Grade, Question
from tuneshift.evaluate.benchmarks.programs import MAX_NEW_TOKENS, SPLITS, STOP, Check, failure, processors, split_of
from tuneshift.evaluate.benchmarks.references import reference_replies
from tuneshift.plain import canonical, decode_numbers
from tuneshift.sandbox import Call, Limits, Sandbox

SETS = ("base", "plus")
REFERENCE = Limits(seconds=60.0, processor_seconds=60)  # a guess; EvalPlus gives its reference solutions no limit
LONGEST = 60.0  # seconds; EvalPlus' limit for all inputs of a set, eval/__init__.py
MAX_LINES = 120
"""Lines of a response that are looked at: finding the code in it takes time with their square. A guess."""


class MbppPlusQuestion(Question):
    """A line of `MbppPlus.jsonl`."""

    task_id: str = Field(pattern=r"^Mbpp/\d+$")
    prompt: str = Field(min_length=1)
    entry_point: str = Field(pattern=r"^[A-Za-z_]\w*$")
    canonical_solution: str
    base_input: list[list[Any]] = Field(min_length=1)
    plus_input: list[list[Any]]
    atol: float = Field(ge=0)


@dataclass(frozen=True)
class Truth:
    """What a set's inputs should give, and how long a program may take for them."""

    checks: tuple[Check, ...]
    limits: Limits


def ask(question: MbppPlusQuestion, _: str | None) -> tuple[str, str, dict[str, Any]]:
    """Return EvalPlus' prompt, the reference solution, and what grading needs."""
    split = split_of(int(question.task_id.removeprefix("Mbpp/")))
    reference = question.prompt + question.canonical_solution
    return question.prompt.strip() + "\n", reference, question.model_dump() | {"subject": split}


def sentence(prompt: str) -> str:
    """Return what a prompt, which is a docstring, asks for, without its tests."""
    lines = prompt.strip().strip('"').strip().splitlines()
    return "\n".join(itertools.takewhile(lambda line: not line.startswith("assert "), lines))


def grading(items: Sequence[Item], sandbox: Sandbox) -> tuple[Grade, dict[str, str]]:
    """Return how programs are graded, and which items cannot be, by id with the reason: the references are run first.

    As in EvalPlus, `plus` wants both sets of inputs right, `base` the first.
    """
    with ThreadPoolExecutor(processors()) as pool:
        found = dict(
            zip([item.id for item in items], pool.map(lambda item: truths_of(item, sandbox), items), strict=True)
        )
    truths = {id: truth for id, truth in found.items() if not isinstance(truth, str)}

    def grade(response: str, item: Item) -> dict[str, bool]:
        wrong = failures(sanitized(response, item), truths[item.id], sandbox)
        return {"plus": wrong["base"] is None and wrong["plus"] is None, "base": wrong["base"] is None}

    return grade, {id: f"the reference solution failed: {why}" for id, why in found.items() if isinstance(why, str)}


def truths_of(item: Item, sandbox: Sandbox) -> dict[str, Truth] | str:
    """Return by set what the reference solution gives for its inputs, or why it gives nothing."""
    truths = {}
    for name in SETS:
        truth = _truth(item, name, sandbox)
        if isinstance(truth, str):
            return truth
        truths[name] = truth
    return truths


def failures(program: str, truths: dict[str, Truth], sandbox: Sandbox) -> dict[str, str | None]:
    """Return why a program is wrong on a task, or `None` where it is right, by set; each is judged by itself."""
    return {
        name: failure(sandbox.run(program, [check.call for check in truth.checks], truth.limits), truth.checks)
        for name, truth in truths.items()
    }


def sanitized(response: str, item: Item) -> str:
    """Return the program in a response: what EvalPlus takes for code that the tested function needs."""
    solution = "\n".join((item.prompt + response).split("\n")[:MAX_LINES])
    try:
        return str(_evalplus("sanitize").sanitize(solution, entrypoint=item.doc["entry_point"]))
    except (ValueError, RecursionError):  # half a character, or nested too deeply to be parsed: it cannot run either
        return solution


def _truth(item: Item, name: str, sandbox: Sandbox) -> Truth | str:
    """Return what the reference solution gives for a set's inputs, or why it gives nothing."""
    task = item.doc
    inputs = _evalplus("data.mbpp").mbpp_deserialize_inputs(task["task_id"], task[f"{name}_input"])
    calls = [Call(task["entry_point"], list(arguments)) for arguments in inputs]
    made_from = [importlib.metadata.version("evalplus"), task["task_id"], task["entry_point"], task[f"{name}_input"]]
    replies = reference_replies(item.reference, calls, REFERENCE, sandbox, made_from=made_from)
    if isinstance(replies, str):
        return replies
    config = _evalplus("config")
    least, factor = config.DEFAULT_MIN_TIME_LIMIT, config.DEFAULT_GT_TIME_LIMIT_FACTOR
    seconds = [max(least, factor * reply.seconds) for reply in replies]
    total = min(LONGEST, sum(seconds)) + 1
    try:
        checks = tuple(_checks(task, inputs, [reply.value for reply in replies], seconds))
    except ValueError as error:
        return str(error)
    return Truth(checks, Limits(seconds=total, processor_seconds=round(total) + 1))


def _checks(
    task: dict[str, Any], inputs: Sequence[Sequence[Any]], values: Sequence[Any], seconds: Sequence[float]
) -> Iterator[Check]:
    """Yield a set's checks.

    Raises:
        ValueError: an expected value equals nothing, or is none that can be compared.
    """
    name, atol = task["entry_point"], task["atol"]
    for arguments, expected, limit in zip(inputs, values, seconds, strict=True):
        if atol == 0 and _is_floats(expected):
            atol = 1e-6  # and from here on for the inputs that follow, as in EvalPlus
        right = _either(_exact(name, arguments, expected, atol), expected, atol)
        yield Check(Call(name, list(arguments), seconds=limit), right)


def _either(exact: Callable[[Any], bool], expected: Any, atol: float) -> Callable[[Any], bool]:
    return lambda plain: exact(plain) or (atol != 0 and _all_close(plain, expected, atol))


def _exact(name: str, arguments: Sequence[Any], expected: Any, atol: float) -> Callable[[Any], bool]:
    """Return EvalPlus' test of a returned value without its tolerance of floats (evalplus/eval/__init__.py)."""
    oracle = _evalplus("eval._special_oracle")
    if name in oracle.MBPP_OUTPUT_NOT_NONE_TASKS:
        return lambda plain: (plain if isinstance(plain, bool) else plain is not None) == (expected is not None)
    if name in oracle.MBPP_OUTPUT_SET_EQ_TASKS:
        members = _members(expected)
        return lambda plain: _members(plain) == members
    if name == "are_equivalent":
        return lambda plain: True
    wanted = {canonical(expected)}
    if canonical(expected) not in wanted:
        raise ValueError("it returns NaN or an object that does not cross the wall, which equals nothing")
    if name == "surface_Area":
        area = oracle._surface_Area(*arguments)
        return lambda plain: canonical(plain) in wanted or bool(abs(decode_numbers(plain) - area) <= atol)
    if name == "sum_div":
        wanted.add(canonical(0))
    if name == "digit_distance_nums":
        wanted.add(canonical(oracle._digit_distance_nums(*arguments)))
    return lambda plain: canonical(plain) in wanted


def _all_close(plain: Any, expected: Any, atol: float) -> bool:
    """Compare with numpy, values of the same type and length only; raises what numpy raises."""
    import numpy as np

    if _kind(plain) != _kind(expected):
        return False
    given, wanted = decode_numbers(plain), decode_numbers(expected)
    if isinstance(wanted, list | tuple) and len(given) != len(wanted):
        return False
    with np.errstate(all="ignore"):
        return bool(np.allclose(given, wanted, rtol=1e-07, atol=atol))


def _kind(plain: Any) -> str:
    return next(iter(plain), "dict") if isinstance(plain, dict) else type(plain).__name__


def _is_floats(plain: Any) -> bool:
    """Tell a float, and a list or tuple of nothing but floats."""
    content = plain.get("tuple") if isinstance(plain, dict) else plain
    if isinstance(content, list) and content:
        return all(isinstance(item, float) for item in content)
    return isinstance(plain, float)


def _members(plain: Any) -> set[str]:
    """Return the members of a sequence, set or dictionary, each in its canonical form.

    Raises:
        ValueError: the value has no members.
    """
    if isinstance(plain, dict):
        ((kind, content),) = plain.items()
        if kind == "dict":
            content = [key for key, _ in content]
        elif kind not in ("tuple", "set", "frozenset"):
            raise ValueError(f"a value of the kind {kind!r} has no members")
    elif isinstance(plain, list | str):
        content = plain
    else:
        raise ValueError("a number or None has no members")
    return {canonical(member) for member in content}


def _evalplus(module: str) -> ModuleType:
    """Import a module of EvalPlus.

    Raises:
        ConfigError: EvalPlus is not installed.
    """
    try:
        return importlib.import_module(f"evalplus.{module}")
    except ImportError as error:
        raise ConfigError(
            f"evaluation.task: mbpp_plus needs EvalPlus 0.3.1, which cannot be imported ({error}). Install it with "
            "pip install 'tuneshift[eval]' and pip install --no-deps evalplus==0.3.1."
        ) from error


MBPP_PLUS = Benchmark(
    hub=None,
    subtasks=SPLITS,
    question=MbppPlusQuestion,
    ask=ask,
    bare=lambda question: sentence(question.prompt),
    metrics=("plus", "base"),
    grade=None,
    stop=STOP,
    max_new_tokens=MAX_NEW_TOKENS,
    harness_task=None,
    options=lambda item: None,
    grading=grading,
    default_subtask=SPLITS[0],
)
