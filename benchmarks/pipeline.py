"""Claim: a whole transfer takes at most twice the time of fine-tuning the target on as many real examples.

    python benchmarks/pipeline.py [CONFIG.yaml] [--repeats 1]

Each side is a process of its own, in turn; loading and start-up count on both. The transfer is `tuneshift transfer`
with synthesis, training, evaluation and report. Fine-tuning trains with the same settings on as many real pairs as the
transfer trained on: the example's test items and seeds, some of them more than once, since only time is measured. The
paper's ratio is 6 to 7. Prints one JSON document.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

from measure import document, ratio, spread

from tuneshift.config import load_config
from tuneshift.distill import Pair, distill
from tuneshift.wiring import training_settings

EXAMPLE = Path(__file__).parents[1] / "studies/start/intents.yaml"


def transfer(config: Path, folder: Path) -> tuple[float, dict]:
    """Return the seconds of a transfer and its verdict."""
    started = time.monotonic()
    command = [sys.executable, "-m", "tuneshift", "transfer", str(config), "--run-dir", str(folder)]
    status = subprocess.run(command, stdout=sys.stderr).returncode
    if status not in (0, 3):  # 3: done, and no improvement was shown
        raise SystemExit(status)
    return time.monotonic() - started, json.loads((folder / "verdict.json").read_text())


def real_pairs(config: Path, number: int) -> list[Pair]:
    loaded = load_config(config).config
    paths = (Path(loaded.seeds), Path(loaded.evaluation.data))
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    pairs = [Pair(row["prompt"], row.get("response") or " " + row["reference"]) for row in rows]
    return list(islice(cycle(pairs), number))


def train(config: Path, number: int, folder: Path) -> float:
    """Return the seconds of the training steps with loading and saving."""
    os.dup2(2, 1)  # the trainer prints; stdout is for the document
    settings, pairs = training_settings(load_config(config)), real_pairs(config, number)
    return distill(pairs, settings, output_dir=folder / "adapter", checkpoint_dir=folder / "checkpoints").seconds


def fine_tune(config: Path, number: int, folder: Path) -> tuple[float, float]:
    """Return the seconds of the whole process and of the training in it."""
    started = time.monotonic()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        inside = process.submit(train, config, number, folder).result()
    return time.monotonic() - started, inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=EXAMPLE)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    rounds = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            whole, verdict = transfer(options.config, Path(folder) / "transfer")
            direct, training = fine_tune(options.config, verdict["trained_pairs"], Path(folder) / "direct")
        counts = {
            name: verdict[name]
            for name in ("kept", "trained_pairs", "candidates", "rounds", "before", "after", "source")
        }
        rounds.append(
            {
                "transfer_seconds": whole,
                "transfer_seconds_by_stage": verdict["seconds"],
                "fine_tuning_seconds": direct,
                "fine_tuning_seconds_without_start": training,
                **counts,
            }
        )
    sides = {name: [each[f"{name}_seconds"] for each in rounds] for name in ("transfer", "fine_tuning")}
    document(
        __doc__.splitlines()[0],
        config=options.config.name,
        rounds=rounds,
        seconds={name: spread(figures) for name, figures in sides.items()},
        ratio=ratio(sides["transfer"], sides["fine_tuning"]),
    )


if __name__ == "__main__":
    main()
