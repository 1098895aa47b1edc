"""Whether the configured engine means the same by its numbers as transformers does.

The engine answers the seeds as a run would, F and B in turn, and tells how likely each answer is under F. Then
transformers, one answer at a time with the adapter switched on, tells the same. What counts is whether decisions
change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from tuneshift.config import LoadedConfig
from tuneshift.criteria import Criterion, decide
from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import ScoreRequest
from tuneshift.engines.canary import largest_distance, mean_distance
from tuneshift.engines.opening import open_reference
from tuneshift.engines.source import Answers
from tuneshift.evaluate.stats import Proportion
from tuneshift.preflight import read_inputs
from tuneshift.progress import SILENT, Progress
from tuneshift.run.records import Candidate, Response
from tuneshift.wiring import answer_decoding, criterion_of, engine_options, open_run_source, source_weights

PAIRS = 32  # of a prompt and a response, half of them F's
MEAN_DIFFERENCE = 0.1  # nats a token: a guess above bf16's 0.06 (benchmarks/results/scoring_smollm2_short.json)
COMPARED = frozenset({"tau", "tau_f", "tau_b", "ratio"})  # what rules compare perplexities with
FLIPS = 0.125  # share of changed decisions: 2 of 16. A guess; each lies within rounding of tau
USABLE = Criterion(name="none")  # keeps whatever a rule can judge


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found; log-probabilities are in nats a token, `None` where there is no reference.

    `flips` lists the decisions that changed, with both perplexities under both computations.
    """

    engine: dict[str, Any]
    canary: dict[str, Any]
    pairs: int
    mean_difference: float | None
    largest_difference: float | None
    decisions: int
    flips: list[dict[str, Any]]
    flip_rate: float | None
    flip_interval: dict[str, float] | None
    agrees: bool | None
    reason: str

    def lines(self) -> list[str]:
        """Return the diagnosis for people."""
        shown = {key: value for key, value in self.canary.items() if value is not None}
        lines = [
            "engine: " + ", ".join(f"{key} {value}" for key, value in self.engine.items() if value is not None),
            "canary: " + ", ".join(f"{key} {value:.2g} nats" for key, value in shown.items()),
        ]
        if self.mean_difference is not None and self.flip_interval is not None:
            low, high = self.flip_interval["low"], self.flip_interval["high"]
            lines += [
                f"log-probabilities: mean difference {self.mean_difference:.4f} nats a token over {self.pairs} pairs, "
                f"largest {self.largest_difference:.3f}",
                f"decisions: {len(self.flips)} of {self.decisions} change ({self.flip_rate:.1%}; 95 % interval "
                f"{low:.1%} to {high:.1%})",
            ]
        return [*lines, *(f"changed: {flip}" for flip in self.flips), self.reason]


def examine(loaded: LoadedConfig, *, progress: Progress = SILENT) -> Diagnosis:
    """Compare the configured engine with transformers on `PAIRS` answers to the seeds.

    Raises:
        UserError: an input is wrong, or the engine's own proof fails; see `tuneshift.engines.canary`.
    """
    inputs = read_inputs(loaded.config, folder=loaded.folder)
    seeds = itertools.islice(itertools.cycle(inputs.seeds), PAIRS // 2)
    prompts = {f"doctor-{number:02d}": seed.prompt for number, seed in enumerate(seeds)}
    # Seeds come round more than once, so the answers are drawn: a greedy one would be the same each time.
    decoding = replace(answer_decoding(loaded), temperature=1.0)
    progress.note(f"Opening the source: {loaded.config.source.base}")
    with closing(open_run_source(loaded, inputs.seeds, substitute=True)) as source:
        progress.note(f"F and B answer {len(prompts)} prompts")
        answers = source.answer(prompts, decoding=decoding, run_seed=loaded.config.run.seed)
        tokenizer, described, canary = source.engine.tokenizer, source.engine.describe(), asdict(source.canary)
    weights = source_weights(loaded)
    if weights.fine_tuning is None:
        return _unknown(described, canary, "nothing to compare with: set source.adapter or source.model")
    judged = [name for name in prompts if decide(_candidate(name, prompts[name], answers[name]), USABLE).kept]
    if not judged:
        return _unknown(
            described,
            canary,
            "nothing to decide on: what F or B answers to the seeds is empty, or F's hits the limit. "
            "Check the seeds, synthesis.stop and synthesis.max_new_tokens",
        )
    progress.note("transformers scores the same answers")
    written = [(name, response) for name in prompts for response in _both(answers[name]) if response.token_ids]
    requests = [ScoreRequest(tuple(encode_prompt(tokenizer, prompts[name])), r.token_ids) for name, r in written]
    one_by_one = replace(engine_options(loaded), kind="hf", workers=1, ray_address=None, batch_size=1)
    with closing(open_reference(weights, one_by_one)) as reference:
        scored = reference.score(requests, fine_tuned=True)
    again = {id(response): logprobs for (_, response), logprobs in zip(written, scored, strict=True)}
    criterion = criterion_of(loaded)
    # Measures are not in the records that are compared here, and what looks at no perplexity never changes its mind.
    if criterion.needs() or not COMPARED.intersection(criterion.rule.reads):
        criterion = replace(criterion, name="ppl_diff")
    return _diagnosis(described, canary, {name: prompts[name] for name in judged}, answers, again, criterion)


def _diagnosis(
    described: dict[str, Any],
    canary: dict[str, Any],
    prompts: dict[str, str],
    answers: dict[str, Answers],
    again: dict[int, tuple[float, ...]],
    criterion: Criterion,
) -> Diagnosis:
    """Compare; `again` maps a response's identity to transformers' log-probabilities of its tokens.

    `prompts` are those whose answers a rule can judge, by name, at least one.
    """
    compared = [r for both in answers.values() for r in _both(both) if id(r) in again]
    ours, theirs = [r.token_logprobs for r in compared], [again[id(r)] for r in compared]
    mean = mean_distance(ours, theirs)
    flips = []
    for name, prompt in prompts.items():
        here = decide(_candidate(name, prompt, answers[name]), criterion)
        there = decide(_candidate(name, prompt, _rescored(answers[name], again)), criterion)
        if here.kept != there.kept:
            flips.append({"prompt": prompt, "engine": _shown(here), "transformers": _shown(there)})
    rate = Proportion(len(flips), len(prompts))
    agrees = mean <= MEAN_DIFFERENCE and rate.accuracy <= FLIPS
    return Diagnosis(
        engine=described,
        canary=canary,
        pairs=len(compared),
        mean_difference=mean if math.isfinite(mean) else None,
        largest_difference=largest_distance(ours, theirs) if math.isfinite(mean) else None,
        decisions=len(prompts),
        flips=flips,
        flip_rate=rate.accuracy,
        flip_interval=asdict(rate.interval()),
        agrees=agrees,
        reason=f"{'agrees' if agrees else 'does not agree'} with transformers: expected are at most {MEAN_DIFFERENCE} "
        f"nats a token and {FLIPS:.1%} of the decisions",
    )


def _unknown(described: dict[str, Any], canary: dict[str, Any], reason: str) -> Diagnosis:
    return Diagnosis(described, canary, 0, None, None, 0, [], None, None, None, reason)


def _both(answers: Answers) -> Sequence[Response]:
    return [response for response in (answers.y_f, answers.y_b) if response is not None]


def _candidate(name: str, prompt: str, answers: Answers) -> Candidate:
    return Candidate(name, 0, "doctor", prompt, prompt, False, "", answers.y_f, answers.y_b)


def _rescored(answers: Answers, again: dict[int, tuple[float, ...]]) -> Answers:
    def rescored(response: Response) -> Response:
        return replace(response, token_logprobs=again.get(id(response), response.token_logprobs))

    return Answers(rescored(answers.y_f), None if answers.y_b is None else rescored(answers.y_b))


def _shown(candidate: Candidate) -> dict[str, Any]:
    ppl = {key: r and round(r.perplexity(), 4) for key, r in (("y_f", candidate.y_f), ("y_b", candidate.y_b))}
    return {**ppl, "reason": candidate.reason}
