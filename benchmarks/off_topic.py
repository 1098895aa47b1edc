"""Question: of what a run can know without the data, what tells off-topic prompts best?

    python benchmarks/off_topic.py CONFIG.yaml TRAIN.jsonl LEDGER.sqlite ... [--real 200]

CONFIG.yaml is examples/snips/intents.yaml or calls.yaml, each ledger a finished synthesis of it with the seeds of the
configuration or, beside it, of SEEDS.jsonl: LEDGER.sqlite=SEEDS.jsonl. TRAIN.jsonl is the data set's own split, with
{"text", "intent"} a line. A prompt that is off topic has no right intent, so a kept prompt counts as on topic where a
naive Bayes classifier that learnt all of TRAIN.jsonl says what F said. Told is each signal's AUC: the chance that a
prompt on topic has more of it than one that is off. Signals that need no answer also tell real requests of TRAIN.jsonl
from kept prompts. 0.5 tells nothing. Nothing is generated but `vote`'s answers. Prints one JSON document.

- `sure`: F's mean log-probability of y_f.
- `vote`: the share of five new answers of F that say the same.
- `steady`: the share of five copies of the prompt, each without one of its words, to which F greedily says the same.
- `support`: how many kept responses are like y_f.
- `asked`: whether F answered what a backward call had asked for (of those calls' prompts alone).
- `shallow`: minus the number of generator calls between the prompt and the seeds.
- `near`: the cosine to the nearest seed, by a sentence model where there is one, else by TF-IDF (`embedded_by`).
- `likely`: G's mean log-probability of the prompt behind the seeds; `likelier`: less that without the seeds.
- `moved`: F's mean log-probability of the prompt in the template less B's.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from measure import document
from reach import NaiveBayes, intent_of
from sklearn.metrics import roc_auc_score

from tuneshift.config import load_config
from tuneshift.coverage import answer_of, densities, kinds_of
from tuneshift.criteria import Criterion
from tuneshift.datafiles import Seed
from tuneshift.encoding import encode_prompt, encode_response
from tuneshift.engines.base import Engine, ScoreRequest
from tuneshift.preflight import read_inputs
from tuneshift.progress import SILENT
from tuneshift.prompts.generators import PromptGenerator, few_shot_prompt
from tuneshift.prompts.parsing import fill_template
from tuneshift.prompts.pool import Plan, PoolItem
from tuneshift.prompts.screening import normalize
from tuneshift.report.embedding import embed
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate, GeneratorCall, Response
from tuneshift.wiring import SynthesisModels, synthesis_models

SHORTENED = 5  # copies of each prompt, as many as `vote` has answers


@dataclass(frozen=True)
class Asked:
    """What the prompts are written for: the template, the seeds, and the generator's instruction."""

    template: str
    seeds: Sequence[Seed]
    instruction: str | None


def mean_logprobs(engine: Engine, before: str, texts: Sequence[str], *, fine_tuned: bool = False) -> list[float]:
    """Return the mean log-probability in nats of each text's tokens behind `before`."""
    tokenizer = engine.tokenizer
    prefix = tuple(encode_prompt(tokenizer, before))
    requests = [ScoreRequest(prefix, tuple(encode_response(tokenizer, text))) for text in texts]
    return [sum(scores) / len(scores) for scores in engine.score(requests, fine_tuned=fine_tuned)]


def of_prompts(models: SynthesisModels, asked: Asked, texts: Sequence[str]) -> dict[str, list[float]]:
    """Return the signals that need no answer."""
    assert isinstance(models.generator, PromptGenerator)
    writer, source = models.generator.engine, models.source.engine
    shown = Plan("", tuple(PoolItem(seed.id, seed.text) for seed in asked.seeds))
    with_seeds, without = (
        few_shot_prompt(plan, between="\n", instruction=asked.instruction) for plan in (shown, Plan("", ()))
    )
    lines = [f" {text}\n" for text in texts]
    likely, plain = (mean_logprobs(writer, before, lines) for before in (with_seeds, without))
    before = asked.template.partition("{text}")[0].rstrip()
    of_f, of_b = (mean_logprobs(source, before, [f" {t}" for t in texts], fine_tuned=side) for side in (True, False))
    return {
        "likely": likely,
        "likelier": [a - b for a, b in zip(likely, plain, strict=True)],
        "moved": [a - b for a, b in zip(of_f, of_b, strict=True)],
    }


def nearness(seeds: Sequence[str], texts: Sequence[str]) -> tuple[list[float], str]:
    """Return the cosine of each text to its nearest seed, and what embedded them."""
    embedding = embed([*seeds, *texts])
    lengths = np.linalg.norm(embedding.vectors, axis=1, keepdims=True)
    unit = embedding.vectors / np.maximum(lengths, 1e-12)  # a text without known words is near to nothing
    near = (unit[len(seeds) :] @ unit[: len(seeds)].T).max(axis=1)
    return near.tolist(), embedding.described


def steadiness(models: SynthesisModels, template: str, pairs: Sequence[tuple[Candidate, Response]]) -> list[float]:
    """Return the share of shortened copies of each prompt to which F says the same; 0 for prompts of one word."""
    copies = {
        f"{c.id} {left_out}": fill_template(" ".join(words[:left_out] + words[left_out + 1 :]), template)
        for c, _ in pairs
        if len(words := c.text.split()) > 1
        for left_out in random.Random(c.id).sample(range(len(words)), min(SHORTENED, len(words)))
    }
    answers = models.source.answer(
        copies, decoding=replace(models.instruments.decoding, temperature=0.0), run_seed=0, worth=lambda y_f: False
    )
    same: dict[str, list[bool]] = defaultdict(list)
    said = {c.id: normalize(y_f.text) for c, y_f in pairs}
    for name, answer in answers.items():
        candidate = name.partition(" ")[0]
        same[candidate].append(normalize(answer.y_f.text) == said[candidate])
    return [fmean(same[c.id]) if same[c.id] else 0.0 for c, _ in pairs]


def depths(kept: Sequence[Candidate], calls: Mapping[str, GeneratorCall]) -> list[float]:
    """Return for each kept candidate how many calls lie between it and the seeds, along its longest descent."""
    found: dict[str, int] = {}
    for candidate in kept:
        found[candidate.id] = 1 + max((found.get(demo, 0) for demo in calls[candidate.call_id].demos), default=0)
    return [float(found[candidate.id]) for candidate in kept]


def wanted(call: GeneratorCall) -> str | None:
    """Return the response that a backward call asked for: what stands behind its last bullet."""
    return call.prompt.rpartition("\n")[2].removeprefix("-").strip().removesuffix(":") or None


def auc(right: Sequence[bool], signal: Sequence[float]) -> float | None:
    return None if len(set(right)) < 2 else float(roc_auc_score(right, signal))


def of_ledger(
    models: SynthesisModels, asked: Asked, path: Path, judge: NaiveBayes, real: Sequence[str]
) -> dict[str, Any]:
    """Return the power of each signal on one synthesis."""
    with Ledger(path, read_only=True) as ledger:
        calls = {call.id: call for call in ledger.calls()}
        pairs = [(c, c.y_f) for c in ledger.candidates() if c.kept and c.y_f is not None]
    kept = [candidate for candidate, _ in pairs]
    voting = Criterion("vote", samples=5)
    voted, (vote,) = models.instruments.measure(kept, voting), voting.needs()
    texts, kinds = [c.text for c in kept], kinds_of(list(map(answer_of, kept)))
    own, theirs = (of_prompts(models, asked, of) for of in (texts, real))
    near, embedded_by = nearness([seed.text for seed in asked.seeds], [*texts, *real])
    own["near"], theirs["near"] = near[: len(texts)], near[len(texts) :]
    right = [judge.tell(c.text) == intent_of(y_f.text) for c, y_f in pairs]
    signals = {
        "sure": [y_f.sum_logprob / y_f.n_tokens for _, y_f in pairs],
        "vote": [c.measures[vote] or 0.0 for c in voted],
        "steady": steadiness(models, asked.template, pairs),
        "support": densities(kinds),
        "shallow": [-depth for depth in depths(kept, calls)],
        **own,
    }
    backward = [place for place, c in enumerate(kept) if calls[c.call_id].strategy in ("backward", "probed")]
    asked_for = [float(wanted(calls[kept[place].call_id]) == kinds[place]) for place in backward]
    return {
        "kept": len(kept),
        "on_topic": sum(right),
        "auc": {name: auc(right, values) for name, values in signals.items()}
        | {"asked": auc([right[place] for place in backward], asked_for)},
        "backward": len(backward),
        "embedded_by": embedded_by,
        "auc_of_real": {
            name: auc([True] * len(real) + [False] * len(kept), [*theirs[name], *own[name]]) for name in own
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("ledgers", nargs="+")
    parser.add_argument("--real", type=int, default=200)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.train.read_text().splitlines()]
    judge = NaiveBayes([(row["text"], row["intent"]) for row in rows])
    real = [row["text"].strip() for row in random.Random(0).sample(rows, options.real)]
    loaded = load_config(options.config)
    results = []
    with synthesis_models(loaded, read_inputs(loaded.config, folder=loaded.folder), SILENT) as models:
        for place in options.ledgers:
            path, _, seeds = place.partition("=")
            own = load_config(options.config, [f"seeds={Path(seeds).resolve()}"] if seeds else [])
            read = read_inputs(own.config, folder=own.folder).seeds
            asked = Asked(loaded.config.prompt_template or "{text}", read, loaded.config.generator.instruction)
            results.append({"ledger": Path(path).name, **of_ledger(models, asked, Path(path), judge, real)})
    document(__doc__.splitlines()[0], task=loaded.name, real=len(real), results=results)


if __name__ == "__main__":
    main()
