"""One request to a chat-completions server, and what came of it.

The `openai` package makes the connection, with its own retries off: when to ask again is decided in
`tuneshift.engines.dispatch`, for all requests together. Nothing here raises for what a server or a network does.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import mktime_tz, parsedate_tz
from typing import Any

from tuneshift.configfile import VARIABLE
from tuneshift.engines.base import Decoding
from tuneshift.errors import ConfigError, GeneratorError

RETRIED = (408, 409, 425, 429)  # and 5xx: those that the `openai` package retries, and 425 "too early" (RFC 8470)
NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError")  # httpx: the request did not leave


@dataclass(frozen=True)
class ApiSettings:
    """Where a hosted model is and how it may be asked; the units are those of the configuration's `generator.api`."""

    base_url: str
    model: str
    api_key: str | None = field(repr=False)
    limit_field: str
    concurrency: int
    requests_per_minute: float | None
    tokens_per_minute: float | None
    timeout: float
    max_attempts: int
    max_tokens: int | None
    max_cost: float | None
    price_per_million_input_tokens: float | None
    price_per_million_output_tokens: float | None


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    `status` is the HTTP status, `None` where no whole answer came, and `problem` then says why. `charged` tells whether
    the server may count its tokens. `retry_at` is the instant of `time.monotonic` before which it wants no request.
    """

    status: int | None
    body: str
    problem: str | None
    charged: bool
    seconds: float
    retry_at: float | None = None


@dataclass(frozen=True)
class Reply:
    """What the model wrote, with the tokens that the server counted; `finished` is false at the length limit."""

    text: str
    finished: bool
    prompt_tokens: int
    completion_tokens: int


def read_reply(body: str) -> Reply | None:
    """Return the first choice of a chat completion; `None` for a body that is torn, or has no choice or usage."""
    try:
        content = json.loads(body)
        choice, usage = content["choices"][0], content["usage"]
        return Reply(
            text=str(choice["message"]["content"] or ""),
            finished=choice["finish_reason"] != "length",
            prompt_tokens=int(usage["prompt_tokens"]),
            completion_tokens=int(usage["completion_tokens"]),
        )
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None


def read_secret(reference: str | None, *, setting: str) -> str | None:
    """Return the value of the environment variable that `reference`, such as "${OPENAI_API_KEY}", names.

    Raises:
        ConfigError: it is not set, or cannot stand in an HTTP header; the message never shows the value.
    """
    if reference is None:
        return None
    name = VARIABLE.sub(r"\1", reference)
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"{setting}: {reference} is not set in the environment, or empty. Export the key as {name}.")
    if not (value.isascii() and value.isprintable() and " " not in value):
        raise ConfigError(f"{setting}: what {reference} holds is no key: it has spaces or characters beyond ASCII.")
    return value


def told_wait(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return how many seconds `Retry-After` asks for, in either of its forms; `None` where it says nothing readable.

    A date is compared with the server's own `Date`, which is cut to whole seconds, so the wait is never too short,
    whatever the clocks say. `now` is the local time in seconds since the epoch, for a server that sends no `Date`.
    """
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        at, date = _epoch(value), _epoch(headers.get("date", ""))
        seconds = at - (now if date is None else date) if at is not None else math.nan
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _epoch(date: str) -> float | None:
    parsed = parsedate_tz(date)
    try:
        return None if parsed is None else float(mktime_tz(parsed))
    except (ValueError, OverflowError):
        return None


class ChatServer:
    """A connection to the server, as a context manager; `ask` may be called from several threads at once."""

    def __init__(self, settings: ApiSettings) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ConfigError(
                "generator.api: the package `openai` is not installed. Run: pip install 'tuneshift[openai]'."
            ) from error
        self._settings = settings
        # Without a key the package would send that of OPENAI_API_KEY, whoever the server is.
        key = settings.api_key or "none"
        self._client = OpenAI(api_key=key, base_url=settings.base_url, timeout=settings.timeout, max_retries=0)

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def ask(self, prompt: str, decoding: Decoding) -> Answer:
        """Send one user message, and return what came of it."""
        limit: dict[str, Any] = {self._settings.limit_field: decoding.max_new_tokens}
        return self._answer(
            lambda: self._client.chat.completions.with_raw_response.create(
                model=self._settings.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                **limit,
            )
        )

    def check(self) -> None:
        """Ask for the list of models, which costs nothing, to prove address and key; not every server has the list.

        Raises:
            GeneratorError: no server answers, or it refuses the key.
        """
        answer = self._answer(self._client.models.with_raw_response.list)
        if answer.status is None:
            raise GeneratorError(
                f"generator.api: {self._settings.base_url} does not answer ({answer.problem}). Check "
                "generator.api.base_url and the network."
            )
        if answer.status == 401:
            raise GeneratorError(refusal(self._settings, answer) or "")

    def _answer(self, call: Any) -> Answer:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        started = time.monotonic()
        try:
            response = call().http_response
        except APIStatusError as error:
            response = error.response
        except APIConnectionError as error:
            cause = type(error.__cause__).__name__
            problem = "no answer in time" if isinstance(error, APITimeoutError) else f"connection failed: {cause}"
            return Answer(None, "", problem, cause not in NEVER_SENT, time.monotonic() - started)
        arrived, status = time.monotonic(), int(response.status_code)
        wait = told_wait(response.headers, now=time.time())
        body = response.content.decode("utf-8", errors="replace")
        if self._settings.api_key:
            body = body.replace(self._settings.api_key, "(key)")
        retry_at = None if wait is None else arrived + wait
        return Answer(status, body, None, 200 <= status < 300, arrived - started, retry_at)


def refusal(settings: ApiSettings, answer: Answer) -> str | None:
    """Return what the user has to mend where asking again cannot help, else `None`."""
    status, (code, said) = answer.status, _server_error(answer.body)
    if status is None or 200 <= status < 300 or status >= 500:
        return None
    if status in RETRIED and code != "insufficient_quota":
        return None
    remedy = {
        401: "Check the key in the variable that generator.api.api_key names.",
        403: f"Check that the key may use the model {settings.model!r}.",
        404: f"Check generator.api.model = {settings.model!r}, and generator.api.base_url, which often ends in /v1.",
        429: "The account's quota is used up: add credit, then run the same command; it goes on where it stopped.",
    }.get(status, "Check generator.api.model, generator.api.limit_field and the generator's sampling settings.")
    return f"generator.api: {settings.base_url} refuses the request with status {status} ({said}). {remedy}"


def _server_error(body: str) -> tuple[str | None, str]:
    """Return the code and the message of an error's body; the body's beginning where it has another form."""
    try:
        error = json.loads(body)["error"]
        code, message = error.get("code"), str(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        code, message = None, body
    return code, " ".join(message.split())[:200] or "no message"
