"""Claim: drawing examples, choosing pairs and telling coverage cost below 5 % of the synthesis of 10,000 candidates.

    python benchmarks/steering.py LEDGER.sqlite [--candidates 10000] [--repeats 3]

LEDGER.sqlite is a finished synthesis by `preset: tuneshift`. Its kept candidates are repeated until there are as many
as asked for, in rounds of 80, and everything that steering does is done again without a model: before each round the
pool is weighed and 16 calls are planned; at the end half of the candidates are chosen and coverage is told. `as stored`
keeps the responses, `all different` gives every response a kind of its own. The share is of the
time that as many candidates took in the ledger's own rounds. Prints one JSON document.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from measure import document, in_turn, spread

from tuneshift.coverage import coverage, skeleton, thin_out
from tuneshift.datafiles import Seed
from tuneshift.prompts.pool import Steering, make_pool, plan_calls
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate, GeneratorCall, Probe

STEERING = Steering(seed_share=0.5, back_generation=1.0)
CALLS, PER_CALL, DEMOS = 16, 5, 5  # of `preset: tuneshift`


def repeated(kept: Sequence[Candidate], size: int, *, different: bool) -> list[Candidate]:
    """Return `size` candidates under new ids; with `different` no two responses have a word in common."""
    made = []
    for number, candidate in enumerate(islice(cycle(kept), size)):
        assert candidate.y_f is not None
        response = replace(candidate.y_f, text=f" Kind{number}") if different else candidate.y_f
        round_index = number // (CALLS * PER_CALL)
        made.append(replace(candidate, id=f"c{number:06d}", round=round_index, y_f=response))
    return made


def steer(
    candidates: Sequence[Candidate], seeds: Sequence[Seed], probes: Sequence[Probe], call: GeneratorCall
) -> float:
    """Return the seconds of everything that steering does while the candidates come, round by round."""
    skeleton.cache_clear()
    started = time.perf_counter()
    for index in range(candidates[-1].round + 1):
        pool = make_pool(seeds, candidates[: index * CALLS * PER_CALL], STEERING, probes)
        plan_calls(pool, round_index=index, calls=CALLS, demos=DEMOS, run_seed=0, back_generation=1.0)
    chosen = {candidate.id for candidate in thin_out(candidates, len(candidates) // 2, seed=0)}
    coverage([replace(candidate, call_id=call.id) for candidate in candidates], [call], chosen, probes)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with Ledger(options.ledger, read_only=True) as ledger:
        stored, probes = ledger.candidates(), ledger.probes() or []
        seconds = sum(summary.seconds for summary in ledger.rounds())
    kept = [candidate for candidate in stored if candidate.kept]
    first = kept[0]
    assert first.y_f is not None
    seeds = [Seed(f"s{number}", "", first.text, first.prompt, first.y_f.text) for number in range(DEMOS)]
    call = GeneratorCall("r0000-c000", 0, tuple(seed.id for seed in seeds), "", (), (), 0, 0.0, {}, "backward")
    made = {
        name: repeated(kept, options.candidates, different=different)
        for name, different in {"as stored": False, "all different": True}.items()
    }
    sides: dict[str, Callable[[], float]] = {
        name: partial(steer, candidates, seeds, probes, call) for name, candidates in made.items()
    }
    figures = in_turn(sides, repeats=options.repeats)
    synthesis = seconds / len(stored) * options.candidates
    document(
        "drawing examples, choosing pairs and telling coverage cost below 5 % of the synthesis of 10,000 candidates",
        candidates=options.candidates,
        kinds={name: len({c.y_f and skeleton(c.text, c.y_f.text) for c in of}) for name, of in made.items()},
        seconds={name: spread(of_name) for name, of_name in figures.items()},
        synthesis={"candidates": len(stored), "seconds": seconds, "for_as_many": synthesis},
        share={name: spread([figure / synthesis for figure in of_name]) for name, of_name in figures.items()},
    )


if __name__ == "__main__":
    main()
