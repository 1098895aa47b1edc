"""Programming exercises: a response is right where its program returns what every test expects.

The program runs in the sandbox and is given the tests' arguments; the expected values stay here, where the values that
came back are compared with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuneshift.plain import canonical, encode
from tuneshift.sandbox import Call, Result

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
