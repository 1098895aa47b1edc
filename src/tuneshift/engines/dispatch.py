"""Many requests to one hosted model: who asks when, who asks again, and what may be spent.

One thread decides and writes to the ledger; the others only wait for their answer. So a `Retry-After` holds for all,
the budget is checked before each request, and every body is committed before it is read.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread

from tuneshift.engines.api import Answer, ApiSettings, ChatServer, Reply, read_reply, refusal
from tuneshift.engines.base import Decoding
from tuneshift.errors import GeneratorError
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import NO_USAGE, Usage

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds of backoff: those of the `openai` package
LONGEST_TOLD = 900.0  # seconds; a server that asks for more has closed for the day. A guess
NOTED_PAUSE = 10.0  # seconds after which a person wonders what is going on; a guess
FRAME_TOKENS = 32  # role and delimiters around one message: 7 with OpenAI's models; a guess that covers others


@dataclass(frozen=True)
class Question:
    """One prompt, under the id of the generator call that it makes."""

    id: str
    prompt: str


class HostedModel:
    """A model behind an API, asked under its rate limits, its `Retry-After` and the user's budget.

    The budget holds for a run's ledger together with `elsewhere`, what other runs of the same study took.
    """

    def __init__(self, settings: ApiSettings, *, note: Callable[[str], None] = lambda text: None) -> None:
        self.settings = settings
        self.elsewhere = NO_USAGE
        self._note = note
        self._open_at = -math.inf  # the instant of time.monotonic from which the next request may leave

    def check(self) -> None:
        """Prove that the server answers and takes the key; see `ChatServer.check`."""
        with ChatServer(self.settings) as server:
            server.check()

    def answer(self, questions: Sequence[Question], *, decoding: Decoding, ledger: Ledger) -> list[Reply]:
        """Return a reply to each question, in order; those that the ledger holds already are not asked again.

        Raises:
            GeneratorError: the server refuses, keeps failing, or the budget is reached. What was answered is in the
                ledger, so the same call goes on from there.
        """
        replies = [_stored(ledger, question.id) for question in questions]
        # Each is (instant from which to ask, index of the question, attempt).
        waiting = [(-math.inf, index, 1) for index, reply in enumerate(replies) if reply is None]
        running: dict[int, tuple[int, int]] = {}
        arrived: SimpleQueue[tuple[int, Answer | BaseException]] = SimpleQueue()
        failure: str | None = None
        with ChatServer(self.settings) as server:
            while running or (waiting and failure is None):
                pause = None  # until an answer arrives; after a failure those under way are still waited for
                if waiting and failure is None and len(running) < self.settings.concurrency:
                    pause = max(min(waiting)[0], self._open_at) - (now := time.monotonic())
                if pause is not None and pause <= 0 and arrived.empty():
                    # What failed most goes first: its next failures should not come when nothing else is left to do.
                    chosen = max((w for w in waiting if w[0] <= now), key=lambda w: (w[2], -w[1]))
                    _, index, attempt = chosen
                    room = bound(questions[index].prompt), decoding.max_new_tokens
                    exceeded = over_budget(self.settings, ledger.usage() + self.elsewhere, *room)
                    if exceeded is None:
                        waiting.remove(chosen)
                        number = ledger.begin_request(questions[index].id, *room)
                        running[number] = index, attempt
                        self._send(server, number, questions[index].prompt, decoding, arrived)
                        continue
                    if not running:
                        failure = exceeded
                        continue
                    pause = None  # those that run may end up cheaper than they might
                try:
                    number, answer = arrived.get(timeout=pause if pause is None else max(0.0, pause))
                except Empty:
                    continue
                if isinstance(answer, BaseException):
                    raise answer
                ledger.end_request(number, answer.status, answer.problem, answer.seconds, answer.body, answer.charged)
                index, attempt = running.pop(number)
                replies[index], refused, again = self._judge(answer, attempt)
                failure = failure or refused
                if replies[index] is None and failure is None:
                    waiting.append((again, index, attempt + 1))
        if failure is not None:
            raise GeneratorError(failure)
        return [reply for reply in replies if reply is not None]

    def _send(
        self,
        server: ChatServer,
        number: int,
        prompt: str,
        decoding: Decoding,
        arrived: SimpleQueue[tuple[int, Answer | BaseException]],
    ) -> None:
        def work() -> None:
            try:
                answer: Answer | BaseException = server.ask(prompt, decoding)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the thread that waits raises it
                answer = error
            arrived.put((number, answer))

        # Even spacing keeps every window of a minute within the limits.
        requests, tokens = self.settings.requests_per_minute, self.settings.tokens_per_minute
        spacing = max(
            60 / requests if requests else 0, 60 * (bound(prompt) + decoding.max_new_tokens) / tokens if tokens else 0
        )
        self._open_at = max(self._open_at, time.monotonic() + spacing)
        # A daemon: an interrupted run does not wait for answers.
        Thread(target=work, daemon=True, name=f"request-{number}").start()

    def _judge(self, answer: Answer, attempt: int) -> tuple[Reply | None, str | None, float]:
        """Return the reply, else why the run has to end, else when to ask again."""
        now = time.monotonic()
        told = answer.retry_at
        self._open_at = max(self._open_at, told or now)
        whole = answer.status is not None and 200 <= answer.status < 300
        reply = read_reply(answer.body) if whole else None
        refused = refusal(self.settings, answer)
        if reply is not None or refused is not None:
            return reply, refused, now
        problem = answer.problem or ("no whole chat completion with its usage" if whole else f"status {answer.status}")
        if attempt >= self.settings.max_attempts:
            return None, self._gave_up(f"{attempt} attempts failed, the last one with: {problem}"), now
        if told is not None and told - now > LONGEST_TOLD:
            return None, self._gave_up(f"it asks to come back in {told - now:.0f} s ({problem})"), now
        backoff = random.uniform(0.5, 1) * min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
        again = told if told is not None else now + backoff
        if again - now >= NOTED_PAUSE:
            self._note(f"{self.settings.base_url}: {problem}; asking again in {again - now:.0f} s")
        return None, None, again

    def _gave_up(self, why: str) -> str:
        return (
            f"generator.api: no answer from {self.settings.base_url}: {why}. What was answered is kept: run the same "
            "command later, with a lower generator.api.concurrency or requests_per_minute if it was the rate."
        )


def bound(prompt: str) -> int:
    """Return a number of tokens that a message cannot exceed: a token is at least one byte of UTF-8."""
    return len(prompt.encode("utf-8", errors="surrogatepass")) + FRAME_TOKENS


def cost(settings: ApiSettings, prompt_tokens: float, completion_tokens: float) -> float | None:
    """Return the cost in the currency of the configured prices, `None` without prices."""
    one, other = settings.price_per_million_input_tokens, settings.price_per_million_output_tokens
    return None if one is None or other is None else (prompt_tokens * one + completion_tokens * other) / 1e6


def over_budget(settings: ApiSettings, usage: Usage, prompt_bound: int, completion_bound: int) -> str | None:
    """Return why one more request might exceed the budget, `None` where it cannot.

    What was sent and not accounted for counts with the most that it may have cost.
    """
    spent = usage.prompt_tokens + usage.prompt_reserved, usage.completion_tokens + usage.completion_reserved
    checks = [
        ("max_tokens", settings.max_tokens, sum(spent), prompt_bound + completion_bound),
        ("max_cost", settings.max_cost, cost(settings, *spent), cost(settings, prompt_bound, completion_bound)),
    ]
    for name, limit, used, more in checks:
        if limit is not None and used is not None and more is not None and used + more > limit:
            return (
                f"generator.api.{name} = {limit:,.10g} is reached: {usage.requests} requests took {used:,.10g}, "
                f"{usage.unreported} of them counted at most, since they brought no count, and the next may take up to "
                f"{more:,.10g}. Raise the limit and run the same command: it goes on where it stopped."
            )
    return None


def _stored(ledger: Ledger, call_id: str) -> Reply | None:
    replies = (read_reply(body) for body in ledger.bodies(call_id))
    return next((reply for reply in replies if reply is not None), None)
