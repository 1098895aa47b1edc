"""Values as plain data: what crosses the wall of the sandbox, and how two such values compare.

Only the standard library is imported: this file is used on both sides of the wall.

A plain value is what JSON can hold. `None`, booleans, strings, floats, small integers and lists stand for themselves;
everything else is an object with one key, its kind: {"tuple": [...]}, {"set": [...]}, {"frozenset": [...]}, {"dict":
[[key, value], ...]}, {"int": hexadecimal}, {"complex": [real, imaginary]}, {"fraction": [numerator, denominator]},
{"bytes": hexadecimal}.
An object of a subclass is encoded as its builtin class, so what `__eq__` and its like were made to say is not asked.
Any other object is {"other": its class's name}, which equals nothing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from fractions import Fraction
from typing import Any

SMALL = 1 << 53
"""Integers below this stand for themselves: every reader of JSON keeps them exact (RFC 8259, section 6)."""

_fresh = itertools.count()


def encode(value: Any) -> Any:
    """Return a value as plain data.

    Raises:
        RecursionError: it is nested too deeply, or contains itself.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if abs(number) < SMALL else {"int": f"{number:x}"}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, list):
        return [encode(item) for item in list.__iter__(value)]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in tuple.__iter__(value)]}
    if isinstance(value, set | frozenset):
        return {"set" if isinstance(value, set) else "frozenset": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Fraction):
        return {"fraction": [f"{value.numerator:x}", f"{value.denominator:x}"]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    return {"other": type(value).__name__}


def decode(plain: Any) -> Any:
    """Return the value that `encode` was given.

    Only for plain data from our side of the wall: numbers can be chosen so that a set of them takes hours to build.

    Raises:
        ValueError: this is no plain data, or of a class that is not carried.
    """
    return _made(plain, {**_NUMBERS, **_CONTAINERS, "bytes": bytes.fromhex})


def decode_numbers(plain: Any) -> Any:
    """Return numbers, strings, and lists and tuples of them, from either side of the wall.

    Raises:
        ValueError: this is no plain data, or holds something else.
    """
    return _made(plain, {**_NUMBERS, "tuple": tuple})


def canonical(plain: Any) -> str:
    """Return a text that two plain values share where Python's `==` would call the values equal.

    So 1, 1.0 and True are one, a set has no order, and NaN equals nothing. Nothing is hashed but text, whose hash the
    sender cannot foresee, so that hostile data costs no more than n log n.

    Raises:
        ValueError: this is no plain data. RecursionError: it is nested too deeply.
    """
    if plain is None or isinstance(plain, str):
        return json.dumps(plain)
    if isinstance(plain, bool | int):
        return _number(int(plain), 1)
    if isinstance(plain, float):
        return _real(plain)
    if isinstance(plain, list):
        return f"[{','.join(map(canonical, plain))}]"
    kind, content = _parts(plain)
    if kind == "tuple":
        return f"({','.join(map(canonical, content))})"
    if kind in ("set", "frozenset"):
        return "{" + ",".join(sorted({canonical(item) for item in content})) + "}"
    if kind == "dict":
        pairs = {canonical(key): canonical(item) for key, item in content}
        return "{" + ",".join(f"{key}:{pairs[key]}" for key in sorted(pairs)) + "}" if pairs else "{:}"
    if kind == "int":
        return _number(int(content, 16), 1)
    if kind == "fraction":
        return _number(int(content[0], 16), int(content[1], 16))
    if kind == "complex":
        return _real(content[0]) if content[1] == 0 else f"{_real(content[0])}+{_real(content[1])}j"
    if kind == "bytes":
        return f"b{json.dumps(content)}"
    return _nothing_else()


def _real(value: float) -> str:
    if value != value:
        return _nothing_else()
    return str(value) if value in (float("inf"), float("-inf")) else _number(*float(value).as_integer_ratio())


def _number(numerator: int, denominator: int) -> str:
    return f"{numerator:x}/{denominator:x}"


def _nothing_else() -> str:
    return f"?{next(_fresh)}"


def _parts(plain: Any) -> tuple[str, Any]:
    if not isinstance(plain, dict) or len(plain) != 1:
        raise ValueError("expected plain data: a JSON value, or an object with one key, its kind")
    ((kind, content),) = plain.items()
    return kind, content


def _made(plain: Any, kinds: dict[str, Callable[[Any], Any]]) -> Any:
    if plain is None or isinstance(plain, bool | str | int | float):
        return plain
    if isinstance(plain, list):
        return [_made(item, kinds) for item in plain]
    kind, content = _parts(plain)
    if kind not in kinds:
        raise ValueError(f"a value of the kind {kind!r} cannot be made")
    if kind in _CONTAINERS:
        content = [_made(item, kinds) for item in content]
    return kinds[kind](content)


_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "complex": lambda parts: complex(*parts),
    "fraction": lambda parts: Fraction(int(parts[0], 16), int(parts[1], 16)),
}
_CONTAINERS: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}
