"""Step 3, where a criterion needs another pass of a model: measures, one number a candidate, kept in the ledger.

l_M(y) is the mean log-probability of y's tokens (without EOS) under M; "along y" is the mean over the positions of y's
tokens, each distribution given the prompt and the tokens before.

    logprob_b_f         l_B(y_f), nats a token
    kl                  KL(p_F || p_B) along y_f, nats a token
    entropy_f           H(p_F) along y_f, nats a token
    entropy_b           H(p_B) along y_f, nats a token
    kl_b                KL(p_B || p_F) along y_b, nats a token
    entropy_b_yb        H(p_B) along y_b, nats a token
    few_shot_ppl        PPL_F(y_b5), where B wrote y_b5 behind demonstrations and F reads it behind the prompt alone
    few_shot_ppl_eos    the same with the EOS counted, where B wrote one
    logprob_t_byte      the sum of T's log-probabilities of y_f's text, in T's own tokens, nats a UTF-8 byte
    vote_K              share of K new answers of F, at temperature 1, whose normalised text is y_f's
    exec                1 where the program in y_f compiles, defines a function and executes without an error, else 0

The paper's eq. 8, E[m_F] = (H(p_B) - H(p_F)) + KL(p_B || p_F), is estimated token-wise: m_F on both responses,
H(p_F) along y_f, H(p_B) and KL(p_B || p_F) along y_b, so that every expectation is taken over the responses of the
model that it belongs to. It is exact where y_f and y_b are drawn at temperature 1 and have one given length. Where they
end by themselves, the token that ends them (an EOS, a stop string) is left out of both sides, and a mean over a random
number of tokens is no longer a mean of entropies: the two sides then differ a little, and the report shows both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from tuneshift import sandbox
from tuneshift.criteria import Criterion, unmeasured
from tuneshift.datafiles import Seed
from tuneshift.encoding import encode_prompt, encode_response
from tuneshift.engines.base import Decoding, Engine, ScoreRequest, derive_seed
from tuneshift.engines.source import Source
from tuneshift.evaluate.benchmarks.programs import processors, program_of
from tuneshift.prompts.screening import normalize
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate, Response

SHARD = 128  # candidates that are measured and committed together; a batch's default rows. A kill loses at most one
Measures = dict[str, dict[str, float]]
"""By candidate and name; NaN and infinity are what was tried and gave no number."""


@dataclass(frozen=True)
class Instruments:
    """What measures are taken with: `source` and `target` open F with B and T when they are first called.

    `demonstrations` are the seeds shown to B, with their responses; `decoding` is how F and B answer; `runs` tells
    whether a program runs.
    """

    source: Callable[[], Source]
    target: Callable[[], Engine]
    demonstrations: Sequence[Seed]
    decoding: Decoding
    run_seed: int
    runs: Callable[[str], bool] = sandbox.runs

    def measure(self, candidates: Sequence[Candidate], criterion: Criterion, *, gated: bool = False) -> list[Candidate]:
        """Return the candidates, with what the criterion needs measured where it is missing; see `unmeasured`.

        Raises:
            ModelError: a model cannot be opened, or cannot tell what the criterion needs.
        """
        lacking = unmeasured(candidates, criterion, gated=gated)
        found = PASSES[criterion.name](self, lacking, criterion) if lacking else {}
        return [replace(c, measures={**c.measures, **_finite(found.get(c.id, {}))}) for c in candidates]


def measure_stored(
    ledger: Ledger, criterion: Criterion, instruments: Instruments, on_shard: Callable[[int], None] = lambda done: None
) -> None:
    """Measure what the criterion needs on a ledger's candidates, and commit `SHARD` of them at a time.

    A repeated call goes on with the rest. `on_shard` is told how many are done.
    """
    lacking = unmeasured(ledger.candidates(), criterion, gated=False)
    for start in range(0, len(lacking), SHARD):
        shard = lacking[start : start + SHARD]
        ledger.record_measures(instruments.measure(shard, criterion))
        on_shard(start + len(shard))


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _mean_logprobs_of_b(tools: Instruments, candidates: Sequence[Candidate], criterion: Criterion) -> Measures:
    engine = tools.source().engine
    requests = [_request(engine, c.prompt, response) for c, response in _responses(candidates)]
    scores = engine.score(requests, fine_tuned=False)
    return {c.id: {"logprob_b_f": sum(s) / len(s)} for c, s in zip(candidates, scores, strict=True)}


def _distributions(tools: Instruments, candidates: Sequence[Candidate], criterion: Criterion) -> Measures:
    """Compare F and B along y_f, and along y_b where there is one."""
    engine = tools.source().engine
    along_y_f = engine.compare([_request(engine, c.prompt, response) for c, response in _responses(candidates)])
    measures: Measures = {
        c.id: {"kl": one.kl_fb, "entropy_f": one.entropy_f, "entropy_b": one.entropy_b}
        for c, one in zip(candidates, along_y_f, strict=True)
    }
    answered = [(c, c.y_b) for c in candidates if c.y_b is not None and c.y_b.n_tokens]
    along_y_b = engine.compare([_request(engine, c.prompt, y_b) for c, y_b in answered])
    for (c, _), one in zip(answered, along_y_b, strict=True):
        measures[c.id] |= {"kl_b": one.kl_bf, "entropy_b_yb": one.entropy_b}
    return measures


def _few_shot_perplexities(tools: Instruments, candidates: Sequence[Candidate], criterion: Criterion) -> Measures:
    """Let B answer behind the demonstrations; NaN where they leave no room in B's context, or B says nothing."""
    source = tools.source()
    # A blank line stands between examples: lm-evaluation-harness's default fewshot_delimiter.
    before = "".join(f"{seed.prompt}{seed.response}\n\n" for seed in tools.demonstrations)
    reader, room = (source.substitute or source.engine).reader, tools.decoding.max_new_tokens
    fitting = {
        c.id: c.prompt
        for c in candidates
        if reader.objection(encode_prompt(reader.tokenizer, before + c.prompt), room=room) is None
    }
    answers = source.answer_base(fitting, decoding=tools.decoding, run_seed=tools.run_seed, role="y_b5", before=before)
    both = {"few_shot_ppl": False, "few_shot_ppl_eos": True}

    def perplexity(candidate: Candidate, count_eos: bool) -> float:
        answer = answers.get(candidate.id)
        return answer.perplexity(count_eos=count_eos) if answer is not None and answer.n_tokens else math.nan

    return {c.id: {name: perplexity(c, count_eos) for name, count_eos in both.items()} for c in candidates}


def _bytewise_logprobs_of_t(tools: Instruments, candidates: Sequence[Candidate], criterion: Criterion) -> Measures:
    """Let T score y_f's text; NaN where T cannot read it."""
    engine = tools.target()
    tokenizer, requests = engine.tokenizer, {}
    for c, y_f in _responses(candidates):
        prompt, text = tuple(encode_prompt(tokenizer, c.prompt)), tuple(encode_response(tokenizer, y_f.text))
        if text and engine.reader.objection(prompt + text, room=1) is None:
            requests[c.id] = ScoreRequest(prompt, text)
    sums = dict(zip(requests, map(sum, engine.score(list(requests.values()), fine_tuned=False)), strict=True))
    return {
        c.id: {"logprob_t_byte": sums.get(c.id, math.nan) / len(y_f.text.encode())} for c, y_f in _responses(candidates)
    }


def _votes(tools: Instruments, candidates: Sequence[Candidate], criterion: Criterion) -> Measures:
    engine = tools.source().engine
    draws = range(criterion.samples)
    prompts = [tuple(encode_prompt(engine.tokenizer, c.prompt)) for c in candidates for _ in draws]
    seeds = [derive_seed(tools.run_seed, "vote", c.id, draw) for c in candidates for draw in draws]
    decoding = replace(tools.decoding, temperature=1.0, top_p=1.0, top_k=0)
    written = iter(engine.generate(prompts, seeds=seeds, decoding=decoding, fine_tuned=True))
    (name,) = criterion.needs()
    measures: Measures = {}
    for candidate, y_f in _responses(candidates):
        agreeing = sum(normalize(next(written).text) == normalize(y_f.text) for _ in draws)
        measures[candidate.id] = {name: agreeing / criterion.samples}
    return measures


def _runs(tools: Instruments, candidates: Sequence[Candidate], criterion: Criterion) -> Measures:
    programs = [program_of(response.text) for _, response in _responses(candidates)]
    with ThreadPoolExecutor(processors()) as pool:
        return {c.id: {"exec": float(runs)} for c, runs in zip(candidates, pool.map(tools.runs, programs), strict=True)}


PASSES: dict[str, Callable[[Instruments, Sequence[Candidate], Criterion], Measures]] = {
    "lift": _mean_logprobs_of_b,
    "kl": _distributions,
    "entropy_drop": _distributions,
    "few_shot_base": _few_shot_perplexities,
    "target_gap": _bytewise_logprobs_of_t,
    "vote": _votes,
    "exec": _runs,
}
"""What measures, for the criteria that read measures; every candidate gets all that `Criterion.needs` names."""
BY_TARGET = ("target_gap",)
"""Those that T measures, and no other model."""


def _responses(candidates: Sequence[Candidate]) -> list[tuple[Candidate, Response]]:
    return [(candidate, candidate.y_f) for candidate in candidates if candidate.y_f is not None]


def _request(engine: Engine, prompt: str, response: Response) -> ScoreRequest:
    return ScoreRequest(tuple(encode_prompt(engine.tokenizer, prompt)), response.token_ids)
