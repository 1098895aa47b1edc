"""Claim: the decoding loop is as fast as `generate` at the same batch, and never off the head's fast path.

    python benchmarks/decode.py MODEL_FOLDER [--adapter FOLDER] [--rows 1 8 32 128 256] [--repeats 5] [--vllm PYTHON]

All sides continue the same prompts greedily for the same number of tokens, in turn: `hf` is the engine, `hf_reference`
is `generate` with all rows in one batch, `hf_reference_32` `generate` in batches of 32, `vllm` (with `--vllm`) the
engine on a vLLM server, whose texts may end early: what counts is tokens. On CPUs a bf16 head fed with a
non-contiguous slice of frozen weights once took 65 s a call instead of 0.04 s: this is where it would show again. A
step reads all weights and the batch's keys and values once: that is the share of memory bandwidth. The prompts' own
reading is part of the time, not of the operations. Prints one JSON document.
"""

import argparse
import time
from pathlib import Path

from measure import Work, bandwidth, document, gemm_peak, in_turn, ratio, spread

from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import Decoding, Engine, Weights
from tuneshift.engines.batching import BATCH_SIZE
from tuneshift.engines.decoding import left_pad
from tuneshift.engines.hf import HfEngine
from tuneshift.engines.opening import open_engine
from tuneshift.engines.options import EngineOptions
from tuneshift.models import LoadOptions, resolve_model

NEW_TOKENS = 32
SETTLE = 2.0  # seconds before a side's turn: a server's threads spin for a while after theirs
PROMPT = "Requests to a voice assistant:\n\n- play some jazz\n- book a table for {}\n- what is the weather in {}\n-"


def ours(engine: Engine, prompts: list[list[int]], fine_tuned: bool) -> int:
    decoding = Decoding(temperature=0, max_new_tokens=NEW_TOKENS)
    answers = engine.generate(prompts, seeds=[0] * len(prompts), decoding=decoding, fine_tuned=fine_tuned)
    return sum(len(answer.token_ids) for answer in answers)


def theirs(engine: HfEngine, prompts: list[list[int]], fine_tuned: bool, batch: int) -> int:
    tokens = 0
    with engine._weights(fine_tuned) as model:
        for start in range(0, len(prompts), batch):
            ids, mask = left_pad(prompts[start : start + batch], engine.tokenizer.pad_token_id, model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
            tokens += (out.shape[1] - ids.shape[1]) * len(ids)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--adapter")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM")
    options = parser.parse_args()
    engine, tuned = HfEngine.open(resolve_model(options.model), load=LoadOptions()), bool(options.adapter)
    if options.adapter:
        engine.attach(options.adapter)
    # No row may end early, or the sides would decode different numbers of tokens.
    engine.eos_ids = frozenset()
    with engine._weights(tuned) as model:
        model.generation_config.eos_token_id = None
        work, peaks, reads = Work.of(model), [gemm_peak(model.dtype)], [bandwidth()]
    # Each side continues all prompts and returns how many tokens it wrote; and how many rows share a step.
    sides = {
        "hf": lambda prompts: ours(engine, prompts, tuned),
        "hf_reference": lambda prompts: theirs(engine, prompts, tuned, len(prompts)),
        "hf_reference_32": lambda prompts: theirs(engine, prompts, tuned, 32),
    }
    batches = {"hf": BATCH_SIZE, "hf_reference": max(options.rows), "hf_reference_32": 32}
    if options.vllm:
        path = resolve_model(options.model)
        served = EngineOptions(kind="vllm", python=options.vllm, batch_size=max(options.rows))
        server = open_engine(Weights(path, path, options.adapter), served)  # it ends with this process
        sides["vllm"] = lambda prompts: ours(server, prompts, tuned)
        batches["vllm"] = max(options.rows)
    results = []
    for rows in options.rows:
        prompts = [encode_prompt(engine.tokenizer, PROMPT.format(n, n)) for n in range(rows)]
        context = sum(map(len, prompts)) / rows + NEW_TOKENS / 2  # tokens that a new one looks at, on average
        operations = 2 * (work.body + work.head) + work.attention * context

        def rate(name, prompts=prompts) -> float:
            time.sleep(SETTLE)
            started = time.perf_counter()
            tokens = sides[name](prompts)
            return tokens / (time.perf_counter() - started)

        rates = in_turn({name: lambda name=name: rate(name) for name in sides}, repeats=options.repeats)
        peaks.append(gemm_peak(model.dtype))
        reads.append(bandwidth())
        read = {n: work.weight_bytes / min(rows, batches[n]) + work.cache_bytes * context for n in sides}  # a token
        results.append(
            {
                "rows": rows,
                "tokens_per_second": {name: spread(figures) for name, figures in rates.items()},
                "flops": {name: spread([f * operations for f in figures]) for name, figures in rates.items()},
                "bytes_per_second": {name: spread([f * read[name] for f in fs]) for name, fs in rates.items()},
                "operations_per_byte": {name: operations / read[name] for name in sides},
                "ratio": {name: ratio(rates["hf"], rates[name]) for name in sides if name != "hf"},
            }
        )
    peak, fastest_read = max(peaks), max(reads)
    for result in results:
        result["share_of_gemm_peak"] = {name: side["median"] / peak for name, side in result["flops"].items()}
        shares = {name: side["median"] / fastest_read for name, side in result["bytes_per_second"].items()}
        result["share_of_bandwidth"] = shares
    medians = {name: max(r["tokens_per_second"][name]["median"] for r in results) for name in sides}
    document(
        __doc__.splitlines()[0],
        model=Path(options.model).name,
        adapter=tuned,
        new_tokens=NEW_TOKENS,
        results=results,
        best_tokens_per_second=medians,
        ratio={name: medians["hf"] / medians[name] for name in sides if name != "hf"},
        gemm_peak_flops=peak,
        memory_bytes_per_second=fastest_read,
        dtype=engine.describe()["dtype"],
    )


if __name__ == "__main__":
    main()
