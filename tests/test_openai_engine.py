"""F and B behind a server: the same numbers as in this process, and every silent fault of a server refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from completions_server import BASE, TUNED, CompletionsServer
from conftest import CORPUS, Tiny, write_project
from test_transfer import run_cli

from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import Decoding, ScoreRequest, Weights
from tuneshift.engines.canary import AGREEMENT, Readings
from tuneshift.engines.openai import OpenAIEngine, read_choice
from tuneshift.engines.opening import open_proved
from tuneshift.engines.options import Endpoint, EngineOptions
from tuneshift.errors import ModelError
from tuneshift.models import LoadOptions
from tuneshift.run.ledger import Ledger

LOAD = LoadOptions(device="cpu", dtype="float32")
GREEDY = Decoding(temperature=0, max_new_tokens=12, stop=("\n",))
CLOSE = 1e-4  # nats


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options(server: CompletionsServer, **settings: Any) -> EngineOptions:
    sides = {"base": Endpoint(server.url, BASE, server.key), "fine_tuned": Endpoint(server.url, TUNED, server.key)}
    return EngineOptions(**{"kind": "openai", "load": LOAD, "batch_size": 4, **sides, **settings})


def weights(tiny: Tiny) -> Weights:
    return Weights("tiny-llama", str(tiny.llama), adapter=str(tiny.adapter))


def open_server(server: CompletionsServer, tiny: Tiny, **settings: Any) -> OpenAIEngine:
    engine, _ = open_proved(weights(tiny), options(server, **settings), CORPUS[:3])
    assert isinstance(engine, OpenAIEngine)
    return engine


def test_a_server_gives_the_texts_and_the_numbers_of_this_process(tiny: Tiny) -> None:
    here, _ = open_proved(weights(tiny), EngineOptions(load=LOAD), CORPUS[:3])
    with CompletionsServer(str(tiny.llama), str(tiny.adapter)) as server:
        there, canary = open_proved(weights(tiny), options(server), CORPUS[:3])
        assert canary.adapter_effect > 0.1
        assert canary.base_drift is not None
        assert canary.scoring_gap is not None
        assert max(canary.base_drift, canary.scoring_gap, canary.reference_gap or 0) < CLOSE
        prompts = [encode_prompt(here.tokenizer, text) for text in CORPUS]
        for side in (True, False):
            ours = here.generate(prompts, seeds=range(6), decoding=GREEDY, fine_tuned=side)
            theirs = there.generate(prompts, seeds=range(6), decoding=GREEDY, fine_tuned=side)
            assert [(c.text, c.token_ids, c.finish_reason) for c in theirs] == [
                (c.text, c.token_ids, c.finish_reason) for c in ours
            ]
            for a, b in zip(theirs, ours, strict=True):
                assert a.logprobs == pytest.approx(b.logprobs, abs=CLOSE)
                assert (a.eos is None) == (b.eos is None)
                assert a.eos_logprob == pytest.approx(b.eos_logprob, abs=CLOSE)
            requests = [ScoreRequest(tuple(p), c.token_ids) for p, c in zip(prompts, ours, strict=True) if c.token_ids]
            for a, b in zip(there.score(requests, fine_tuned=side), here.score(requests, fine_tuned=side), strict=True):
                assert a == pytest.approx(b, abs=CLOSE)
        there.close()


def test_every_sampling_setting_and_the_prompts_own_ids_are_sent(tiny: Tiny) -> None:
    with CompletionsServer(str(tiny.llama), str(tiny.adapter)) as server:
        engine = open_server(server, tiny)
        server.requests.clear()
        decoding = Decoding(temperature=0.5, top_p=0.9, top_k=7, max_new_tokens=3, stop=("x",))
        engine.generate([[5, 6, 7]], seeds=[2**63 + 11], decoding=decoding, fine_tuned=True)
        (sent,) = server.requests
        engine.close()
    wanted = {
        "model": TUNED, "prompt": [5, 6, 7], "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.0,
        "max_tokens": 3, "repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0,
        "add_special_tokens": False,
        "return_token_ids": True, "logprobs": 0, "prompt_logprobs": None, "stop": ["x"], "stop_token_ids": [1],
        "seed": 11,
    }  # fmt: skip
    assert sent == wanted


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("not applied", "changes nothing"),
        ("leak", "with the adapter switched off the base still differs"),
        ("part", "F samples tokens with other log-probabilities than it scores them with"),
        ("processed", "F samples tokens with other log-probabilities than it scores them with"),
        ("another model", "the engine and transformers disagree"),
        ("bos", "the server read other tokens than it was sent"),
        ("without prompt_logprobs", "lack log-probabilities of the prompt"),
        ("without token_ids", "lack the ids of the sampled tokens"),
        ("without logprobs", "lack log-probabilities of the sampled tokens"),
        ("without prompt_token_ids", "lack the ids of the prompt"),
        ("other list", r"the answer has no 'data' \(\['llama'\]\)\. Check .* often ends in /v1"),
        ("error in a success", "the answer has no 'choices' .*out of memory.* Check .* often ends in /v1"),
    ],
)
def test_a_server_that_would_give_wrong_numbers_is_refused(tiny: Tiny, fault: str, said: str) -> None:
    server = CompletionsServer(str(tiny.llama), str(tiny.adapter), faults=[fault])
    with server, pytest.raises(ModelError, match=said):
        open_server(server, tiny)


def test_without_weights_of_its_own_a_black_box_is_proved_by_itself_alone(tiny: Tiny) -> None:
    with CompletionsServer(str(tiny.llama), str(tiny.adapter)) as server:
        engine, canary = open_proved(Weights("llama", str(tiny.llama)), options(server), CORPUS[:3])
        engine.close()
    assert canary.reference_gap is None
    assert canary.scoring_gap is not None
    assert canary.scoring_gap < AGREEMENT


def test_what_the_server_lacks_is_said_before_anything_is_asked(tiny: Tiny) -> None:
    with CompletionsServer(str(tiny.llama), str(tiny.adapter), key="right") as server:
        wrong = Endpoint(server.url, BASE, "wrong")
        with pytest.raises(ModelError, match="status 401"):
            open_server(server, tiny, base=wrong)
        with pytest.raises(ModelError, match="no model 'other'; it has 'base', 'tuned'"):
            open_server(server, tiny, fine_tuned=Endpoint(server.url, "other", "right"))


def test_an_address_where_nobody_answers_is_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneshift.engines.openai.RETRIES", 0)
    closed = Endpoint("http://127.0.0.1:9/v1", BASE)
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:9/v1: no answer"):
        open_proved(weights(tiny), EngineOptions(kind="openai", load=LOAD, base=closed, fine_tuned=closed), CORPUS[:3])


def test_what_a_server_cannot_answer_is_refused_before_it_is_sent(tiny: Tiny) -> None:
    with CompletionsServer(str(tiny.llama), str(tiny.adapter)) as server:
        engine = open_server(server, tiny)
        server.requests.clear()
        assert engine.reader.context_length == 255  # the server's 256 less the token that it writes behind any text
        with pytest.raises(ModelError, match="do not fit into the context"):
            engine.score([ScoreRequest((5,) * 250, (6,) * 6)], fine_tuned=True)
        with pytest.raises(ModelError, match=r"needs engine\.kind: hf"):
            engine.compare([ScoreRequest((5,), (6,))])
        assert server.requests == []
        engine.close()


def test_the_least_number_that_json_holds_is_minus_infinity() -> None:
    answer = {
        "choices": [
            {
                "token_ids": [7], "prompt_token_ids": [5, 6], "logprobs": {"token_logprobs": [-9999.0]},
                "prompt_logprobs": [None, {"6": {"logprob": -0.5}}],
            }
        ]
    }  # fmt: skip
    read = read_choice(answer, [5, 6], Endpoint("http://x/v1", "m"), scores=True)
    assert read.logprobs == (-math.inf,)
    assert read.prompt_logprobs == (-0.5,)


def test_a_whole_transfer_behind_a_server_keeps_what_one_in_this_process_keeps(tiny: Tiny, tmp_path: Path) -> None:
    greedy = {"synthesis": {"decoding": "greedy", "complete_scores": True}, "engine": {"batch_size": 4}}
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    plain = write_project(here, tiny, generator={"model": str(tiny.llama)}, **greedy)
    assert run_cli("transfer", str(plain), "--run-dir", str(here / "run")) in (0, 3)
    with CompletionsServer(str(tiny.llama), str(tiny.adapter)) as server:
        models = {"base": BASE, "fine_tuned": TUNED}
        sides = {side: {"base_url": server.url, "model": model} for side, model in models.items()}
        greedy["engine"] = {"batch_size": 4, "kind": "openai", **sides}
        served = write_project(there, tiny, generator={"model": str(tiny.llama)}, **greedy)
        assert run_cli("transfer", str(served), "--run-dir", str(there / "run")) in (0, 3)
    of_b = []
    for folder in (here, there):
        with Ledger(folder / "run/ledger.sqlite") as ledger:
            of_b.append([c.y_b.base_logprobs for c in ledger.candidates() if c.y_b is not None])
    assert any(of_b[0])
    for own, served_ones in zip(*of_b, strict=True):
        assert served_ones == (None if own is None else pytest.approx(own, abs=CLOSE))
    kept = [(folder / "run/dataset/kept.jsonl").read_text().splitlines() for folder in (here, there)]
    ours, theirs = ([(row["prompt"], row["response"]) for row in map(json.loads, lines)] for lines in kept)
    assert theirs == ours
    assert len(ours) > 5


def test_two_readings_are_as_far_apart_as_their_worse_side_and_a_nan_is_never_near() -> None:
    first = Readings([(-1.0, -2.0)], [(-1.0,)])
    assert first.distance(Readings([(-1.5, -2.0)], [(-4.0,)])) == 3.0
    assert first.distance(Readings([(-1.0, -2.0)], [(-4.0,)])) == 3.0
    for broken in (Readings([(-1.0, math.nan)], [(-1.0,)]), Readings([(-1.0, -2.0)], [(math.nan,)])):
        assert math.isnan(first.distance(broken))
