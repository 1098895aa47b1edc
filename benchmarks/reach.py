"""Claim: with few seeds and a weak generator, the pairs of `preset: tuneshift` teach more than the paper's loop's.

    python benchmarks/reach.py CONFIG.yaml TRAIN.jsonl [--arm NAME KEY=VALUE ...] [--kept 150]
        [--replicates 0 1 2] [--intents 3] [--out FOLDER]

Nothing is trained. CONFIG.yaml is examples/snips/intents.yaml or calls.yaml, TRAIN.jsonl the data set's own split, with
{"text", "intent", "slots"} a line; each replicate draws five seeds from it, of `--intents` intents. An arm is the
configuration with other settings; all arms of a replicate have its seeds and its run seed. Told of the kept pairs: the
clusters of responses, the intents that F's responses name, `as_judged`: for how many of them a naive Bayes classifier
that learnt all of TRAIN.jsonl says what F said (it has 99.5 % of the held-out requests right), and `taught`: the share
of held-out requests that such a classifier has right which learnt the chosen pairs alone. It ranks sets of pairs by
their words; what a target would learn from them only a training tells. Prints one JSON document; FOLDER keeps the
ledgers.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from measure import document

from tuneshift.config import LoadedConfig, load_config
from tuneshift.coverage import answer_of, kinds_of, spread
from tuneshift.dataset import choose
from tuneshift.pipeline import synthesis
from tuneshift.preflight import read_inputs
from tuneshift.progress import SILENT
from tuneshift.prompts.parsing import extract_text
from tuneshift.prompts.screening import normalize
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate
from tuneshift.wiring import SynthesisModels, prompt_generator, synthesis_models

ARMS = {"paper": ["synthesis.preset=paper"], "tuneshift": ["synthesis.preset=tuneshift"]}
SMOOTHING = 0.3  # of the classifier; a guess, the same for all arms


def intent_of(response: str) -> str:
    """Return the intent that a response of either task names."""
    return response.strip().partition("(")[0]


def draw_seeds(rows: Sequence[dict], form: str, *, intents: int, replicate: int) -> list[dict]:
    """Draw five requests of `intents` intents, as evenly as that goes, in the task's form."""
    draw = random.Random(replicate)
    chosen = draw.sample(sorted({row["intent"] for row in rows}), intents)
    picked = []
    for number in range(5):
        row = draw.choice([row for row in rows if row["intent"] == chosen[number % intents]])
        arguments = ", ".join(f'{name}="{value}"' for name, value in row["slots"])
        response = row["intent"] if form == "Intent:" else f"{row['intent']}({arguments})"
        picked.append({"prompt": f"Request: {row['text'].strip()}\n{form}", "response": f" {response}"})
    return picked


def features(text: str) -> list[str]:
    words = normalize(text).split()
    return words + [f"{one} {other}" for one, other in zip(["", *words], [*words, ""], strict=True)]


class NaiveBayes:
    """Tells a request's intent from its words and pairs of words."""

    def __init__(self, requests: Sequence[tuple[str, str]]) -> None:
        self.counts = Counter(intent for _, intent in requests)
        self.words: dict[str, Counter[str]] = defaultdict(Counter)
        for text, intent in requests:
            self.words[intent].update(features(text))
        self.known = set().union(*self.words.values())
        self.totals = {name: math.log(of.total() + SMOOTHING * len(self.known)) for name, of in self.words.items()}

    def tell(self, text: str) -> str:
        """Return the likeliest intent."""
        found = [one for one in features(text) if one in self.known]

        def likelihood(name: str) -> float:
            seen = sum(math.log(self.words[name][one] + SMOOTHING) - self.totals[name] for one in found)
            return seen + math.log(self.counts[name])

        return max(sorted(self.counts), key=likelihood)

    def right(self, requests: Sequence[tuple[str, str]]) -> float:
        """Return the share of requests whose intent it tells."""
        return sum(self.tell(text) == intent for text, intent in requests) / len(requests)


def pairs_of(candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
    return [(candidate.text, intent_of(candidate.y_f.text)) for candidate in candidates]


def figures(
    loaded: LoadedConfig, candidates: Sequence[Candidate], held_out: Sequence[tuple[str, str]], judge: NaiveBayes
) -> dict:
    """Return what is told of a synthesis."""
    section, seed = loaded.config.synthesis, loaded.config.run.seed
    kept = [candidate for candidate in candidates if candidate.kept]
    true = {intent for _, intent in held_out}
    named = Counter(intent_of(candidate.y_f.text) for candidate in kept)
    chosen = {
        how: choose(kept, section.target_size, how, seed=seed)
        for how in ("first", "random", "balanced", section.select)
    }
    clusters = spread(kinds_of(list(map(answer_of, kept))))
    return {
        "candidates": len(candidates),
        "answered": sum(candidate.y_f is not None for candidate in candidates),
        "kept": len(kept),
        "reasons": dict(Counter(candidate.reason for candidate in candidates).most_common()),
        "clusters": clusters and asdict(clusters),
        "clusters_per_1000_candidates": 1000 * clusters.clusters / len(candidates) if clusters else None,
        "intents_reached": len(true & set(named)),
        "intents": dict(named.most_common(12)),
        "intents_chosen": dict(Counter(intent_of(c.y_f.text) for c in chosen[section.select]).most_common(12)),
        "share_of_two_largest": sum(count for _, count in named.most_common(2)) / max(1, len(kept)),
        "entropy_of_intents": getattr(spread(named.elements()), "entropy", None),
        "as_judged": judge.right(pairs_of(kept)) if kept else None,
        "as_judged_chosen": judge.right(pairs_of(chosen[section.select])) if kept else None,
        "taught": {how: NaiveBayes(pairs_of(of)).right(held_out) for how, of in chosen.items()} if kept else None,
    }


def run(
    loaded: LoadedConfig,
    models: SynthesisModels,
    path: Path,
    held_out: Sequence[tuple[str, str]],
    judge: NaiveBayes,
) -> dict:
    """Run one synthesis on opened models, or read the finished one at `path`, and return its figures."""
    inputs = read_inputs(loaded.config, folder=loaded.folder)
    seed = loaded.config.run.seed
    own = replace(
        models,
        generator=prompt_generator(loaded, models.generator.engine),
        instruments=replace(models.instruments, run_seed=seed),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with Ledger(path) as ledger:
        reason = synthesis(loaded, inputs, own).run(ledger)
        return {
            "stop": reason,
            "seconds": ledger.seconds()["synthesis"],
            **figures(loaded, ledger.candidates(), held_out, judge),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("--arm", action="append", nargs="+", metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--kept", type=int, default=150)
    parser.add_argument("--replicates", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--intents", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arms = {name: settings for name, *settings in options.arm} if options.arm else ARMS
    rows = [json.loads(line) for line in options.train.read_text().splitlines()]
    out = options.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    base = load_config(options.config)
    template = base.config.prompt_template or "{text}"
    held_out = [
        (extract_text(item.prompt, template) or "", intent_of(item.reference))
        for item in read_inputs(base.config, folder=base.folder).items
    ]
    judge = NaiveBayes([(row["text"], row["intent"]) for row in rows])
    results: dict[str, list[dict]] = {name: [] for name in arms}
    with synthesis_models(base, read_inputs(base.config, folder=base.folder), SILENT) as models:
        for replicate in options.replicates:
            seeds = out / f"{base.name}_{options.intents}_seeds_{replicate}.jsonl"
            drawn = draw_seeds(rows, template.rpartition("\n")[2], intents=options.intents, replicate=replicate)
            seeds.write_text("".join(json.dumps(row) + "\n" for row in drawn))
            for name, settings in arms.items():
                size = [f"synthesis.target_size={options.kept}", f"run.seed={replicate}", f"seeds={seeds.resolve()}"]
                loaded = load_config(options.config, [*size, *settings])
                found = run(
                    loaded, models, out / f"{base.name}_{options.intents}_{name}_{replicate}.sqlite", held_out, judge
                )
                results[name].append({"replicate": replicate, **found})
                print(json.dumps({"arm": name, **results[name][-1]}), file=sys.stderr, flush=True)
    document(__doc__.splitlines()[0], task=base.name, seed_intents=options.intents, arms=arms, results=results)


if __name__ == "__main__":
    main()
