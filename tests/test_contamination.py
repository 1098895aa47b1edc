"""Which prompts give a held-out question away: its prompt, its own text, and a text that contains it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from test_benchmarks import LETTERED, MMLU_ROWS, SHARED, bbh_items, gsm8k_items, mmlu_items, needs_data

from tuneshift.datafiles import Item
from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.evaluate.benchmarks.base import read_benchmark
from tuneshift.prompts.contamination import LEAST_WORDS, HeldOut
from tuneshift.prompts.screening import UNANSWERED, Screen
from tuneshift.run.records import GeneratorCall

SENTENCE = "Write a python function to find the first repeated character."
MBPP_ROW = {"task_id": 11, "text": SENTENCE, "code": "def f(s):\n    return s", "test_list": ["assert f('a') == 'a'"]}
PLUS_ROW = {
    "task_id": "Mbpp/11",
    "prompt": f'"""\n{SENTENCE}\nassert f(\'a\') == \'a\'\n"""\n',
    "entry_point": "f",
    "canonical_solution": "def f(s):\n    return s",
    "base_input": [["a"]],
    "plus_input": [],
    "atol": 0,
}


def programs(folder: Path, name: str, row: dict[str, Any]) -> list[Item]:
    path = write_jsonl(folder / f"{name}.jsonl", [row])
    return read_benchmark(name, BENCHMARKS[name], data=str(path), subtask="test")[0]


def reason(items: list[Item], text: str, template: str | None = None) -> str:
    """Return why a screen drops a generated text."""
    screen = Screen(seeds=[], held_out=HeldOut(items), seen=[], fits=lambda prompt: True, template=template)
    (candidate,) = screen.sift(GeneratorCall("c", 0, (), "", (text,), (True,), 0, 0.0, {}), [text])
    return candidate.reason


@pytest.mark.parametrize(("name", "row"), [("mbpp", MBPP_ROW), ("mbpp_plus", PLUS_ROW)])
def test_the_bare_sentence_of_an_exercise_is_contamination(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    items = programs(tmp_path, name, row)
    assert reason(items, items[0].prompt) == "in the evaluation set"
    assert reason(items, SENTENCE) == "in the evaluation set"
    assert reason(items, f"Question 3: {SENTENCE.upper()} Please.") == "in the evaluation set"
    assert reason(items, SENTENCE, 'Solve:\n"""{text}"""\n') == "in the evaluation set"
    assert reason(items, "Write a python function to find the first character.") == UNANSWERED


def test_a_question_without_its_header_or_its_options_is_contamination(tmp_path: Path) -> None:
    items = mmlu_items(tmp_path)
    assert reason(items, "Which bone is in the arm?") == "in the evaluation set"
    assert reason(items, "Which bone is in the arm?\nA. rib\nB. ulna\nC. hip\nD. jaw") == "in the evaluation set"
    assert reason(items, "Which bone is in the leg?") == UNANSWERED
    (lettered,) = bbh_items(tmp_path, "hyperbaton")
    assert lettered.prompt.endswith(f"Q: {LETTERED['input']}\nA:")
    assert reason([lettered], LETTERED["input"]) == "in the evaluation set"
    assert reason([lettered], "which one") == "in the evaluation set"
    assert reason([lettered], "Which one is red?") == UNANSWERED
    assert reason(gsm8k_items(tmp_path), "What are 617 twos?") == "in the evaluation set"


def test_a_question_that_is_short_counts_as_contained_in_none(tmp_path: Path) -> None:
    words = ["what", "is", "the", "weather", "in", "paris", "on", "a", "monday"]
    for count in (LEAST_WORDS - 1, LEAST_WORDS):
        question = " ".join(words[:count])
        items = [Item("e0", "f:1", f"Q: {question} A:", "", bare=(question,))]
        assert reason(items, question) == "in the evaluation set"
        expected = "in the evaluation set" if count == LEAST_WORDS else UNANSWERED
        assert reason(items, f"Tell me: {question}, and why?") == expected


def test_parts_of_words_contain_nothing() -> None:
    question = "a b c d e f g h"
    items = [Item("e0", "f:1", question, "")]
    assert reason(items, f"x {question} y") == "in the evaluation set"
    assert reason(items, f"x{question} y") == reason(items, f"x {question}y") == UNANSWERED


@pytest.mark.parametrize("form", ["({})", "{} (Explain.)", "{}\n(A) 2 (B) 3", "Q: [{}] A:"])
def test_a_question_in_brackets_or_with_options_behind_it_is_found(form: str) -> None:
    question = "How many apples does Ann have if she buys 3 and eats 1?"
    assert reason([Item("e0", "f:1", question, "")], form.format(question)) == "in the evaluation set"


def test_the_beginning_of_a_longer_formula_is_another_question(tmp_path: Path) -> None:
    start = "Complete the rest of the sequence of brackets. Input: "
    items = [Item("e0", "f:1", f"Q: {start}[ {{\nA:", "", bare=(f"{start}[ {{",))]
    assert reason(items, f"{start}[ {{") == "in the evaluation set"
    assert reason(items, f"{start}[ {{\nAnswer:") == "in the evaluation set"
    assert reason(items, f"{start}[ {{ [") == UNANSWERED
    sum_of = "What is the sum of all these numbers: 1 + 2"
    assert reason([Item("e0", "f:1", sum_of, "")], f"{sum_of} + 3") == UNANSWERED


def test_every_question_that_is_given_away_is_named() -> None:
    same = "find the largest number of all in the list"
    items = [Item(f"e{n}", f"f:{n}", f"{same} assert f({n}) == {n}", "", bare=(same,)) for n in range(3)]
    held_out = HeldOut([*items, Item("e3", "f:3", "another", "")])
    assert held_out.given_away_by(items[1].prompt) == {"e0", "e1", "e2"}
    assert held_out.given_away_by("Another!", "nothing") == {"e3"}
    assert held_out.given_away_by() == set()


def test_a_stem_that_several_questions_share_is_none_of_theirs(tmp_path: Path) -> None:
    stem = "Which of these statements about the three of them is right?"
    rows = [{**MMLU_ROWS[0], "question": stem, "choices": [*"abc", last]} for last in "de"]
    path = write_jsonl(tmp_path / "mmlu.jsonl", [*rows, MMLU_ROWS[2]])
    items, _ = read_benchmark("mmlu", BENCHMARKS["mmlu"], data=str(path), subtask=None)
    assert HeldOut(items).given_away_by(stem) == set()
    assert HeldOut(items).given_away_by(f"{stem}\nA. a\nB. b\nC. c\nD. e") == {items[1].id}
    assert HeldOut(items).given_away_by(str(MMLU_ROWS[2]["question"])) == {items[2].id}


def test_the_subject_of_a_question_is_no_part_of_its_own_text(tmp_path: Path) -> None:
    (item, *_) = mmlu_items(tmp_path)
    assert not any("multiple choice" in text for text in item.bare)
    assert MMLU_ROWS[0]["question"] in item.bare


@needs_data
def test_mbpp_with_all_its_questions_knows_each_bare_sentence_and_no_other_benchmarks() -> None:
    rows = [json.loads(line) for line in (SHARED / "mbpp/mbpp.jsonl").read_text().splitlines()]
    data = str(SHARED / "mbpp/mbpp.jsonl")
    items, _ = read_benchmark("mbpp", BENCHMARKS["mbpp"], data=data, subtask="test")
    held_out = HeldOut(items)
    asked = {row["text"] for row in rows if 10 < row["task_id"] < 511}
    assert len(asked) > 490
    assert all(held_out.given_away_by(f"Task: {text}") or len(text.split()) < LEAST_WORDS for text in asked)
    other = [json.loads(line)["question"] for line in (SHARED / "gsm8k/test.jsonl").read_text().splitlines()]
    assert not held_out.given_away_by(*other)


@pytest.mark.parametrize("question", ["Compute 1+2+3+4+5+6+7+8 =", "a/b/c/d/e/f/g/h"])
def test_a_formula_without_spaces_is_a_question_too(question: str) -> None:
    held_out = HeldOut([Item("q", "here:1", question, "36")])
    assert held_out.given_away_by(question) == {"q"}
    assert not held_out.given_away_by("what is the weather like in Paris today, and tomorrow")
