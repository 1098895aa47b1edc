"""The prompt generator behind an API: a real server on this machine that fails as real ones do.

No assertion rests on how fast this machine is. Times are the server's own, and only lower bounds are checked.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Tiny, write_project
from mock_api import FAULTS, KEY, MockApi
from test_transfer import run_cli

from tuneshift.config import load_config
from tuneshift.engines import dispatch
from tuneshift.engines.api import ApiSettings, read_reply, told_wait
from tuneshift.engines.base import Decoding
from tuneshift.engines.dispatch import HostedModel, Question, bound
from tuneshift.errors import ConfigError, GeneratorError, Interrupted
from tuneshift.reference import configuration_reference
from tuneshift.run.ledger import Ledger

pytest.importorskip("openai")

DECODING = Decoding(max_new_tokens=64)
OPERATIONAL = {
    "api_key": "${OTHER_KEY}", "limit_field": "max_completion_tokens", "concurrency": 3, "requests_per_minute": 9.0,
    "tokens_per_minute": 9.0, "timeout": 9.0, "max_attempts": 3, "max_tokens": 9, "max_cost": 9.0,
    "price_per_million_input_tokens": 9.0, "price_per_million_output_tokens": 9.0,
}  # fmt: skip
PRICES = {"price_per_million_input_tokens": 2.5, "price_per_million_output_tokens": 10.0}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FIRST_PAUSE", 0.02)
    monkeypatch.setenv("MOCK_KEY", KEY)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def settings(api: MockApi, **options: Any) -> ApiSettings:
    defaults: dict[str, Any] = {**dict.fromkeys(OPERATIONAL), "limit_field": "max_tokens"}
    defaults |= {"base_url": api.url, "model": "mock", "api_key": KEY, "concurrency": 8, "timeout": 0.5}
    return ApiSettings(**defaults | {"max_attempts": 20} | options)


def questions(n: int) -> list[Question]:
    return [Question(f"r0000-c{index:03d}", f"prompt number {index}") for index in range(n)]


def ask(api: MockApi, ledger: Ledger, n: int, **options: Any) -> list[str]:
    model = HostedModel(settings(api, **options))
    return [reply.text for reply in model.answer(questions(n), decoding=DECODING, ledger=ledger)]


# What a server does


def test_under_faults_nothing_is_lost_or_paid_twice_and_the_books_agree(ledger: Ledger, tmp_path: Path) -> None:
    with MockApi() as api, Ledger(tmp_path / "undisturbed.sqlite") as other:
        undisturbed = ask(api, other, 60)
    with MockApi(faults=FAULTS, seed=1, dates=0.1) as api:
        replies = ask(api, ledger, 60)
        assert replies == undisturbed  # each under its own question, in their order
        assert api.delivered == {question.prompt: 1 for question in questions(60)}
        usage = ledger.usage()
        assert {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens} == api.sent
        assert usage.unreported == api.lost > 0
        assert usage.requests == len(api.payloads) > 60
        assert {seen.outcome for seen in api.seen} >= {"ok", "429", "500", "reset", "torn"}
        stored = [body for question in questions(60) for body in ledger.bodies(question.id) if read_reply(body)]
        assert sorted(stored) == sorted(body.decode() for body in api.bodies)  # byte for byte


@pytest.mark.parametrize("dates", [0.0, 1.0], ids=["seconds", "dates"])
def test_nobody_asks_before_the_instant_that_retry_after_names(dates: float, ledger: Ledger) -> None:
    with MockApi(
        faults={"429": 0.25}, seed=2, told=1.0, dates=dates, clock_ahead=3600
    ) as api:  # its clock is an hour ahead
        ask(api, ledger, 12, concurrency=4)
        refusals = [seen for seen in api.seen if seen.told is not None]
        assert refusals
        for refused in refusals:
            own = [seen.arrived for seen in api.seen if seen.content == refused.content]
            assert not [at for at in own if refused.arrived < at < (refused.told or 0)]
            # Others may already be on their way when the refusal is read.
            rest = [seen.arrived for seen in api.seen if seen.arrived > refused.answered + 0.3]
            assert not [at for at in rest if at < (refused.told or 0)]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Fri, 99 Foo 2026 99:99:99 GMT"}, None),
        ({"retry-after": formatdate(1000, usegmt=True)}, 10.0),  # against the local clock
        ({"retry-after": formatdate(1000, usegmt=True), "date": "nonsense"}, 10.0),
        ({"retry-after": formatdate(5000, usegmt=True), "date": formatdate(4970, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(5000, usegmt=True), "date": formatdate(5001, usegmt=True)}, 0.0),
    ],
)
def test_retry_after_is_read_in_seconds_and_as_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert told_wait(headers, now=990.0) == seconds


@pytest.mark.parametrize(
    ("status", "error", "remedy"),
    [
        (400, {"message": "Unsupported parameter: 'max_tokens'"}, "generator.api.limit_field"),
        (401, {"message": f"Incorrect API key provided: {KEY}"}, "generator.api.api_key"),
        (403, {"message": "no access"}, "may use the model 'mock'"),
        (404, {"message": "no such model"}, "ends in /v1"),
        (429, {"message": "You exceeded your quota", "code": "insufficient_quota"}, "add credit"),
        (302, "moved", "generator.api.model"),
    ],
)
def test_what_asking_again_cannot_mend_ends_at_once(status: int, error: Any, remedy: str, ledger: Ledger) -> None:
    with MockApi(refuse={5: (status, {"error": error})}) as api:
        with pytest.raises(GeneratorError, match=f"status {status}") as caught:
            ask(api, ledger, 30, concurrency=2)
        assert remedy in str(caught.value)
        assert KEY not in str(caught.value)
        assert 4 < len(api.payloads) <= 6  # none was asked again
        assert sum(api.delivered.values()) == 4
    with MockApi() as api:  # mended: what was paid for is not asked again
        assert len(ask(api, ledger, 30)) == 30
        assert len(api.payloads) == 26


def test_a_server_that_stays_down_ends_the_run_and_a_later_one_goes_on(ledger: Ledger) -> None:
    with MockApi(refuse={4: (503, {})}) as api:
        with pytest.raises(GeneratorError, match="3 attempts failed, the last one with: status 503"):
            ask(api, ledger, 8, concurrency=1, max_attempts=3)
        assert sum(api.delivered.values()) == 3
        assert len(api.payloads) <= 3 + 3 * 5
    with MockApi() as api:
        ask(api, ledger, 8)
        assert len(api.payloads) == 5


def test_a_server_that_closes_for_long_is_not_waited_for(ledger: Ledger) -> None:
    with MockApi(faults={"429": 1.0}, told=7200) as api, pytest.raises(GeneratorError, match=r"come back in 7\d\d\d s"):
        ask(api, ledger, 1)


def test_an_address_where_nobody_listens_is_named() -> None:
    with MockApi() as api:
        pass
    with pytest.raises(GeneratorError, match="does not answer") as caught:
        HostedModel(settings(api)).check()
    assert api.url in str(caught.value)


def test_a_request_that_never_left_is_not_charged(ledger: Ledger) -> None:
    with MockApi() as api:
        pass
    with pytest.raises(GeneratorError, match="connection failed: ConnectError"):
        ask(api, ledger, 1, max_attempts=2)
    usage = ledger.usage()
    assert (usage.requests, usage.unreported, usage.prompt_reserved) == (2, 0, 0)


@pytest.mark.parametrize(
    "body",
    [
        "", "{", "null", "[]", "{}", '{"choices": []}', '{"choices": [{}]}', "[" * 10_000,
        '{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}',
        '{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}',
    ],
)  # fmt: skip
def test_a_body_without_a_choice_or_its_usage_is_no_reply(body: str) -> None:
    assert read_reply(body) is None


def test_a_refusal_of_the_model_is_a_reply_without_text() -> None:
    choice = {"message": {"content": None, "refusal": "no"}, "finish_reason": "length"}
    reply = read_reply(json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}))
    assert reply is not None
    assert (reply.text, reply.finished, reply.prompt_tokens, reply.completion_tokens) == ("", False, 3, 4)


# How fast


@pytest.mark.parametrize(
    "limit", [{"requests_per_minute": 600.0}, {"tokens_per_minute": 600.0 * (bound("prompt number 1") + 64)}]
)
def test_requests_keep_to_the_rate(limit: dict[str, float], ledger: Ledger) -> None:
    with MockApi(latency=0.0) as api:
        ask(api, ledger, 9, **limit)
        arrived = sorted(seen.arrived for seen in api.seen)
    assert arrived[-1] - arrived[0] > 8 * 0.1 - 0.15  # the first may have taken long to arrive


def test_no_more_requests_are_under_way_than_allowed(ledger: Ledger) -> None:
    with MockApi(latency=0.05) as api:
        ask(api, ledger, 12, concurrency=3)
        for one in api.seen:
            assert sum(other.arrived <= one.arrived < other.answered - 0.02 for other in api.seen) <= 3


# What it may cost


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("faults", [{}, FAULTS], ids=["", "faults"])
def test_the_budget_holds_and_a_higher_one_goes_on(concurrency: int, faults: dict[str, float], ledger: Ledger) -> None:
    with MockApi(faults=faults, seed=3) as api:
        with pytest.raises(GeneratorError, match=r"generator.api.max_tokens = 600 is reached: \d+ requests") as caught:
            ask(api, ledger, 40, max_tokens=600, concurrency=concurrency)
        assert "Raise the limit and run the same command" in str(caught.value)
        paid = sum(api.delivered.values())
        assert api.sent.total() + api.lost * 28 <= 600
        assert 0 < paid < 40
        with pytest.raises(GeneratorError, match="is reached"):  # what was spent is remembered
            ask(api, ledger, 40, max_tokens=600, concurrency=concurrency)
        assert sum(api.delivered.values()) == paid
        ask(api, ledger, 40, max_tokens=1_000_000)
        assert set(api.delivered.values()) == {1}
        assert len(api.delivered) == 40


def test_a_budget_in_money_counts_both_prices(ledger: Ledger) -> None:
    worst = (bound("prompt number 0") * 2.5 + 64 * 10) / 1e6
    with MockApi() as api:
        with pytest.raises(GeneratorError, match=r"generator\.api\.max_cost"):
            ask(api, ledger, 3, max_cost=worst * 0.99, **PRICES)
        assert api.payloads == []
        ask(api, ledger, 3, max_cost=worst * 3, concurrency=1, **PRICES)
        assert len(api.payloads) == 3


# Killed


KILLED = """
import os, signal, sys
from pathlib import Path
from test_api_generator import *
ended = Ledger.end_request
def end_request(self, number, *rest):
    ended(self, number, *rest)
    if number >= 9:
        os.kill(os.getpid(), signal.SIGKILL)
Ledger.end_request = end_request
class Api: url = sys.argv[1]
with Ledger(Path(sys.argv[2])) as ledger:
    ask(Api, ledger, 30, concurrency=4)
"""


def test_after_a_kill_what_was_paid_for_is_not_paid_again(tmp_path: Path) -> None:
    path = tmp_path / "killed.sqlite"
    with MockApi(latency=0.02) as api:
        folders = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        child = subprocess.run(
            [sys.executable, "-c", KILLED, api.url, str(path)], env={**os.environ, "PYTHONPATH": folders}
        )
        assert child.returncode == -signal.SIGKILL
        with Ledger(path) as ledger:
            stored = [question.prompt for question in questions(30) if ledger.bodies(question.id)]
            under_way = ledger.usage().unreported
            assert len(stored) >= 6
            assert under_way <= 4
            ask(api, ledger, 30)
            assert all(api.delivered[prompt] == 1 for prompt in stored)
            assert len(api.delivered) == 30
            never_sent = (
                30 + under_way - len(api.payloads)
            )  # a request is noted before it leaves, and the kill came first
            assert 0 <= never_sent <= under_way
            assert ledger.usage().requests == len(api.payloads) + never_sent
            paid = ledger.usage().completion_tokens + (under_way - never_sent) * 25
            assert paid == api.sent["completion_tokens"]


# The configuration


def api_section(api: MockApi | None = None, **options: Any) -> dict[str, Any]:
    section = {"base_url": api.url if api else "http://127.0.0.1:1/v1", "model": "mock", "api_key": "${MOCK_KEY}"}
    return {"kind": "chat", "model": "target", "api": {**section, "timeout": 0.5, "max_attempts": 20, **options}}


def refused(tmp_path: Path, tiny: Tiny, generator: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write_project(tmp_path, tiny, generator=generator))
    return str(caught.value)


@pytest.mark.parametrize("key", [KEY, 1234567890123, "${MOCK_KEY}x", ""])
def test_a_key_that_is_written_out_is_refused_and_not_shown(tiny: Tiny, tmp_path: Path, key: Any) -> None:
    message = refused(tmp_path, tiny, api_section(api_key=key))
    assert "generator.api" in message
    assert str(key) not in message or not key
    if isinstance(key, str):
        assert "${OPENAI_API_KEY}" in message


@pytest.mark.parametrize("value", [None, "", " ", "two words", "kéy", "a\nb"])
def test_a_variable_that_holds_no_key_is_named_and_not_shown(
    tiny: Tiny, tmp_path: Path, value: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MOCK_KEY") if value is None else monkeypatch.setenv("MOCK_KEY", value)
    config = write_project(tmp_path, tiny, generator=api_section())
    assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 2
    message = capsys.readouterr().err
    assert "generator.api.api_key: " in message
    assert "MOCK_KEY" in message
    assert not value or not value.strip() or value not in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modle": "x"}, "generator.api.modle: unknown key; did you mean `model`?"),
        ({"concurrency": 0}, "generator.api.concurrency: "),
        ({"max_cost": math.inf}, "generator.api.max_cost: "),
        ({"max_cost": 5}, "generator.api: `max_cost` needs both price"),
        ({"price_per_million_input_tokens": 5}, "generator.api: `max_cost` needs both price"),
        ({"base_url": "ftp://x"}, "generator.api.base_url: it must be http"),
        ({"base_url": "https://user:word@host/v1"}, "generator.api.base_url: it must be http"),
    ],
)
def test_a_wrong_setting_is_named_where_it_stands(
    tiny: Tiny, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    message = refused(tmp_path, tiny, api_section(**options))
    assert f"\n  {said}" in message
    assert "user:word" not in message


@pytest.mark.parametrize("generator", [{"kind": "few_shot"}, {"top_k": 5}])
def test_what_an_api_does_not_speak_is_refused(tiny: Tiny, tmp_path: Path, generator: dict[str, Any]) -> None:
    message = refused(tmp_path, tiny, {**api_section(), **generator})
    assert "generator: `api` speaks chat completions: set kind: chat" in message


def test_only_where_and_who_the_generator_is_belongs_to_the_fingerprint(tiny: Tiny, tmp_path: Path) -> None:
    def fingerprint(**options: Any) -> str:
        return load_config(write_project(tmp_path, tiny, generator=api_section(**options))).fingerprint

    prices = {key: 1.0 for key in PRICES}
    for key, value in OPERATIONAL.items():
        assert fingerprint(**prices | {key: value}) == fingerprint(), key
    assert len({fingerprint(), fingerprint(model="other"), fingerprint(base_url="http://other/v1")}) == 3


def test_stored_settings_have_every_default_and_the_variables_name(tiny: Tiny, tmp_path: Path) -> None:
    loaded = load_config(write_project(tmp_path, tiny, generator=api_section()))
    api = loaded.settings()["generator"]["api"]
    assert set(api) == {"base_url", "model", *OPERATIONAL}
    assert (api["api_key"], api["concurrency"]) == ("${MOCK_KEY}", 8)
    assert KEY not in repr(loaded)


def test_the_reference_describes_every_setting_of_the_section() -> None:
    table = configuration_reference().split("## generator.api\n")[1].split("\n## ")[0]
    for key in ("base_url", "model", *OPERATIONAL):
        assert f"\n| `{key}` | `" in table


def test_the_readmes_hosted_generator_loads_as_written(tiny: Tiny, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    block = next(block for block in readme.split("```") if block.startswith("\ngenerator: {kind: chat, api:"))
    loaded = load_config(write_project(tmp_path, tiny, **yaml.safe_load(block)))
    assert loaded.config.generator.api is not None
    assert loaded.config.generator.api.max_cost == 5


# The whole command


def transfer(tmp_path: Path, config: Path, *overrides: str) -> int:
    extra = [argument for override in overrides for argument in ("--set", override)]
    return run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run"), *extra)


def test_a_transfer_with_a_hosted_generator_under_faults(tiny: Tiny, tmp_path: Path) -> None:
    with MockApi(faults=FAULTS, seed=4, items=4) as api:
        config = write_project(tmp_path, tiny, generator=api_section(api, **PRICES))
        assert transfer(tmp_path, config) == 3  # random models do not improve
    run = tmp_path / "run"
    with Ledger(run / "ledger.sqlite") as ledger:
        calls, candidates, usage = ledger.calls(), ledger.candidates(), ledger.usage()
    assert set(api.delivered.values()) == {1}
    assert [call.id for call in calls] == sorted(call.id for call in calls)
    assert [call.prompt in api.delivered for call in calls] == [True] * len(api.delivered)
    assert sum(call.generated_tokens for call in calls) == usage.completion_tokens == api.sent["completion_tokens"]
    missing = [candidate for candidate in candidates if candidate.reason == "unfinished or unreadable prompt"]
    assert len(missing) == len(calls)  # asked 5, got 4
    verdict = json.loads((run / "verdict.json").read_text())
    spent = verdict["generator_usage"]
    assert spent["unreported"] == api.lost
    assert spent["cost"] == pytest.approx((usage.prompt_tokens * 2.5 + usage.completion_tokens * 10) / 1e6)
    assert f"in {usage.requests:,} requests, at a cost of " in (run / "report.md").read_text()
    models = json.loads((run / "manifest.json").read_text())["models"]
    assert models["generator.api"]["reference"] == "mock"
    assert "generator.model" not in models
    assert api.keys == {f"Bearer {KEY}"}
    for path in run.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def test_a_finished_runs_questions_can_change_without_the_key(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MockApi() as api:
        config = write_project(tmp_path, tiny, generator=api_section(api), synthesis={"target_size": 4})
        assert transfer(tmp_path, config) == 3
    monkeypatch.delenv("MOCK_KEY")
    assert transfer(tmp_path, config) == 3  # nothing is measured again
    assert run_cli("reselect", str(tmp_path / "run"), "--set", "criterion=none") == 0
    assert run_cli("report", str(tmp_path / "run")) == 0


def test_a_wrong_key_ends_before_any_weights_are_read(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOCK_KEY", "sk-wrong")
    with MockApi() as api:
        assert transfer(tmp_path, write_project(tmp_path, tiny, generator=api_section(api))) == 2
    message = capsys.readouterr().err
    assert "refuses the request with status 401 (bad key)" in message
    assert "generator.api.api_key" in message
    assert "sk-wrong" not in message
    assert "Loading" not in message
    assert not (tmp_path / "run").exists()
    assert api.payloads == []


def test_a_reached_budget_ends_the_run_and_a_higher_one_goes_on(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MockApi() as api:
        config = write_project(tmp_path, tiny, generator=api_section(api, max_tokens=500))
        assert transfer(tmp_path, config) == 2
        assert "generator.api.max_tokens = 500 is reached" in capsys.readouterr().err
        assert 0 < api.sent.total() <= 500
        before = dict(api.delivered)
        assert before
        assert transfer(tmp_path, config, "generator.api.max_tokens=null", "generator.api.concurrency=2") == 3
        assert set(api.delivered.values()) == {1}
        assert len(api.delivered) > len(before)
        undisturbed = tmp_path / "undisturbed"
        run_cli("transfer", str(config), "--run-dir", str(undisturbed), "--set", "generator.api.max_tokens=null")
    kept = (tmp_path / "run/dataset/kept.jsonl").read_bytes()
    assert kept == (undisturbed / "dataset/kept.jsonl").read_bytes()


def test_answers_that_were_stored_before_an_interruption_are_read_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Ledger, calls: Any) -> None:
        raise Interrupted

    with MockApi() as api:
        config = write_project(tmp_path, tiny, generator=api_section(api))
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "record_calls", interrupt)
            assert transfer(tmp_path, config) == 130
        assert sum(api.delivered.values()) == 2  # the first round's calls
        assert transfer(tmp_path, config) == 3
        assert set(api.delivered.values()) == {1}


def test_a_plan_tells_the_generators_tokens_and_cost(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MockApi(items=20) as api:
        config = write_project(tmp_path, tiny, generator=api_section(api, **PRICES))
        assert run_cli("plan", str(config), "--json") == 0
        estimate = json.loads(capsys.readouterr().out.splitlines()[-1])
        expected = estimate["candidates_needed"] / 20 * api.sent["completion_tokens"]
        assert estimate["generator_usage"]["completion_tokens"] == pytest.approx(expected)
        assert estimate["generator_usage"]["cost"] > 0
        assert run_cli("plan", str(config)) == 0
        assert "generator's API: about " in capsys.readouterr().out


def test_a_long_wait_is_told(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "NOTED_PAUSE", 0.0)
    notes: list[str] = []
    with MockApi(faults={"429": 0.5}, told=0.1) as api:
        HostedModel(settings(api), note=notes.append).answer(questions(6), decoding=DECODING, ledger=ledger)
    assert notes
    assert all("status 429; asking again in " in note for note in notes)
