"""A server with vLLM's completions on a tiny model and its adapter, which can do what servers do wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE, TUNED = "base", "tuned"


class CompletionsServer:
    """Serves `base` and `tuned` on loopback.

    `faults` may hold: "not applied" (tuned is base), "leak" (base rows get the adapter once a tuned row was there, as
    vLLM's CPU kernels do), "part" (scoring leaves out a part of the adapter, as vLLM does with an output layer's),
    "processed" (sampled log-probabilities after temperature), "bos" (a token is put before the prompt), "another model"
    (both sides have other weights), "other list" (the list of models has another form), "error in a success" (an error
    comes with status 200), or "without NAME" for a field of the answer that is left out.
    """

    def __init__(self, base: str, adapter: str, *, faults: Sequence[str] = (), key: str | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if "another model" in faults:
            torch.manual_seed(9)
            model = AutoModelForCausalLM.from_config(model.config)
        self.model = PeftModel.from_pretrained(model, adapter).eval()
        self.faults, self.key, self.lock = set(faults), key, threading.Lock()
        self.tuned_seen = False
        self.requests: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

            def reply(self, status: int, body: Any) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
                    return self.reply(401, {"error": {"message": "Unauthorized"}})
                if "other list" in server.faults:
                    return self.reply(200, ["llama"])
                entries = [{"id": name, "object": "model", "max_model_len": 256} for name in (BASE, TUNED)]
                return self.reply(200, {"object": "list", "data": entries})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock, torch.inference_mode():
                    server.requests.append(request)
                    if "error in a success" in server.faults:
                        return self.reply(200, {"error": {"message": "out of memory"}})
                    return self.reply(200, {"object": "text_completion", "choices": [server.choice(request)]})

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self) -> CompletionsServer:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def logits(self, ids: Sequence[int], tuned: bool) -> torch.Tensor:
        self.tuned_seen |= tuned
        applied = (tuned or ("leak" in self.faults and self.tuned_seen)) and "not applied" not in self.faults
        tensor = torch.tensor([list(ids)])
        if applied:
            return self.model(input_ids=tensor).logits[0]
        with self.model.disable_adapter():
            return self.model(input_ids=tensor).logits[0]

    def choice(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return an answer's choice; "seed" draws as the temperature says."""
        prompt, tuned = list(request["prompt"]), request["model"] == TUNED
        if "bos" in self.faults:
            prompt = [2, *prompt]
        ids, logprobs = [], []
        generator = torch.Generator().manual_seed((request.get("seed") or 0) % 2**31)
        for _ in range(request["max_tokens"]):
            row, temperature = self.logits([*prompt, *ids], tuned)[-1], request["temperature"]
            scaled = row / temperature if temperature else row
            drawn = torch.multinomial(scaled.softmax(-1), 1, generator=generator)
            token = int(drawn if temperature else row.argmax())
            ids.append(token)
            logprobs.append(float((scaled if "processed" in self.faults else row).log_softmax(-1)[token]))
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if token in request["stop_token_ids"] or any(stop in text for stop in request.get("stop") or []):
                break
        choice = {"text": "", "token_ids": ids, "prompt_token_ids": prompt, "logprobs": {"token_logprobs": logprobs}}
        if request["prompt_logprobs"] is not None:
            logits = self.logits(prompt, tuned)
            if "part" in self.faults and tuned:
                logits = (logits + self.logits(prompt, tuned=False)) / 2
            table = logits.log_softmax(-1)
            entries = [{str(t): {"logprob": max(float(table[n, t]), -9999.0)}} for n, t in enumerate(prompt[1:])]
            choice["prompt_logprobs"] = [None, *entries]
        return {name: value for name, value in choice.items() if f"without {name}" not in self.faults}
