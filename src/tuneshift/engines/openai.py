"""F and B behind servers that speak OpenAI's completions and return prompt log-probabilities, as vLLM's does.

Token ids go out and come back, never text: the server neither adds a BOS nor decodes and encodes again, and each answer
is checked against what was asked. One request a prompt, so that each has its own seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tuneshift.encoding import Reader
from tuneshift.engines.base import (
    Comparison,
    Completion,
    Decoding,
    ScoreRequest,
    Told,
    as_completion,
    check_ids,
    untold,
)
from tuneshift.engines.options import Endpoint
from tuneshift.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMPOSSIBLE = -9999.0  # JSON has no infinity: vLLM sends this instead
ADDRESS = "Check that the address is that of a server with OpenAI's completions; it often ends in /v1."
LOOPBACK = ("127.0.0.1", "::1", "localhost")
TIMEOUT = 600.0  # seconds for one answer, the time in the server's queue included; a guess
RETRIES = 4  # the package's own, with its backoff: a server of one's own is seldom busy for long; a guess


@dataclass(frozen=True)
class Sampled:
    """A choice of a completion: its ids with their log-probabilities in nats, and the prompt's where asked for."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_logprobs: tuple[float, ...]


class OpenAIEngine:
    """An `Engine` on one or two servers.

    Args:
        base: where B, or a model without a fine-tuning, is.
        fine_tuned: where F is; `None` for a model without a fine-tuning.
        tokenizer: the tokenizer of both.
        vocabulary_size: how many ids the model has embeddings for.
        eos_ids: the ids that end a text.
        concurrency: requests at the same time.
    """

    def __init__(
        self,
        *,
        base: Endpoint,
        fine_tuned: Endpoint | None,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary_size: int,
        eos_ids: frozenset[int],
        concurrency: int,
    ) -> None:
        self._endpoints = {False: base, True: fine_tuned}
        self._tokenizer = tokenizer
        self.eos_ids = eos_ids
        self._concurrency = concurrency
        self._clients = {side: _client(endpoint) for side, endpoint in self._endpoints.items() if endpoint is not None}
        try:
            listed = [self._listed(side) for side in self._clients]
        except BaseException:
            OpenAIEngine.close(self)
            raise
        lengths = [int(entry["max_model_len"]) for entry in listed if entry.get("max_model_len")]
        # A scored text is a prompt to the server, which writes at least one token behind it.
        readable = min(lengths) - 1 if lengths else None
        self._reader = Reader(tokenizer, readable, vocabulary_size)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of both sides."""
        return self._tokenizer

    @property
    def reader(self) -> Reader:
        """What both sides can read, as far as the servers tell."""
        return self._reader

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        decoding: Decoding,
        fine_tuned: bool,
        told: Told = untold,
    ) -> list[Completion]:
        """Continue each prompt, in order."""
        check_ids(self._reader, prompts)
        sampling = {
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
            "stop": list(decoding.stop),
        }

        def ask(item: tuple[Sequence[int], int]) -> Sampled:
            return self._ask(item[0], fine_tuned, seed=item[1] % 2**63, **sampling)

        written = self._together(ask, list(zip(prompts, seeds, strict=True)), told)
        return [
            as_completion(self._tokenizer, prompt, w.ids, w.logprobs, eos_ids=self.eos_ids, stop=decoding.stop)
            for prompt, w in zip(prompts, written, strict=True)
        ]

    def score(self, requests: Sequence[ScoreRequest], *, fine_tuned: bool) -> list[tuple[float, ...]]:
        """Return each response token's raw log-probability in nats."""
        return self.score_mixed([(request, fine_tuned) for request in requests])

    def score_mixed(self, requests: Sequence[tuple[ScoreRequest, bool]]) -> list[tuple[float, ...]]:
        """Score requests of both sides at the same time; each comes with `fine_tuned`."""
        check_ids(self._reader, [(*request.prompt_ids, *request.response_ids) for request, _ in requests])

        def ask(item: tuple[ScoreRequest, bool]) -> tuple[float, ...]:
            request, fine_tuned = item
            ids = (*request.prompt_ids, *request.response_ids)
            read = self._ask(ids, fine_tuned, max_tokens=1, temperature=0, prompt_logprobs=0)
            return read.prompt_logprobs[len(request.prompt_ids) - 1 :]

        return self._together(ask, list(requests))

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Refuse: a server tells the log-probabilities of tokens, not whole distributions."""
        raise ModelError("Servers do not tell whole distributions: comparing F's with B's needs engine.kind: hf.")

    def describe(self) -> dict[str, Any]:
        """Return which models answer where."""
        sides = {"model": self._endpoints[False], "fine_tuned": self._endpoints[True]}
        shown = {side: e and {"base_url": e.base_url, "model": e.model} for side, e in sides.items()}
        return {"engine": "openai", **shown}

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()

    def _together(self, ask: Callable[[Any], Any], items: Sequence[Any], told: Told = untold) -> list[Any]:
        answers: list[Any] = []
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                for answer in pool.map(ask, items):
                    answers.append(answer)
                    told(len(answers))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return answers

    def _listed(self, side: bool) -> dict[str, Any]:
        """Return the server's entry of a model, which proves address, key and name."""
        endpoint = self._endpoints[side]
        assert endpoint is not None
        known = _entries(self._call(side, lambda client: client.models.with_raw_response.list()), "data", endpoint)
        for entry in known:
            if entry["id"] == endpoint.model:
                return dict(entry)
        names = ", ".join(repr(entry["id"]) for entry in known)
        raise ModelError(f"{endpoint.base_url}: the server has no model {endpoint.model!r}; it has {names}.")

    def _ask(self, prompt: Sequence[int], fine_tuned: bool, **options: Any) -> Sampled:
        """Send a prompt's ids to one side, with every sampling setting that a server may have another default for."""
        endpoint = self._endpoints[fine_tuned]
        if endpoint is None:
            raise ModelError("no adapter or fine-tuned checkpoint is served")
        extra = {
            "top_k": options.pop("top_k", 0),
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "add_special_tokens": False,
            "return_token_ids": True,
            "stop_token_ids": sorted(self.eos_ids),
            "prompt_logprobs": options.pop("prompt_logprobs", None),
        }
        answer = self._call(
            fine_tuned,
            lambda client: client.completions.with_raw_response.create(
                model=endpoint.model,
                prompt=list(prompt),
                logprobs=0,
                presence_penalty=0,
                frequency_penalty=0,
                extra_body=extra,
                **options,
            ),
        )
        return read_choice(answer, prompt, endpoint, scores=extra["prompt_logprobs"] is not None)

    def _call(self, side: bool, call: Callable[[Any], Any]) -> dict[str, Any]:
        from openai import APIConnectionError, APIStatusError

        endpoint = self._endpoints[side]
        assert endpoint is not None
        try:
            answer: dict[str, Any] = json.loads(call(self._clients[side]).http_response.content)
        except APIStatusError as error:
            said = " ".join(error.response.text.split())[:300]
            raise ModelError(
                f"{endpoint.base_url}: the server answers with status {error.status_code} ({said}). Check the engine's "
                "endpoints, their keys, and that the server takes token ids as the prompt of a completion."
            ) from error
        except APIConnectionError as error:
            raise ModelError(
                f"{endpoint.base_url}: no answer ({error.__cause__ or error}). Check that the server runs; the same "
                "command goes on from the last whole round."
            ) from error
        except ValueError as error:
            raise ModelError(f"{endpoint.base_url}: the answer is no JSON ({error}). {ADDRESS}") from error
        return answer


def read_choice(answer: dict[str, Any], prompt: Sequence[int], endpoint: Endpoint, *, scores: bool) -> Sampled:
    """Return the first choice of a completion, proved to be an answer to `prompt`.

    Raises:
        ModelError: the server leaves out what the method needs, or read another prompt.
    """
    choice = _entries(answer, "choices", endpoint)[0]
    logprobs: Any = (choice.get("logprobs") or {}).get("token_logprobs")
    found = {
        "the ids of the sampled tokens (token_ids)": choice.get("token_ids"),
        "the ids of the prompt (prompt_token_ids)": choice.get("prompt_token_ids"),
        "log-probabilities of the sampled tokens (logprobs)": logprobs,
        "log-probabilities of the prompt (prompt_logprobs)": choice.get("prompt_logprobs") if scores else (),
    }
    lacking = [name for name, value in found.items() if value is None]
    if lacking:
        raise ModelError(
            f"{endpoint.base_url}: the completions of {endpoint.model!r} lack {' and '.join(lacking)}, without which F "
            "cannot score. vLLM's server returns them; behind other servers a model can still be the prompt generator "
            "(generator.api)."
        )
    if choice["prompt_token_ids"] != list(prompt) or len(choice["token_ids"]) != len(logprobs):
        raise ModelError(
            f"{endpoint.base_url}: the server read other tokens than it was sent, so its numbers belong to another "
            "text. Check that it takes token ids as they are, and that its model is the configured one."
        )
    entries = zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True) if scores else ()
    return Sampled(
        ids=tuple(choice["token_ids"]),
        logprobs=tuple(map(_nats, logprobs)),
        prompt_logprobs=tuple(_nats(entry[str(token)]["logprob"]) for token, entry in entries),
    )


def _entries(answer: dict[str, Any], name: str, endpoint: Endpoint) -> list[dict[str, Any]]:
    """Return the one or more entries of an answer's list.

    Raises:
        ModelError: it has none: something else answers there, or an error came with the status of a success.
    """
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, list) or not found:
        raise ModelError(f"{endpoint.base_url}: the answer has no {name!r} ({str(answer)[:300]}). {ADDRESS}")
    return found


def _nats(value: float | None) -> float:
    if value is None:
        return math.nan
    return -math.inf if value <= IMPOSSIBLE else value


def _client(endpoint: Endpoint) -> Any:
    try:
        from openai import DefaultHttpxClient, OpenAI
    except ImportError as error:
        raise ConfigError(
            "engine.kind: the package `openai` is not installed. Run: pip install 'tuneshift[openai]'."
        ) from error
    # Without a key the package would send that of OPENAI_API_KEY, whoever the server is.
    key = endpoint.api_key or "none"
    here = urlsplit(endpoint.base_url).hostname in LOOPBACK
    http = DefaultHttpxClient(trust_env=not here)  # a proxy of the environment does not see this machine's loopback
    return OpenAI(api_key=key, base_url=endpoint.base_url, timeout=TIMEOUT, max_retries=RETRIES, http_client=http)
