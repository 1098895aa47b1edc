"""Make what the studies start from: original pairs, random seeds, and source adapters.

    python studies/prepare.py DATA_FOLDER MODELS_FOLDER [--output studies/data] [--data-only]

DATA_FOLDER holds snips/train.jsonl and snips/test.jsonl with {"text", "intent", "slots"} a line
(examples/snips/CITATION.md), banking77/train.csv and banking77/test.csv with text and category (Casanueva et al. 2020,
CC-BY-4.0), and bbh/SUBTASK.json (Suzgun et al. 2022, MIT); MODELS_FOLDER is what `tuneshift models` makes. Trains, on
two cores in about an hour:

- a strong source on Gemma-3-270M, from 2,500 requests, for the way back to SmolLM2;
- a weak source on SmolLM2-135M, from 400 requests, which gets about half of the intents right;
- a source on SmolLM2-135M for the 77 topics of Banking77, from 5,000 questions;
- a source on SmolLM2-135M for each of four subtasks of BIG-Bench Hard, from the half that is not held out.
"""

import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from tuneshift.distill import Pair, TrainingSettings, distill
from tuneshift.study.start import bbh_pairs, draw_pairs, write_pairs

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples/snips"))
from train_source import call_prompt, call_response, intent_prompt, read  # noqa: E402

REPLICATES = 5  # as many as any study has
ORIGINALS = 2000  # pairs of which a study draws; more than any arm trains on
BANKING77_LEARNT = 5000  # questions that the source learns
QUESTIONS = 200  # held-out questions of Banking77, as many as Snips has
SUBTASKS = ("boolean_expressions", "object_counting", "sports_understanding", "web_of_lies")
SOURCES = {
    "gemma": ("gemma-3-270m", "google/gemma-3-270m", 2500),
    "weak": ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", 400),
}


def prepare_snips(data: Path, folder: Path) -> None:
    """Write original pairs and, for each replicate, random seeds, in both forms of the task."""
    rows = read(data / "snips/train.jsonl")
    forms = {"intents": (intent_prompt, lambda row: f" {row['intent']}"), "calls": (call_prompt, call_response)}
    for name, (prompt, response) in forms.items():
        different = list({prompt(row): Pair(prompt(row), response(row)) for row in rows}.values())
        write_pairs(folder / f"originals_{name}.jsonl", draw_pairs(different, 0, ORIGINALS))
        for replicate in range(REPLICATES):
            write_pairs(folder / f"seeds_{name}_{replicate}.jsonl", draw_pairs(different, replicate + 1))


def prepare_banking77(data: Path, folder: Path) -> None:
    """Write what the source learns, original pairs, held-out questions and, for each replicate, random seeds."""
    split: dict[str, list[Pair]] = {}
    for name in ("train", "test"):
        with (data / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = {row["text"].strip(): row["category"] for row in csv.DictReader(file)}
        split[name] = [Pair(f"Question: {text}\nTopic:", f" {topic}") for text, topic in rows.items()]
    learnt = draw_pairs(split["train"], 0, BANKING77_LEARNT)
    write_pairs(folder / "learnt.jsonl", learnt)
    write_pairs(folder / "originals.jsonl", learnt[:ORIGINALS])
    known = {pair.prompt for pair in split["train"]}
    asked = random.Random(0).sample([pair for pair in split["test"] if pair.prompt not in known], QUESTIONS)
    questions = [{"prompt": pair.prompt, "reference": pair.response.strip()} for pair in asked]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    for replicate in range(REPLICATES):
        write_pairs(folder / f"seeds_{replicate}.jsonl", draw_pairs(split["train"], replicate + 1))


def prepare_bbh(data: Path, folder: Path) -> None:
    """Write each subtask's questions, and pairs and seeds from the half that is not asked."""
    for subtask in SUBTASKS:
        pairs, own = bbh_pairs(subtask, data), folder / subtask
        write_pairs(own / "originals.jsonl", pairs)
        shutil.copyfile(data / "bbh" / f"{subtask}.json", own / "questions.json")
        for replicate in range(REPLICATES):
            write_pairs(own / f"seeds_{replicate}.jsonl", draw_pairs(pairs, replicate + 1))


def train_snips(data: Path, models: Path, folder: Path) -> None:
    """Train the sources on Snips that are not there yet, and print their accuracy."""
    for name, (model, public_name, examples) in SOURCES.items():
        if (folder / name / "source.json").is_file():
            continue
        (folder / name).mkdir(exist_ok=True)
        script = ROOT / "examples/snips/train_source.py"
        command = [sys.executable, str(script), str(data / "snips"), str(models / model)]
        command += ["--base-name", public_name, "--examples", str(examples), "--output", str(folder / name)]
        subprocess.run(command, check=True)
        print(name, json.loads((folder / name / "source.json").read_text(encoding="utf-8"))["accuracy"])


def train(base: Path, pairs: Path, folder: Path, *, epochs: int) -> None:
    """Train the source that is to stand in `folder` where it is not there yet, and print its losses."""
    if not (folder / "adapter").exists():
        learnt = [Pair(**pair) for pair in read(pairs)]
        settings = TrainingSettings(str(base), target_modules="all-linear", num_train_epochs=epochs, learning_rate=1e-3)
        summary = distill(learnt, settings, output_dir=folder / "adapter", checkpoint_dir=folder / "checkpoints")
        print(folder.name, summary.losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "studies/data")
    parser.add_argument("--data-only", action="store_true", help="write pairs and seeds, train no source")
    options = parser.parse_args()
    snips, banking77, bbh = (options.output / name for name in ("snips", "banking77", "bbh"))
    prepare_snips(options.data, snips)
    prepare_banking77(options.data, banking77)
    prepare_bbh(options.data, bbh)
    if not options.data_only:
        base = options.models / "SmolLM2-135M-Instruct"
        train_snips(options.data, options.models, snips)
        train(base, banking77 / "learnt.jsonl", banking77, epochs=2)
        for subtask in SUBTASKS:
            train(base, bbh / subtask / "originals.jsonl", bbh / subtask, epochs=10)


if __name__ == "__main__":
    main()
