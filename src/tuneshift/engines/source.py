"""F and B behind one door: both answer a prompt, and F scores both answers (paper, section 3.2).

Opening a source proves that its two sides are what they claim: the base with the adapter switched off equals the base
before the adapter was loaded, and the fine-tuned side differs from it. An adapter that silently is not applied
would otherwise keep nothing, or everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuneshift.encoding import encode_prompt, encode_response
from tuneshift.engines.base import Completion, Decoding, Engine, ScoreRequest, derive_seed
from tuneshift.engines.hf import HfEngine
from tuneshift.errors import ModelError
from tuneshift.models import LoadOptions, check_adapter_base, resolve_model
from tuneshift.run.records import Response

CANARY_TOLERANCE = 1e-3  # nats; the base's two readings are the same computation and measured exactly equal here


@dataclass(frozen=True)
class Answers:
    """The responses to one prompt, scored under F; `y_b` is `None` where B was not asked."""

    y_f: Response
    y_b: Response | None


@dataclass(frozen=True)
class Canary:
    """Proof that the adapter acts: the largest change in nats of a token's log-probability on the seed prompts.

    `base_drift` compares the base before and after the adapter was loaded (adapter off) and should be 0; it is
    `None` for a full checkpoint or a substitute base, where base and fine-tuned weights are separate.
    """

    adapter_effect: float
    base_drift: float | None


class Source:
    """The fine-tuned model F and its base B (or a substitute base with a tokenizer of its own)."""

    def __init__(self, engine: Engine, *, substitute: Engine | None = None, canary: Canary) -> None:
        self.engine = engine
        self.substitute = substitute
        self.canary = canary

    def answer(
        self,
        prompts: Mapping[str, str],
        *,
        decoding: Decoding,
        run_seed: int,
        worth: Callable[[Response], bool] = lambda y_f: True,
    ) -> dict[str, Answers]:
        """Let F answer each prompt, and B where F's response is `worth` it; score the answers under F.

        `prompts` maps a candidate's id, which seeds the randomness of its answers, to its prompt.
        """
        if not prompts:
            return {}
        y_f = self._answers_of_f(prompts, decoding, run_seed)
        y_b = self._answers_of_b({name: prompts[name] for name in prompts if worth(y_f[name])}, decoding, run_seed)
        return {name: Answers(y_f=y_f[name], y_b=y_b.get(name)) for name in prompts}

    def engines(self) -> list[Engine]:
        """Return the engines behind F and B."""
        return [self.engine, *([self.substitute] if self.substitute else [])]

    def describe(self) -> dict[str, Any]:
        """Return both engines' descriptions for the manifest."""
        substitute = self.substitute.describe() if self.substitute else None
        return {"fine_tuned_and_base": self.engine.describe(), "substitute_base": substitute}

    def close(self) -> None:
        """Free the weights."""
        for engine in self.engines():
            engine.close()

    def _answers_of_f(self, prompts: Mapping[str, str], decoding: Decoding, run_seed: int) -> dict[str, Response]:
        encoded = [tuple(encode_prompt(self.engine.tokenizer, prompt)) for prompt in prompts.values()]
        seeds = [derive_seed(run_seed, "y_f", name) for name in prompts]
        written = self.engine.generate(encoded, seeds=seeds, decoding=decoding, fine_tuned=True)
        if self.substitute is not None:  # y_b will take the path through text: both suffer the same re-encoding
            written = [self._reencoded(completion) for completion in written]
        return dict(zip(prompts, self._scored(encoded, written, own=True), strict=True))

    def _answers_of_b(self, prompts: Mapping[str, str], decoding: Decoding, run_seed: int) -> dict[str, Response]:
        if not prompts:
            return {}
        writer = self.substitute or self.engine
        own = [tuple(encode_prompt(writer.tokenizer, prompt)) for prompt in prompts.values()]
        seeds = [derive_seed(run_seed, "y_b", name) for name in prompts]
        written = writer.generate(own, seeds=seeds, decoding=decoding, fine_tuned=False)
        encoded = own
        if self.substitute is not None:
            written = [self._reencoded(completion) for completion in written]
            encoded = [tuple(encode_prompt(self.engine.tokenizer, prompt)) for prompt in prompts.values()]
        return dict(zip(prompts, self._scored(encoded, written, own=False), strict=True))

    def _reencoded(self, completion: Completion) -> Completion:
        ids = tuple(encode_response(self.engine.tokenizer, completion.text))
        return Completion(completion.text, ids, None, None, completion.finish_reason, reencoded=True)

    def _scored(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion], *, own: bool
    ) -> list[Response]:
        """Return responses with F's log-probabilities; F's own, as sampled, need no second pass (`own`)."""
        requests, missing = [], []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ending = () if completion.eos is None else completion.eos[:1]
            ids = completion.token_ids + ending
            if ids and not (own and completion.logprobs is not None):
                requests.append(ScoreRequest(prompt, ids))
                missing.append(index)
        scores = dict(zip(missing, self.engine.score(requests, fine_tuned=True) if requests else [], strict=True))
        responses = []
        for index, completion in enumerate(completions):
            n_tokens = len(completion.token_ids)
            logprobs, eos = completion.logprobs or (), completion.eos_logprob
            if index in scores:
                logprobs = scores[index][:n_tokens]
                eos = scores[index][n_tokens] if len(scores[index]) > n_tokens else None
            responses.append(
                Response(
                    text=completion.text,
                    token_ids=completion.token_ids,
                    token_logprobs=logprobs,
                    eos_logprob=eos,
                    finish_reason=completion.finish_reason,
                    reencoded=completion.reencoded,
                )
            )
        return responses


def open_source(
    *,
    base: str,
    adapter: str | None = None,
    model: str | None = None,
    substitute_base: str | None = None,
    same_base: bool = False,
    canary_prompts: Sequence[str],
    load: LoadOptions,
) -> Source:
    """Load F and B, and prove on `canary_prompts` that they differ and that B is unharmed.

    Raises:
        ModelError: a model cannot be loaded, the adapter belongs to another base, or it changes nothing.
    """
    path = resolve_model(base)
    if adapter is not None:
        if not same_base:
            check_adapter_base(adapter, base)
        engine = HfEngine.open(path, load=load)
        alone = _prompt_logprobs(engine, canary_prompts, fine_tuned=False)
        engine.attach(adapter)
        drift = _largest_change(alone, _prompt_logprobs(engine, canary_prompts, fine_tuned=False))
    elif model is not None:
        engine = HfEngine.open(path, load=load, fine_tuned=resolve_model(model))
        drift = None
    else:
        raise ModelError("source: give either `adapter` or `model`; without one F would equal B.")
    tuned = _prompt_logprobs(engine, canary_prompts, fine_tuned=True)
    effect = _largest_change(_prompt_logprobs(engine, canary_prompts, fine_tuned=False), tuned)
    if not math.isfinite(effect):
        raise ModelError(
            f"{adapter or model}: F's log-probabilities on the seed prompts are not finite numbers, so its weights are "
            "damaged. Copy it anew, or set run.dtype: float32 if it overflows."
        )
    if effect <= CANARY_TOLERANCE:
        raise ModelError(
            f"{adapter or model}: changes nothing. On the seed prompts F's log-probabilities equal those of "
            f"{base!r} within {effect:.1e} nats, so there is nothing to transfer. Check that this is the trained "
            "checkpoint and not a fresh one (its B matrices would be zero)."
        )
    if drift is not None and drift > CANARY_TOLERANCE:
        raise ModelError(
            f"{adapter}: with the adapter switched off the base still differs by {drift:.1e} nats from the base "
            "loaded alone, so its responses could not be trusted. This adapter changes weights outside LoRA layers; "
            "merge it and give it as source.model."
        )
    substitute = HfEngine.open(resolve_model(substitute_base), load=load) if substitute_base else None
    return Source(engine, substitute=substitute, canary=Canary(effect, drift))


def _prompt_logprobs(engine: Engine, prompts: Sequence[str], *, fine_tuned: bool) -> list[tuple[float, ...]]:
    requests = []
    for prompt in prompts:
        ids = tuple(encode_prompt(engine.tokenizer, prompt))
        if len(ids) > 1:
            requests.append(ScoreRequest(ids[:1], ids[1:]))
    return engine.score(requests, fine_tuned=fine_tuned)


def _largest_change(first: Sequence[tuple[float, ...]], second: Sequence[tuple[float, ...]]) -> float:
    pairs = zip(first, second, strict=True)
    changes = [abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)]
    return max(changes, default=0.0) if all(map(math.isfinite, changes)) else math.nan
