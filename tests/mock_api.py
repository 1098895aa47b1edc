"""A chat-completions server on this machine that fails as real ones do, by a seeded plan, and keeps its own books.

What happens to a request depends on its content and on how often it came before, never on the order of arrival.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789abcdef"
FAULTS = {"429": 0.20, "500": 0.10, "timeout": 0.05, "reset": 0.05, "torn": 0.05}
"""Shares of requests that fail, by kind; a torn answer has the status 200 and half of its JSON."""

WORDS = ("play", "book", "find", "rate", "add", "song", "table", "novel", "movie", "weather", "list", "two", "new")


LOST = ("timeout", "reset", "torn")


@dataclass
class Seen:
    """A request as the server saw it: in its own seconds (`time.monotonic`), complete before the answer leaves."""

    content: str
    arrived: float
    outcome: str
    answered: float = math.inf
    told: float | None = None  # the instant before which the server wants no request


class MockApi:
    """A context manager; `url` is the base URL. `latency`, `hang` and `told` (Retry-After) are in seconds.

    `dates` is the share of Retry-After that is a date.
    """

    def __init__(
        self,
        *,
        faults: dict[str, float] | None = None,
        seed: int = 0,
        latency: float = 0.01,
        hang: float = 2.0,
        told: float = 0.2,
        dates: float = 0.0,
        items: int = 5,
        clock_ahead: float = 0.0,
        refuse: dict[int, Any] | None = None,
    ) -> None:
        self.faults, self.seed, self.latency, self.hang = faults or {}, seed, latency, hang
        self.told, self.items, self.clock_ahead = told, items, clock_ahead
        self.dates = dates
        self.refuse = refuse or {}  # from the request of this number on: a (status, body)
        self.seen: list[Seen] = []
        self.sent = Counter[str]()  # tokens of the answers that went out whole
        self.lost = 0  # answers that were made, and charged, and did not go out whole
        self.delivered: Counter[str] = Counter()  # whole answers by request
        self.bodies: list[bytes] = []
        self.payloads: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def date_time_string(self, timestamp: float | None = None) -> str:
                return formatdate(time.time() + api.clock_ahead, usegmt=True)

            def do_GET(self) -> None:
                wrong = self.headers["Authorization"] != f"Bearer {KEY}"
                api.reply(
                    self, 401 if wrong else 200, b'{"error": {"message": "bad key"}}' if wrong else b'{"data": []}'
                )

            def do_POST(self) -> None:
                api.serve(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *arguments: object) -> None:
                pass  # a client that gave up

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> MockApi:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        arrived = time.monotonic()
        payload = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        content = payload["messages"][0]["content"]
        with self._lock:
            self._attempts[content] += 1
            attempt, number = self._attempts[content], sum(self._attempts.values())
            self.payloads.append(payload)
            self.keys.add(handler.headers["Authorization"])
            seen = Seen(content, arrived, self._outcome(content, attempt))
            refusals = [answer for first, answer in self.refuse.items() if number >= first]
            self.seen.append(seen)
            self.lost += seen.outcome in LOST and not refusals
        if refusals:
            seen.outcome, (status, body) = "refused", refusals[0]
            self.answer(handler, seen, status, json.dumps(body).encode())
        elif seen.outcome == "429":
            self._slow_down(handler, seen, as_date=random.Random(f"{content}{attempt}").random() < self.dates)
        elif seen.outcome == "500":
            self.answer(handler, seen, 500, b"<html>Internal Server Error</html>")
        else:
            self._complete(handler, seen, attempt)

    def _outcome(self, content: str, attempt: int) -> str:
        drawn = random.Random(f"{self.seed}:{attempt}:{content}").random()
        for name, share in self.faults.items():
            if drawn < share:
                return name
            drawn -= share
        return "ok"

    def _slow_down(self, handler: BaseHTTPRequestHandler, seen: Seen, *, as_date: bool) -> None:
        wait, value = self.told, f"{self.told:g}"
        now = time.monotonic()
        if as_date:
            moment = time.time() + self.clock_ahead
            at = int(moment + wait) + 1
            wait, value = at - moment, formatdate(at, usegmt=True)
        seen.told = now + wait
        body = b'{"error": {"message": "slow down", "code": "rate_limit"}}'
        self.answer(handler, seen, 429, body, {"Retry-After": value})

    def _complete(self, handler: BaseHTTPRequestHandler, seen: Seen, attempt: int) -> None:
        rng = random.Random(hashlib.sha256(seen.content.encode()).digest())
        texts = [" ".join(rng.choices(WORDS, k=4)) for _ in range(self.items)]
        usage = {"prompt_tokens": len(seen.content.split()), "completion_tokens": 5 * self.items}
        listed = "\n".join(f"{n}. {text}" for n, text in enumerate(texts, start=1))
        message = {"role": "assistant", "content": listed}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        body = json.dumps(
            {"id": f"x{attempt}", "object": "chat.completion", "choices": choices, "usage": usage}
        ).encode()
        self._closing.wait(self.hang if seen.outcome == "timeout" else self.latency)
        if seen.outcome == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True
        elif seen.outcome in LOST:
            self.answer(handler, seen, 200, body[: len(body) // 2])
        else:
            with self._lock:
                self.sent.update(usage)
                self.delivered[seen.content] += 1
                self.bodies.append(body)
            self.answer(handler, seen, 200, body)

    def answer(
        self,
        handler: BaseHTTPRequestHandler,
        seen: Seen,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
    ) -> None:
        seen.answered = time.monotonic()
        self.reply(handler, status, body, headers)

    def reply(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        handler.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
