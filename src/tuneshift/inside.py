"""What runs inside the sandbox: it executes a program, calls its functions, and reports what they return.

It reads one JSON object from standard input, and writes reports as lines to what standard output was at the start:
first of the program, then one for each call. The program runs in the same process and can say what it likes on the
same channel: nothing that is reported here is believed, see `tuneshift.sandbox`. Only the standard library and `plain`
are imported.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any


def main() -> None:
    """Do the job on standard input, and leave without a farewell: no `atexit`, no `__del__`."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from plain import decode, encode  # type: ignore[import-not-found]

    del sys.path[0]
    job = json.loads(sys.stdin.buffer.read())
    channel = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    for limit, value in job["limits"].items():
        resource.setrlimit(getattr(resource, limit), (value, value))
    token = job["token"]

    def report(act: Callable[[], dict[str, Any]]) -> bool:
        started = time.perf_counter()
        try:
            said = act()
        except BaseException as error:  # noqa: BLE001 - the program may raise anything, SystemExit included
            said = {"error": type(error).__name__}
        said["seconds"] = time.perf_counter() - started
        try:
            line = json.dumps(said)
        except (ValueError, RecursionError) as error:
            line = json.dumps({"error": type(error).__name__, "seconds": said["seconds"]})
        _write(channel, f"{token} {line}\n".encode())
        return "error" not in said

    namespace: dict[str, Any] = {}

    def load() -> dict[str, Any]:
        exec(compile(job["program"], "<program>", "exec"), namespace)
        return {"functions": sum(isinstance(value, types.FunctionType) for value in namespace.values())}

    def call(function: str, arguments: list[Any]) -> dict[str, Any]:
        return {"value": encode(eval(function, namespace)(*arguments))}

    if report(load):
        for function, arguments in job["calls"]:
            report(partial(call, function, decode(arguments)))
    os._exit(0)


def _write(channel: int, data: bytes) -> None:
    while data:
        data = data[os.write(channel, data) :]


if __name__ == "__main__":
    main()
