"""Claim: with a failing API no prompt is lost or paid for twice, and the run takes at most 3 times the faultless one.

    python benchmarks/api_faults.py [--calls 200] [--latency 4.0] [--seeds 0 1 2]

A server on this machine fails 20 % of requests with 429 (Retry-After in seconds or as a date, at least one second),
10 % with 500, 5 % by silence, 5 % by a reset, 5 % by torn JSON. The default latency is that of 20 prompts of 20
tokens at 100 tokens a second, a guess; the pauses that the server asks for weigh the more, the quicker it is.
Prints one JSON document.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tuneshift.engines.api import ApiSettings
from tuneshift.engines.base import Decoding
from tuneshift.engines.dispatch import HostedModel, Question
from tuneshift.run.ledger import Ledger
from tuneshift.run.manifest import environment

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from mock_api import FAULTS, KEY, MockApi

GRACE = 0.3  # seconds in which requests that were under way may still arrive after a Retry-After was sent


def measure(faults: dict[str, float], options: argparse.Namespace, seed: int) -> dict:
    questions = [Question(f"c{n:04d}", f"Generate 20 more samples like these 5: {n}") for n in range(options.calls)]
    timeout = 2 * options.latency
    with (
        tempfile.TemporaryDirectory() as folder,
        Ledger(Path(folder) / "ledger.sqlite") as ledger,
        MockApi(faults=faults, seed=seed, latency=options.latency, hang=2 * timeout, told=1.0, dates=0.5) as api,
    ):
        settings = ApiSettings(
            base_url=api.url, model="mock", api_key=KEY, limit_field="max_tokens", concurrency=options.concurrency,
            requests_per_minute=None, tokens_per_minute=None, timeout=timeout, max_attempts=20, max_tokens=None,
            max_cost=None, price_per_million_input_tokens=None, price_per_million_output_tokens=None,
        )  # fmt: skip
        started = time.monotonic()
        replies = HostedModel(settings).answer(questions, decoding=Decoding(max_new_tokens=1280), ledger=ledger)
        seconds = time.monotonic() - started
        usage = ledger.usage()
        early = [
            seen
            for refused in api.seen
            if refused.told is not None
            for seen in api.seen
            if (refused.answered + (0 if seen.content == refused.content else GRACE)) < seen.arrived < refused.told
        ]
        return {
            "seconds": seconds,
            "requests": len(api.payloads),
            "outcomes": dict(Counter(seen.outcome for seen in api.seen)),
            "prompts_lost": options.calls - len(replies) + options.calls - len(api.delivered),
            "prompts_paid_twice": sum(count > 1 for count in api.delivered.values()),
            "requests_before_they_were_told": len(early),
            "tokens_of_server_minus_ledger": api.sent.total() - usage.prompt_tokens - usage.completion_tokens,
            "lost_answers_of_server_minus_ledger": api.lost - usage.unreported,
            "requests_of_server_minus_ledger": len(api.payloads) - usage.requests,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--latency", type=float, default=4.0, help="seconds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    faultless = measure({}, options, 0)
    faulty = {seed: measure(FAULTS, options, seed) for seed in options.seeds}
    ratios = {seed: run["seconds"] / faultless["seconds"] for seed, run in faulty.items()}
    document = {"settings": vars(options), "faults": FAULTS, "faultless": faultless, "faulty": faulty, "ratio": ratios}
    print(json.dumps({**document, "environment": environment()}))


if __name__ == "__main__":
    main()
