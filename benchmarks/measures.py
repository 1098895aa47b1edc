"""Claim: a criterion that only reads costs less than the answers it reads; one that asks again costs what it asks.

    python benchmarks/measures.py BASE ADAPTER TARGET SEEDS.jsonl PAIRS.jsonl [--rows 128] [--max-new-tokens 12]
        [--repeats 3]

PAIRS.jsonl holds {"prompt"} lines; SEEDS.jsonl holds prompts with responses, which `few_shot_base` shows to B. F and B
answer every prompt at temperature 1, up to a line break, then each criterion's pass measures the same candidates, all
in turn. Prints one JSON document; seconds are for all candidates, and each pass is compared with answering, round by
round.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from measure import document, in_turn, ratio, spread

from tuneshift.criteria import Criterion
from tuneshift.datafiles import read_seeds
from tuneshift.engines.base import Decoding, Weights
from tuneshift.engines.opening import open_engine
from tuneshift.engines.options import EngineOptions
from tuneshift.engines.source import open_source
from tuneshift.measuring import PASSES, Instruments
from tuneshift.models import resolve_model
from tuneshift.run.records import Candidate

STOP = "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("target")
    parser.add_argument("seeds", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.pairs.read_text(encoding="utf-8").splitlines()[: options.rows]]
    seeds = read_seeds(options.seeds, None)[:5]
    decoding = Decoding(max_new_tokens=options.max_new_tokens, stop=(STOP,))
    base = Weights(options.base, resolve_model(options.base), adapter=options.adapter)
    source = open_source(base, engines=EngineOptions(), canary_prompts=[seed.prompt for seed in seeds])
    target = open_engine(Weights(options.target, resolve_model(options.target)), EngineOptions())
    prompts = {f"p{number:05d}": row["prompt"] for number, row in enumerate(rows)}

    def answered() -> list[Candidate]:
        answers = source.answer(prompts, decoding=decoding, run_seed=0)
        return [
            Candidate(name, 0, "", prompt, prompt, kept=False, reason="", y_f=answers[name].y_f, y_b=answers[name].y_b)
            for name, prompt in prompts.items()
        ]

    candidates = answered()
    instruments = Instruments(lambda: source, lambda: target, seeds, decoding, run_seed=0)
    measured = sum(bool(c.measures) for c in instruments.measure(candidates, Criterion("lift")))
    sides = {"answering": partial(timed, answered)}
    for rule in PASSES:
        sides[rule] = partial(timed, partial(instruments.measure, candidates, Criterion(rule)))
    figures = in_turn(sides, repeats=options.repeats)
    document(
        "a criterion that only reads costs less than the answers it reads; one that asks again costs what it asks",
        candidates=len(candidates),
        measured=measured,
        max_new_tokens=options.max_new_tokens,
        seconds={name: spread(of_name) for name, of_name in figures.items()},
        of_answering={name: ratio(figures[name], figures["answering"]) for name in PASSES},
    )


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
