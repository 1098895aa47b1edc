"""F and B behind one door: both answer a prompt, and F scores both answers (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuneshift.adapters import check_adapter_base
from tuneshift.encoding import encode_prompt, encode_response
from tuneshift.engines.base import Completion, Decoding, Engine, ScoreRequest, Told, Weights, derive_seed, untold
from tuneshift.engines.canary import Canary
from tuneshift.engines.opening import open_engine, open_proved
from tuneshift.engines.options import EngineOptions
from tuneshift.models import resolve_model
from tuneshift.run.records import Response


@dataclass(frozen=True)
class Answers:
    """The responses to one prompt, scored under F; `y_b` is `None` where B was not asked."""

    y_f: Response
    y_b: Response | None


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
        say: Callable[[str], None] = lambda info: None,
    ) -> dict[str, Answers]:
        """Let F answer each prompt, and B where F's response is `worth` it; score the answers under F.

        `prompts` maps a candidate's id, which seeds the randomness of its answers, to its prompt. `say` is told who
        has answered how many.
        """
        if not prompts:
            return {}
        y_f = self._answers_of_f(prompts, decoding, run_seed, lambda n: say(f"F: {n} of {len(prompts)} answers"))
        asked = {name: prompts[name] for name in prompts if worth(y_f[name])}
        y_b = self.answer_base(
            asked, decoding=decoding, run_seed=run_seed, told=lambda n: say(f"B: {n} of {len(asked)} answers")
        )
        return {name: Answers(y_f=y_f[name], y_b=y_b.get(name)) for name in prompts}

    def answer_base(
        self,
        prompts: Mapping[str, str],
        *,
        decoding: Decoding,
        run_seed: int,
        role: str = "y_b",
        before: str = "",
        told: Told = untold,
    ) -> dict[str, Response]:
        """Let B answer each prompt with `before` standing before it; F scores the answers behind the prompt alone.

        `prompts` is as in `answer`; `role` seeds the randomness too; `told` is as in `Engine.generate`.
        """
        if not prompts:
            return {}
        told(0)
        writer = self.substitute or self.engine
        own = [tuple(encode_prompt(writer.tokenizer, before + prompt)) for prompt in prompts.values()]
        seeds = [derive_seed(run_seed, role, name) for name in prompts]
        written = writer.generate(own, seeds=seeds, decoding=decoding, fine_tuned=False, told=told)
        if self.substitute is not None:
            written = [self._reencoded(completion) for completion in written]
        encoded = [tuple(encode_prompt(self.engine.tokenizer, prompt)) for prompt in prompts.values()]
        return dict(zip(prompts, self._scored(encoded, written, own=False), strict=True))

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

    def _answers_of_f(
        self, prompts: Mapping[str, str], decoding: Decoding, run_seed: int, told: Told
    ) -> dict[str, Response]:
        told(0)
        encoded = [tuple(encode_prompt(self.engine.tokenizer, prompt)) for prompt in prompts.values()]
        seeds = [derive_seed(run_seed, "y_f", name) for name in prompts]
        written = self.engine.generate(encoded, seeds=seeds, decoding=decoding, fine_tuned=True, told=told)
        if self.substitute is not None:  # y_b will take the path through text: both suffer the same re-encoding
            written = [self._reencoded(completion) for completion in written]
        return dict(zip(prompts, self._scored(encoded, written, own=True), strict=True))

    def _reencoded(self, completion: Completion) -> Completion:
        ids = tuple(encode_response(self.engine.tokenizer, completion.text))
        return Completion(completion.text, ids, None, None, completion.finish_reason, reencoded=True)

    def _scored(
        self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion], *, own: bool
    ) -> list[Response]:
        """Return responses with F's log-probabilities, and what B found of its own tokens as it sampled them.

        F's own (`own`), as sampled, need no second pass.
        """
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
                    base_logprobs=None if own else completion.logprobs,
                    base_eos_logprob=None if own else completion.eos_logprob,
                )
            )
        return responses


def open_source(
    weights: Weights,
    *,
    engines: EngineOptions,
    canary_prompts: Sequence[str],
    same_base: bool = False,
    substitute_base: str | None = None,
) -> Source:
    """Open F and B, and prove on `canary_prompts` that they differ and that B is unharmed.

    Raises:
        ModelError: a model cannot be loaded, the adapter belongs to another base, it changes nothing, or a substitute
            base was asked of an engine that serves none.
    """
    if weights.adapter is not None and not same_base:
        check_adapter_base(weights.adapter, weights.name)
    engine, canary = open_proved(weights, engines, canary_prompts)
    try:
        substitute = (
            open_engine(Weights(substitute_base, resolve_model(substitute_base)), engines) if substitute_base else None
        )
    except BaseException:
        engine.close()
        raise
    return Source(engine, substitute=substitute, canary=canary)
