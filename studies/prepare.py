"""Make what the studies start from: original pairs, random seeds, and source adapters.

    python studies/prepare.py DATA_FOLDER MODELS_FOLDER [--output studies/data]

DATA_FOLDER holds snips/train.jsonl and snips/test.jsonl with {"text", "intent", "slots"} a line
(examples/snips/CITATION.md), and bbh/SUBTASK.json (Suzgun et al. 2022, MIT); MODELS_FOLDER is what `tuneshift models`
makes. Trains, on two cores in about half an hour:

- a strong source on Gemma-3-270M, from 2,500 requests, for the way back to SmolLM2;
- a weak source on SmolLM2-135M, from 400 requests, which gets about half of the intents right;
- a source on SmolLM2-135M for each of four subtasks of BIG-Bench Hard, from the half that is not held out.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from tuneshift.distill import Pair, TrainingSettings, distill
from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.evaluate.benchmarks.base import read_benchmark, split_held_out

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples/snips"))
from train_source import call_prompt, call_response, intent_prompt, read, write  # noqa: E402

REPLICATES = 3
ORIGINALS = 2000  # pairs of which a study draws; more than any arm trains on
SUBTASKS = ("boolean_expressions", "object_counting", "sports_understanding", "web_of_lies")
SOURCES = {
    "gemma": ("gemma-3-270m", "google/gemma-3-270m", 2500),
    "weak": ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", 400),
}


def write_pairs(rows: list[dict], folder: Path) -> None:
    """Write original pairs and, for each replicate, five random seeds, in both forms of the task."""
    forms = {"intents": (intent_prompt, lambda row: f" {row['intent']}"), "calls": (call_prompt, call_response)}
    for name, (prompt, response) in forms.items():
        pairs = [{"prompt": prompt(row), "response": response(row)} for row in rows]
        different = list({pair["prompt"]: pair for pair in pairs}.values())
        write(folder / f"originals_{name}.jsonl", random.Random(0).sample(different, ORIGINALS))
        for replicate in range(REPLICATES):
            write(folder / f"seeds_{name}_{replicate}.jsonl", random.Random(replicate + 1).sample(different, 5))


def prepare_bbh(data: Path, base: Path, folder: Path) -> None:
    """Write training pairs, seeds for each replicate and a source for each subtask, from the half that is left."""
    for subtask in SUBTASKS:
        benchmark, own = BENCHMARKS["bbh"], folder / subtask
        items, _ = read_benchmark("bbh", benchmark, data=str(data / f"{subtask}.json"), subtask=subtask)
        _, left = split_held_out(items, fraction=0.5, seed=0)  # as `evaluation.held_out` in bbh.yaml
        pairs = [{"prompt": item.prompt, "response": f" {item.reference}"} for item in left]
        own.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / f"{subtask}.json", own / "questions.json")
        write(own / "originals.jsonl", pairs)
        for replicate in range(REPLICATES):
            write(own / f"seeds_{replicate}.jsonl", random.Random(replicate + 1).sample(pairs, 5))
        if (own / "adapter").exists():
            continue
        settings = TrainingSettings(str(base), target_modules="all-linear", num_train_epochs=10, learning_rate=1e-3)
        learnt = [Pair(**pair) for pair in pairs]
        summary = distill(learnt, settings, output_dir=own / "adapter", checkpoint_dir=own / "checkpoints")
        print(subtask, summary.losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "studies/data")
    options = parser.parse_args()
    folder = options.output / "snips"
    folder.mkdir(parents=True, exist_ok=True)
    write_pairs(read(options.data / "snips/train.jsonl"), folder)
    for name, (model, public_name, examples) in SOURCES.items():
        if (folder / name / "source.json").is_file():
            continue  # trained already
        (folder / name).mkdir(exist_ok=True)
        script = ROOT / "examples/snips/train_source.py"
        command = [sys.executable, str(script), str(options.data / "snips"), str(options.models / model)]
        command += ["--base-name", public_name, "--examples", str(examples), "--output", str(folder / name)]
        subprocess.run(command, check=True)
        print(name, json.loads((folder / name / "source.json").read_text(encoding="utf-8"))["accuracy"])
    prepare_bbh(options.data / "bbh", options.models / "SmolLM2-135M-Instruct", options.output / "bbh")


if __name__ == "__main__":
    main()
