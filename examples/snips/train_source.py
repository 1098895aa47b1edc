"""Make the example's data and train its source adapter: what a team that still had its data would have done.

    python examples/snips/train_source.py SNIPS_FOLDER BASE_MODEL

SNIPS_FOLDER holds train.jsonl and test.jsonl with {"text", "intent", "slots"} a line (see CITATION.md); BASE_MODEL is
SmolLM2-135M-Instruct. One adapter learns both forms of the task: "Intent:" asks for the intent alone, "Call:" for the
whole call. Writes seeds, evaluation requests, the adapter and its accuracy (source.json) beside this file.
"""

import argparse
import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tuneshift.datafiles import read_items
from tuneshift.distill import Pair, TrainingSettings, distill
from tuneshift.engines.hf import HfEngine
from tuneshift.evaluate.stats import Proportion
from tuneshift.evaluate.tasks import answer_items, find_metric
from tuneshift.models import LoadOptions, resolve_model
from tuneshift.run.manifest import environment

HERE = Path(__file__).parent
WEIGHTS = "adapter_model.safetensors"
SEED = 13
EVALUATION_ITEMS = 200
INTENT_SHARE = 0.2  # of the training requests also appear in the intent form


def intent_prompt(row: dict) -> str:
    return f"Request: {row['text'].strip()}\nIntent:"


def call_prompt(row: dict) -> str:
    return f"Request: {row['text'].strip()}\nCall:"


def call_response(row: dict) -> str:
    arguments = ", ".join(f'{name}="{value}"' for name, value in row["slots"])
    return f" {row['intent']}({arguments})"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def evaluation_items(rows: list[dict], rng: random.Random) -> list[dict]:
    """Draw items at random, with every intent as often as the others (the test split has 100 of each)."""
    by_intent: dict[str, list[dict]] = {}
    for row in rng.sample(rows, len(rows)):
        by_intent.setdefault(row["intent"], []).append(row)
    turns = [row for turn in zip(*by_intent.values(), strict=False) for row in turn]
    return turns[:EVALUATION_ITEMS]


def seeds(rows: list[dict], rng: random.Random, count: int = 5) -> list[dict]:
    """Draw the first request of each of `count` random intents: few, but not all alike."""
    chosen: dict[str, dict] = {}
    for row in rng.sample(rows, len(rows)):
        chosen.setdefault(row["intent"], row)
    return rng.sample(list(chosen.values()), count)


def publish(trained: Path, folder: Path, base_name: str) -> None:
    """Copy the trained adapter as it is shipped: weights in bfloat16, and the base by its public name."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(trained / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def evaluate(base: str, adapter: Path, folder: Path) -> dict:
    """Return how many of the held-out requests the shipped adapter gets right, in both forms."""
    engine = HfEngine.open(resolve_model(base), load=LoadOptions())
    engine.attach(str(adapter))
    exact, results = find_metric("exact_match"), {}
    for name, suffix, limit in (("intents", "", 12), ("calls", "_calls", 96)):
        outcomes = answer_items(
            engine,
            read_items(folder / f"test{suffix}.jsonl"),
            fine_tuned=True,
            grade=lambda response, item: {"exact_match": exact(response, item.reference)},
            metric="exact_match",
            max_new_tokens=limit,
            stop=["\n"],
        )
        rate = Proportion(sum(outcome.correct for outcome in outcomes), len(outcomes))
        results[name] = {"correct": rate.correct, "n": rate.n, "interval": asdict(rate.interval())}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("base")
    parser.add_argument("--base-name", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="name in the adapter")
    parser.add_argument("--examples", type=int, default=None, help="training requests; all of them by default")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--work", type=Path, default=None, help="keep checkpoints here, to continue a stopped training")
    parser.add_argument("--data-only", action="store_true", help="write seeds and evaluation requests, do not train")
    options = parser.parse_args()

    rng = random.Random(SEED)
    train, test = read(options.data / "train.jsonl"), read(options.data / "test.jsonl")
    forms = {"": (intent_prompt, lambda row: f" {row['intent']}"), "_calls": (call_prompt, call_response)}
    held_out, chosen = evaluation_items(test, rng), seeds(train, rng)
    for suffix, (prompt, response) in forms.items():
        items = [{"prompt": prompt(row), "reference": response(row).strip()} for row in held_out]
        write(options.output / f"test{suffix}.jsonl", items)
        pairs = [{"prompt": prompt(row), "response": response(row)} for row in chosen]
        write(options.output / f"seeds{suffix}.jsonl", pairs)
    if options.data_only:
        return
    rows = rng.sample(train, options.examples or len(train))
    pairs = [Pair(call_prompt(row), call_response(row)) for row in rows]
    pairs += [Pair(intent_prompt(row), f" {row['intent']}") for row in rows[: int(INTENT_SHARE * len(rows))]]
    rng.shuffle(pairs)
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        settings = TrainingSettings(
            target=resolve_model(options.base),
            target_modules="all-linear",
            num_train_epochs=options.epochs,
            learning_rate=1e-3,
            per_device_train_batch_size=16,
            trainer_args={"train_sampling_strategy": "group_by_length"},
            seed=SEED,
        )
        summary = distill(
            pairs,
            settings,
            output_dir=work / "adapter",
            checkpoint_dir=work / "checkpoints",
            on_step=lambda done, total, numbers: print(f"{done} of {total}") if done % 50 == 0 else None,
        )
        publish(work / "adapter", options.output / "adapter", options.base_name)
    accuracy = evaluate(options.base, options.output / "adapter", options.output)
    result = {"pairs": len(pairs), "accuracy": accuracy, "training": asdict(summary), "environment": environment()}
    (options.output / "source.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
