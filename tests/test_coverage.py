"""Coverage: what counts as the same response, how pairs spread, and how the pool and the choice are steered."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tuneshift.coverage import (
    answer_of,
    collapse,
    coverage,
    densities,
    families,
    kinds_of,
    probed_kinds,
    skeleton,
    spread,
)
from tuneshift.datafiles import Seed
from tuneshift.dataset import choose, kept_rows
from tuneshift.engines.base import Decoding
from tuneshift.engines.source import Answers
from tuneshift.preflight import ModelChecks
from tuneshift.prompts.generators import chat_request, chat_texts, few_shot_prompt
from tuneshift.prompts.pool import Plan, PoolItem, Steering, make_pool, plan_calls
from tuneshift.prompts.probing import FIRST, ask_words, probe_words
from tuneshift.report.coverage import coverage_sentences
from tuneshift.run.records import Candidate, GeneratorCall, Probe, Response


def answered(number: int, response: str, *, text: str = "play it", kept: bool = True, call: str = "c0") -> Candidate:
    y_f = Response(response, (5, 6), (-0.1, -0.1), None, "stop", reencoded=False)
    return Candidate(f"p{number:04d}", 0, call, text, text, kept, "kept" if kept else "high-high", y_f)


def call_of(name: str, *demos: str) -> GeneratorCall:
    return GeneratorCall(name, 0, demos, "", (), (), 0, 0.0, {})


# What counts as the same response


@pytest.mark.parametrize(
    ("text", "response", "masked"),
    [
        ("play some jazz by Miles Davis", ' PlayMusic(artist="Miles Davis")', 'PlayMusic(artist="_")'),
        ("play some jazz by miles davis", ' PlayMusic(artist="Miles Davis")', 'PlayMusic(artist="_")'),
        ("rain in Paris tomorrow", ' GetWeather(city="Paris", day="tomorrow")', 'GetWeather(city="_", day="_")'),
        ("what is the capital of France", "The capital of France is Paris.", "_ Paris."),
        ("give it 5 stars", " RateBook", "RateBook"),
        ("Ann has 3 apples", " 3 apples", "3 apples"),
        ("(A) yes or (B) no?", "(B)", "(B)"),
        ("get me O'Brien, the book", ' Find(name="O\'Brien, the book")', 'Find(name="_")'),
        ("is it? (yes)", "no (never)", "no (never)"),  # punctuation alone is no copy
        ('play "Miles Davis" now', ' PlayMusic(artist="Miles Davis")', 'PlayMusic(artist="_")'),
        ("to Rome, Texas", " Find(a, Texas)", "Find(a, _)"),
        ("from new york to rome", " Fly(new york rome, now)", "Fly(_, now)"),  # neighbours are one
        ("播放周杰伦的歌曲", ' Play(artist="周杰伦")', 'Play(artist="_")'),
        ("明天北京的天气", ' Weather(城市="北京", 时间="明天")', 'Weather(城市="_", 时间="_")'),
        ("เปิดเพลงของคาราบาว", ' Play(artist="คาราบาว")', 'Play(artist="_")'),
        ("आज दिल्ली में मौसम", ' Weather(city="दिल्ली")', 'Weather(city="_")'),
        ("我的卡", "卡片遗失", "卡片遗失"),  # one letter alone is shared by chance
        ("", " PlayMusic", "PlayMusic"),
        ("play", "", ""),
    ],
)
def test_what_was_copied_from_the_prompt_is_masked(text: str, response: str, masked: str) -> None:
    assert skeleton(text, response) == masked


def test_the_longest_span_is_masked_as_one_and_not_its_first_words() -> None:
    assert skeleton("new york, or new york city", "it is new york city, now") == "it is _, now"


def test_a_span_does_not_end_in_punctuation() -> None:
    assert skeleton("add it. Then stop", "it. Now") == "_. Now"


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_has_a_skeleton_that_is_no_longer_than_the_response(text: str, response: str) -> None:
    assert len(skeleton(text, response)) <= len(response)


# How pairs spread over clusters


def test_an_answer_that_some_prompt_got_without_its_words_is_closed_and_masked_nowhere() -> None:
    """Topics of a bank: a question often has words of its own topic."""
    topics = [("my card is lost, help", "lost or stolen card"), ("where is it?", " lost or stolen card")]
    calls = [("hear lost", "Play(track=lost)"), ("hear help", "Play(track=help)")]
    assert kinds_of([*topics, *calls]) == ["lost or stolen card"] * 2 + ["Play(track=_)"] * 2
    assert kinds_of(topics[:1]) == ["_ or stolen _"]  # one prompt alone cannot tell


def test_the_spread_of_a_hand_worked_case() -> None:
    found = spread("aaaabbcde")  # 9 pairs, clusters of 4, 2, 1, 1 and 1
    assert found is not None
    assert (found.pairs, found.clusters) == (9, 5)
    entropy = -(4 / 9 * math.log(4 / 9) + 2 / 9 * math.log(2 / 9) + 3 * 1 / 9 * math.log(1 / 9))
    assert found.entropy == pytest.approx(entropy)
    assert found.effective == pytest.approx(math.exp(entropy))
    assert found.largest == pytest.approx(4 / 9)
    assert found.unseen == pytest.approx(3 / 9)
    assert found.expected == pytest.approx(5 + 3 * 2 / (2 * 2))  # Chao1, bias-corrected: n1 = 3, n2 = 1


def test_equal_clusters_are_all_effective_and_none_is_unseen() -> None:
    found = spread("aabbcc")
    assert found is not None
    assert found.effective == pytest.approx(3)
    assert (found.unseen, found.expected) == (0, 3)


def test_no_pairs_have_no_spread() -> None:
    assert spread([]) is None


def test_the_unseen_mass_tells_how_often_the_next_pair_is_new() -> None:
    draw = random.Random(0)
    estimates, truths = [], []
    for _ in range(200):
        seen = [draw.choices(range(50), weights=[1 / (n + 1) for n in range(50)])[0] for _ in range(60)]
        found = spread(map(str, seen))
        assert found is not None
        estimates.append(found.unseen)
        truths.append(sum(1 / (n + 1) for n in set(range(50)) - set(seen)) / sum(1 / (n + 1) for n in range(50)))
    assert sum(estimates) / 200 == pytest.approx(sum(truths) / 200, abs=0.02)


def test_kept_pairs_descend_from_their_seeds_in_parts() -> None:
    calls = {"c0": call_of("c0", "s0", "s1"), "c1": call_of("c1", "p0000", "s1")}
    first, second = answered(0, "a", call="c0"), answered(1, "b", call="c1")
    dropped = answered(2, "c", call="c1", kept=False)
    shares = families([first, second, dropped], calls)  # the second: half of s1, a quarter of each by the first
    assert shares == {"s1": pytest.approx((0.5 + 0.75) / 2), "s0": pytest.approx((0.5 + 0.25) / 2)}


def test_the_descent_of_what_is_learnt_leads_over_what_was_kept_alone() -> None:
    calls = {"c0": call_of("c0", "s0", "s1"), "c1": call_of("c1", "p0000", "s1")}
    candidates = [answered(0, "a", call="c0"), answered(1, "b", call="c1")]
    assert families(candidates, calls, {"p0001"}) == {"s1": 0.75, "s0": 0.25}


def test_coverage_is_told_of_the_kept_pairs_until_those_that_are_learnt_are_chosen() -> None:
    calls = [call_of("c0", "s0", "s1"), call_of("c1", "s1")]
    candidates = [answered(n, "a" if n < 6 else "b") for n in range(8)] + [answered(8, "c", kept=False)]
    kept, learnt = coverage(candidates, calls), coverage(candidates, calls, {"p0000", "p0001", "p0006", "p0007"})
    assert kept is not None
    assert learnt is not None
    assert (kept["of"], kept["kept"], kept["spread"]["largest"]) == ("kept", 8, 0.75)
    assert (learnt["of"], learnt["kept"], learnt["spread"]["largest"]) == ("learnt", 8, 0.5)
    assert coverage_sentences(kept)[0].startswith("8 kept pairs show 2 kinds")
    assert coverage_sentences(learnt)[0].startswith("4 learnt pairs of 8 kept show 2 kinds")
    assert coverage_sentences(kept)[-1].startswith("1 of 2 generator calls showed fewer than 2 examples")
    assert "generator calls" not in " ".join(coverage_sentences(coverage(candidates, calls[:1]) or {}))


def test_how_the_kinds_grew_is_told_of_ever_fewer_rounds_and_the_last() -> None:
    kept = [replace(answered(n, f"Kind{n // 2}"), round=n) for n in range(7)]
    found = coverage(kept, [call_of("c0", "s0")])
    assert found is not None
    assert "Kinds up to round 1: 1, 2: 1, 4: 2, 7: 4." in coverage_sentences(found)


def test_prompts_from_a_file_descend_from_nothing() -> None:
    assert families([answered(0, "a")], {"c0": call_of("c0")}) == {}


# Where it is dense


def test_the_density_of_closed_answers_is_the_size_of_their_cluster() -> None:
    assert densities(["a", "b", "a", "a", "c", "b"]) == [3, 2, 3, 3, 1, 2]


def test_answers_that_share_words_count_in_part() -> None:
    one, other = 'Play(artist="_", year="_")', 'Play(artist="_")'  # 2 of 3 words are shared
    assert densities([one, other, other]) == pytest.approx([1 + 2 * 2 / 3, 2 + 2 / 3, 2 + 2 / 3])


def test_answers_without_words_are_like_their_equals_alone() -> None:
    assert densities(["_", "_", "?", "word"]) == [2, 2, 1, 1]
    assert densities([]) == []


@given(st.lists(st.sampled_from("aaaabbbccd"), min_size=1, max_size=60), st.integers(1, 60), st.integers(0, 3))
def test_thinning_out_cuts_large_clusters_to_one_level(names: list[str], size: int, seed: int) -> None:
    candidates = [answered(number, name) for number, name in enumerate(names)]
    chosen = choose(candidates, size, "balanced", seed=seed)
    assert len(chosen) == min(size, len(names))
    assert chosen == [candidate for candidate in candidates if candidate in chosen]
    before, after = Counter(names), Counter(kinds_of(list(map(answer_of, chosen))))
    level = max(after.values())
    assert all(level - 1 <= after[name] <= level or after[name] == before[name] for name in before)


@pytest.mark.parametrize("seed", range(6))
def test_kinds_of_the_same_words_are_thinned_out_alike(seed: int) -> None:
    names = ["1"] * 60 + ["-1"] * 25 + ["0"] * 15
    chosen = choose([answered(number, name) for number, name in enumerate(names)], 50, "balanced", seed=seed)
    assert Counter(kinds_of(list(map(answer_of, chosen)))) in (
        {"1": 18, "-1": 17, "0": 15},
        {"1": 17, "-1": 18, "0": 15},
    )


def test_which_pair_of_a_cluster_is_left_out_depends_on_the_seed() -> None:
    candidates = [answered(number, "ab"[number % 2]) for number in range(40)]
    chosen = [choose(candidates, 10, how, seed=seed) for how in ("random", "balanced") for seed in (0, 1)]
    assert len({tuple(c.id for c in each) for each in chosen}) == 4
    assert choose(candidates, 10, "balanced", seed=0) == chosen[2]
    assert choose(candidates, 10, "first", seed=0) == candidates[:10]


# How the pool is drawn from

SEEDS = [
    Seed(f"s{n}", "seeds.jsonl:1", text, text, f" {name}") for n, (text, name) in enumerate([("go", "A"), ("do", "B")])
]
KEPT = [answered(n, "A", text=f"text {n}") for n in range(6)] + [
    answered(n, "C", text=f"text {n}") for n in range(6, 9)
]


def share_of(pool: list[PoolItem], *names: str) -> float:
    return sum(item.weight for item in pool if item.id in names) / sum(item.weight for item in pool)


def test_the_papers_pool_is_uniform() -> None:
    pool = make_pool(SEEDS, KEPT, Steering())
    assert {item.weight for item in pool} == {1.0}
    assert {item.cue for item in pool} == {None}  # no response is looked at


def test_a_seed_without_a_response_has_fs_own_where_it_ended() -> None:
    checks = ModelChecks(
        1.0,
        None,
        [
            {"prompt": "go", "response": None, "y_f": " A", "finish_reason": "stop"},
            {"prompt": "do", "response": None, "y_f": " half of", "finish_reason": "length"},
            {"prompt": "be", "response": " C", "y_f": " other", "finish_reason": "stop"},
        ],
        [],
    )
    given = {"go": None, "do": None, "be": " C", "new": None}
    seeds = [Seed(prompt, "seeds.jsonl:1", prompt, prompt, response) for prompt, response in given.items()]
    assert [seed.response for seed in checks.answered(seeds)] == [" A", None, " C", None]


def test_a_kind_is_the_rarer_the_fewer_responses_are_like_it() -> None:
    pool = make_pool(SEEDS, KEPT, Steering(back_generation=1.0))  # A: a seed and 6 kept; B: a seed; C: 3 kept
    assert [item.rarity for item in pool] == pytest.approx([1 / 7, 1, *[1 / 7] * 6, *[1 / 3] * 3])
    assert {item.weight for item in pool} == {1.0}


def test_a_response_that_was_kept_once_is_not_asked_for_but_a_seeds_is() -> None:
    pool = make_pool(SEEDS, [*KEPT, answered(9, "Invented")], Steering(back_generation=1.0))
    rarities = {item.id: item.rarity for item in pool}
    assert (rarities["p0009"], rarities["s1"]) == (0, 1)
    plans = plan_calls(pool, round_index=0, calls=200, demos=4, run_seed=0, back_generation=1.0)
    assert {plan.cue for plan in plans} == {"A", "B", "C"}


@pytest.mark.parametrize("back_generation", [0.0, 1.0])
def test_seeds_keep_their_share_however_many_are_kept(back_generation: float) -> None:
    steering = Steering(0.4, back_generation)
    assert share_of(make_pool(SEEDS, KEPT, steering), "s0", "s1") == pytest.approx(0.4)
    assert share_of(make_pool(SEEDS, [], steering), "s0", "s1") == 1


def test_weights_are_how_often_an_item_is_drawn_first() -> None:
    pool = [PoolItem("a", "a", 6.0), PoolItem("b", "b", 3.0), PoolItem("c", "c", 1.0)]
    plans = plan_calls(pool, round_index=0, calls=4000, demos=2, run_seed=0)
    first = Counter(plan.demos[0].id for plan in plans)
    assert all(len({item.id for item in plan.demos}) == 2 for plan in plans)
    for name, rate in {"a": 0.6, "b": 0.3, "c": 0.1}.items():
        assert first[name] / 4000 == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / 4000))


def test_a_share_of_the_calls_is_backward_and_wants_what_its_last_example_got() -> None:
    pool = [
        *make_pool(SEEDS, KEPT, Steering(back_generation=1.0)),
        PoolItem("x", "no answer known", 1000.0, rarity=0.0),
    ]
    plans = plan_calls(pool, round_index=3, calls=2000, demos=4, run_seed=0, back_generation=0.25)
    backward = [plan for plan in plans if plan.strategy == "backward"]
    assert len(backward) / 2000 == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 2000))
    assert all(plan.cue == plan.demos[-1].cue for plan in backward)
    assert "x" not in {item.id for plan in backward for item in plan.demos}
    wanted = Counter(plan.cue for plan in backward)  # each kind as often as the others, whatever examples weigh
    for cue in "ABC":
        assert wanted[cue] / len(backward) == pytest.approx(1 / 3, abs=5 * math.sqrt(0.25 / len(backward)))


@pytest.mark.parametrize("calls", [3, 4, 7, 16, 100])
def test_the_calls_of_one_round_spread_over_the_kinds(calls: int) -> None:
    pool = make_pool(SEEDS, KEPT, Steering(back_generation=1.0))
    for index in range(20):
        plans = plan_calls(pool, round_index=index, calls=calls, demos=4, run_seed=0, back_generation=1.0)
        wanted = Counter(plan.cue for plan in plans)
        assert all(abs(wanted[cue] - calls / 3) <= 2 for cue in "ABC")


def test_a_larger_round_begins_with_the_same_calls() -> None:
    pool = make_pool(SEEDS, KEPT, Steering(0.5, 1.0))
    options = {"round_index": 1, "demos": 3, "run_seed": 7, "back_generation": 0.5}
    assert plan_calls(pool, calls=3, **options) == plan_calls(pool, calls=8, **options)[:3]  # type: ignore[arg-type]


def test_a_few_short_answers_among_long_ones_do_not_take_over_the_loop() -> None:
    long = [answered(n, f"line {n}\nand another", text=f"text {n}") for n in range(98)]
    refused = [answered(n, "Sorry, I cannot help.", text=f"text {n}") for n in range(98, 100)]
    pool = make_pool([], [*long, *refused], Steering(back_generation=1.0))
    plans = plan_calls(pool, round_index=0, calls=990, demos=3, run_seed=0, back_generation=1.0)
    backward = [plan for plan in plans if plan.strategy == "backward"]
    assert {plan.cue for plan in backward} == {"Sorry, I cannot help."}
    assert len(backward) == pytest.approx(10, abs=2)  # one kind of 99
    assert len({item.id for plan in plans for item in plan.demos}) == 100


def test_single_sentences_that_share_words_are_not_asked_for() -> None:
    words = ["the", "card", "is", "on", "its", "way", "to", "you", "today", "now"]
    kept = [answered(n, " ".join([*words[n % 10 :], *words[: n % 10], str(n)])) for n in range(60)]
    assert {item.rarity for item in make_pool([], kept, Steering(back_generation=1.0))} == {0.0}


def test_where_no_response_is_known_every_call_is_forward() -> None:
    pool = [PoolItem("a", "a"), PoolItem("b", "b")]
    plans = plan_calls(pool, round_index=0, calls=20, demos=2, run_seed=0, back_generation=1.0)
    assert {plan.strategy for plan in plans} == {"forward"}


@pytest.mark.parametrize("response", ["one\ntwo", "word " * 60])
def test_a_response_that_is_no_short_line_cannot_be_asked_for(response: str) -> None:
    (item,) = make_pool([], [answered(0, response)], Steering(back_generation=1.0))
    assert item.cue is None


BACKWARD = Plan("r0000-c000", (PoolItem("a", "go", 1.0, "A"), PoolItem("b", "play\nit", 1.0, "B(_)")), "B(_)")


def test_backward_examples_have_their_responses_before_them() -> None:
    assert few_shot_prompt(BACKWARD, between="\n---\n", instruction="Requests:") == (
        "Requests:\n\nA\ngo\n---\nB(_)\nplay\nit\n---\nB(_)\n"
    )
    short = Plan("r", (PoolItem("a", "go", 1.0, "A"),), "A")
    assert few_shot_prompt(short, between="\n", instruction=None) == "- A: go\n- A:"


def test_a_closed_answer_that_shares_words_with_every_prompt_is_cut_as_one_kind_where_probes_gave_it() -> None:
    texts = ("I lost my card", "my card was stolen", "lost or not", "stolen!")
    pairs = [answered(number, " lost or stolen card", text=texts[number % 4]) for number in range(40)]
    pairs += [answered(40 + number, " wrong pin", text=f"q{number}") for number in range(40)]
    found = []
    for probes in ([], [Probe("tree", " lost or stolen card")]):
        chosen = choose(pairs, 40, "balanced", seed=0, probes=probes)
        found.append(sum(candidate.y_f is not None and "lost" in candidate.y_f.text for candidate in chosen))
    assert found[0] > found[1] == 20


def test_a_chat_model_is_told_which_answer_is_wanted() -> None:
    asked = chat_request(BACKWARD, asked=20, instruction=None)
    assert "1. go => A\n2. play\nit => B(_)\n" in asked
    assert asked.endswith("Generate 20 more samples whose answer is B(_), without the answer.")


@pytest.mark.parametrize(("cue", "text"), [(None, "eat => sleep"), ("sleep", "eat")])
def test_an_answer_that_a_chat_model_writes_behind_its_prompt_is_cut_where_it_was_shown_some(
    cue: str | None, text: str
) -> None:
    raw = ("1. eat => sleep\n2. play\n3. what does (x) => x + 1 do\n4. write x => bed",)
    call = replace(call_of("c0"), prompt="1. go to bed => sleep", raw=raw, finished=(True,), cue=cue)
    assert chat_texts(call, asked=5) == [text, "play", "what does (x) => x + 1 do", "write x => bed", None]


def test_a_kept_row_tells_how_it_was_asked_for_and_its_parents() -> None:
    call = replace(call_of("c0", "s0", "p0007"), strategy="backward", cue="B")
    (row,) = kept_rows([answered(0, " A")], [call], count_eos=False)
    assert (row["strategy"], row["cue"], row["parents"]) == ("backward", "B", ["s0", "p0007"])


# Telling a collapse


def told(sizes: Mapping[str, int], families: Mapping[str, float], strategy: str = "forward") -> list[str]:
    whole = spread(kind for kind, size in sizes.items() for _ in range(size))
    assert whole is not None
    return collapse(
        {
            "of": "kept",
            "loop": asdict(whole),
            "families": families,
            "strategies": {strategy: {}},
        }
    )


EVEN = {"s0": 0.4, "s1": 0.3, "s2": 0.3}


def test_a_collapse_onto_two_of_many_kinds_or_onto_one_is_told() -> None:
    assert "two of 4 kinds of responses are 80%" in told({"a": 20, "b": 20, "c": 5, "d": 5}, EVEN)[0]
    assert "one kind" in told({"a": 40}, EVEN)[0]
    assert told({"a": 20, "b": 20}, EVEN) == []  # they may be all there are
    assert told({"a": 10, "b": 10, "c": 10, "d": 10}, EVEN) == []
    assert told({"a": 20, "b": 5, "c": 2, "d": 1}, EVEN) == []  # too few pairs to tell


def test_the_descent_from_one_of_several_seeds_is_told() -> None:
    even = {"a": 10, "b": 10, "c": 10, "d": 10}
    assert "descend from seed s0" in told(even, {"s0": 1.0, "s1": 0.0, "s2": 0.0})[0]
    assert told(even, {"s0": 0.6, "s1": 0.4}) == []


def test_who_gave_the_prompts_is_advised_to_give_others() -> None:
    assert told({"a": 40}, {}, "listed") == ["all kept pairs have one kind of response: give prompts of other kinds."]


def test_a_seed_without_descendants_has_a_share_of_zero() -> None:
    calls = {"c0": call_of("c0", "s0", "s1")}
    assert families([answered(0, "a")], calls) == {"s0": 0.5, "s1": 0.5}
    assert families([answered(0, "a")], {"c0": call_of("c0", "s0"), "c1": call_of("c1", "s1")}) == {
        "s0": 1.0,
        "s1": 0.0,
    }


# --- probes ---


def vocabulary(pre_tokenizer: pre_tokenizers.PreTokenizer, decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["the weather in Paris is übel at 10 am, the weathering"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "marks",
    [
        (pre_tokenizers.ByteLevel(), decoders.ByteLevel()),
        (pre_tokenizers.Metaspace(), decoders.Metaspace()),
    ],
)
def test_probes_are_lower_case_words_of_the_vocabulary(marks: tuple[Any, Any]) -> None:
    words = probe_words(vocabulary(*marks), 100, seed=0)
    assert {"weather", "übel"} < set(words)
    assert not {"Paris", "10", "am,"} & set(words)
    assert probe_words(vocabulary(*marks), 2, seed=0) == words[:2]
    assert probe_words(vocabulary(*marks), 100, seed=1) != words


def test_where_a_vocabulary_marks_no_words_any_token_of_letters_may_be_one() -> None:
    assert "weather" in probe_words(vocabulary(pre_tokenizers.Whitespace(), decoders.Fuse()), 100, seed=0)


class Asked:
    """In place of a source: says what it is told to, and counts."""

    def __init__(self, say: Callable[[int], str]) -> None:
        self.say, self.asked = say, 0

    def answer(self, prompts: dict[str, str], **_: Any) -> dict[str, Answers]:
        start, self.asked = self.asked, self.asked + len(prompts)
        said = (
            Response(self.say(start + n), (1,), (-0.1,), None, "stop", reencoded=False) for n in range(len(prompts))
        )
        return {name: Answers(y_f, None) for name, y_f in zip(prompts, said, strict=True)}


@pytest.mark.parametrize(
    ("say", "asked"), [(lambda n: f" Kind{n % 50}", 256), (lambda n: f" Other{n}", FIRST), (lambda n: " Kind", 256)]
)
def test_no_more_words_are_asked_where_f_says_nothing_twice(say: Callable[[int], str], asked: int) -> None:
    source, words = Asked(say), [f"word{number}" for number in range(256)]
    probes = ask_words(cast("Any", source), words, template=None, decoding=Decoding(), run_seed=0)
    assert (source.asked, [probe.word for probe in probes]) == (asked, words[:asked])


def test_half_an_answer_to_a_word_is_none() -> None:
    class Endless(Asked):
        def answer(self, prompts: dict[str, str], **given: Any) -> dict[str, Answers]:
            said = super().answer(prompts, **given)
            return {name: Answers(replace(one.y_f, finish_reason="length"), None) for name, one in said.items()}

    source = Endless(lambda n: " Kind")
    probes = ask_words(cast("Any", source), ["one", "two"], template=None, decoding=Decoding(), run_seed=0)
    assert probes == [Probe("one", ""), Probe("two", "")]
    assert probed_kinds(probes) == []


def test_few_words_are_asked_at_once() -> None:
    source = Asked(lambda n: " Kind")
    assert len(ask_words(cast("Any", source), ["one", "two"], template=None, decoding=Decoding(), run_seed=0)) == 2


def test_what_f_says_to_one_probe_alone_is_no_kind() -> None:
    said = {"rain": "Get(rain)", "snow": "Get(snow)", "book": "Rate", "tale": "Rate", "novel": "Rate", "x": "Lift"}
    assert probed_kinds([Probe(word, response) for word, response in said.items()]) == ["Rate", "Get(_)"]


def test_a_probed_kind_is_asked_for_as_often_as_a_seeds_and_shown_by_no_word() -> None:
    probes = [Probe("rain", "D"), Probe("snow", "D"), Probe("one", "A"), Probe("two", "A"), Probe("x", "Invented")]
    pool = make_pool(SEEDS, [], Steering(back_generation=1.0), probes)  # A and B are the seeds' own
    plans = plan_calls(pool, round_index=0, calls=3000, demos=4, run_seed=0, back_generation=1.0)
    wanted = Counter(plan.cue for plan in plans)
    for cue in "ABD":
        assert wanted[cue] / 3000 == pytest.approx(1 / 3, abs=5 * math.sqrt(0.25 / 3000))
    assert {plan.strategy for plan in plans if plan.cue == "D"} == {"probed"}
    assert {item.id for plan in plans for item in plan.demos} == {"s0", "s1"}
    probed = next(plan for plan in plans if plan.cue == "D")
    assert few_shot_prompt(probed, between="\n", instruction=None).endswith("\n- D:")


def test_what_probes_show_and_no_pair_does_is_told() -> None:
    probes = [Probe("rain", "D"), Probe("snow", "D"), Probe("one", "A"), Probe("two", "A")]
    found = coverage(KEPT, [call_of("c0", "s0")], None, probes)
    assert found is not None
    assert found["probed"] == {"words": 4, "kinds": 2, "missing": ["D"]}
    assert "no pair shows D." in " ".join(coverage_sentences(found))
