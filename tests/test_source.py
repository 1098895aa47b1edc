"""F and B behind one door, against plain forward passes of the same models; and the faults it must refuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS, Tiny, make_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import Decoding, ScoreRequest, Weights
from tuneshift.engines.hf import HfEngine
from tuneshift.engines.options import EngineOptions
from tuneshift.engines.source import Answers, Source, open_source
from tuneshift.errors import ModelError
from tuneshift.models import LoadOptions
from tuneshift.run.records import Response

LOAD = LoadOptions(device="cpu", dtype="float32")
ENGINES = EngineOptions(load=LOAD)
CANARIES = CORPUS[:3]
PROMPTS = [f"Request: {text}\nIntent:" for text in CORPUS[:5]] * 3
ASKED = {f"r0000-c000-p{number:03d}": prompt for number, prompt in enumerate(PROMPTS)}
FAITHFUL = Decoding(temperature=1, max_new_tokens=24)
CLOSE = 1e-4  # nats


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, many times so beside another process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(base: str, **fine_tuning: str) -> Weights:
    return Weights(base, base, **fine_tuning)


@pytest.fixture(scope="module")
def source(tiny: Tiny) -> Source:
    return open_source(weights(str(tiny.llama), adapter=str(tiny.adapter)), engines=ENGINES, canary_prompts=CANARIES)


@pytest.fixture(scope="module")
def tuned(tiny: Tiny) -> Any:
    """F, loaded by transformers and peft alone."""
    base = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(tiny.adapter)).eval()


@pytest.fixture(scope="module")
def answers(source: Source) -> list[Answers]:
    return asked(source)


@pytest.fixture(scope="module")
def substituted(tiny: Tiny) -> Source:
    return open_source(
        weights(str(tiny.llama), adapter=str(tiny.adapter)),
        engines=ENGINES,
        canary_prompts=CANARIES,
        substitute_base=str(tiny.gemma),
    )


def asked(source: Source, *, decoding: Decoding = FAITHFUL, run_seed: int = 0) -> list[Answers]:
    """Return the answers to `PROMPTS`, in order."""
    answers = source.answer(ASKED, decoding=decoding, run_seed=run_seed)
    assert list(answers) == list(ASKED)
    return list(answers.values())


def plain_logprobs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """Return the response tokens' log-probabilities from one forward pass over everything."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    table = torch.log_softmax(logits.double(), -1)
    return [table[len(prompt) + n - 1, token].item() for n, token in enumerate(response)]


def assert_scored_by(model: Any, prompt: Sequence[int], response: Response) -> None:
    """Check every log-probability of a response, and its EOS's where it has one."""
    ids, scores = list(response.token_ids), list(response.token_logprobs)
    if response.eos_logprob is not None:
        ids, scores = [*ids, 1], [*scores, response.eos_logprob]
    assert scores == pytest.approx(plain_logprobs(model, prompt, ids), abs=CLOSE)


def assert_known_from_b(model: Any, prompt: Sequence[int], y_b: Response) -> None:
    """Check what B found of each token that it sampled, and of the EOS where it sampled one."""
    assert y_b.base_logprobs is not None
    assert (y_b.base_eos_logprob is None) == (y_b.eos_logprob is None)
    ids, scores = list(y_b.token_ids), list(y_b.base_logprobs)
    if y_b.base_eos_logprob is not None:
        ids, scores = [*ids, 1], [*scores, y_b.base_eos_logprob]
    assert scores == pytest.approx(plain_logprobs(model, prompt, ids), abs=CLOSE)


def llama_ids(tiny: Tiny, prompt: str) -> list[int]:
    return encode_prompt(AutoTokenizer.from_pretrained(tiny.llama), prompt)


# The canary


def test_an_opened_source_proves_that_its_adapter_acts_and_its_base_is_unharmed(source: Source) -> None:
    assert source.canary.adapter_effect > 0.1
    assert source.canary.base_drift == 0.0


def test_the_canary_is_the_largest_change_of_a_seed_token(source: Source, tuned: Any, tiny: Tiny) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    changes = []
    for prompt in CANARIES:
        first, *rest = llama_ids(tiny, prompt)
        pairs = zip(plain_logprobs(tuned, [first], rest), plain_logprobs(base, [first], rest), strict=True)
        changes += [abs(f - b) for f, b in pairs]
    assert source.canary.adapter_effect == pytest.approx(max(changes), abs=CLOSE)


def test_an_adapter_of_zeros_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    zeros = make_adapter(tiny.llama, tmp_path / "zeros", scale=0)
    with pytest.raises(ModelError, match="changes nothing"):
        open_source(weights(str(tiny.llama), adapter=str(zeros)), engines=ENGINES, canary_prompts=CANARIES)


def test_a_checkpoint_equal_to_its_base_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="changes nothing"):
        open_source(weights(str(tiny.llama), checkpoint=str(tiny.llama)), engines=ENGINES, canary_prompts=CANARIES)


def test_an_adapter_that_harms_the_base_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = HfEngine.attach

    def attach_and_harm(self: HfEngine, adapter: str) -> None:
        attach(self, adapter)
        with torch.no_grad():
            self._base.model.norm.weight[0] += 0.5  # no LoRA layer: switching the adapter off does not undo it

    monkeypatch.setattr(HfEngine, "attach", attach_and_harm)
    with pytest.raises(ModelError, match="switched off"):
        open_source(weights(str(tiny.llama), adapter=str(tiny.adapter)), engines=ENGINES, canary_prompts=CANARIES)


def test_an_adapter_of_nan_weights_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    broken = make_adapter(tiny.llama, tmp_path / "nan", scale=0.5)
    tensors = load_file(broken / "adapter_model.safetensors")
    save_file({name: value * float("nan") for name, value in tensors.items()}, broken / "adapter_model.safetensors")
    with pytest.raises(ModelError):
        open_source(weights(str(tiny.llama), adapter=str(broken)), engines=ENGINES, canary_prompts=CANARIES)


def test_an_adapter_of_another_base_is_refused_unless_it_is_said_to_be_the_same(tiny: Tiny, tmp_path: Path) -> None:
    renamed = tmp_path / "tiny-llama-renamed"
    renamed.symlink_to(tiny.llama)
    with pytest.raises(ModelError, match="was trained for"):
        open_source(weights(str(renamed), adapter=str(tiny.adapter)), engines=ENGINES, canary_prompts=CANARIES)
    opened = open_source(
        weights(str(renamed), adapter=str(tiny.adapter)), engines=ENGINES, canary_prompts=CANARIES, same_base=True
    )
    assert opened.canary.base_drift == 0.0


def test_a_source_needs_an_adapter_or_a_checkpoint(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="no adapter or fine-tuned checkpoint"):
        open_source(weights(str(tiny.llama)), engines=ENGINES, canary_prompts=CANARIES)


# A full checkpoint


@pytest.fixture(scope="module")
def merged(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("merged")
    base = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    PeftModel.from_pretrained(base, str(tiny.adapter)).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.llama).save_pretrained(folder)
    return open_source(weights(str(tiny.llama), checkpoint=str(folder)), engines=ENGINES, canary_prompts=CANARIES)


def test_a_merged_checkpoint_scores_like_its_adapter(merged: Source, tuned: Any, tiny: Tiny) -> None:
    prompts = [llama_ids(tiny, prompt) for prompt in PROMPTS[:5]]
    requests = [ScoreRequest(tuple(ids[:8]), tuple(ids[8:])) for ids in prompts]
    for request, scores in zip(requests, merged.engine.score(requests, fine_tuned=True), strict=True):
        assert scores == pytest.approx(plain_logprobs(tuned, request.prompt_ids, request.response_ids), abs=CLOSE)
    base = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    for request, scores in zip(requests, merged.engine.score(requests, fine_tuned=False), strict=True):
        assert scores == pytest.approx(plain_logprobs(base, request.prompt_ids, request.response_ids), abs=CLOSE)


def test_a_merged_checkpoint_answers_like_its_adapter(merged: Source, answers: list[Answers]) -> None:
    others = asked(merged)
    assert [(a.y_f.text, a.y_b.text) for a in others] == [(a.y_f.text, a.y_b.text) for a in answers]
    assert merged.canary.base_drift is None


# Answers


def test_both_answers_carry_f_s_log_probabilities(answers: list[Answers], tuned: Any, tiny: Tiny) -> None:
    assert {a.y_f.finish_reason for a in answers} | {a.y_b.finish_reason for a in answers} == {"eos", "length"}
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert_scored_by(tuned, llama_ids(tiny, prompt), answer.y_f)  # measured while sampling, against a second pass
        if answer.y_b.token_ids:
            assert_scored_by(tuned, llama_ids(tiny, prompt), answer.y_b)


def test_b_s_own_answers_carry_what_b_found_of_them_and_f_s_do_not(answers: list[Answers], tiny: Tiny) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.y_f.base_logprobs is answer.y_f.base_eos_logprob is None  # nobody asked B about them
        assert_known_from_b(base, llama_ids(tiny, prompt), answer.y_b)
    assert any(a.y_b.base_logprobs and a.y_b.base_logprobs != a.y_b.token_logprobs for a in answers)
    assert any(a.y_b.base_eos_logprob is not None for a in answers)


def test_the_eos_of_an_empty_base_response_carries_f_s_log_probability(
    answers: list[Answers], tuned: Any, tiny: Tiny
) -> None:
    empty = [(p, a.y_b) for p, a in zip(PROMPTS, answers, strict=True) if not a.y_b.token_ids]
    assert any(response.eos_logprob is not None for _, response in empty)
    for prompt, response in empty:
        assert_scored_by(tuned, llama_ids(tiny, prompt), response)


def test_the_base_answers_without_the_adapter(answers: list[Answers], tiny: Tiny) -> None:
    alone = HfEngine.open(str(tiny.llama), load=LOAD)
    greedy = Decoding(temperature=0, max_new_tokens=24)
    source = open_source(weights(str(tiny.llama), adapter=str(tiny.adapter)), engines=ENGINES, canary_prompts=CANARIES)
    both = asked(source, decoding=greedy)[:5]
    prompts = [llama_ids(tiny, prompt) for prompt in PROMPTS[:5]]
    wanted = alone.generate(prompts, seeds=[0] * 5, decoding=greedy, fine_tuned=False)
    assert [answer.y_b.text for answer in both] == [completion.text for completion in wanted]
    assert [answer.y_f.text for answer in both] != [completion.text for completion in wanted]
    assert len({answer.y_f.text for answer in answers}) > 10  # and at temperature 1 the ids tell equal prompts apart


def test_an_answer_depends_on_its_id_and_the_run_s_seed_alone(source: Source, answers: list[Answers]) -> None:
    whole = dict(zip(ASKED, answers, strict=True))
    few = {name: ASKED[name] for name in list(ASKED)[9:3:-2]}
    again = source.answer(few, decoding=FAITHFUL, run_seed=0)
    texts = {name: (answer.y_f.text, answer.y_b.text) for name, answer in again.items()}
    assert texts == {name: (whole[name].y_f.text, whole[name].y_b.text) for name in few}
    other = asked(source, run_seed=1)
    assert sum(a.y_f.text == b.y_f.text for a, b in zip(answers, other, strict=True)) < 5


def test_answers_are_not_reencoded_unless_a_stop_string_began_inside_a_token(source: Source, tuned: Any) -> None:
    stopping = Decoding(temperature=1, max_new_tokens=24, stop=("n", "s"))  # the tokens "in", "is" and "on" exist
    written = asked(source, decoding=stopping)
    responses = [(p, r) for p, a in zip(PROMPTS, written, strict=True) for r in (a.y_f, a.y_b)]
    tokenizer = source.engine.tokenizer
    assert {response.reencoded for _, response in responses} == {True, False}
    for prompt, response in responses:
        assert not {"n", "s"} & set(response.text)
        assert len(response.token_ids) == len(response.token_logprobs)
        if response.token_ids:
            assert_scored_by(tuned, encode_prompt(tokenizer, prompt), response)
        if response.reencoded:
            assert list(response.token_ids) == tokenizer(response.text, add_special_tokens=False)["input_ids"]
    from_b = [answer.y_b for answer in written]
    assert {(y_b.reencoded, y_b.base_logprobs is None) for y_b in from_b} == {(True, True), (False, False)}


def test_who_waits_is_told_how_many_answers_are_there(tiny: Tiny) -> None:
    said: list[str] = []
    batches = replace(ENGINES, batch_size=3)
    small = open_source(weights(str(tiny.llama), adapter=str(tiny.adapter)), engines=batches, canary_prompts=CANARIES)
    wanted = list(ASKED)[:4]
    small.answer(
        {name: ASKED[name] for name in wanted},
        decoding=FAITHFUL,
        run_seed=0,
        say=said.append,
    )
    assert said == [f"{who}: {done} of 4 answers" for who in ("F", "B") for done in (0, 3, 4)]


def test_no_prompts_get_no_answers(source: Source) -> None:
    assert source.answer({}, decoding=FAITHFUL, run_seed=0) == {}


# A substitute base


def test_with_a_substitute_base_both_responses_are_encoded_anew_and_scored_by_f(
    substituted: Source, tuned: Any, tiny: Tiny
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    written = asked(substituted)
    assert sum(bool(answer.y_b.token_ids) for answer in written) > 10
    for prompt, answer in zip(PROMPTS, written, strict=True):
        for response in (answer.y_f, answer.y_b):
            assert response.reencoded
            assert response.eos_logprob is None
            assert response.base_logprobs is response.base_eos_logprob is None  # the substitute's tokens were others
            assert list(response.token_ids) == tokenizer(response.text, add_special_tokens=False)["input_ids"]
            if response.token_ids:
                assert_scored_by(tuned, encode_prompt(tokenizer, prompt), response)


def test_a_substitute_base_writes_the_base_response_from_its_own_tokens(substituted: Source, tiny: Tiny) -> None:
    greedy = Decoding(temperature=0, max_new_tokens=24)
    written = asked(substituted, decoding=greedy)[:5]
    tokenizer = AutoTokenizer.from_pretrained(tiny.gemma)
    model = AutoModelForCausalLM.from_pretrained(tiny.gemma, dtype=torch.float32)
    for prompt, answer in zip(PROMPTS, written, strict=False):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        assert answer.y_b.text == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_substitute_base_leaves_f_s_texts_as_they_were(substituted: Source, answers: list[Answers]) -> None:
    written = asked(substituted)
    assert [answer.y_f.text for answer in written] == [answer.y_f.text for answer in answers]
    assert [answer.y_f.finish_reason for answer in written] == [answer.y_f.finish_reason for answer in answers]


def test_the_manifest_names_every_model(substituted: Source, source: Source, tiny: Tiny) -> None:
    named = substituted.describe()
    assert named["fine_tuned_and_base"]["model"] == str(tiny.llama)
    assert named["fine_tuned_and_base"]["fine_tuned"] == str(tiny.adapter)
    assert named["substitute_base"]["model"] == str(tiny.gemma)
    assert source.describe()["substitute_base"] is None
