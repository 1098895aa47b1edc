"""Programming exercises: a response is right where its program returns what every test expects.

The program runs in the sandbox and is given the tests' arguments; the expected values stay here, where the values that
came back are compared with them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuneshift.plain import canonical, encode
from tuneshift.sandbox import Call, Result

SPLITS = ("test", "validation", "train", "prompt")
"""MBPP's, the one that is asked by default first."""
STOP = ("\nif __name__", "\ndef main(", "\nprint(", '\n"""', "\nassert")
"""What ends a program: EvalPlus 0.3.1, provider/utility.py, but for the special tokens, which end a response anyway."""
MAX_NEW_TOKENS = 768  # EvalPlus 0.3.1, provider/base.py

FENCED = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
"""A block of code in Markdown, as chat models write it."""


@dataclass(frozen=True)
class Check:
    """A test: a call, and what tells whether the plain value that came back is right."""

    call: Call
    right: Callable[[Any], bool]


def equals(expected: Any) -> Callable[[Any], bool]:
    """Return what tells whether a plain value equals the expected one, as Python's `==` does."""
    wanted = canonical(encode(expected))
    return lambda plain: canonical(plain) == wanted


def failure(result: Result, checks: Sequence[Check]) -> str | None:
    """Return why a program is wrong, by its first failed check, or `None` where it passes them all."""
    for reply, check in zip(result.replies, checks, strict=False):
        if reply.error is not None:
            return reply.error
        try:
            if not check.right(reply.value):
                return "wrong value"
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
            return "unreadable value"
    return result.error


def program_of(response: str) -> str:
    """Return the program in a response: its first block of code in Markdown, or all of it where there is none."""
    block = FENCED.search(response)
    return block[1] if block else response


def split_of(task_id: int) -> str:
    """Return the split that MBPP's paper puts a task into (section 2)."""
    return "prompt" if task_id < 11 else "test" if task_id < 511 else "validation" if task_id < 601 else "train"


def processors() -> int:
    """Return how many programs may run at a time: one for each processor that this process may use."""
    return len(os.sched_getaffinity(0))
