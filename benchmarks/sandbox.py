"""Claim: in the sandbox a program takes at most twice the time of one in a bare process with the same limits.

    python benchmarks/sandbox.py [--programs 50] [--repeats 5]

Both run the same small programs, one call each, in turn; nearly all of the time is the interpreter's start. Then the
sandbox runs a program for each processor at a time. Prints one JSON document.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

from measure import document, in_turn, ratio, spread

from tuneshift.evaluate.benchmarks.programs import processors
from tuneshift.sandbox import Call, Sandbox

PROGRAM = "def square(x):\n    return x * x\n"


def milliseconds(sandbox: Sandbox, programs: int, at_a_time: int) -> float:
    """Return the time of a program."""
    started = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as pool:
        results = list(pool.map(lambda n: sandbox.run(PROGRAM, [Call("square", [n])]), range(programs)))
    elapsed = time.perf_counter() - started
    assert [result.replies[0].value for result in results] == [n * n for n in range(programs)]
    return 1000 * elapsed / programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    sandbox, bare = Sandbox(), Sandbox(unsafe=True)
    times = in_turn(
        {
            "sandbox": lambda: milliseconds(sandbox, options.programs, 1),
            "bare_process": lambda: milliseconds(bare, options.programs, 1),
            "sandbox_on_all_processors": lambda: milliseconds(sandbox, options.programs, processors()),
        },
        repeats=options.repeats,
    )
    document(
        __doc__.splitlines()[0],
        sandbox=sandbox.describe(),
        programs=options.programs,
        processors=processors(),
        milliseconds_per_program={name: spread(figures) for name, figures in times.items()},
        ratio=ratio(times["sandbox"], times["bare_process"]),
    )


if __name__ == "__main__":
    main()
