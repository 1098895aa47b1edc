"""The canary: an engine proves on the seed prompts that its two sides are what they claim.

Wrong numbers come without an error: an adapter that is not applied, one that leaks into the base's rows, an output
layer whose adapter only counts in one of two code paths. Each would keep nothing, or everything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import Decoding, Engine, ScoreRequest, Weights, derive_seed
from tuneshift.errors import ModelError

EFFECT = 1e-3  # nats; below it an adapter changes nothing: equal computations measured exactly equal
DRIFT = 1e-3  # nats; the base's two readings are the same computation on the same floats
# Mean nats a token between two computations of one text: a guess above bf16's rounding, which is 0.06 in transformers
# (benchmarks/results/scoring_smollm2_short.json) and was 0.08 on vLLM's CPU path (the result was not kept).
AGREEMENT = 0.25
WRITTEN = Decoding(temperature=0.7, max_new_tokens=16)  # what F writes for the canary; 0.7 shows scaled logits

Logprobs = list[tuple[float, ...]]


@dataclass(frozen=True)
class Readings:
    """The log-probabilities in nats of the canary prompts' tokens, the first of each left out, under both sides."""

    base: Logprobs
    fine_tuned: Logprobs

    def distance(self, other: Readings) -> float:
        """Return the larger of both sides' mean distances in nats a token; NaN where a number is not finite."""
        sides = [mean_distance(self.base, other.base), mean_distance(self.fine_tuned, other.fine_tuned)]
        return max(sides) if all(map(math.isfinite, sides)) else math.nan


@dataclass(frozen=True)
class Canary:
    """What the engine proved, in nats a token.

    `adapter_effect` is the largest change of a seed token's log-probability; `base_drift` the mean distance
    between the base alone and beside its fine-tuning, `None` where their weights are separate; `scoring_gap` that
    between the log-probabilities that F samples with and those that it scores the same tokens with, `None` where F
    wrote nothing; `reference_gap` that to transformers' computation of the same, `None` where the engine is that
    computation or nothing is there to compare with.
    """

    adapter_effect: float
    base_drift: float | None
    scoring_gap: float | None
    reference_gap: float | None = None


def read(engine: Engine, prompts: Sequence[str], *, fine_tuned: bool) -> Logprobs:
    """Return the log-probabilities of the prompts' tokens under one side."""
    return engine.score(requests_of(engine, prompts), fine_tuned=fine_tuned)


def requests_of(engine: Engine, prompts: Sequence[str]) -> list[ScoreRequest]:
    """Return what to score: each prompt's tokens but the first."""
    encoded = [tuple(encode_prompt(engine.tokenizer, prompt)) for prompt in prompts]
    return [ScoreRequest(ids[:1], ids[1:]) for ids in encoded if len(ids) > 1]


def prove(
    engine: Engine,
    weights: Weights,
    prompts: Sequence[str],
    *,
    readings: Readings,
    alone: Logprobs | None,
    drift_limit: float = DRIFT,
    reference: Readings | None = None,
) -> Canary:
    """Return the canary of an opened engine; `alone` is the base's reading without its fine-tuning beside it.

    `reference` are transformers' readings of the same, `None` where the engine is transformers itself.

    Raises:
        ModelError: the fine-tuning changes nothing, harms the base, or is not what scores; a number is not finite; or
            the engine and transformers disagree.
    """
    base = readings.base if alone is None else alone  # beside a leaking adapter the base would equal F
    name, effect = weights.fine_tuning, largest_distance(base, readings.fine_tuned)
    if not math.isfinite(effect):
        raise ModelError(
            f"{name}: F's log-probabilities on the seed prompts are not finite numbers, so its weights are "
            "damaged. Copy it anew, or set run.dtype: float32 if it overflows."
        )
    if effect <= EFFECT:
        raise ModelError(
            f"{name}: changes nothing. On the seed prompts F's log-probabilities equal those of "
            f"{weights.name!r} within {effect:.1e} nats, so there is nothing to transfer. Check that this is the "
            "trained checkpoint and not a fresh one (its B matrices would be zero), and that the engine applies it."
        )
    drift = None if alone is None else mean_distance(alone, readings.base)
    if drift is not None and not drift <= drift_limit:
        raise ModelError(
            f"{name}: with the adapter switched off the base still differs by {drift:.1e} nats a token from the base "
            "alone, so its responses could not be trusted. Either this adapter changes weights outside LoRA "
            "layers, or the engine mixes its two sides up; merge it and give it as source.model."
        )
    canary = Canary(effect, drift, scoring_gap(engine, prompts))
    if canary.scoring_gap is not None and not canary.scoring_gap <= AGREEMENT:
        raise ModelError(
            f"{name}: F samples tokens with other log-probabilities than it scores them with ({canary.scoring_gap:.2g} "
            f"nats a token on average, at most {AGREEMENT} are expected), so no perplexity could be trusted. Servers "
            "leave out the adapter of an output layer (lm_head) when they score, or return log-probabilities after "
            "temperature. Merge the adapter and give it as source.model, or set engine.kind: hf."
        )
    if reference is None:
        return canary
    gap = readings.distance(reference)
    if not gap <= AGREEMENT:
        raise ModelError(
            f"{name}: the engine and transformers disagree on the seed prompts by {gap:.2g} nats a token on average; "
            f"at most {AGREEMENT} are expected from rounding. Check that the engine serves these very models, in "
            "run.dtype; `tuneshift doctor` tells more, and engine.kind: hf avoids it."
        )
    return replace(canary, reference_gap=gap)


def scoring_gap(engine: Engine, prompts: Sequence[str]) -> float | None:
    """Return the mean distance in nats between what F samples tokens with and what it scores them with.

    `None` where F writes nothing that could be scored.
    """
    encoded = [tuple(encode_prompt(engine.tokenizer, prompt)) for prompt in prompts]
    seeds = [derive_seed("canary", index) for index in range(len(encoded))]
    written = engine.generate(encoded, seeds=seeds, decoding=WRITTEN, fine_tuned=True)
    pairs = [(ids, c) for ids, c in zip(encoded, written, strict=True) if c.logprobs]
    if not pairs:
        return None
    scored = engine.score([ScoreRequest(ids, c.token_ids) for ids, c in pairs], fine_tuned=True)
    return mean_distance([c.logprobs or () for _, c in pairs], scored)


def mean_distance(first: Logprobs, second: Logprobs) -> float:
    """Return the mean absolute difference a token, in nats; NaN where a number is not finite, 0 for no token."""
    changes = _changes(first, second)
    return sum(changes) / len(changes) if changes else 0.0


def largest_distance(first: Logprobs, second: Logprobs) -> float:
    """Return the largest absolute difference of a token, in nats; NaN where a number is not finite, 0 for no token."""
    changes = _changes(first, second)
    return max(changes, default=0.0) if all(map(math.isfinite, changes)) else math.nan


def _changes(first: Logprobs, second: Logprobs) -> list[float]:
    return [abs(a - b) for a, b in zip(itertools.chain(*first), itertools.chain(*second), strict=True)]
