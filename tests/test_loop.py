"""The parts of the loop that need no weights: when it stops, what it asks, what it drops and how it explains itself."""

from __future__ import annotations

import math
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from tuneshift.datafiles import Item
from tuneshift.encoding import Reader
from tuneshift.engines.base import Completion, Decoding, ScoreRequest
from tuneshift.engines.hf import HfEngine
from tuneshift.errors import ModelError
from tuneshift.models import load_tokenizer
from tuneshift.prompts.contamination import HeldOut
from tuneshift.prompts.generators import PromptGenerator, chat_request, few_shot_prompt, separator
from tuneshift.prompts.pool import Plan, PoolItem, plan_calls, shorten
from tuneshift.prompts.screening import UNANSWERED, Screen, normalize
from tuneshift.prompts.stopping import Limits, diagnosis, next_calls, stop_reason
from tuneshift.run.ledger import Ledger, RoundSummary
from tuneshift.run.records import Candidate, GeneratorCall, Response

LIMITS = Limits(target_size=3, max_candidates=10, max_rounds=5, patience=2)


ANSWER = Response("yes", (5,), (-0.1,), None, "stop", reencoded=False)


def candidate(*, round_: int = 0, reason: str = "high-high", kept: bool = False) -> Candidate:
    y_f = None if reason == "duplicate" else ANSWER
    return Candidate("id", round_, "call", "text", "prompt", kept=kept, reason="kept" if kept else reason, y_f=y_f)


def candidates(*rounds: str) -> list[Candidate]:
    """`candidates("k.", "d")`: of two candidates of the first round one was kept; the second had a duplicate alone."""
    reasons = {"d": "duplicate"}
    return [
        candidate(round_=n, kept=mark == "k", reason=reasons.get(mark, "high-high"))
        for n, marks in enumerate(rounds)
        for mark in marks
    ]


# When it stops


def test_a_loop_that_has_not_begun_goes_on() -> None:
    assert stop_reason([], rounds=0, limits=LIMITS) is None


@pytest.mark.parametrize(("kept", "reason"), [(2, None), (3, "target_size reached"), (4, "target_size reached")])
def test_the_loop_ends_with_enough_kept_pairs(kept: int, reason: str | None) -> None:
    assert stop_reason(candidates("k" * kept + "."), rounds=1, limits=LIMITS) == reason


@pytest.mark.parametrize(
    ("dropped", "reason"), [(8, None), (9, "max_candidates reached"), (12, "max_candidates reached")]
)
def test_the_loop_ends_with_too_many_candidates(dropped: int, reason: str | None) -> None:
    assert stop_reason(candidates("k" + "." * dropped), rounds=1, limits=LIMITS) == reason


def test_candidates_that_cost_no_answer_do_not_end_the_loop() -> None:
    assert stop_reason(candidates("k" + "." * 8 + "d" * 90), rounds=1, limits=LIMITS) is None
    assert stop_reason(candidates("k" + "." * 9 + "d" * 90), rounds=1, limits=LIMITS) == "max_candidates reached"


@pytest.mark.parametrize(("rounds", "reason"), [(4, None), (5, "max_rounds reached"), (6, "max_rounds reached")])
def test_the_loop_ends_with_too_many_rounds(rounds: int, reason: str | None) -> None:
    recent = [candidate(round_=rounds - 1, kept=True)]
    assert stop_reason(recent, rounds=rounds, limits=LIMITS) == reason


@pytest.mark.parametrize(
    ("rounds", "stops"),
    [
        (["."], False),  # one barren round is less than the patience of two
        ([".", "."], True),
        (["k", "."], False),
        (["k", ".", "."], True),
        ([".", "k."], False),
        (["k", ".", "k"], False),
        (["", ""], True),  # rounds without candidates are barren too
    ],
)
def test_the_loop_ends_after_barren_rounds(rounds: list[str], stops: bool) -> None:
    reason = stop_reason(candidates(*rounds), rounds=len(rounds), limits=LIMITS)
    assert reason == ("nothing kept in 2 rounds" if stops else None)


@pytest.mark.parametrize(
    ("rounds", "supply", "stops"),
    [
        (["kk", "k" + "d" * 9, "d" * 10], None, True),  # one of 20 was new
        (["kk", "kk" + "d" * 8, "d" * 10], None, False),
        (["kk", "k" + "d" * 9], None, False),  # three of 12
        (["kk", "k" + "d" * 9, "d" * 10], 100, False),  # further on in the user's file may be others
    ],
)
def test_the_loop_ends_where_the_generator_repeats_itself(rounds: list[str], supply: int | None, stops: bool) -> None:
    limits = replace(LIMITS, target_size=9, supply=supply)
    reason = stop_reason(candidates(*rounds), rounds=len(rounds), limits=limits)
    assert (
        reason is not None and reason.startswith("hardly anything new in 2 rounds, most often duplicate: the gener")
    ) == stops


def test_a_target_that_was_reached_is_named_before_any_limit() -> None:
    everything = candidates("kkk", ".......", "", "", "")
    assert stop_reason(everything, rounds=5, limits=LIMITS) == "target_size reached"


@pytest.mark.parametrize(("alone", "stops"), [(1.0, True), (0.95, True), (0.8, False)])
def test_where_hardly_two_responses_are_alike_no_more_are_kept_than_are_learnt(alone: float, stops: bool) -> None:
    limits = replace(LIMITS, target_size=80, max_candidates=100, unbalanced=40)
    texts = ["same" if number >= 40 * alone else f"other{number}" for number in range(40)]
    kept = [replace(candidate(kept=True), y_f=replace(ANSWER, text=text)) for text in texts]
    reason = stop_reason(kept, rounds=1, limits=limits)
    assert (reason is not None and reason.startswith("target_size reached; hardly two")) == stops
    assert stop_reason(kept[:39], rounds=1, limits=limits) is None


# How large the next round is


def test_the_first_round_is_a_full_one() -> None:
    limits = Limits(target_size=250, max_candidates=10_000, max_rounds=500, patience=3)
    assert next_calls([], per_call=20, calls_per_round=4, limits=limits) == 4


def test_a_last_round_is_as_large_as_the_keep_rate_says_and_a_fifth_more() -> None:
    limits = Limits(target_size=60, max_candidates=10_000, max_rounds=500, patience=3)
    half = candidates("k." * 50)  # 50 of 100 kept: ten more need 20 candidates, and a fifth more makes 24
    assert next_calls(half, per_call=5, calls_per_round=100, limits=limits) == 5
    assert next_calls(half, per_call=12, calls_per_round=100, limits=limits) == 2
    assert next_calls(half, per_call=1, calls_per_round=100, limits=limits) == 24


def test_without_kept_candidates_only_the_limit_counts() -> None:
    limits = Limits(target_size=60, max_candidates=130, max_rounds=500, patience=3)
    assert next_calls(candidates("." * 100), per_call=5, calls_per_round=100, limits=limits) == 6
    assert next_calls(candidates("." * 100 + "d" * 40), per_call=5, calls_per_round=100, limits=limits) == 6


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(1, 80),
)
def test_a_round_is_never_larger_than_it_may_be(
    kept: list[bool], per_call: int, calls_per_round: int, target_size: int, max_candidates: int
) -> None:
    limits = Limits(target_size, max_candidates, max_rounds=500, patience=3)
    calls = next_calls(
        candidates("".join(".k"[k] for k in kept)), per_call=per_call, calls_per_round=calls_per_round, limits=limits
    )
    assert 1 <= calls <= calls_per_round
    # all calls but the last one are needed to reach the limit; a call is never cut
    assert calls == 1 or len(kept) + (calls - 1) * per_call < max_candidates


# Why nothing was kept


@pytest.mark.parametrize(
    ("main", "advice"),
    [
        ("high-high", "raise criterion.tau (now 1.5)"),
        ("high-low", "raise criterion.tau (now 1.5)"),
        ("low-low", "F and B agree"),
        ("y_f hit max_new_tokens", "synthesis.max_new_tokens"),
        ("empty y_f", "prompt_template"),
        ("duplicate", "generator.temperature"),
        ("unfinished or unreadable prompt", "generator.max_new_tokens"),
        ("copy of a seed", "give more of them"),
        ("in the evaluation set", "tuneshift show"),
    ],
)
def test_the_diagnosis_names_the_main_cause_and_its_remedy(main: str, advice: str) -> None:
    others = [reason for reason in ("high-high", "low-low", "duplicate") if reason != main]
    mixed = [candidate(reason=reason) for reason in [others[0], main, others[1], main, main, others[0]]]
    text = diagnosis(mixed, tau=1.5)
    assert text.startswith(f"6 candidates: {main} 3, {others[0]} 2, {others[1]} 1. ")
    assert advice in text.split(". ", 1)[1]


def test_the_diagnosis_of_no_candidates_says_so() -> None:
    assert diagnosis([], tau=1.5).startswith("0 candidates: none. ")


# What is dropped unanswered


def call_of(*raw: str, finished: bool = True) -> GeneratorCall:
    return GeneratorCall("r0002-c001", 2, ("s1",), "asked", raw, (finished,) * len(raw), 0, 0.0, {})


SAID = Response("said", (1,), (-0.5,), None, "stop", reencoded=False)


def screen(**options: Any) -> Screen:
    defaults: dict[str, Any] = {
        "seeds": ["Play some jazz!"],
        "held_out": HeldOut([Item("e0", "f:1", "What is the weather in Paris?", "")]),
        "seen": ["Book a table."],
        "fits": lambda prompt: len(prompt) <= 30,
        "template": None,
    }
    return Screen(**{**defaults, **options})


def reasons(of: Screen, *texts: str | None) -> list[str]:
    return [candidate.reason for candidate in of.sift(call_of(), texts)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("play some rock", UNANSWERED),
        ("Play some jazz!", "copy of a seed"),
        ("play  SOME, jazz", "copy of a seed"),
        ("«Play» some jazz…", "copy of a seed"),
        ("what is the weather in paris", "in the evaluation set"),
        ("BOOK A TABLE", "duplicate"),
        ("play some jazz by miles davis now", "prompt too long"),
        ("", "empty prompt"),
        (" \n", "empty prompt"),
        ("?!…", "empty prompt"),
        (None, "unfinished or unreadable prompt"),
    ],
)
def test_each_text_is_dropped_for_its_reason(text: str | None, reason: str) -> None:
    assert reasons(screen(), text) == [reason]


def test_a_text_that_came_before_is_a_duplicate() -> None:
    one = screen()
    assert reasons(one, "play rock", "Play rock.", "play pop", "PLAY POP") == [UNANSWERED, "duplicate"] * 2
    assert reasons(one, "play, pop") == ["duplicate"]  # in a later call too


def test_a_text_that_was_too_long_counts_as_seen_as_it_does_after_a_restart() -> None:
    long = "play some jazz by miles davis now"
    assert reasons(screen(), long, long) == ["prompt too long", "duplicate"]
    assert reasons(screen(seen=[long]), long) == ["duplicate"]


def test_a_prompt_of_the_evaluation_is_named_before_anything_else() -> None:
    text = "What is the weather in Paris?"
    assert reasons(screen(seeds=[text], seen=[text]), text) == ["in the evaluation set"]


def test_other_letters_and_digits_make_another_text() -> None:
    assert reasons(screen(seeds=["table for 2", "naive"]), "table for 3", "naïve", "tables for 2") == [UNANSWERED] * 3


def test_prompts_are_compared_and_measured_in_their_template() -> None:
    template = "Request: {text}\nIntent:"
    one = screen(
        template=template, seeds=["Request: play jazz\nIntent:"], fits=lambda p: len(p) <= len(template) - 6 + 10
    )
    sifted = one.sift(call_of(), ["Play jazz!", "play rock", "play some rock"])
    assert [c.reason for c in sifted] == ["copy of a seed", UNANSWERED, "prompt too long"]
    assert [c.prompt for c in sifted] == [template.replace("{text}", c.text) for c in sifted]


def test_an_empty_text_is_empty_whatever_its_template_says() -> None:
    assert reasons(screen(template="Request: {text}\nIntent:"), "", "?") == ["empty prompt"] * 2


def test_candidates_carry_their_call_and_their_place_in_it() -> None:
    first, second = screen().sift(call_of(), ["play rock", None])
    assert (first.id, second.id) == ("r0002-c001-p000", "r0002-c001-p001")
    assert {first.round, second.round} == {2}
    assert {first.call_id, second.call_id} == {"r0002-c001"}
    assert (first.text, second.text, second.prompt) == ("play rock", "", "")
    assert not first.kept
    assert first.y_f is first.y_b is None


def test_the_ledger_keeps_the_order_of_more_calls_and_prompts_than_an_id_has_digits_for(tmp_path: Path) -> None:
    rounds = range(9_999, 10_001)
    written = []
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for index in rounds:
            plans = plan_calls(POOL, round_index=index, calls=1_001, demos=1, run_seed=0)
            raw = [("x",) * (1_001 if number == 1_000 else 1) for number in range(len(plans))]
            calls = [replace(call_of(*own), id=p.call_id, round=index) for p, own in zip(plans, raw, strict=True)]
            new = [c for call in calls for c in screen(template="{text}").sift(call, call.raw)]
            ledger.record_calls(calls)
            new[-1] = replace(new[-1], kept=True, text=f"of round {index}", y_f=SAID)
            ledger.record_round(RoundSummary(index, 1.5, 0.0, {}), new)
            written.append((calls, new))
        assert [call.id for call in ledger.calls()] == [call.id for calls, _ in written for call in calls]
        assert [call.id for call in ledger.calls(10_000)] == [call.id for call in written[1][0]]
        assert [c.id for c in ledger.candidates()] == [c.id for _, new in written for c in new]
        assert len({c.id for c in ledger.candidates()}) == 2 * 2_001
        assert ledger.counts().newest_kept == ("of round 10000", SAID.text)


def test_the_ledger_gives_back_what_f_and_b_found_of_every_token(tmp_path: Path) -> None:
    third = 1 / 3  # no decimal number of few digits
    y_f = replace(SAID, token_logprobs=(-third,), eos_logprob=-0.1, finish_reason="eos")
    known = replace(y_f, base_logprobs=(-third / 7,), base_eos_logprob=-1e-9)
    found = {
        "sampled by B": known,
        "impossible to B": replace(known, base_logprobs=(-math.inf,)),
        "empty": replace(known, token_ids=(), token_logprobs=(), base_logprobs=()),
        "encoded anew": replace(SAID, reencoded=True),
    }
    call = call_of("x")
    new = [replace(candidate(), id=name, call_id=call.id, y_f=y_f, y_b=y_b) for name, y_b in found.items()]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record_calls([call])
        ledger.record_round(RoundSummary(0, 1.5, 0.0, {}), new)
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.candidates() == new
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        unknown = "SELECT candidate_id, role FROM responses WHERE base_logprobs IS NULL ORDER BY 1, 2"
        everyone = [*((name, "y_f") for name in found), ("encoded anew", "y_b")]
        assert database.execute(unknown).fetchall() == sorted(everyone)


def test_normalizing_ignores_case_punctuation_and_spacing() -> None:
    assert normalize("  Straße,\tNO. 5! ") == "strasse no 5"


@pytest.mark.parametrize(("one", "other"), [("दिन", "दान"), ("ปี", "ปู")], ids=["Hindi", "Thai"])
def test_a_vowel_sign_is_no_punctuation(one: str, other: str) -> None:
    assert normalize(one) != normalize(other)


@pytest.mark.parametrize(
    ("one", "other"), [("[ { [", "{ [ ["), ("( 1 + 2 ) * 3", "1 + ( 2 * 3 )"), ("f(x)[0]", "f(x[0])")]
)
def test_brackets_make_another_text(one: str, other: str) -> None:
    assert normalize(one) != normalize(other)
    assert reasons(screen(seen=[one]), other, one) == [UNANSWERED, "duplicate"]


def test_spacing_of_brackets_counts_for_nothing() -> None:
    assert normalize("[{(\N{FULLWIDTH LEFT PARENTHESIS}") == normalize(" [ {( ( ")


def test_an_accent_counts_the_same_however_it_is_encoded() -> None:
    assert normalize("na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve") == normalize("nai\N{COMBINING DIAERESIS}ve")


# What the generator is asked


class ScriptedEngine:
    """Answers with a script, and keeps what it was asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: Sequence[tuple[str, bool]]) -> None:
        self.tokenizer = tokenizer
        self.reader = Reader(tokenizer, 256, 60)
        self.script = script
        self.prompts: list[list[int]] = []
        self.seeds: list[int] = []
        self.decoding: Decoding | None = None
        self.fine_tuned: bool | None = None

    def generate(
        self, prompts: Sequence[Sequence[int]], *, seeds: Sequence[int], decoding: Decoding, fine_tuned: bool
    ) -> list[Completion]:
        self.prompts, self.seeds = [list(prompt) for prompt in prompts], list(seeds)
        self.decoding, self.fine_tuned = decoding, fine_tuned
        answers = [self.script[index % len(self.script)] for index in range(len(prompts))]
        return [
            Completion(text, (5, 6, 7), (-1.0, -1.0, -1.0), None, "stop" if done else "length", reencoded=False)
            for text, done in answers
        ]

    def score(self, requests: Sequence[ScoreRequest], *, fine_tuned: bool) -> list[tuple[float, ...]]:
        raise AssertionError("the generator scores nothing")

    def describe(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


POOL = [PoolItem(f"s{n}", text) for n, text in enumerate(["play jazz", "book a table", "rate it", "stop", "go on"])]
BLOCKS = [PoolItem("s0", "play jazz\nby miles"), PoolItem("s1", "rate it")]
DECODING = Decoding(temperature=0.9, top_p=0.95, top_k=40, max_new_tokens=32)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def tokenizer(tiny: Tiny) -> PreTrainedTokenizerBase:
    """A tokenizer that puts a BOS before a text, and whose chat template writes one of its own."""
    loaded = load_tokenizer(str(tiny.gemma))
    assert loaded("play")["input_ids"][0] == loaded.bos_token_id
    loaded.chat_template = CHAT_TEMPLATE
    return loaded


def generator(engine: ScriptedEngine, **options: Any) -> PromptGenerator:
    defaults: dict[str, Any] = {"kind": "few_shot", "instruction": None, "demos": 3, "per_call": 4, "run_seed": 0}
    return PromptGenerator(engine=engine, decoding=DECODING, **{**defaults, **options})


def plan(*texts: str) -> Plan:
    return Plan("r0000-c000", tuple(PoolItem(f"s{n}", text) for n, text in enumerate(texts)))


def test_examples_of_one_line_are_bullets_and_the_next_one_is_begun() -> None:
    assert few_shot_prompt(plan("play jazz", "rate it"), between="\n", instruction=None) == "- play jazz\n- rate it\n-"


def test_examples_of_several_lines_are_blocks_with_a_rule_after_each() -> None:
    texts = ["play jazz\nby miles", "rate it"]
    assert (
        few_shot_prompt(plan(*texts), between="\n---\n", instruction=None) == "play jazz\nby miles\n---\nrate it\n---\n"
    )


@pytest.mark.parametrize(("between", "listed"), [("\n", "- rate it\n-"), ("\n---\n", "rate it\n---\n")])
def test_the_instruction_stands_above_the_list(between: str, listed: str) -> None:
    assert few_shot_prompt(plan("rate it"), between=between, instruction="Requests:") == f"Requests:\n\n{listed}"


@pytest.mark.parametrize(("texts", "between"), [(["a", "b"], "\n"), (["a", "b\nc"], "\n---\n"), ([], "\n")])
def test_one_text_of_several_lines_makes_the_whole_list_blocks(texts: list[str], between: str) -> None:
    assert separator(texts) == between


def test_a_call_asks_for_its_continuations_of_one_list_with_a_seed_each(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(tokenizer, [(" play pop", True)])
    first, second = generator(engine).write(POOL, round_index=3, calls=2)
    for call, asked in ((first, engine.prompts[:4]), (second, engine.prompts[4:])):
        texts = {item.id: item.text for item in POOL}
        assert call.prompt == "".join(f"- {texts[demo]}\n" for demo in call.demos) + "-"
        assert asked == [tokenizer(call.prompt)["input_ids"]] * 4
    assert (first.id, second.id) == ("r0003-c000", "r0003-c001")
    assert {first.round, second.round} == {3}
    assert len(engine.seeds) == len(set(engine.seeds)) == 8
    assert first.raw == (" play pop",) * 4
    assert first.generated_tokens == 4 * 3
    assert first.seconds >= 0


@pytest.mark.parametrize(("pool", "stop"), [(POOL, "\n"), (BLOCKS, "\n---\n")])
def test_a_continuation_ends_where_an_example_ends(
    pool: list[PoolItem], stop: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = ScriptedEngine(tokenizer, [(" play pop", True)])
    (call,) = generator(engine, demos=2, instruction="Requests:").write(pool, round_index=0, calls=1)
    assert engine.decoding == Decoding(temperature=0.9, top_p=0.95, top_k=40, max_new_tokens=32, stop=(stop,))
    assert call.prompt.startswith("Requests:\n\n")
    assert call.prompt.count(stop) >= 2


def test_a_single_line_example_from_a_pool_with_blocks_is_a_block(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(tokenizer, [("play pop", True)])
    calls = generator(engine, demos=1).write(BLOCKS, round_index=0, calls=12)
    assert {call.prompt for call in calls} == {"play jazz\nby miles\n---\n", "rate it\n---\n"}


@pytest.mark.parametrize("fine_tuned", [True, False])
def test_the_generator_runs_on_the_side_it_was_given(fine_tuned: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(tokenizer, [("play pop", True)])
    generator(engine, fine_tuned=fine_tuned).write(POOL, round_index=0, calls=1)
    assert engine.fine_tuned is fine_tuned


def test_examples_are_drawn_without_replacement_and_uniformly(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(tokenizer, [("play pop", True)])
    calls = generator(engine, per_call=1).write(POOL, round_index=0, calls=600)
    assert {len(set(call.demos)) for call in calls} == {3}
    counts = Counter(demo for call in calls for demo in call.demos)
    five_sigma = 5 * math.sqrt(600 * 0.6 * 0.4)
    assert all(counts[item.id] == pytest.approx(360, abs=five_sigma) for item in POOL)
    first = Counter(call.demos[0] for call in calls)  # their order is random too
    assert all(first[item.id] == pytest.approx(120, abs=5 * math.sqrt(600 * 0.2 * 0.8)) for item in POOL)


def test_a_small_pool_is_shown_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(tokenizer, [("play pop", True)])
    (call,) = generator(engine, demos=9).write(POOL, round_index=0, calls=1)
    assert sorted(call.demos) == ["s0", "s1", "s2", "s3", "s4"]


LONG = PoolItem("r0000-c000-p000", "play some jazz by miles davis tonight in boston", cue="long")


def test_a_generator_of_a_short_context_goes_on_when_kept_prompts_are_longer_than_the_seeds(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, context = load_tokenizer(str(tiny.llama)), 64
    config = GPT2Config(
        n_positions=context, n_embd=32, n_layer=1, n_head=2, vocab_size=44, bos_token_id=2, eos_token_id=1
    )
    engine = HfEngine(
        GPT2LMHeadModel(config).eval(), tokenizer, name="gpt2"
    )  # it has no place for a token more than that
    seeds = [PoolItem(f"s{n}", text) for n, text in enumerate(["a b", "c d", "e f"])]
    kept = [replace(LONG, id=f"r0000-c000-p{n:03d}", text=f"{LONG.text} {LONG.text} {'a' * n}") for n in range(9)]
    writer = replace(generator(engine), decoding=replace(DECODING, max_new_tokens=16))  # type: ignore[arg-type]
    writer.check([seed.text for seed in seeds])
    first = writer.write([*seeds, *kept], round_index=3, calls=6)
    assert [message for message in caplog.messages if message.startswith("round 4: ")]
    assert all(len(tokenizer(call.prompt)["input_ids"]) + 16 <= context for call in first)
    assert all(1 <= len(call.demos) < 3 for call in first)
    again = writer.write([*seeds, *kept], round_index=3, calls=6)
    assert [(call.demos, call.raw) for call in again] == [(call.demos, call.raw) for call in first]


def test_the_longest_examples_are_left_out_until_the_rest_fits(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(tokenizer, [("play pop", True)])
    engine.reader = Reader(tokenizer, 75, 60)
    pool = [*POOL[:2], LONG]
    assert len(engine.reader.tokenizer(LONG.text)["input_ids"]) + DECODING.max_new_tokens < 75
    (call,) = generator(engine).write(pool, round_index=0, calls=1)
    assert sorted(call.demos) == ["s0", "s1"]
    assert call.prompt == few_shot_prompt(
        plan(*(POOL[int(name[1])].text for name in call.demos)), between="\n", instruction=None
    )


def test_the_example_whose_answer_is_wanted_stays_as_long_as_another_can_go() -> None:
    short, other = replace(POOL[0], cue="jazz"), replace(POOL[1], cue="table")
    backward = Plan("r0000-c000", (other, short, LONG), LONG.cue, "backward")
    first = shorten(backward, POOL)
    assert first == replace(backward, demos=(short, LONG))
    second = shorten(first, POOL)
    assert second == replace(backward, demos=(LONG,))
    third = shorten(second, POOL)
    assert third == Plan("r0000-c000", (POOL[3],))  # the shortest of the pool, in a forward call
    assert shorten(third, POOL) is None


def test_a_repeated_round_asks_the_same_again(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = []
    for calls in (2, 2, 3):  # of a larger round the first calls are the same
        engine = ScriptedEngine(tokenizer, [("play pop", True)])
        made = generator(engine).write(POOL, round_index=1, calls=calls)
        asked.append(([call.demos for call in made][:2], engine.seeds[:8], engine.prompts[:8]))
    assert asked[0] == asked[1] == asked[2]


@pytest.mark.parametrize("other", [{"round_index": 2}, {"run_seed": 1}])
def test_another_round_or_run_asks_something_else(other: dict[str, int], tokenizer: PreTrainedTokenizerBase) -> None:
    demos, seeds = [], set()
    for options in ({}, other):
        engine = ScriptedEngine(tokenizer, [("play pop", True)])
        made = generator(engine, run_seed=options.get("run_seed", 0)).write(
            POOL, round_index=options.get("round_index", 1), calls=5
        )
        demos.append([call.demos for call in made])
        seeds |= set(engine.seeds)
    assert demos[0] != demos[1]
    assert len(seeds) == 2 * 5 * 4


def test_continuations_are_stripped_and_unfinished_ones_are_unusable(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(tokenizer, [(" play pop ", True), (" book a", False), ("", True)])
    few_shot = generator(engine, per_call=3)
    (call,) = few_shot.write(POOL, round_index=0, calls=1)
    assert call.finished == (True, False, True)
    assert few_shot.parse(call) == ["play pop", None, ""]


# Chat


def test_the_chat_request_is_the_paper_s_phrase_with_a_numbered_list() -> None:
    asked = chat_request(plan("play jazz", "rate it"), asked=20, instruction=None)
    assert asked == "Generate 20 more samples like these 2:\n\n1. play jazz\n2. rate it"
    assert chat_request(plan("go"), asked=5, instruction="Requests to a speaker.").startswith(
        "Requests to a speaker.\n\nGenerate 5 more samples like these 1:"
    )


def test_the_chat_form_applies_the_chat_template_once(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(tokenizer, [("1. play pop", True)])
    (call,) = generator(engine, kind="chat").write(POOL, round_index=0, calls=1)
    texts = {item.id: item.text for item in POOL}
    listed = "\n".join(f"{number}. {texts[demo]}" for number, demo in enumerate(call.demos, start=1))
    request = f"Generate 4 more samples like these 3:\n\n{listed}"
    assert call.prompt == f"<bos>[user] {request}\n[assistant] "
    (ids,) = engine.prompts  # one text holds all of a call's prompts
    messages = [{"role": "user", "content": request}]
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert engine.decoding == DECODING  # a list has several lines, so no stop string


def test_each_chat_call_has_a_seed_of_its_own(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(tokenizer, [("1. play pop", True)])
    calls = generator(engine, kind="chat").write(POOL, round_index=0, calls=3)
    assert len(set(engine.seeds)) == 3
    assert [len(call.raw) for call in calls] == [1, 1, 1]


@pytest.mark.parametrize(
    ("raw", "finished", "texts"),
    [
        ("1. play pop\n2. book it", True, ["play pop", "book it", None, None]),
        ("1. play pop\n2. book it", False, ["play pop", None, None, None]),
        ("1. a b\n2. c d\n3. e f\n4. g h\n5. i j", True, ["a b", "c d", "e f", "g h"]),
        ("", True, [None] * 4),
    ],
)
def test_a_chat_answer_is_padded_to_the_prompts_that_were_asked_for(
    raw: str, finished: bool, texts: list[str | None], tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = ScriptedEngine(tokenizer, [(raw, finished)])
    chat = generator(engine, kind="chat")
    (call,) = chat.write(POOL, round_index=0, calls=1)
    assert chat.parse(call) == texts


def test_a_model_without_a_chat_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    engine = ScriptedEngine(tokenizer, [("1. play pop", True)])
    with pytest.raises(ModelError, match="no chat template"):
        generator(engine, kind="chat").write(POOL, round_index=0, calls=1)
