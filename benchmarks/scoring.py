"""Claim: scoring is several times as quick as plain transformers; told as a share of the processor's matrix peak.

    python benchmarks/scoring.py MODEL_FOLDER [--texts short|long] [--requests 1 8 32 128 256] [--repeats 5]

The texts are real requests of examples/snips; `long` joins them to 128 to 512 tokens, of which the last sixth is the
response. The reference is transformers alone: right-padded batches of 8 and full logits; it always scores the first 16
requests, since its rate does not grow with their number. All sides score in turn in one run. Operations are those of
the real tokens: 2 a weight of the body, attention over the tokens before, 2 a weight of the head for response tokens.
`parts` tells what binds: the rate of the model's own narrow products, and where a forward pass spends its time.
Prints one JSON document.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from measure import Work, bandwidth, document, gemm_peak, in_turn, ratio, spread

from tuneshift.encoding import encode_prompt, encode_response
from tuneshift.engines.base import ScoreRequest
from tuneshift.engines.batching import CPU_SCORING_TOKENS
from tuneshift.engines.hf import HfEngine
from tuneshift.models import LoadOptions, resolve_model

DATA = Path(__file__).parents[1] / "examples/snips/test.jsonl"
BATCH, REFERENCE_REQUESTS = 8, 16
LONG = range(128, 513, 32)


def texts_of(engine: HfEngine, kind: str, number: int) -> list[ScoreRequest]:
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    tokenizer = engine.tokenizer
    short = [
        ScoreRequest(
            tuple(encode_prompt(tokenizer, row["prompt"])), tuple(encode_response(tokenizer, " " + row["reference"]))
        )
        for row in rows
    ]
    if kind == "short":
        return [short[index % len(short)] for index in range(number)]
    ids = [token for request in short for token in (*request.prompt_ids, *request.response_ids)]
    requests = []
    for index in range(number):
        length, start = LONG[index * 5 % len(LONG)], index * 97 % (len(ids) - LONG[-1])
        text, end = ids[start : start + length], length - length // 6
        requests.append(ScoreRequest(tuple(text[:end]), tuple(text[end:])))
    return requests


@torch.inference_mode()
def reference(model, requests: list[ScoreRequest]) -> list[tuple[float, ...]]:
    """Return the responses' log-probabilities as transformers alone gives them."""
    scores = []
    for start in range(0, len(requests), BATCH):
        batch = requests[start : start + BATCH]
        texts = [torch.tensor([*request.prompt_ids, *request.response_ids]) for request in batch]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        logits = model(input_ids=ids, attention_mask=mask).logits
        for request, text, row in zip(batch, texts, logits, strict=True):
            at = len(request.prompt_ids)
            table = torch.log_softmax(row[at - 1 : len(text) - 1].float(), -1)
            scores.append(tuple(table.gather(-1, text[at:, None])[:, 0].tolist()))
    return scores


def operations(work: Work, request: ScoreRequest) -> int:
    tokens, response = len(request.prompt_ids) + len(request.response_ids), len(request.response_ids)
    return 2 * work.body * tokens + work.attention * tokens * (tokens + 1) // 2 + 2 * work.head * response


def seconds_of(run, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


@torch.inference_mode()
def parts(model, requests: list[ScoreRequest]) -> dict:
    """Return the products' own rate at a full batch's shapes, and where an eager pass over such a batch spends time."""
    from torch.profiler import ProfilerActivity, profile

    width = max(len(request.prompt_ids) + len(request.response_ids) for request in requests)
    rows = max(1, min(len(requests), CPU_SCORING_TOKENS // width))
    shapes: dict[tuple[int, int], int] = {}
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            shape = (module.out_features, module.in_features)
            shapes[shape] = shapes.get(shape, 0) + 1
    seconds, products = 0.0, []
    for (outputs, inputs), count in shapes.items():
        x, weight = (torch.randn(n, inputs, dtype=model.dtype) for n in (rows * width, outputs))
        each = seconds_of(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))
        seconds += each * count
        flops = 2 * rows * width * inputs * outputs / each
        products.append({"inputs": inputs, "outputs": outputs, "layers": count, "flops": flops})
    ids = torch.randint(5, 1000, (rows, width))
    decoder = model.get_decoder()
    whole = seconds_of(lambda: decoder(input_ids=ids, use_cache=False))
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        decoder(input_ids=ids, use_cache=False)
    kinds = {"products": ("aten::mm", "aten::addmm", "aten::bmm"), "attention": ("scaled_dot_product",)}
    times = dict.fromkeys((*kinds, "elementwise"), 0.0)
    for event in trace.key_averages():
        kind = next((kind for kind, names in kinds.items() if any(n in event.key for n in names)), "elementwise")
        times[kind] += event.self_cpu_time_total
    work = Work.of(model)
    return {
        "tokens": rows * width,
        "products": products,
        "products_flops": 2 * work.body * rows * width / seconds,
        "eager_body_seconds": whole,
        "products_alone_seconds": seconds,
        "share_of_time": {kind: value / sum(times.values()) for kind, value in times.items()},
    }


def difference(first: list[tuple[float, ...]], second: list[tuple[float, ...]]) -> dict[str, float]:
    pairs = [abs(a - b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)]
    return {"largest": max(pairs), "mean": sum(pairs) / len(pairs), "n": len(pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", choices=["short", "long"], default="short")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    path = resolve_model(options.model)
    plain, compiled = (HfEngine.open(path, load=LoadOptions(compile=compile)) for compile in (False, True))
    with plain._weights(False) as model:
        work, peaks = Work.of(model), [gemm_peak(model.dtype)]
    sides = {
        "hf": lambda requests: plain.score(requests, fine_tuned=False),
        "hf_compiled": lambda requests: compiled.score(requests, fine_tuned=False),
        "hf_reference": lambda requests: reference(model, requests[:REFERENCE_REQUESTS]),
    }
    results = []
    for number in options.requests:
        requests, scores = texts_of(plain, options.texts, number), {}

        def rate(name, requests=requests, scores=scores) -> float:
            """Return operations a second."""
            started = time.perf_counter()
            scores[name] = sides[name](requests)
            elapsed = time.perf_counter() - started
            return sum(operations(work, request) for request in requests[: len(scores[name])]) / elapsed

        rates = in_turn({name: lambda name=name: rate(name) for name in sides}, repeats=options.repeats)
        peaks.append(gemm_peak(model.dtype))
        tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in requests)
        response = sum(len(r.response_ids) for r in requests)
        flops = sum(operations(work, r) for r in requests)
        # The reference scores the first 16 requests: its tokens a second are those of the same operations a second.
        results.append(
            {
                "requests": number,
                "tokens": tokens,
                "response_tokens": response,
                "operations": flops,
                "operations_per_weight_byte": flops / work.weight_bytes / -(-tokens // CPU_SCORING_TOKENS),
                "flops": {name: spread(figures) for name, figures in rates.items()},
                "tokens_per_second": {n: spread([f * tokens / flops for f in figures]) for n, figures in rates.items()},
                "response_tokens_per_second": {
                    n: spread([f * response / flops for f in figures]) for n, figures in rates.items()
                },
                "ratio": {n: ratio(rates[n], rates["hf_reference"]) for n in ("hf", "hf_compiled")},
                "difference_in_nats": {
                    n: difference(scores[n][: len(scores["hf_reference"])], scores["hf_reference"])
                    for n in ("hf", "hf_compiled")
                },
            }
        )
    peak = max(peaks)
    for result in results:
        result["share_of_gemm_peak"] = {name: side["median"] / peak for name, side in result["flops"].items()}
    document(
        __doc__.splitlines()[0],
        model=Path(options.model).name,
        texts=options.texts,
        results=results,
        best_share_of_gemm_peak={name: max(result["share_of_gemm_peak"][name] for result in results) for name in sides},
        ratio={
            name: max(result["ratio"][name]["median"] for result in results) for name in sides if name != "hf_reference"
        },
        parts=parts(model, requests),
        gemm_peak_flops=peak,
        memory_bytes_per_second=bandwidth(),
        dtype=plain.describe()["dtype"],
    )


if __name__ == "__main__":
    main()
