"""Claim: the engine's decoding loop is faster than `generate`, and no batch falls off the fast path of the head.

    python benchmarks/decoding.py MODEL_FOLDER [--adapter FOLDER] [--rows 32 128] [--repeats 3]

Both sides decode the same prompts greedily for the same number of tokens, in turn. On CPUs a bf16 head fed with a
non-contiguous slice of frozen weights once took 65 s a call instead of 0.04 s: this is where it would show again.
Prints one JSON document.
"""

import argparse
import json
import statistics
import time

import torch

from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import Decoding
from tuneshift.engines.decoding import left_pad
from tuneshift.engines.hf import HfEngine
from tuneshift.models import LoadOptions, resolve_model
from tuneshift.run.manifest import environment

NEW_TOKENS = 32
PROMPT = "Requests to a voice assistant:\n\n- play some jazz\n- book a table for {}\n- what is the weather in {}\n-"


def ours(engine: HfEngine, prompts: list[list[int]], fine_tuned: bool) -> int:
    decoding = Decoding(temperature=0, max_new_tokens=NEW_TOKENS)
    answers = engine.generate(prompts, seeds=[0] * len(prompts), decoding=decoding, fine_tuned=fine_tuned)
    return sum(len(answer.token_ids) for answer in answers)


def theirs(engine: HfEngine, prompts: list[list[int]], fine_tuned: bool) -> int:
    with engine._weights(fine_tuned) as model:
        ids, mask = left_pad(prompts, engine.tokenizer.pad_token_id, model.device)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return int((out.shape[1] - ids.shape[1]) * len(prompts))


def rate(side, *arguments) -> float:
    started = time.monotonic()
    tokens = side(*arguments)
    return tokens / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    engine = HfEngine.open(resolve_model(options.model), load=LoadOptions())
    if options.adapter:
        engine.attach(options.adapter)
    # No row may end early, or the sides would decode different numbers of tokens.
    engine.eos_ids = frozenset()
    engine._base.generation_config.eos_token_id = None
    results = []
    for rows in options.rows:
        prompts = [encode_prompt(engine.tokenizer, PROMPT.format(n, n)) for n in range(rows)]
        pairs = [
            {
                name: rate(side, engine, prompts, bool(options.adapter))
                for name, side in (("ours", ours), ("generate", theirs))
            }
            for _ in range(options.repeats + 1)
        ][1:]  # the first pair warms up
        results.append(
            {
                "rows": rows,
                "tokens_per_second": {n: statistics.median(p[n] for p in pairs) for n in ("ours", "generate")},
                "ratio": statistics.median(p["ours"] / p["generate"] for p in pairs),
            }
        )
    threads = torch.get_num_threads()
    print(json.dumps({"results": results, "new_tokens": NEW_TOKENS, "threads": threads, "environment": environment()}))


if __name__ == "__main__":
    main()
