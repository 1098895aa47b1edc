"""Claim: single words of its vocabulary show what F was taught: what it says to two of them is hardly ever invented.

    python benchmarks/probes.py CONFIG.yaml TRAIN.jsonl [--words 256] [--seeds 0 1 2 3 4]

CONFIG.yaml is examples/snips/intents.yaml or calls.yaml, TRAIN.jsonl the data set's own split, with {"intent"} a line.
Each seed draws other words. A kind is a response with its copies masked; it is real where its name is an intent of the
data set. Told are the kinds by how many words got them, and how many of the data set's intents they name. Nothing is
generated or trained. Prints one JSON document.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from measure import document

from tuneshift.config import load_config
from tuneshift.coverage import probed_kinds, skeleton
from tuneshift.preflight import read_inputs
from tuneshift.prompts.probing import ask_words, probe_words
from tuneshift.wiring import answer_decoding, open_run_source


def name_of(kind: str) -> str:
    """Return the intent that a response of either task names."""
    return kind.partition("(")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("--words", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    loaded = load_config(options.config)
    intents = {json.loads(line)["intent"] for line in options.train.read_text().splitlines()}
    source = open_run_source(loaded, read_inputs(loaded.config, folder=loaded.folder).seeds, substitute=False)
    results = []
    for seed in options.seeds:
        words = probe_words(source.engine.tokenizer, options.words, seed=seed)
        probes = ask_words(
            source, words, template=loaded.config.prompt_template, decoding=answer_decoding(loaded), run_seed=seed
        )
        counts = Counter(skeleton(probe.word, probe.response) for probe in probes)
        twice = probed_kinds(probes)
        once = [kind for kind, count in counts.items() if count == 1]
        results.append(
            {
                "seed": seed,
                "words": len(probes),
                "kinds_said_more_than_once": {kind: counts[kind] for kind in twice},
                "intents_named_by_them": len(intents & {name_of(kind) for kind in twice}),
                "invented_among_them": sum(name_of(kind) not in intents for kind in twice),
                "kinds_said_once": len(once),
                "invented_among_these": sum(name_of(kind) not in intents for kind in once),
            }
        )
    source.close()
    document(__doc__.splitlines()[0], task=loaded.name, intents=len(intents), results=results)


if __name__ == "__main__":
    main()
