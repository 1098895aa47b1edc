"""The Hugging Face engine against transformers itself: its loss, its `generate` and its sampling filters."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CORPUS, Tiny
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import tuneshift.engines.batching as batching
import tuneshift.engines.decoding as decode_module
from tuneshift.encoding import encode_prompt, encode_response
from tuneshift.engines.base import Completion, Decoding, ScoreRequest
from tuneshift.engines.decoding import BLOCK, choose_tokens
from tuneshift.engines.hf import HfEngine
from tuneshift.errors import MemoryLimitError, ModelError
from tuneshift.models import LoadOptions
from tuneshift.scoring import perplexity

LOAD = LoadOptions(device="cpu", dtype="float32")
GREEDY, FAITHFUL = Decoding(temperature=0, max_new_tokens=40), Decoding(temperature=1, max_new_tokens=40)
PROMPTS = [*CORPUS[:5], "play", CORPUS[5], CORPUS[0] + " " + CORPUS[1]]  # from 1 to 74 tokens
CLOSE = 1e-4  # nats

Engines = dict[str, tuple[HfEngine, bool]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, many times so beside another process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engines(tiny: Tiny) -> Engines:
    """What is compared: an engine, and whether its fine-tuned side is meant."""
    llama, gemma = HfEngine.open(str(tiny.llama), load=LOAD), HfEngine.open(str(tiny.gemma), load=LOAD)
    llama.attach(str(tiny.adapter))
    switched = HfEngine.open(str(tiny.llama), load=LOAD)
    switched.attach(str(tiny.adapter), merge=False)
    return {
        "llama": (llama, False),
        "llama with adapter": (llama, True),
        "llama with its adapter switched on": (switched, True),
        "llama with its adapter switched off": (switched, False),
        "gemma": (gemma, False),
    }


@pytest.fixture(scope="module")
def references(tiny: Tiny) -> dict[str, Any]:
    """The same models, loaded by transformers and peft alone."""
    adapted = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32).eval()
    tuned = PeftModel.from_pretrained(adapted, str(tiny.adapter)).eval()
    return {
        "llama": base,
        "llama with adapter": tuned,
        "llama with its adapter switched on": tuned,
        "llama with its adapter switched off": base,
        "gemma": AutoModelForCausalLM.from_pretrained(tiny.gemma, dtype=torch.float32).eval(),
    }


def test_every_end_of_text_that_either_model_names_ends_a_text(tiny: Tiny) -> None:
    tuned = AutoModelForCausalLM.from_pretrained(tiny.llama)
    tuned.generation_config.eos_token_id = [1, 7]
    base = AutoModelForCausalLM.from_pretrained(tiny.llama)
    engine = HfEngine(base, AutoTokenizer.from_pretrained(tiny.llama), name="both", fine_tuned_model=tuned)
    assert engine.eos_ids == {1, 7}


def test_a_pad_token_without_an_embedding_is_never_used(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    tokenizer.add_special_tokens({"pad_token": "<pad of a chat template>"})
    model = AutoModelForCausalLM.from_pretrained(tiny.llama)
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    padded = HfEngine(model, tokenizer, name="padded")
    plain = HfEngine.open(str(tiny.llama), load=LOAD)
    prompts = encoded(plain)
    requests = [ScoreRequest(tuple(prompt[:2]), tuple(prompt[2:])) for prompt in prompts]
    assert padded.score(requests, fine_tuned=False) == plain.score(requests, fine_tuned=False)
    seeds = list(range(len(prompts)))
    both = [e.generate(prompts, seeds=seeds, decoding=GREEDY, fine_tuned=False) for e in (padded, plain)]
    assert both[0] == both[1]


def test_ids_without_an_embedding_are_refused(tiny: Tiny) -> None:
    engine = HfEngine.open(str(tiny.llama), load=LOAD)
    with pytest.raises(ModelError, match=r"the token id 4444, but the model has embeddings for"):
        engine.score([ScoreRequest((5,), (4444,))], fine_tuned=False)


each_model = pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama with adapter",
        "llama with its adapter switched on",
        "llama with its adapter switched off",
        "gemma",
    ],
)
each_decoding = pytest.mark.parametrize("decoding", [FAITHFUL, GREEDY], ids=["faithful", "greedy"])


def encoded(engine: HfEngine, prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    return [encode_prompt(engine.tokenizer, prompt) for prompt in prompts]


def requests_of(engine: HfEngine, responses: Sequence[str]) -> list[ScoreRequest]:
    return [
        ScoreRequest(tuple(prompt), tuple(encode_response(engine.tokenizer, response)))
        for prompt, response in zip(encoded(engine), responses, strict=True)
    ]


RESPONSES = [" jazz", " tonight", " in paris tomorrow", "a", " stars now", " some music", "- rate this", "s"]


def largest_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    pairs = [(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)]
    assert pairs
    return max(abs(a - b) for a, b in pairs)


def own_logprobs(completion: Completion) -> tuple[float, ...]:
    """Return what generation says about the sampled ids, the EOS with them."""
    assert completion.logprobs is not None
    ending = () if completion.eos_logprob is None else (completion.eos_logprob,)
    return completion.logprobs + ending


# Scoring


@each_model
def test_perplexity_is_the_exponential_of_the_model_s_own_loss(
    name: str, engines: Engines, references: dict[str, Any]
) -> None:
    engine, fine_tuned = engines[name]
    requests = requests_of(engine, RESPONSES)
    for request, logprobs in zip(requests, engine.score(requests, fine_tuned=fine_tuned), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *request.response_ids]])
        labels = ids.clone()
        labels[:, : len(request.prompt_ids)] = -100
        with torch.no_grad():
            loss = references[name](input_ids=ids, labels=labels).loss.item()
        assert perplexity(sum(logprobs), len(logprobs)) == pytest.approx(math.exp(loss), rel=1e-4)


@each_model
@each_decoding
def test_generated_log_probabilities_equal_a_second_pass(name: str, decoding: Decoding, engines: Engines) -> None:
    engine, fine_tuned = engines[name]
    prompts = encoded(engine)
    written = engine.generate(prompts, seeds=range(8), decoding=decoding, fine_tuned=fine_tuned)
    eos = int(engine.tokenizer.eos_token_id)
    endings = [() if c.eos_logprob is None else (eos,) for c in written]
    requests = [
        ScoreRequest(tuple(prompt), completion.token_ids + ending)
        for prompt, completion, ending in zip(prompts, written, endings, strict=True)
    ]
    again = engine.score(requests, fine_tuned=fine_tuned)
    assert largest_difference([own_logprobs(c) for c in written], again) < CLOSE


def test_with_and_without_the_adapter_the_scores_differ(engines: Engines) -> None:
    engine, _ = engines["llama"]
    requests = requests_of(engine, RESPONSES)
    tuned, base = (engine.score(requests, fine_tuned=side) for side in (True, False))
    assert largest_difference(tuned, base) > 0.1


@each_model
def test_scores_do_not_depend_on_the_batch(name: str, engines: Engines) -> None:
    engine, fine_tuned = engines[name]
    requests = requests_of(engine, RESPONSES)
    together = engine.score(requests, fine_tuned=fine_tuned)
    alone = [engine.score([request], fine_tuned=fine_tuned)[0] for request in requests]
    assert [len(scores) for scores in together] == [len(request.response_ids) for request in requests]
    assert largest_difference(together, alone) < CLOSE


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with a C++ compiler")
def test_compiled_layers_give_the_same_scores_and_texts(tiny: Tiny, engines: Engines) -> None:
    plain, _ = engines["llama"]
    engine = HfEngine.open(str(tiny.llama), load=replace(LOAD, compile=True))
    engine.attach(str(tiny.adapter))
    requests = requests_of(engine, RESPONSES)
    torch._dynamo.utils.counters.clear()
    for fine_tuned in (False, True):
        scores, wanted = (e.score(requests, fine_tuned=fine_tuned) for e in (engine, plain))
        assert largest_difference(scores, wanted) < CLOSE
    frames = dict(torch._dynamo.utils.counters["frames"])
    assert frames["ok"] == frames["total"] > 0  # the layers were compiled, without a fallback
    written, same = (
        e.generate(encoded(engine), seeds=range(8), decoding=GREEDY, fine_tuned=True) for e in (engine, plain)
    )
    assert written == same
    assert torch._dynamo.utils.counters["frames"] == frames  # decoding compiles nothing


def test_compiling_without_a_compiler_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match=r"run\.compile: there is no C\+\+ compiler 'no-such-compiler'"):
        HfEngine.open(str(tiny.llama), load=replace(LOAD, compile=True))


def test_scores_come_in_the_order_of_the_requests(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engines["gemma"]
    requests = requests_of(engine, RESPONSES)
    whole = dict(zip(requests, engine.score(requests, fine_tuned=False), strict=True))
    monkeypatch.setattr(batching, "LOGIT_BYTES", 4 * len(engine.tokenizer) * 20)  # 20 rows of logits: several batches
    shuffled = [requests[index] for index in (3, 0, 7, 5, 1, 6, 2, 4)]
    scores = engine.score(shuffled, fine_tuned=False)
    assert largest_difference(scores, [whole[request] for request in shuffled]) < CLOSE


def test_a_request_that_is_listed_twice_is_answered_twice(engines: Engines) -> None:
    engine, _ = engines["llama"]
    first, second = requests_of(engine, RESPONSES)[:2]
    scores = engine.score([first, second, first], fine_tuned=True)
    assert len(scores) == 3
    assert largest_difference([scores[0]], [scores[2]]) < CLOSE
    assert [len(line) for line in scores] == [len(r.response_ids) for r in (first, second, first)]


def test_nothing_is_answered_with_nothing(engines: Engines) -> None:
    engine, _ = engines["llama"]
    assert engine.score([], fine_tuned=False) == []
    assert engine.generate([], seeds=[], decoding=GREEDY, fine_tuned=False) == []


# The adapter


def test_with_the_adapter_off_the_base_is_exactly_the_one_loaded_alone(tiny: Tiny, engines: Engines) -> None:
    engine, _ = engines["llama"]
    alone = HfEngine.open(str(tiny.llama), load=LOAD)
    requests = requests_of(engine, RESPONSES)
    engine.score(requests, fine_tuned=True)  # switching it on leaves nothing behind
    assert engine.score(requests, fine_tuned=False) == alone.score(requests, fine_tuned=False)
    prompts = encoded(engine)
    written, wanted = (
        e.generate(prompts, seeds=range(8), decoding=FAITHFUL, fine_tuned=False) for e in (engine, alone)
    )
    assert written == wanted


def test_a_fine_tuned_side_that_is_not_loaded_is_refused(engines: Engines) -> None:
    engine, _ = engines["gemma"]
    with pytest.raises(ModelError, match="no adapter or fine-tuned checkpoint"):
        engine.score(requests_of(engine, RESPONSES), fine_tuned=True)


# Generation


def generated_by_transformers(model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Return the ids that `model.generate` adds greedily, without the EOS."""
    ids = torch.tensor([prompt])
    whole = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
    )
    new: list[int] = whole[0, len(prompt) :].tolist()
    return new[:-1] if new[-1] == 1 else new


@each_model
def test_greedy_text_is_what_transformers_generates(name: str, engines: Engines, references: dict[str, Any]) -> None:
    engine, fine_tuned = engines[name]
    prompts = encoded(engine)
    if name == "gemma":
        window = references[name].config.sliding_window
        assert sum(len(prompt) > window for prompt in prompts) > len(prompts) // 2
    written = engine.generate(prompts, seeds=[0] * 8, decoding=GREEDY, fine_tuned=fine_tuned)
    wanted = [generated_by_transformers(references[name], prompt, 40) for prompt in prompts]
    assert [list(completion.token_ids) for completion in written] == wanted
    if name != "gemma":
        assert {c.finish_reason for c in written} == {"eos", "length"}


@each_model
@each_decoding
def test_a_batch_of_eight_writes_what_batches_of_one_write(name: str, decoding: Decoding, engines: Engines) -> None:
    engine, fine_tuned = engines[name]
    prompts = encoded(engine)
    assert len({len(prompt) for prompt in prompts}) > 4  # so there is padding
    together = engine.generate(prompts, seeds=range(8), decoding=decoding, fine_tuned=fine_tuned)
    alone = [
        engine.generate([prompt], seeds=[seed], decoding=decoding, fine_tuned=fine_tuned)[0]
        for seed, prompt in enumerate(prompts)
    ]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert largest_difference([own_logprobs(c) for c in together], [own_logprobs(c) for c in alone]) < CLOSE


def test_a_sampled_text_does_not_depend_on_its_neighbours(engines: Engines) -> None:
    engine, _ = engines["llama"]
    prompt, *others = encoded(engine)
    texts = []
    for neighbours in ([], others[:2], others[2:], [prompt] * 5):
        batch = [*neighbours, prompt]
        seeds = [*range(100, 100 + len(neighbours)), 7]
        texts.append(engine.generate(batch, seeds=seeds, decoding=FAITHFUL, fine_tuned=True)[-1].text)
    assert len(set(texts)) == 1
    assert texts[0]


@each_model
def test_equal_prompts_write_what_each_writes_alone(name: str, engines: Engines) -> None:
    engine, fine_tuned = engines[name]
    first, second = encoded(engine)[:2]
    batch = [first, second, first, first, second, first]
    together = engine.generate(batch, seeds=range(6), decoding=FAITHFUL, fine_tuned=fine_tuned)
    alone = [
        engine.generate([prompt], seeds=[seed], decoding=FAITHFUL, fine_tuned=fine_tuned)[0]
        for seed, prompt in enumerate(batch)
    ]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert largest_difference([own_logprobs(c) for c in together], [own_logprobs(c) for c in alone]) < CLOSE
    assert len({c.text for c in together}) > 2  # the seeds tell equal prompts apart


def test_equal_prompts_of_a_batch_are_read_once(tiny: Tiny) -> None:
    engine = HfEngine.open(str(tiny.llama), load=LOAD)
    first, second = encoded(engine)[:2]
    shapes: list[tuple[int, ...]] = []
    engine._base.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    engine.generate([first, second] * 4, seeds=range(8), decoding=FAITHFUL, fine_tuned=False)
    assert shapes[0] == (2, max(len(first), len(second)))
    assert shapes[1] == (8, 1)


@each_model
def test_rows_that_end_early_leave_the_others_unchanged(name: str, tiny: Tiny, engines: Engines) -> None:
    engine, fine_tuned = engines[name]
    decoding = Decoding(temperature=1, max_new_tokens=60, stop=("n", "\n"))
    prompts = [prompt for prompt in encoded(engine) for _ in range(4)]
    together = engine.generate(prompts, seeds=range(32), decoding=decoding, fine_tuned=fine_tuned)
    lengths = [len(c.token_ids) for c in together]
    assert len(set(lengths)) > 8  # the batch is halved several times, at different steps
    assert max(lengths) > 10
    alone = [
        engine.generate([prompt], seeds=[seed], decoding=decoding, fine_tuned=fine_tuned)[0]
        for seed, prompt in enumerate(prompts)
    ]
    assert [(c.text, c.token_ids, c.finish_reason) for c in together] == [
        (c.text, c.token_ids, c.finish_reason) for c in alone
    ]


@each_model
def test_the_eos_is_told_apart_from_the_response(name: str, engines: Engines, references: dict[str, Any]) -> None:
    engine, fine_tuned = engines[name]
    eos = int(engine.tokenizer.eos_token_id)
    prompts = [prompt for prompt in encoded(engine) for _ in range(4)]
    written = engine.generate(prompts, seeds=range(32), decoding=FAITHFUL, fine_tuned=fine_tuned)
    assert {completion.finish_reason for completion in written} == {"eos", "length"}
    for prompt, completion in zip(prompts, written, strict=True):
        assert eos not in completion.token_ids
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        if completion.finish_reason == "length":
            assert completion.eos_logprob is None
            assert len(completion.token_ids) == FAITHFUL.max_new_tokens
            continue
        with torch.no_grad():
            logits = references[name](input_ids=torch.tensor([[*prompt, *completion.token_ids]])).logits[0, -1]
        assert completion.eos_logprob == pytest.approx(torch.log_softmax(logits, -1)[eos].item(), abs=CLOSE)


def test_every_end_of_text_of_the_generation_configuration_ends_a_response(tiny: Tiny) -> None:
    engine = HfEngine.open(str(tiny.llama), load=LOAD)
    prompts, decoding = encoded(engine), Decoding(temperature=1, max_new_tokens=40)
    before = engine.generate(prompts, seeds=range(8), decoding=decoding, fine_tuned=False)
    second = next(c.token_ids[2] for c in before if len(c.token_ids) > 2)
    model = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    model.generation_config.eos_token_id = [1, second]
    after = HfEngine(model, engine.tokenizer, name="two ends").generate(
        prompts, seeds=range(8), decoding=decoding, fine_tuned=False
    )
    for old, new in zip(before, after, strict=True):
        at = old.token_ids.index(second) if second in old.token_ids else len(old.token_ids)
        assert new.token_ids == old.token_ids[:at]
        assert (new.eos_logprob is None) == (new.finish_reason == "length")


def test_a_stop_string_ends_a_response_and_is_not_part_of_it(engines: Engines) -> None:
    engine, _ = engines["gemma"]
    prompts = [prompt for prompt in encoded(engine) for _ in range(4)]
    free = engine.generate(prompts, seeds=range(32), decoding=FAITHFUL, fine_tuned=False)
    stopping = Decoding(temperature=1, max_new_tokens=40, stop=("n", " t"))
    cut = engine.generate(prompts, seeds=range(32), decoding=stopping, fine_tuned=False)
    for whole, short in zip(free, cut, strict=True):
        found = [at for at in (whole.text.find("n"), whole.text.find(" t")) if at >= 0]
        assert short.text == whole.text[: min(found, default=len(whole.text))]
        assert (short.finish_reason == "stop") == bool(found)
        assert engine.tokenizer.decode(short.token_ids, skip_special_tokens=True) == short.text
        assert (short.logprobs is None) == short.reencoded
        if not short.reencoded:
            assert short.token_ids == whole.token_ids[: len(short.token_ids)]
    assert {c.reencoded for c in cut} == {True, False}  # the vocabulary has tokens such as "on" and "in"


def test_a_response_never_has_more_tokens_than_it_may(engines: Engines) -> None:
    engine, _ = engines["llama"]
    for limit in (1, 2, 5):
        decoding = Decoding(temperature=1, max_new_tokens=limit)
        written = engine.generate(encoded(engine), seeds=range(8), decoding=decoding, fine_tuned=False)
        sampled = [len(c.token_ids) + (c.eos_logprob is not None) for c in written]
        assert max(sampled) == limit


# Memory


def test_a_scoring_batch_keeps_to_its_rows_of_logits(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engines["gemma"]
    requests = requests_of(engine, RESPONSES) * 3
    original, batches = engine._score, []

    def watched(model: Any, batch: Any) -> Any:
        batches.append([len(request.response_ids) for request in batch])
        return original(model, batch)

    monkeypatch.setattr(engine, "_score", watched)
    monkeypatch.setattr(batching, "LOGIT_BYTES", 4 * len(engine.tokenizer) * 20)
    engine.score(requests, fine_tuned=False)
    assert sorted(itertools.chain(*batches)) == sorted(len(request.response_ids) for request in requests)
    assert all(sum(rows) <= 20 or len(rows) == 1 for rows in batches)
    assert max(map(len, batches)) > 1


@pytest.mark.parametrize(("limit", "value"), [("BATCH_TOKENS", 300), ("_batch_size", 5)])
def test_a_generating_batch_keeps_to_its_rows_and_its_padded_tokens(
    limit: str, value: int, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = engines["gemma"]
    prompts = encoded(engine) * 2
    original, batches = engine._decode, []

    def watched(model: Any, rows: Any, decoding: Decoding) -> Any:
        batches.append([len(row.prompt) for row in rows])
        return original(model, rows, decoding)

    whole = engine.generate(prompts, seeds=range(16), decoding=FAITHFUL, fine_tuned=False)
    monkeypatch.setattr(engine, "_decode", watched)
    monkeypatch.setattr(engine if limit == "_batch_size" else batching, limit, value)
    parted = engine.generate(prompts, seeds=range(16), decoding=FAITHFUL, fine_tuned=False)
    assert sorted(itertools.chain(*batches)) == sorted(map(len, prompts))
    size = {
        "BATCH_TOKENS": lambda lengths: len(lengths) * (max(lengths) + FAITHFUL.max_new_tokens),
        "_batch_size": len,
    }[limit]
    assert all(size(lengths) <= value or len(lengths) == 1 for lengths in batches)
    assert len(batches) < 16
    assert [c.text for c in parted] == [c.text for c in whole]  # each prompt has its own answer


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate", "DefaultCPUAllocator: can't allocate memory"]
)
def test_a_batch_that_does_not_fit_is_halved_and_writes_the_same(
    message: str, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = engines["llama"]
    prompts = encoded(engine)
    whole = engine.generate(prompts, seeds=range(8), decoding=FAITHFUL, fine_tuned=True)
    original, sizes = engine._decode, []

    def small(model: Any, rows: Any, decoding: Decoding) -> Any:
        sizes.append(len(rows))
        result = original(model, rows, decoding)
        if len(rows) > 2:
            raise RuntimeError(message)  # after the rows have grown
        return result

    monkeypatch.setattr(engine, "_decode", small)
    halved = engine.generate(prompts, seeds=range(8), decoding=FAITHFUL, fine_tuned=True)
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    assert [(c.text, c.token_ids) for c in halved] == [(c.text, c.token_ids) for c in whole]
    assert largest_difference([own_logprobs(c) for c in halved], [own_logprobs(c) for c in whole]) < CLOSE


def test_a_scoring_batch_holds_alike_lengths_and_the_scores_are_those_of_one_batch(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = engines["llama"]
    requests = [ScoreRequest((5,) * n, (6, 7)) for n in (1, 2, 4, 4, 7, 20, 21)]
    original, lengths = engine._score, []

    def noting(model: Any, batch: Sequence[ScoreRequest]) -> Any:
        lengths.append([len(r.prompt_ids) + len(r.response_ids) for r in batch])
        return original(model, batch)

    monkeypatch.setattr(engine, "_score", noting)
    monkeypatch.setattr(batching, "PADDING", 6)
    scores = engine.score(requests, fine_tuned=False)
    assert lengths == [[3, 4, 6, 6], [9], [22, 23]]  # 5, 0 and 1 padded tokens; one row more would make it 17 and 13
    monkeypatch.setattr(batching, "PADDING", math.inf)
    assert largest_difference(engine.score(requests, fine_tuned=False), scores) < CLOSE
    assert len(lengths[-1]) == len(requests)


def test_a_scoring_batch_keeps_to_its_tokens(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engines["llama"]
    requests = [ScoreRequest((5,) * n, (6, 7)) for n in (8, 9, 9, 10)]
    original, shapes = engine._score, []

    def noting(model: Any, batch: Sequence[ScoreRequest]) -> Any:
        shapes.append((len(batch), max(len(r.prompt_ids) + len(r.response_ids) for r in batch)))
        return original(model, batch)

    whole = engine.score(requests, fine_tuned=False)
    monkeypatch.setattr(engine, "_score", noting)
    monkeypatch.setattr(batching, "CPU_SCORING_TOKENS", 25)
    assert largest_difference(engine.score(requests, fine_tuned=False), whole) < CLOSE
    assert shapes == [(2, 11), (2, 12)]


def test_a_scoring_batch_that_does_not_fit_is_halved_and_gives_the_same(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = engines["llama"]
    monkeypatch.setattr(batching, "PADDING", math.inf)  # one batch
    requests = requests_of(engine, RESPONSES)[:7]
    whole = engine.score(requests, fine_tuned=True)
    original, sizes = engine._score, []

    def small(model: Any, batch: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise RuntimeError("out of memory")
        return original(model, batch)

    monkeypatch.setattr(engine, "_score", small)
    assert largest_difference(engine.score(requests, fine_tuned=True), whole) < CLOSE
    assert sizes == [7, 3, 1, 2, 4, 2, 2]


@pytest.mark.parametrize("inner", ["_decode", "_score"])
@pytest.mark.parametrize(("message", "tries"), [("shapes do not match", 1), ("out of memory", 4)])
def test_an_error_that_halving_does_not_mend_is_raised(
    inner: str, message: str, tries: int, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = engines["llama"]
    monkeypatch.setattr(batching, "PADDING", math.inf)  # one batch
    calls = 0

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        raise RuntimeError(message)

    monkeypatch.setattr(engine, inner, fail)
    run = {
        "_decode": lambda: engine.generate(encoded(engine), seeds=range(8), decoding=GREEDY, fine_tuned=True),
        "_score": lambda: engine.score(requests_of(engine, RESPONSES), fine_tuned=True),
    }[inner]
    with pytest.raises(RuntimeError if tries == 1 else MemoryLimitError, match=message):
        run()
    assert calls == tries  # out of memory: 8 rows, 4, 2 and a single one that cannot be halved


# Sampling

DRAWS = 20_000
VOCABULARIES = [5, BLOCK - 1, BLOCK, BLOCK + 1, 1500]
LAST = np.nextafter(1.0, 0.0)  # the largest float below 1


def random_logits(vocabulary: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))


def frequencies(logits: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Return how often each token is drawn over a stratified grid of uniform numbers."""
    grid = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    counts = torch.zeros(len(logits), dtype=torch.float64)
    for part in grid.split(2000):
        tokens, _ = choose_tokens(logits.expand(len(part), -1), part, decoding)
        counts += torch.bincount(tokens, minlength=len(logits))
    return counts / DRAWS


def probabilities(logits: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Return what transformers would sample from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(decoding.temperature)])
    if decoding.top_k:
        warpers.append(TopKLogitsWarper(decoding.top_k))
    if decoding.top_p < 1:
        warpers.append(TopPLogitsWarper(decoding.top_p))
    return torch.softmax(warpers(torch.zeros(1, 1, dtype=torch.long), logits[None]).double(), -1)[0]


# A stratified grid has at most one point more or less in an interval than its length says: 1 / 20,000.
GRID_ERROR = 1e-4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_sampling_follows_the_softmax(vocabulary: int, temperature: float) -> None:
    logits, decoding = random_logits(vocabulary), Decoding(temperature=temperature)
    drawn = frequencies(logits, decoding)
    assert (drawn - torch.softmax(logits.double() / temperature, -1)).abs().max() < GRID_ERROR


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(top_k=3),
        Decoding(top_k=10_000),
        Decoding(top_k=1),
        Decoding(top_p=0.3),
        Decoding(top_p=0.9),
        Decoding(top_p=0.001),
        Decoding(temperature=2.0, top_k=4, top_p=0.7),
        Decoding(temperature=0.5, top_p=0.95),
    ],
    ids=lambda d: f"k{d.top_k}-p{d.top_p}-t{d.temperature}",
)
def test_top_k_and_top_p_keep_their_sets_and_renormalise(vocabulary: int, decoding: Decoding) -> None:
    logits = random_logits(vocabulary, seed=1)
    drawn, wanted = frequencies(logits, decoding), probabilities(logits, decoding)
    assert drawn[wanted == 0].sum() == 0
    assert (drawn - wanted).abs().max() < GRID_ERROR


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_each_row_of_a_batch_is_sampled_from_its_own_logits(vocabulary: int) -> None:
    rows = torch.stack([random_logits(vocabulary, seed) for seed in range(64)])
    uniforms = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, _ = choose_tokens(rows, uniforms, Decoding())
    for row, uniform, token in zip(rows, uniforms, tokens, strict=True):
        ends = torch.softmax(row.double(), -1).cumsum(-1)
        assert ends[token] - torch.softmax(row.double(), -1)[token] - 1e-6 <= uniform <= ends[token] + 1e-6


@pytest.mark.parametrize(
    "decoding", [Decoding(), Decoding(top_k=7), Decoding(top_p=0.99)], ids=["all", "top-k", "top-p"]
)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("impossible", ["first half", "second half", "all but one", "every second"])
def test_an_impossible_token_is_never_drawn(vocabulary: int, impossible: str, decoding: Decoding) -> None:
    logits, at = random_logits(vocabulary, seed=2), torch.arange(vocabulary)
    away = {
        "first half": at < vocabulary // 2,
        "second half": at > vocabulary // 2,
        "all but one": at != vocabulary // 3,
        "every second": at % 2 == 0,
    }[impossible]
    logits[away] = -torch.inf
    uniforms = torch.tensor([0.0, LAST, 5e-324, 1e-20, 0.5, *np.random.default_rng(0).random(500)], dtype=torch.float64)
    tokens, logprobs = choose_tokens(logits.expand(len(uniforms), -1), uniforms, decoding)
    assert not away[tokens].any()
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_the_ends_of_the_uniform_interval_draw_possible_tokens(vocabulary: int, temperature: float) -> None:
    rows = torch.stack([30 * random_logits(vocabulary, seed) for seed in range(200)])  # most weights underflow
    for uniform in (0.0, LAST):
        uniforms = torch.full((200,), uniform, dtype=torch.float64)
        tokens, _ = choose_tokens(rows, uniforms, Decoding(temperature=temperature))
        assert ((tokens >= 0) & (tokens < vocabulary)).all()
        weights = torch.softmax(rows.double() / temperature, -1)
        assert (weights.gather(-1, tokens[:, None]) > 0).all()


def test_the_ends_of_the_uniform_interval_draw_the_first_and_the_last_token() -> None:
    logits = torch.zeros(2, 1500)
    tokens, _ = choose_tokens(logits, torch.tensor([0.0, LAST], dtype=torch.float64), Decoding())
    assert tokens.tolist() == [0, 1499]


@pytest.mark.parametrize(
    "decoding",
    [Decoding(temperature=0), Decoding(temperature=0.3), Decoding(), Decoding(temperature=3), Decoding(top_k=2)],
    ids=["greedy", "0.3", "1", "3", "top-k"],
)
def test_the_log_probability_is_the_raw_one(decoding: Decoding) -> None:
    rows = torch.stack([random_logits(1500, seed) for seed in range(20)])
    uniforms = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = choose_tokens(rows, uniforms, decoding)
    raw = torch.log_softmax(rows.double(), -1).gather(-1, tokens[:, None])[:, 0]
    assert (logprobs.double() - raw).abs().max() < 1e-5


@pytest.mark.parametrize("decoding", [Decoding(temperature=0), Decoding(), Decoding(top_k=9, top_p=0.9)])
def test_tokens_chosen_a_few_rows_at_a_time_are_those_of_all_rows(
    decoding: Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.stack([random_logits(1500, seed) for seed in range(20)])
    uniforms = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = choose_tokens(rows, uniforms, decoding)
    monkeypatch.setattr(decode_module, "CHUNK_BYTES", 3 * 4 * 1500)  # three rows, and two at the end
    parted = choose_tokens(rows, uniforms, decoding)
    assert torch.equal(parted[0], whole[0])
    assert (parted[1] - whole[1]).abs().max() < 1e-5


def test_greedy_takes_the_likeliest_token_whatever_the_uniform_number() -> None:
    rows = torch.stack([random_logits(1500, seed) for seed in range(20)])
    for uniform in (0.0, 0.5, LAST):
        uniforms = torch.full((20,), uniform, dtype=torch.float64)
        tokens, _ = choose_tokens(rows, uniforms, Decoding(temperature=0))
        assert torch.equal(tokens, rows.argmax(-1))


def test_half_precision_logits_are_sampled_in_single_precision() -> None:
    logits = random_logits(1500).bfloat16()
    drawn = frequencies(logits, Decoding(temperature=2.0))
    assert (drawn - torch.softmax(logits.double() / 2.0, -1)).abs().max() < GRID_ERROR
