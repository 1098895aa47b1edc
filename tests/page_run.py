"""Finished runs for the page's tests, written through the project's own ledger: any texts, any scores, no models."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from conftest import CORPUS, make_tokenizer, write_jsonl

from tuneshift.config import check_config
from tuneshift.criteria import Criterion, decide
from tuneshift.dataset import kept_rows
from tuneshift.engines.base import Decoding
from tuneshift.evaluate.tasks import Outcome
from tuneshift.evaluate.verdict import ARMS, judge
from tuneshift.models import file_sha256
from tuneshift.pipeline import what_it_took
from tuneshift.prompts.parsing import fill_template
from tuneshift.run.directory import RunDirectory, jsonl, write_atomically, write_json
from tuneshift.run.ledger import Ledger, RoundSummary
from tuneshift.run.manifest import origin
from tuneshift.run.records import Candidate, FinishReason, GeneratorCall, Response
from tuneshift.run.resume import open_ledger

PER_CALL = 20
TEMPLATE = "Request: {text}\nIntent:"
TIES = (1.2, 1.5, 1.6, 2.0, 2.25)
"""Perplexities that many responses have, as nearly as a float can say it: thresholds fall on them."""

OWN = (0.31, 10.22, 0.0, 10.23, 0.3, 333.0)
"""What B found of its tokens, in nats: about the numbers from which the page writes one with another digit."""


@dataclass(frozen=True)
class Written:
    """What a candidate of a made run says: prompt and both answers."""

    prompt: str
    y_f: str
    y_b: str


def plain_texts(size: int) -> list[Written]:
    rng = random.Random(1)
    words = " ".join(CORPUS[:5]).split()
    return [
        Written(f"{' '.join(rng.choices(words, k=7))} {number}", " play a song", rng.choice([" book a table", " play"]))
        for number in range(size)
    ]


def make_run(
    folder: Path,
    texts: Sequence[Written],
    *,
    name: str = "made",
    evaluated: bool = True,
    count_eos: bool = False,
    model_name: str = "model",
    prose: bool = False,
    rule: dict[str, Any] | None = None,
) -> RunDirectory:
    """Write a finished run of `texts`; some candidates are unanswered, unscored, cut off, not finite or encoded anew.

    `rule` is what its `criterion` says beside; the decisions stay the default rule's. With `prose` every response has
    the same 40 tokens, so that a large run is quick to make.
    """
    tokenizer = make_tokenizer(44, bos=False)
    tokenizer.save_pretrained(folder / model_name)
    write_jsonl(folder / "seeds.jsonl", [{"prompt": fill_template(text, TEMPLATE)} for text in CORPUS[:4]])
    questions = [{"prompt": fill_template(f"{text} please", TEMPLATE), "reference": "x"} for text in CORPUS[:5]]
    write_jsonl(folder / "test.jsonl", questions)
    raw: dict[str, Any] = {
        "source": {"base": model_name, "adapter": "adapter"},
        "target": {"model": model_name},
        "seeds": "seeds.jsonl",
        "prompt_template": TEMPLATE,
        "criterion": {"tau": 1.5, "count_eos": count_eos, **(rule or {})},
        "synthesis": {"max_new_tokens": 12},
    }
    digests = {"seeds": file_sha256(folder / "seeds.jsonl")}
    if evaluated:
        raw["evaluation"] = {"data": "test.jsonl"}
        digests["evaluation.data"] = file_sha256(folder / "test.jsonl")
    loaded = check_config(raw, folder=folder, name=name, shown_as="made")
    candidates = _candidates(texts, Criterion(count_eos=count_eos), tokenizer, prose)
    run = RunDirectory(folder / "run")
    with run, open_ledger(loaded, run, digests) as ledger:
        tokenizer.save_pretrained(run.adapter)
        model = {"reference": str(folder / model_name), "path": str(folder / model_name)}
        ledger.set_meta(stop_reason="enough", models=json.dumps({"source.base": model, "target.model": model}))
        _record(ledger, candidates)
        rows = kept_rows([c for c in candidates if c.kept], ledger.calls(), count_eos=count_eos)
        write_atomically(run.dataset, jsonl(rows))
        training = {"steps": 8, "losses": [2.5, 1.25, 0.5], "trained_tokens": 900, "seconds": 3.5}
        write_json(run.training, training | {"target_modules": ["q_proj"]})
        write_json(run.verdict, _verdict(evaluated) | {
            "criterion": loaded.config.criterion.name, "trained_pairs": len(rows), **what_it_took(loaded, ledger, rows)
        })  # fmt: skip
    return run


def made_origin(run: RunDirectory) -> dict[str, Any]:
    with Ledger(run.ledger) as ledger:
        return origin(ledger)


def _candidates(texts: Sequence[Written], criterion: Criterion, tokenizer: Any, prose: bool) -> list[Candidate]:
    rng = random.Random(2)
    same = tuple(tokenizer(" play a song", add_special_tokens=False)["input_ids"]) * 8
    found = []
    for number, written in enumerate(texts):
        kind = number % 10

        def response(text: str, end: FinishReason = "eos", finite: bool = True) -> Response:
            ids = same if prose else tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            wanted = rng.choice([*TIES, math.exp(rng.expovariate(2))])
            logprobs = tuple(-math.log(wanted) for _ in ids) if finite else (-math.inf,) * len(ids)
            eos = -rng.random() if end == "eos" else None
            return Response(" play a song" * 8 if prose else text, ids, logprobs, eos, end, False)

        call = number // PER_CALL
        answered = kind != 7
        candidate = Candidate(
            id=f"r{call:04d}-c000-p{number % PER_CALL:03d}",
            round=call,
            call_id=f"r{call:04d}-c000",
            text=written.prompt,
            prompt=fill_template(written.prompt, TEMPLATE),
            kept=False,
            reason="kept" if answered else "duplicate",
            y_f=response(written.y_f, "length" if kind == 4 else "eos") if answered else None,
            y_b=_own(response(written.y_b, finite=kind != 3), kind == 6) if answered and kind != 5 else None,
        )
        found.append(decide(candidate, criterion))
    return found


def _own(y_b: Response, reencoded: bool) -> Response:
    """Return B's response with what B found of its tokens, or as one whose tokens B did not sample."""
    if reencoded:
        return replace(y_b, reencoded=True)
    found = tuple(-OWN[place % len(OWN)] for place in range(y_b.n_tokens))
    return replace(y_b, base_logprobs=found, base_eos_logprob=y_b.eos_logprob and -0.05)


def _record(ledger: Ledger, candidates: Sequence[Candidate]) -> None:
    rng, pool = random.Random(3), [f"s{number:03d}" for number in range(4)]
    decoding = asdict(Decoding(temperature=1.0, max_new_tokens=12))
    for call in sorted({c.call_id for c in candidates}):
        own = [c for c in candidates if c.call_id == call]
        demos = tuple(rng.sample(pool, min(5, len(pool))))
        raw = tuple(c.text for c in own)
        ledger.record_calls(
            [GeneratorCall(call, own[0].round, demos, "examples", raw, (True,) * len(own), 9, 0.5, decoding)]
        )
        ledger.record_round(RoundSummary(own[0].round, 1.5, 1.0, decoding), own)
        pool += [c.id for c in own if c.kept]


def _verdict(evaluated: bool) -> dict[str, Any]:
    if not evaluated:
        nothing = dict.fromkeys((*ARMS, "mcnemar_p", "recovery", "chance", "regression", "questions"))
        return {"improved": None, "reason": "No evaluation is configured, so nothing was measured.", **nothing}
    rights = {"before": 1, "after": 9, "source": 11, "base": 2}
    arms = {
        arm: [Outcome(f"e{n:05d}", "x", n < right, "eos", {"exact_match": n < right}) for n in range(12)]
        for arm, right in rights.items()
    }
    return {
        **judge(**arms),
        "chance": 0.25,
        "chance_reason": None,
        "regression": None,
        "questions": {"metric": "exact_match"},
    }
