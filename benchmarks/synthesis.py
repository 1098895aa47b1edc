"""Claim: F and B answer and are scored at several times the candidates a second of plain transformers.

    python benchmarks/synthesis.py BASE ADAPTER PAIRS.jsonl [--rows 64] [--max-new-tokens 12] [--repeats 5]

PAIRS.jsonl holds {"prompt"} lines, for example a run's dataset/kept.jsonl. The reference does what the paper says with
transformers and peft alone: both models loaded, greedy `generate` at batch 8, then a second forward pass with full
logits for each response's perplexity under F. Both sides answer the same prompts, in turn; the texts are compared. Both
ask for every y_b. Prints one JSON document.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from measure import document, in_turn, ratio, spread
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tuneshift.encoding import first_stop
from tuneshift.engines.base import Decoding, Weights
from tuneshift.engines.options import EngineOptions
from tuneshift.engines.source import Source, open_source
from tuneshift.models import pick_dtype, resolve_model

BATCH = 8
STOP = "\n"


class Reference:
    """F and B as transformers and peft load them."""

    def __init__(self, base: str, adapter: str) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = pick_dtype("auto", device)
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.base = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device).eval()
        tuned = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device)
        self.tuned = PeftModel.from_pretrained(tuned, adapter).eval()

    @torch.inference_mode()
    def answer(self, prompts: list[str], max_new_tokens: int) -> list[tuple[str, str]]:
        """Return F's and B's responses to each prompt; their perplexities are computed on the way."""
        answers = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            written = [self.generate(model, batch, max_new_tokens) for model in (self.tuned, self.base)]
            for responses in written:
                self.perplexities(batch, responses)
            answers += list(zip(*written, strict=True))
        return answers

    def generate(self, model: PreTrainedModel, prompts: list[str], max_new_tokens: int) -> list[str]:
        """Return greedy responses, cut before the stop string."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.base.device)
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stop_strings=[STOP],
            tokenizer=self.tokenizer,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        texts = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text[: first_stop(text, [STOP])] for text in texts]

    def perplexities(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return each response's perplexity under F, from full logits."""
        lengths = [len(ids) for ids in self.tokenizer(prompts)["input_ids"]]
        whole = [a + b for a, b in zip(prompts, responses, strict=True)]
        inputs = self.tokenizer(whole, return_tensors="pt", padding=True).to(self.base.device)
        table = torch.log_softmax(self.tuned(**inputs).logits.float(), -1)
        chosen = table[:, :-1].gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        width = inputs["input_ids"].shape[1]
        totals = inputs["attention_mask"].sum(-1).tolist()
        values = []
        for row, (total, prompt) in enumerate(zip(totals, lengths, strict=True)):
            scores = chosen[row, width - 1 - (total - prompt) :]
            values.append(math.exp(-scores.mean().item()) if len(scores) else math.nan)
        return values


def ours(source: Source, prompts: list[str], max_new_tokens: int) -> list[tuple[str, str]]:
    decoding = Decoding(temperature=0, max_new_tokens=max_new_tokens, stop=(STOP,))
    answers = source.answer({str(n): prompt for n, prompt in enumerate(prompts)}, decoding=decoding, run_seed=0)
    return [(answer.y_f.text, answer.y_b.text) for answer in answers.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    prompts = [json.loads(line)["prompt"] for line in options.pairs.read_text().splitlines()][: options.rows]
    reference = Reference(options.base, options.adapter)
    source = open_source(
        Weights(options.base, resolve_model(options.base), options.adapter),
        engines=EngineOptions(),
        canary_prompts=prompts[:2],
    )
    texts = {}

    def rate(name, answer) -> float:
        started = time.perf_counter()
        texts[name] = answer(prompts, options.max_new_tokens)
        return len(prompts) / (time.perf_counter() - started)

    rates = in_turn(
        {
            "ours": lambda: rate("ours", lambda *a: ours(source, *a)),
            "reference": lambda: rate("reference", reference.answer),
        },
        repeats=options.repeats,
    )
    same = [sum(a[side] == b[side] for a, b in zip(texts["ours"], texts["reference"], strict=True)) for side in (0, 1)]
    document(
        __doc__.splitlines()[0],
        base=Path(options.base).name,
        candidates=len(prompts),
        max_new_tokens=options.max_new_tokens,
        candidates_per_second={name: spread(figures) for name, figures in rates.items()},
        ratio=ratio(rates["ours"], rates["reference"]),
        same_text={"y_f": same[0], "y_b": same[1], "n": len(prompts)},
        dtype=str(reference.base.dtype).removeprefix("torch."),
    )


if __name__ == "__main__":
    main()
