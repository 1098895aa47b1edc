"""What the ledger stores of a candidate: plain facts, from which every decision can be taken again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from tuneshift.scoring import perplexity

FinishReason = Literal["eos", "stop", "length"]
"""Why a response ended: the model's EOS, a stop string, or the length limit (then it is unfinished)."""

Strategy = Literal["forward", "backward", "probed", "listed"]
"""How a call asked: for more prompts like its demos, for prompts to a response, or not at all: they were in a file."""


@dataclass(frozen=True)
class Response:
    """A model's response to a candidate, scored under F.

    `token_ids` and `token_logprobs` cover the response without EOS and without the stop string; log-probabilities
    are raw (before temperature), in nats, under F, whichever model wrote the response. `eos_logprob` is set when
    the response ended with EOS. `reencoded` tells that the ids are not the sampled ones but the text's, because
    the writer had another tokenizer or the stop string began inside a token. `base_logprobs` and `base_eos_logprob`
    are what B itself found of the tokens as it sampled them. Of tokens that B did not sample it is not known, and
    `base_logprobs` is `None`: in every y_f, which B is not asked about, and in a y_b that is `reencoded`.
    """

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    eos_logprob: float | None
    finish_reason: FinishReason
    reencoded: bool
    base_logprobs: tuple[float, ...] | None = None
    base_eos_logprob: float | None = None

    @property
    def n_tokens(self) -> int:
        """N of the paper's eq. 4: tokens without EOS."""
        return len(self.token_ids)

    @property
    def sum_logprob(self) -> float:
        """Sum of the tokens' log-probabilities under F, in nats, without EOS."""
        return sum(self.token_logprobs)

    def perplexity(self, *, count_eos: bool = False) -> float:
        """Return PPL_F; with `count_eos` the EOS counts as a token where one was generated."""
        if count_eos and self.eos_logprob is not None:
            return perplexity(self.sum_logprob + self.eos_logprob, self.n_tokens + 1)
        return perplexity(self.sum_logprob, self.n_tokens)

    def finite_perplexity(self, *, count_eos: bool) -> float | None:
        """Return PPL_F, `None` for a response that has no tokens or no finite score."""
        found = self.perplexity(count_eos=count_eos) if self.n_tokens else math.nan
        return found if math.isfinite(found) else None


def call_id(round_index: int, index: int) -> str:
    """Return the id of a round's call: its name and not its order, since its digits do not bound how many there are."""
    return f"r{round_index:04d}-c{index:03d}"


@dataclass(frozen=True)
class GeneratorCall:
    """One call of the prompt generator.

    `demos` are the ids of the pool items shown to it; `raw` is what it wrote, before any parsing, one entry per
    continuation, with `finished` false where the length limit cut it. `decoding` holds the fields of `Decoding`. `cue`
    is the kind of response that prompts were wanted for: in a backward call that of its last demo's, in a probed one
    that of F's to probes, in others `None`.
    """

    id: str
    round: int
    demos: tuple[str, ...]
    prompt: str
    raw: tuple[str, ...]
    finished: tuple[bool, ...]
    generated_tokens: int
    seconds: float
    decoding: dict[str, Any]
    strategy: Strategy = "forward"
    cue: str | None = None


@dataclass(frozen=True)
class Usage:
    """What a run's requests to an API took.

    `prompt_tokens` and `completion_tokens` are the server's own counts. `unreported` requests may have been charged
    and brought no count (no answer in time, a torn body, a kill); the most that they took is reserved for them.
    """

    requests: int
    unreported: int
    prompt_tokens: int
    completion_tokens: int
    prompt_reserved: int
    completion_reserved: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


@dataclass(frozen=True)
class Probe:
    """A single word that F was asked in the template, and what it said."""

    word: str
    response: str


NO_USAGE = Usage(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Candidate:
    """A generated prompt, its two responses and what was decided about it.

    `text` is what the generator wrote, `prompt` the text in its template. Candidates dropped before they were
    answered have no responses. `reason` is "kept", or why it was dropped. `measures` are the numbers that criteria
    other than the paper's need, by name (see `tuneshift.measuring`): `None` was tried and is not finite, a name that is
    missing was not tried.
    """

    id: str
    round: int
    call_id: str
    text: str
    prompt: str
    kept: bool
    reason: str
    y_f: Response | None = None
    y_b: Response | None = None
    measures: Mapping[str, float | None] = field(default_factory=dict)
