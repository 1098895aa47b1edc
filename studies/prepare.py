"""Make what the studies start from: original pairs, random seeds, and source adapters.

    python studies/prepare.py DATA_FOLDER MODELS_FOLDER [--output studies/data]

DATA_FOLDER holds snips/train.jsonl and snips/test.jsonl with {"text", "intent", "slots"} a line
(examples/snips/CITATION.md); MODELS_FOLDER is what `tuneshift models` makes. Trains, on two cores in about 20 minutes:

- a strong source on Gemma-3-270M, from 2,500 requests, for the way back to SmolLM2;
- a weak source on SmolLM2-135M, from 400 requests, which gets about half of the intents right.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples/snips"))
from train_source import call_prompt, call_response, intent_prompt, read, write  # noqa: E402

REPLICATES = 3
ORIGINALS = 2000  # pairs of which a study draws; more than any arm trains on
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


if __name__ == "__main__":
    main()
