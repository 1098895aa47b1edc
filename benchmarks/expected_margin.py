"""Claim: on a task's own prompts the expected margin is entropy drop plus divergence, the paper's eq. 8, as measured.

    python benchmarks/expected_margin.py --task NAME BASE ADAPTER PROMPTS.jsonl [--task ...] [--rows 200]
        [--max-new-tokens 48]

PROMPTS.jsonl holds {"prompt"} lines, of which the first are taken. The source should not have learnt them: of BIG-Bench
Hard they should be the half that `split_held_out` evaluates (docs/evaluation.md). In results/expected_margin.json they
are the other half, originals.jsonl of studies/prepare.py (126 prompts of sports_understanding, where 124 are held out).

F and B answer each once at temperature 1, up to a line break, since the equation speaks of draws; nothing is kept or
trained. Tells each task's mean margin, its two parts and their difference, in nats a token, with standard errors over
prompts. Prints one JSON document.
"""

import argparse
import json
from pathlib import Path

from measure import document

from tuneshift.criteria import Criterion
from tuneshift.engines.base import Decoding, Weights
from tuneshift.engines.options import EngineOptions
from tuneshift.engines.source import open_source
from tuneshift.measuring import Instruments
from tuneshift.models import resolve_model
from tuneshift.report.decomposition import decomposition
from tuneshift.run.records import Candidate

SEED = 0


def answered_and_compared(base: str, adapter: str, prompts: list[str], *, max_new_tokens: int) -> list[Candidate]:
    """Return a candidate for each prompt, with both answers and what `decomposition` reads."""
    weights = Weights(base, resolve_model(base), adapter=adapter)
    source = open_source(weights, engines=EngineOptions(), canary_prompts=prompts[:5])
    decoding = Decoding(max_new_tokens=max_new_tokens, stop=("\n",))
    names = {f"p{number:05d}": prompt for number, prompt in enumerate(prompts)}
    answers = source.answer(names, decoding=decoding, run_seed=SEED)
    candidates = [
        Candidate(name, 0, "", prompt, prompt, kept=False, reason="", y_f=answers[name].y_f, y_b=answers[name].y_b)
        for name, prompt in names.items()
    ]
    instruments = Instruments(lambda: source, lambda: source.engine, [], decoding, run_seed=SEED)
    measured = instruments.measure(candidates, Criterion("kl"))
    source.close()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("NAME", "BASE", "ADAPTER", "PROMPTS")
    parser.add_argument("--task", nargs=4, action="append", required=True, metavar=names, dest="tasks")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()
    results = {}
    for name, base, adapter, path in options.tasks:
        lines = Path(path).read_text(encoding="utf-8").splitlines()[: options.rows]
        prompts = [json.loads(line)["prompt"] for line in lines]
        candidates = answered_and_compared(base, adapter, prompts, max_new_tokens=options.max_new_tokens)
        results[name] = decomposition(candidates, rounds=[])
    document(
        "on a task's own prompts the expected margin is entropy drop plus divergence (paper, eq. 8), as measured",
        temperature=1,
        max_new_tokens=options.max_new_tokens,
        results=results,
    )


if __name__ == "__main__":
    main()
