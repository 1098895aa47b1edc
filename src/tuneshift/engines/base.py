"""What an engine is: something that continues token ids and tells how likely given continuations are.

One protocol serves every model of a run: F and B (one engine, `fine_tuned` switches), the generator G, and the target
before and after. Text becomes ids in `tuneshift.encoding` alone, so F and B see identical ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tuneshift.encoding import Reader, decode_response, encode_response, truncate_at_stop
from tuneshift.errors import ModelError
from tuneshift.run.records import FinishReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. Temperature 0 is greedy; `top_k` 0 is off; `max_new_tokens` counts the EOS too."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What a model wrote behind a prompt.

    `token_ids` are the sampled ids up to the stop, without EOS; `logprobs` their raw log-probabilities in nats
    under the model that wrote them, before temperature and truncation of the distribution. When the stop string
    began inside a token, `reencoded` is true: the ids are then the cut text's, and `logprobs` is `None`. `eos` is the
    EOS that was sampled, with its log-probability; models know several.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    eos: tuple[int, float] | None
    finish_reason: FinishReason
    reencoded: bool

    @property
    def eos_logprob(self) -> float | None:
        """The log-probability of the sampled EOS, `None` where there is none."""
        return self.eos[1] if self.eos else None


def as_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    logprobs: Sequence[float],
    *,
    eos_ids: frozenset[int],
    stop: Sequence[str],
) -> Completion:
    """Return what sampled ids, an EOS at their end included, and their log-probabilities amount to as a response."""
    eos = (ids[-1], logprobs[-1]) if ids and ids[-1] in eos_ids else None
    ids, logprobs = (ids[:-1], logprobs[:-1]) if eos else (ids, logprobs)
    cut = truncate_at_stop(tokenizer, prompt_ids, ids, stop) if stop else None
    if cut is None:
        text = decode_response(tokenizer, prompt_ids, ids)
        return Completion(text, tuple(ids), tuple(logprobs), eos, "eos" if eos else "length", reencoded=False)
    if cut.kept is None:
        anew = tuple(encode_response(tokenizer, cut.text))
        return Completion(cut.text, anew, None, None, "stop", reencoded=True)
    return Completion(cut.text, tuple(ids[: cut.kept]), tuple(logprobs[: cut.kept]), None, "stop", reencoded=False)


@dataclass(frozen=True)
class Weights:
    """The models of one engine: a base, and its fine-tuning as a PEFT adapter or as a full checkpoint, or none.

    Each is a Hub id or a folder; `name` is what the configuration calls the base.
    """

    name: str
    base: str
    adapter: str | None = None
    checkpoint: str | None = None

    @property
    def fine_tuning(self) -> str | None:
        """The adapter or the checkpoint."""
        return self.adapter or self.checkpoint


@dataclass(frozen=True)
class ScoreRequest:
    """A continuation to score: the ids it follows, and its own ids, at least one of each."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """How F's and B's next-token distributions differ along a response: means over its tokens' positions, in nats.

    `kl_fb` is KL(p_F || p_B), `kl_bf` is KL(p_B || p_F); `entropy_f` and `entropy_b` are the entropies of p_F and p_B.
    A KL is infinite where one side rules out what the other does not.
    """

    kl_fb: float
    kl_bf: float
    entropy_f: float
    entropy_b: float


def check_ids(reader: Reader, texts: Sequence[Sequence[int]], *, room: int = 0) -> None:
    """Refuse what a model cannot read: a CPU raises an error of its own, a GPU or a server loses the whole process.

    Raises:
        ModelError: an id has no embedding, or a text with `room` more tokens does not fit into the context.
    """
    for ids in texts:
        objection = reader.objection(ids, room=room)
        if objection is not None:
            raise ModelError(f"In the prompt of {len(ids)} tokens {objection}. Use the model's own tokenizer.")


Told = Callable[[int], None]
"""Is called with how many of a call's texts are done."""


def untold(done: int) -> None:
    """Tell nobody."""


class Engine(Protocol):
    """A language model, with or without its fine-tuning."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the ids belong to."""

    @property
    def reader(self) -> Reader:
        """What the model can read: tokenizer, context, vocabulary."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        decoding: Decoding,
        fine_tuned: bool,
        told: Told = untold,
    ) -> list[Completion]:
        """Continue each prompt, in order. `seeds` holds one seed a prompt, used by nothing else.

        `told` is called with the number of prompts that are done, as often as the engine knows it.
        """

    def score(self, requests: Sequence[ScoreRequest], *, fine_tuned: bool) -> list[tuple[float, ...]]:
        """Return the raw log-probability in nats of each response token of each request, in order."""

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return how F and B differ along each response, in order.

        Raises:
            ModelError: the engine does not know whole distributions, or F and B have other vocabularies.
        """

    def describe(self) -> dict[str, Any]:
        """Return what was loaded and where it runs, for the manifest."""

    def close(self) -> None:
        """Free the weights."""


def derive_seed(*parts: object) -> int:
    """Return a 64-bit seed that depends on nothing but `parts`.

    Every random choice of a run is seeded by what it is for (run seed, role, id), so a run that was killed makes the
    same choices again, whatever is left to do.
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")
