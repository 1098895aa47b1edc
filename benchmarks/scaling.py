"""Claim: two workers of one thread each answer and score nearly twice the candidates a second of one process.

    python benchmarks/scaling.py BASE ADAPTER PROMPTS.jsonl ... [--rows 320] [--batch-size 40] [--repeats 5]

PROMPTS.jsonl holds {"prompt"} lines. F and B answer every prompt, and F scores the answers: the work of a run's round.
Sides, in turn over the same prompts: this process without Ray, and two workers, with one thread each. Opening and a
first batch, which warms up, are not timed. The answers are compared. Needs two idle cores. Prints one JSON document;
`efficiency` is the rate of two over twice the rate of one.
"""

import argparse
import json
import time
from pathlib import Path

from measure import document, in_turn, spread

from tuneshift.engines.base import Decoding, Weights
from tuneshift.engines.options import EngineOptions
from tuneshift.engines.source import open_source
from tuneshift.models import resolve_model

WORKERS = (1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("prompts", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    lines = [line for path in options.prompts for line in path.read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in lines][: options.rows]
    asked = {str(number): prompt for number, prompt in enumerate(prompts)}
    decoding = Decoding(temperature=1, max_new_tokens=options.max_new_tokens, stop=("\n",))
    weights = Weights(options.base, resolve_model(options.base), options.adapter)
    answers = {}

    def rate(workers: int) -> float:
        engines = EngineOptions(batch_size=options.batch_size, workers=workers, threads=1)
        source = open_source(weights, engines=engines, canary_prompts=prompts[:2])
        try:
            source.answer(dict(list(asked.items())[: options.batch_size]), decoding=decoding, run_seed=0)  # warms up
            started = time.perf_counter()
            answers[workers] = source.answer(asked, decoding=decoding, run_seed=0)
            return len(asked) / (time.perf_counter() - started)
        finally:
            source.close()

    rates = in_turn(
        {str(workers): lambda workers=workers: rate(workers) for workers in WORKERS}, repeats=options.repeats
    )
    one, two = rates["1"], rates["2"]
    document(
        __doc__.splitlines()[0],
        base=Path(options.base).name,
        candidates=len(asked),
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        candidates_per_second={workers: spread(figures) for workers, figures in rates.items()},
        ratio={"efficiency": spread([b / (2 * a) for a, b in zip(one, two, strict=True)])},
        same_answers=answers[1] == answers[2],
    )


if __name__ == "__main__":
    main()
