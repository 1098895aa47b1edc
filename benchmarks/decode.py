"""Claim: the decoding loop is about as fast as `generate` at the same batch, and never off the head's fast path.

    python benchmarks/decode.py MODEL_FOLDER [--adapter FOLDER] [--rows 8 32 64 128] [--repeats 5]

Both sides decode the same prompts greedily for the same number of tokens, in turn. On CPUs a bf16 head fed with a
non-contiguous slice of frozen weights once took 65 s a call instead of 0.04 s: this is where it would show again. The
roof of a step is reading all weights once, at the measured memory bandwidth. Prints one JSON document.
"""

import argparse
import time
from pathlib import Path

from measure import bandwidth, document, in_turn, ratio, spread

from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import Decoding
from tuneshift.engines.decoding import left_pad
from tuneshift.engines.hf import HfEngine
from tuneshift.models import LoadOptions, resolve_model

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
    started = time.perf_counter()
    tokens = side(*arguments)
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    engine = HfEngine.open(resolve_model(options.model), load=LoadOptions())
    if options.adapter:
        engine.attach(options.adapter)
    # No row may end early, or the sides would decode different numbers of tokens.
    engine.eos_ids = frozenset()
    with engine._weights(bool(options.adapter)) as model:
        model.generation_config.eos_token_id = None
        weight_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    results = []
    for rows in options.rows:
        prompts = [encode_prompt(engine.tokenizer, PROMPT.format(n, n)) for n in range(rows)]
        rates = in_turn(
            {
                "ours": lambda prompts=prompts: rate(ours, engine, prompts, bool(options.adapter)),
                "generate": lambda prompts=prompts: rate(theirs, engine, prompts, bool(options.adapter)),
            },
            repeats=options.repeats,
        )
        results.append(
            {
                "rows": rows,
                "tokens_per_second": {name: spread(figures) for name, figures in rates.items()},
                "ratio": ratio(rates["ours"], rates["generate"]),
            }
        )
    medians = {side: max(r["tokens_per_second"][side]["median"] for r in results) for side in ("ours", "generate")}
    read = bandwidth()
    best = max(results, key=lambda r: r["tokens_per_second"]["ours"]["median"])
    document(
        __doc__.splitlines()[0],
        model=Path(options.model).name,
        adapter=bool(options.adapter),
        new_tokens=NEW_TOKENS,
        results=results,
        best_tokens_per_second=medians,
        ratio=medians["ours"] / medians["generate"],
        memory_bytes_per_second=read,
        share_of_bandwidth_at_best=best["tokens_per_second"]["ours"]["median"] / best["rows"] * weight_bytes / read,
        dtype=engine.describe()["dtype"],
    )


if __name__ == "__main__":
    main()
