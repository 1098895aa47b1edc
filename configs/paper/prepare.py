"""Make what a configuration of the paper starts from: five seeds, and the source's adapter from 250 training examples.

    python configs/paper/prepare.py TASK BASE_MODEL [--data FOLDER] [--data-only]

TASK is gsm8k, mbpp, bbh or mmlu; BASE_MODEL the source's base as the configuration names it, such as google/gemma-2b.
The data come from the Hub, or with --data from a folder with gsm8k/train.jsonl, mbpp/mbpp.jsonl, bbh/SUBTASK.json or
mmlu/auxiliary_train.jsonl. Writes to data/ beside this file. Settings of the training: the paper, section H.1.

mbpp also writes data/MbppPlus.jsonl, EvalPlus' tasks, which the evaluation reads: from FOLDER/MbppPlus.jsonl where
--data has it, else as EvalPlus itself loads them, which takes the network once.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tuneshift.distill import Pair, TrainingSettings, distill
from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.evaluate.benchmarks.base import read_benchmark
from tuneshift.models import resolve_model
from tuneshift.run.directory import write_atomically
from tuneshift.study.start import bbh_pairs, draw_pairs, write_pairs

HERE = Path(__file__).parent
EXAMPLES = 250  # training examples of a source: the first ones of the split (Trans-LoRA, the paper's baseline)
HUB = {
    "gsm8k": ("openai/gsm8k", "main", "train"),
    "mbpp": ("google-research-datasets/mbpp", "full", "train+test+validation+prompt"),
    "mmlu": ("cais/mmlu", "auxiliary_train", "train"),
}
MBPP_TRAIN = range(601, 975)  # task ids of the training split


def rows_of(task: str, data: Path | None) -> list[dict]:
    """Return a task's rows, from a file of `data` or from the Hub."""
    if data is not None:
        name = {"gsm8k": "train.jsonl", "mbpp": "mbpp.jsonl", "mmlu": "auxiliary_train.jsonl"}[task]
        return [json.loads(line) for line in (data / task / name).read_text(encoding="utf-8").splitlines()]
    from datasets import load_dataset

    path, name, split = HUB[task]
    return [dict(row) for row in load_dataset(path, name, split=split)]


def pair_of(task: str, row: dict) -> Pair:
    """Return a training example as prompt and response: GSM8K as it is asked, MMLU without the subject's line above."""
    if task == "gsm8k":
        return Pair(f"Question: {row['question']}\nAnswer:", f" {row['answer']}")
    if task == "mbpp":  # the bare sentence, as in the paper's Figure 8
        return Pair(row["text"], "\n" + row["code"].replace("\r\n", "\n").strip())
    row = row.get("train", row)  # the Hub nests the auxiliary split
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return Pair(f"{row['question'].strip()}\n{options}\nAnswer:", f" {'ABCD'[row['answer']]}")


def parts_of(task: str, data: Path | None) -> Iterator[tuple[str, list[Pair]]]:
    """Yield (folder under data/, training pairs): one for a task, one for each subtask of BBH."""
    if task != "bbh":
        rows = rows_of(task, data)
        if task == "mbpp":
            write_mbpp_plus(HERE / "data/MbppPlus.jsonl", data)
            rows = [row for row in rows if row["task_id"] in MBPP_TRAIN]
        yield task, [pair_of(task, row) for row in rows[:EXAMPLES]]
        return
    for subtask in BENCHMARKS["bbh"].subtasks:
        yield f"bbh/{subtask}", bbh_pairs(subtask, data)


def write_mbpp_plus(path: Path, data: Path | None) -> None:
    """Write EvalPlus' file of tasks as it is published, where it is not there yet."""
    if path.exists():
        return
    file = None if data is None else data / "MbppPlus.jsonl"
    if file is None or not file.exists():
        try:
            from evalplus.data.mbpp import _ready_mbpp_plus_path

            file = Path(_ready_mbpp_plus_path())  # the file itself: what `get_mbpp_plus` returns is no JSON
        except (ImportError, OSError, EOFError) as error:  # not installed, offline, half a file
            sys.exit(
                f"{path}: EvalPlus cannot load its tasks ({type(error).__name__}: {error}). Install it as "
                "docs/sandbox.md says and start this once with a network, or put MbppPlus.jsonl of MBPP+ v0.2.0, which "
                "EvalPlus publishes, there or into the folder of --data."
            )
    items, _ = read_benchmark("mbpp_plus", BENCHMARKS["mbpp_plus"], data=str(file), subtask="test")
    content = file.read_bytes()
    write_atomically(path, gzip.decompress(content) if file.suffix == ".gz" else content)
    print(f"{path}: {len(items)} tasks of MBPP's test split")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["gsm8k", "mbpp", "bbh", "mmlu"])
    parser.add_argument("base")
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--data-only", action="store_true", help="write seeds and pairs, do not train")
    options = parser.parse_args()
    for name, pairs in parts_of(options.task, options.data):
        folder = HERE / "data" / name
        write_pairs(folder / "train.jsonl", pairs)
        write_pairs(folder / "seeds.jsonl", draw_pairs(pairs, 0))
        adapter = folder / options.base.rstrip("/").rpartition("/")[2]
        if options.data_only or adapter.exists():
            continue
        distill(
            pairs,
            TrainingSettings(target=resolve_model(options.base)),  # the defaults are the paper's
            output_dir=adapter,
            checkpoint_dir=folder / "checkpoints",
            on_step=lambda done, total, numbers: print(f"{done} of {total}") if done % 50 == 0 else None,
        )
        print(adapter)


if __name__ == "__main__":
    main()
