"""GSM8K, BBH and MMLU: prompts, grading and splits are lm-evaluation-harness's own, item by item."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_jsonl

from tuneshift.datafiles import Item
from tuneshift.errors import ConfigError, DataError
from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.evaluate.benchmarks.base import chance_level, read_benchmark, split_held_out
from tuneshift.evaluate.benchmarks.bbh import NUMBER_WORDS, SUBTASKS
from tuneshift.evaluate.benchmarks.harness import _by_task, _load, check_harness
from tuneshift.evaluate.benchmarks.mmlu import MMLU, SUBJECTS, MmluQuestion

SHARED = Path(__file__).parents[2] / "shared/data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks' own files are not here")

GSM8K_ROWS = [
    {"question": "Ann has 3 apples and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "What are 617 twos?", "answer": "617 * 2 = 1234\n#### 1,234"},
    {"question": "It is 3 degrees and falls by 6. How cold?", "answer": "3 - 6 = -3\n#### -3"},
    {"question": "Half of 25 dollars?", "answer": "25 / 2 = 12.50\n#### 12.50"},
]
LETTERED = {
    "input": "Which one?\nOptions:\n(A) The red ball.\n(B) The red ball, again\n(C) It's 5 (five)\n(D) red",
    "target": "(B)",
}
BBH_ROWS: dict[str, dict[str, str]] = {
    "boolean_expressions": {"input": "not ( True ) and ( True ) is", "target": "False"},
    "causal_judgement": {"input": "Did it?\nOptions:\n- Yes\n- No", "target": "No"},
    "dyck_languages": {"input": "Input: [ { [", "target": "] } ]"},
    "formal_fallacies": {"input": "Is it?\nOptions:\n- valid \n- invalid", "target": "invalid"},
    "multistep_arithmetic_two": {"input": "((-1 + 2) * 3) =", "target": "-3"},
    "navigate": {"input": "Do you return?\nOptions:\n- Yes\n- No", "target": "Yes"},
    "object_counting": {"input": "I have a cat and 4 dogs. How many?", "target": "5"},
    "sports_understanding": {"input": 'Is it plausible? "He scored."', "target": "yes"},
    "web_of_lies": {"input": "Ann lies. Does Bo tell the truth?", "target": "No"},
    "word_sorting": {"input": "Sort the words: List: pear apple fig at&t", "target": "apple at&t fig pear"},
}
MMLU_ROWS: list[dict[str, Any]] = [
    {"question": " Where is the femur? ", "choices": ["arm", "leg", "head", "hand"], "answer": 1, "subject": "anatomy"},
    {"question": "What is 2 + 2?", "choices": ["3", "5", "4", "22"], "answer": 2, "subject": "elementary_mathematics"},
    {
        "question": "Which bone is in the arm?",
        "choices": ["rib", "ulna", "hip", "jaw"],
        "answer": 1,
        "subject": "anatomy",
    },
]

RESPONSES = [
    "", " ", "\n", "no number", "7", " 7", "#### 7", "#### 7.", "#### 1,234.", "#### 1234", "#### $1,234", "$1234",
    "-3", "#### -3", "- 3", "12.50", "#### 12.50.", "12.5", "$5", "$", "....", "7.", "7,", ",7", "7 8", "8 7 8",
    "The answer is 7.", "7 apples", "#### 8 #### 7", "####7", "# 7", "\u0667", "\uff17", "\u22123", "7\xa0",
    "1.234,50", "(A)", " (A)", "(B)", "A", "B", "b", "(b)", ": B", "Answer:\n\nB", "A: (B)", "[B]", "(E)", "(B).",
    "(B) The red ball", "The red ball", "the red ball again", "The Red Ball, Again!", "red", "It's 5", "its 5", "5",
    "ball", "True", "False", "true", " False.", "False and True", "not True", "Falsehood", "Yes", "No", "yes", "no",
    "YES", "Nope", "Yes, no", "valid", "invalid", "Invalid", "is not valid", "deductively valid", "] } ]", "]}]",
    " ] } ]", "] } ] )", '"] } ]"', "then ] } ]", "<>", "five", "Five", "I have five.", "twenty-five", "twenty five",
    "one hundred and five", "and five", "five hundred thousand", "thousand million", "one one", "five, six",
    "million", "point five", "fiveteen", "-", "--3", "3-3", "plausible", "not plausible", "Not plausible.",
    "implausible", "yes, plausible", "no: plausible", "tells the truth", "does not tell the truth",
    "Bo is telling the truth", "is not telling the truth", "the truth", "apple at&t fig pear",
    "apple, at&t, fig, pear", "pear fig apple", "apple apple at&t fig pear", "apples fig", "fig apple at&t fig pear",
    "Apple at&t fig pear", "\\", '"', "(A)(B)", "()", "((B))", "(\u0391)", "\xc9t\xe9 (B)", "Question",
    "na\xefve \U0001f600 7 \U0001f600", "1e5", "0x7", "07", "+7", "7%", "7/1", "7th", "a7b", "7\n8", "7\r\n",
]  # fmt: skip


def responses() -> list[str]:
    """Return the hard cases, and random ones put together from their parts."""
    draw = random.Random(0)
    parts = [*RESPONSES, "\n", " ", ", ", ". ", ": ", "#### ", "so ", "Q", "The answer is "]
    return RESPONSES + ["".join(draw.choices(parts, k=draw.randint(2, 6))) for _ in range(400)]


def bbh_row(subtask: str) -> dict[str, str]:
    return BBH_ROWS.get(subtask, LETTERED)


def bbh_items(folder: Path, subtask: str) -> list[Item]:
    path = folder / f"{subtask}.json"
    path.write_text(json.dumps({"canary": "x", "examples": [bbh_row(subtask)]}))
    return read_benchmark("bbh", BENCHMARKS["bbh"], data=str(path), subtask=None)[0]


def gsm8k_items(folder: Path) -> list[Item]:
    path = write_jsonl(folder / "gsm8k.jsonl", GSM8K_ROWS)
    return read_benchmark("gsm8k", BENCHMARKS["gsm8k"], data=str(path), subtask=None)[0]


def mmlu_items(folder: Path) -> list[Item]:
    path = write_jsonl(folder / "mmlu.jsonl", MMLU_ROWS)
    return read_benchmark("mmlu", BENCHMARKS["mmlu"], data=str(path), subtask=None)[0]


def harness_tasks(items: list[Item], name: str) -> dict[str, Any]:
    return dict(_load(_by_task(items, BENCHMARKS[name]))["tasks"])


def graded_by_the_harness(task: Any, item: Item, response: str) -> dict[str, bool]:
    """Grade one response with the harness's own filters and metric."""
    grades = {}
    for ensemble in task._filters:
        (answer,) = _filtered(ensemble, item, response)
        score = task.process_results(item.doc, [answer])["exact_match"]
        grades[ensemble.name.replace("-", "_")] = bool(score == 1)
    return grades


def _filtered(ensemble: Any, item: Item, response: str) -> list[str]:
    answers: Any = [[response]]
    for make in ensemble.filters:
        answers = list(make().apply(answers, [item.doc]))
    return list(answers)


def test_gsm8k_is_graded_as_the_harness_grades_it(tmp_path: Path) -> None:
    items = gsm8k_items(tmp_path)
    (task,) = harness_tasks(items, "gsm8k").values()
    found = set()
    for item in items:
        for response in [*responses(), item.reference]:
            grades = BENCHMARKS["gsm8k"].grade(response, item)
            assert grades == graded_by_the_harness(task, item, response), response
            found.add(tuple(sorted(grades.items())))
    assert len(found) >= 3  # the strings hold right and wrong ones by each metric


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_bbh_is_graded_as_the_harness_grades_it(subtask: str, tmp_path: Path) -> None:
    (item,) = bbh_items(tmp_path, subtask)
    (task,) = harness_tasks([item], "bbh").values()
    found, ends_with_an_error = set(), []
    for response in [*responses(), item.reference]:
        grades = BENCHMARKS["bbh"].grade(response, item)
        try:
            expected = graded_by_the_harness(task, item, response)
        except ValueError:  # "thousand million" is no number, and ends the harness
            ends_with_an_error.append(response)
            assert not grades["flexible_extract"]
            continue
        assert grades == expected, response
        found |= set(grades.items())
    assert found == {(metric, right) for metric in BENCHMARKS["bbh"].metrics for right in (True, False)}
    assert not ends_with_an_error or subtask in ("object_counting", "multistep_arithmetic_two")


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if benchmark.harness_task])
def test_prompts_and_settings_are_the_harnesss(name: str, tmp_path: Path) -> None:
    items = {
        "gsm8k": lambda: gsm8k_items(tmp_path),
        "bbh": lambda: [item for subtask in SUBTASKS for item in bbh_items(tmp_path, subtask)],
        "mmlu": lambda: mmlu_items(tmp_path),
    }[name]()
    check_harness(items, BENCHMARKS[name])  # compares every prompt
    for task in harness_tasks(items, name).values():
        assert task.config.num_fewshot == 0
        if name != "mmlu":
            assert tuple(task.config.generation_kwargs["until"]) == BENCHMARKS[name].stop
            filters = {ensemble.name.replace("-", "_") for ensemble in task._filters}
            assert filters == set(BENCHMARKS[name].metrics)


def test_a_harness_that_asks_otherwise_is_refused(tmp_path: Path) -> None:
    (item, *_) = gsm8k_items(tmp_path)
    other = Item(item.id, item.place, item.prompt.replace("Question", "Problem"), item.reference, item.doc)
    with pytest.raises(ConfigError, match=r"asks .*gsm8k\.jsonl:1 as 'Question: .* Install lm-eval 0\.4\.13"):
        check_harness([other], BENCHMARKS["gsm8k"])


def test_subtasks_and_subjects_are_the_harnesss() -> None:
    import lm_eval.tasks

    tasks = Path(lm_eval.tasks.__file__).parent
    bbh = {path.stem for path in (tasks / "bbh/zeroshot").glob("*.yaml") if not path.name.startswith("_")}
    mmlu = {path.stem.removeprefix("mmlu_") for path in (tasks / "mmlu/default").glob("mmlu_*.yaml")}
    assert set(SUBTASKS) == bbh
    assert set(SUBJECTS) == mmlu
    for subject in SUBJECTS:
        described = yaml.safe_load((tasks / f"mmlu/default/mmlu_{subject}.yaml").read_text())["description"]
        row = {"question": "Why?", "choices": ["a", "b", "c", "d"], "answer": 0}
        assert MMLU.ask(MmluQuestion(**row), subject)[0].startswith(f"{described}Why?\nA. a")
    written = re.search(
        r'english_number_regex = regex\.compile\(\s*"(.*)"', (tasks / "bbh/zeroshot/utils.py").read_text()
    )
    assert written is not None
    assert written.group(1).encode().decode("unicode_escape") == NUMBER_WORDS


@needs_data
def test_the_benchmarks_own_files_are_read_and_their_references_are_right() -> None:
    gsm8k = BENCHMARKS["gsm8k"]
    items, _ = read_benchmark("gsm8k", gsm8k, data=str(SHARED / "gsm8k/test.jsonl"), subtask=None)
    assert len(items) == 1319
    assert all(all(gsm8k.grade(item.reference, item).values()) for item in items)
    bbh, wrong = BENCHMARKS["bbh"], []
    for subtask in SUBTASKS:
        items, _ = read_benchmark("bbh", bbh, data=str(SHARED / f"bbh/{subtask}.json"), subtask=None)
        assert len(items) == {"causal_judgement": 187, "penguins_in_a_table": 146, "snarks": 178}.get(subtask, 250)
        check_harness(items[:3], bbh)
        wrong += [item.place for item in items if not bbh.grade(item.reference, item)["flexible_extract"]]
    assert [place.rpartition("/")[2] for place in wrong] == WRONG_REFERENCES


WRONG_REFERENCES = [  # their own text stands for the letter, and another option is found in it
    "movie_recommendation.json, number 163 of the list",
    "ruin_names.json, number 99 of the list",
    "ruin_names.json, number 144 of the list",
]


def test_the_split_is_a_function_of_prompts_and_seed_alone() -> None:
    items = [Item(str(number), f"f:{number}", f"prompt {number % 90}", "x") for number in range(100)]
    held_out, rest = split_held_out(items, fraction=0.5, seed=0)
    assert sorted(held_out + rest, key=lambda item: int(item.id)) == items
    assert {item.prompt for item in held_out}.isdisjoint(item.prompt for item in rest)  # equal prompts stay together
    assert len({item.prompt for item in held_out}) == 45
    turned = split_held_out(items[::-1], fraction=0.5, seed=0)[0]
    assert {item.id for item in turned} == {item.id for item in held_out}
    assert split_held_out(items, fraction=0.5, seed=1)[0] != held_out
    fewer = split_held_out(items, fraction=0.2, seed=0)[0]
    assert {item.id for item in fewer} < {item.id for item in held_out}
    with pytest.raises(DataError, match="leaves a part of 1 questions empty"):
        split_held_out(items[:1], fraction=0.5, seed=0)


def test_chance_is_that_of_guessing_among_the_options(tmp_path: Path) -> None:
    chance = {subtask: chance_level(BENCHMARKS["bbh"], bbh_items(tmp_path, subtask))[0] for subtask in SUBTASKS}
    assert chance["snarks"] == 0.25  # the test's item has four options
    for subtask in ("boolean_expressions", "causal_judgement", "formal_fallacies", "navigate", "web_of_lies"):
        assert chance[subtask] == 0.5
    assert {subtask for subtask, level in chance.items() if level is None} == {
        "dyck_languages", "multistep_arithmetic_two", "object_counting", "word_sorting"
    }  # fmt: skip
    assert chance_level(BENCHMARKS["gsm8k"], gsm8k_items(tmp_path)) == (
        None,
        "the answers are free, not chosen from options",
    )
    assert chance_level(BENCHMARKS["mmlu"], mmlu_items(tmp_path)) == (0.25, None)


CHOICES = '{"question": "a", "choices": ["a", "b", "c", "d"], "answer": %s}'
WRONG_FILES = {
    "no such file": ("gsm8k", None, "none.jsonl", "", "cannot be read"),
    "no JSON": ("gsm8k", None, "a.jsonl", "{\n", "a.jsonl:1: not valid JSON"),
    "no object": ("gsm8k", None, "a.jsonl", "\n[1]\n", "a.jsonl:2: expected an object, got list"),
    "a field is missing": ("gsm8k", None, "a.jsonl", '{"question": "a"}', 'a.jsonl:1: answer: .* "question", "answer"'),
    "a field is no text": ("gsm8k", None, "a.jsonl", '{"question": 3, "answer": "#### 3"}', "a.jsonl:1: question: "),
    "a field is empty": ("gsm8k", None, "a.jsonl", '{"question": "", "answer": "#### 3"}', "a.jsonl:1: question: "),
    "half a character": ("gsm8k", None, "a.jsonl", '{"question": "\\ud800", "answer": "#### 3"}', "question: "),
    "no number": ("gsm8k", None, "a.jsonl", '{"question": "a", "answer": "3"}', 'a.jsonl:1: answer: expected "#### "'),
    "nothing": ("gsm8k", None, "a.jsonl", "\n", "a.jsonl: no question here"),
    "a JSON file of lines": ("bbh", "navigate", "a.json", "{}\n{}", "a.json: not valid JSON"),
    "a JSON file without a list": ("bbh", "navigate", "a.json", "{}", "a.json: expected a list of objects"),
    "a list of texts": ("bbh", "navigate", "a.json", '["a"]', "a.json, number 0 of the list: expected an object"),
    "no subtask": ("bbh", None, "a.json", '[{"input": "a", "target": "Yes"}]', "which subtask is this"),
    "another subtask": ("bbh", None, "navigate.json", '[{"input": "a", "target": "(A)"}]', "no reference as right"),
    "nothing to sort": ("bbh", None, "word_sorting.json", '[{"input": "a", "target": "a"}]', 'expected "List:"'),
    "no pattern": ("bbh", "word_sorting", "a.json", '[{"input": "List: a* *b", "target": "a*"}]', "words as patterns"),
    "two choices": ("mmlu", "anatomy", "a.jsonl", CHOICES.replace(', "c", "d"', "") % 0, "choices: "),
    "a fifth choice": ("mmlu", "anatomy", "a.jsonl", CHOICES % 4, "answer: "),
    "no subject": ("mmlu", None, "a.jsonl", CHOICES % 1, "subject: "),
    "another subject": ("mmlu", "virology", "a.jsonl", CHOICES % '1, "subject": "anatomy"', "of subtask virology"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_file_is_refused_with_place_and_remedy(case: str, tmp_path: Path) -> None:
    name, subtask, file, content, said = WRONG_FILES[case]
    if content:
        (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said) as refused:
        read_benchmark(name, BENCHMARKS[name], data=str(tmp_path / file), subtask=subtask)
    assert str(tmp_path / file) in str(refused.value)


def test_without_a_file_the_hubs_dataset_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in a Hub dataset's form stands for the dataset; what reads it is the same."""
    write_jsonl(tmp_path / "test.jsonl", GSM8K_ROWS)
    here = replace(BENCHMARKS["gsm8k"], hub=(str(tmp_path), "default"))
    items, digest = read_benchmark("gsm8k", here, data=None, subtask=None)
    from_file = gsm8k_items(tmp_path)
    assert [(item.id, item.prompt, item.reference) for item in items] == [
        (item.id, item.prompt, item.reference) for item in from_file
    ]
    assert digest == read_benchmark("gsm8k", here, data=None, subtask=None)[1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    gone = replace(here, hub=(str(tmp_path / "gone"), "default"))
    with pytest.raises(DataError, match=r"cannot be read from the Hub .* Give evaluation\.data"):
        read_benchmark("gsm8k", gone, data=None, subtask=None)
