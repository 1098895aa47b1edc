"""Claim: distillation trains the target at several times the tokens a second of trl's `SFTTrainer` with its defaults.

    python benchmarks/training.py MODEL_FOLDER PAIRS.jsonl [--rows 64] [--batch 8] [--repeats 5]

PAIRS.jsonl holds {"prompt", "response"} lines, for example a run's dataset/kept.jsonl. Both sides train the same LoRA
on the same pairs at the same batch size, each training in a process of its own, in turn; a training's first step warms
up and is not timed. trl's defaults: gradient checkpointing, bf16 autocast, its fused head. Prints one JSON document.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from measure import Work, bandwidth, document, gemm_peak, ratio, spread

from tuneshift.distill import Pair, TrainingSettings, add_lora, distill, tokenize_pairs
from tuneshift.models import LoadOptions, load_causal_lm, load_tokenizer


def ours(settings: TrainingSettings, pairs: list[Pair], folder: Path) -> list[float]:
    times = []
    distill(
        pairs,
        settings,
        output_dir=folder / "adapter",
        checkpoint_dir=folder / "checkpoints",
        on_step=lambda *_: times.append(time.perf_counter()),
    )
    return times


def theirs(settings: TrainingSettings, pairs: list[Pair], folder: Path) -> list[float]:
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **kwargs):
            times.append(time.perf_counter())

    tokenizer = load_tokenizer(settings.target)
    model = add_lora(load_causal_lm(settings.target, LoadOptions()), settings)
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.num_train_epochs,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        learning_rate=settings.learning_rate,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = tokenize_pairs(pairs, tokenizer, max_length=None)
    SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[Clock()]
    ).train()
    return times


def train(side: str, settings: TrainingSettings, pairs: list[Pair]) -> tuple[float, int]:
    """Return steps a second and peak memory in bytes."""
    os.dup2(2, 1)  # the trainer prints; stdout is for the document
    with tempfile.TemporaryDirectory() as folder:
        times = {"ours": ours, "sft_trainer_defaults": theirs}[side](settings, pairs, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (len(times) - 1) / (times[-1] - times[0]), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.pairs.read_text().splitlines()][: options.rows]
    pairs = [Pair(row["prompt"], row["response"]) for row in rows]
    settings = TrainingSettings(
        options.model,
        num_train_epochs=1,
        learning_rate=1e-3,
        per_device_train_batch_size=options.batch,
        trainer_args={"save_strategy": "no"},
    )
    dataset = tokenize_pairs(pairs, load_tokenizer(options.model), max_length=None)
    tokens = sum(map(len, dataset["input_ids"]))
    response_tokens = sum(label != -100 for labels in dataset["labels"] for label in labels)
    per_step = tokens / len(pairs) * options.batch
    spawn = multiprocessing.get_context("spawn")
    rates: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for _ in range(options.repeats):
        for side in ("ours", "sft_trainer_defaults"):
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                steps, peak = process.submit(train, side, settings, pairs).result()
            rates.setdefault(side, []).append(steps * per_step)
            peaks[side] = max(peak, peaks.get(side, 0))
    model = load_causal_lm(options.model, LoadOptions())
    work = Work.of(model)
    # LoRA needs no gradients of the frozen weights: forward and backward of activations, 2 operations a weight each.
    operations = 4.0 * work.body + 4.0 * work.head * response_tokens / tokens
    best = gemm_peak(model.dtype)
    document(
        __doc__.splitlines()[0],
        model=Path(options.model).name,
        batch=options.batch,
        rows=len(pairs),
        tokens=tokens,
        response_tokens=response_tokens,
        tokens_per_second={side: spread(figures) for side, figures in rates.items()},
        response_tokens_per_second={
            side: spread([figure * response_tokens / tokens for figure in figures]) for side, figures in rates.items()
        },
        ratio=ratio(rates["ours"], rates["sft_trainer_defaults"]),
        peak_memory_bytes=peaks,
        flops={side: spread([figure * operations for figure in figures]) for side, figures in rates.items()},
        operations_per_weight_byte=operations * per_step / (2 * work.weight_bytes),  # read forwards and backwards
        gemm_peak_flops=best,
        memory_bytes_per_second=bandwidth(),
        share_of_gemm_peak={side: spread([f * operations / best for f in figures]) for side, figures in rates.items()},
        dtype=str(model.dtype).removeprefix("torch."),
    )


if __name__ == "__main__":
    main()
