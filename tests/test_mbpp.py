"""MBPP and MBPP+: honest programs get what the file's asserts and EvalPlus itself give them."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, write_project
from hypothesis import given
from hypothesis import strategies as st
from test_transfer import run_cli

from tuneshift.config import load_config
from tuneshift.datafiles import Item
from tuneshift.demo import prepare_models
from tuneshift.engines.hf import HfEngine
from tuneshift.errors import DataError, SandboxError
from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.evaluate.benchmarks.base import gradable, read_benchmark
from tuneshift.evaluate.benchmarks.mbpp import wrong
from tuneshift.evaluate.benchmarks.mbpp_plus import failures, sanitized, truths_of
from tuneshift.evaluate.benchmarks.programs import Check, equals, failure, program_of
from tuneshift.evaluate.benchmarks.references import reference_replies
from tuneshift.evaluate.tasks import answer_items
from tuneshift.models import LoadOptions
from tuneshift.plain import canonical, decode, encode
from tuneshift.preflight import read_inputs
from tuneshift.run.directory import read_jsonl
from tuneshift.sandbox import Call, Limits, Reply, Result, Sandbox

needs_sandbox = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed (`make test` installs it)"
)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what reference solutions give out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESHIFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


MBPP = Path(__file__).parents[2] / "shared/data/mbpp/mbpp.jsonl"

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.fractions()
)
hashable = st.recursive(scalars, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=6)
values = st.recursive(
    hashable | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner)
        | st.sets(hashable, max_size=4)
        | st.dictionaries(hashable, inner, max_size=3)
    ),
    max_leaves=10,
)


@given(values)
def test_a_value_survives_the_wall(value: object) -> None:
    plain = json.loads(json.dumps(encode(value)))
    assert decode(plain) == value
    assert canonical(plain) == canonical(encode(value))


@given(values, values)
def test_two_values_are_equal_where_python_says_so(first: object, second: object) -> None:
    assert (canonical(encode(first)) == canonical(encode(second))) == (first == second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (2**60, float(2**60)),
        (1, 1 + 0j),
        (Fraction(1, 2), 0.5),
        ({1, 2}, frozenset({2, 1})),
        ({"a": [1], "b": 2}, {"b": 2.0, "a": [True]}),
        (b"ab", bytearray(b"ab")),
        (math.inf, math.inf),
    ],
)
def test_values_of_different_types_are_equal_as_in_python(first: object, second: object) -> None:
    assert first == second
    assert equals(first)(encode(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1], (1,)),
        ("1", 1),
        (b"a", "a"),
        ({1}, [1]),
        ({}, set()),
        (math.nan, math.nan),
        (None, 0),
        (0.1, Fraction(1, 10)),
    ],
)
def test_values_that_differ_are_told_apart(first: object, second: object) -> None:
    assert not equals(first)(encode(second))


@pytest.mark.parametrize("plain", [{}, {"set": [1], "tuple": []}, {"int": "x"}, {"complex": [1]}, [{}], {"dict": [1]}])
def test_what_is_no_plain_data_is_refused(plain: Any) -> None:
    with pytest.raises((ValueError, IndexError, TypeError)):
        canonical(plain)
    check = Check(Call("f"), equals(1))
    assert failure(Result(None, 1, (Reply(plain, None, 0.0),)), [check]) == "unreadable value"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


QUESTION = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n  return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2", "assert double(0.5)==1.0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}


def read(name: str, path: Path, rows: list[dict[str, Any]], subtask: str = "test") -> list[Item]:
    return read_benchmark(name, BENCHMARKS[name], data=str(write(path, rows)), subtask=subtask)[0]


def test_questions_are_asked_as_evalplus_asks_them(tmp_path: Path) -> None:
    rows = [QUESTION, *({**QUESTION, "task_id": number} for number in (10, 510, 511, 600, 601))]
    first, last = read("mbpp", tmp_path / "mbpp.jsonl", rows)
    assert first.prompt == '"""\nWrite a function to double a number.\nassert double(2) == 4\n"""\n'
    assert [first.doc["task_id"], last.doc["task_id"]] == [11, 510]
    splits = {part: len(read("mbpp", tmp_path / "mbpp.jsonl", rows, part)) for part in BENCHMARKS["mbpp"].subtasks}
    assert splits == {"prompt": 1, "test": 2, "validation": 2, "train": 1}


@pytest.mark.parametrize(
    "form",
    [
        "assert math.isclose(f(1), 1.5)",
        "assert not f(1)",
        "assert f(1) == g(2)",
        "assert f(1) == 1 == f(2)",
        "f(1)",
        "assert (",
    ],
)
@needs_sandbox
def test_a_question_whose_assert_cannot_be_judged_outside_is_left_out_and_counted(tmp_path: Path, form: str) -> None:
    rows = [QUESTION, {**QUESTION, "task_id": 12, "test_list": ["assert f(1) == 1", form]}]
    items = read("mbpp", tmp_path / "mbpp.jsonl", rows)
    _, asked, described = gradable(BENCHMARKS["mbpp"], items, unsafe_no_sandbox=False)
    assert asked == items[:1]
    assert described["left_out"] == {"an assert is not of the form call == value": 1}
    with pytest.raises(DataError, match="no question can be graded; this one: an assert is not of the form"):
        gradable(BENCHMARKS["mbpp"], items[1:], unsafe_no_sandbox=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_id": "11"}, "task_id"),
        ({"test_list": []}, "test_list"),
        ({"text": None}, "text"),
        ({"task_id": 2000}, "no question of subtask test here"),
    ],
)
def test_a_wrong_question_is_refused_by_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read("mbpp", tmp_path / "mbpp.jsonl", [{**QUESTION, **change}])


@needs_sandbox
@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("def double(x):\n    return x + x", None),
        ("Here it is:\n```python\ndef double(x):\n    return x * 2\n```\nDone.", None),
        ("def double(x):\n    return x ** 2", "wrong value"),
        ("def double(x):\n    return int(2 * x)", None),
        ("def double(x):\n    return str(2 * x)", "wrong value"),
        ("def triple(x):\n    return 3 * x", "NameError"),
        ("I cannot", "SyntaxError"),
        ("", "NameError"),
        ("def double(x):\n    return 1 / 0", "ZeroDivisionError"),
        ("assert False\ndef double(x):\n    return 2 * x", "AssertionError"),
    ],
)
def test_responses_are_graded_by_the_asserts(tmp_path: Path, response: str, why: str | None) -> None:
    (item,) = items = read("mbpp", tmp_path / "mbpp.jsonl", [QUESTION])
    assert wrong(response, item, Sandbox()) == why
    grade, _, described = gradable(BENCHMARKS["mbpp"], items, unsafe_no_sandbox=False)
    assert grade(response, item) == {"pass_at_1": why is None}
    assert described == {"sandbox": Sandbox().describe(), "left_out": {}}


@needs_sandbox
def test_setup_code_runs_behind_the_program(tmp_path: Path) -> None:
    row = {**QUESTION, "test_setup_code": "root = Node(3)", "test_list": ["assert value(root) == 3"]}
    (item,) = read("mbpp", tmp_path / "mbpp.jsonl", [row])
    program = "class Node:\n    def __init__(self, v): self.v = v\ndef value(node): return node.v"
    assert wrong(program, item, Sandbox()) is None
    assert wrong("def value(node): return 3", item, Sandbox()) == "NameError"


@needs_sandbox
@pytest.mark.skipif(not MBPP.exists(), reason="MBPP's data are not on this machine")
def test_reference_solutions_are_right() -> None:
    items, _ = read_benchmark("mbpp", BENCHMARKS["mbpp"], data=str(MBPP), subtask="test")
    _, asked, _ = gradable(BENCHMARKS["mbpp"], items, unsafe_no_sandbox=False)
    assert len(items) == len(asked) == 500
    assert [item.id for item in items[::25] if wrong(item.reference, item, Sandbox())] == []


def test_the_first_block_of_code_is_the_program() -> None:
    assert program_of("x\n```py\na = 1\n```\n```\nb\n```") == "a = 1\n"
    assert program_of("```\na = 1") == "a = 1"
    assert program_of("a = 1") == "a = 1"


# MBPP+ -------------------------------------------------------------------------------------------------------------


def task(number: int, name: str, solution: str, base: list[Any], plus: list[Any], atol: float = 0) -> dict[str, Any]:
    return {
        "task_id": f"Mbpp/{number}",
        "prompt": f'"""\nWrite {name}.\n"""\n',
        "entry_point": name,
        "canonical_solution": solution,
        "base_input": base,
        "plus_input": plus,
        "contract": "",
        "atol": atol,
    }


TASKS = [
    task(11, "double", "def double(x):\n    return 2 * x", [[1], [2]], [[0], [-3], [10**30]]),
    task(12, "half", "def half(x):\n    return x / 2", [[1], [3]], [[0], [7], [1e300]]),
    task(14, "roughly", "def roughly(x):\n    return [x * 3.0, 1.0]", [[1]], [[2]], atol=0.01),
    # The inputs of task 116 are turned into tuples.
    task(116, "kind", "def kind(x):\n    return type(x).__name__, x", [[[1, 2]]], [[[]], [[3]]]),
    # Special rules: sets, "not None", zero.
    task(
        249,
        "intersection_array",
        "def intersection_array(a, b):\n    return [x for x in a if x in b]",
        [[[1, 2, 3], [3, 2]]],
        [[[], []]],
    ),
    task(
        434,
        "text_match_three",
        "import re\ndef text_match_three(s):\n    return re.search('b{3}', s)",
        [["abbb"], ["a"]],
        [["bbb"]],
    ),
    task(295, "sum_div", "def sum_div(n):\n    return sum(i for i in range(1, n) if n % i == 0)", [[8]], [[12]]),
    task(
        558,
        "digit_distance_nums",
        "def digit_distance_nums(a, b):\n    return sum(map(int, str(abs(a - b))))",
        [[1, 2]],
        [[23, 56], [19, 21]],
    ),
]
SOLUTIONS = {
    11: [
        "def double(x): return x + x",
        "def double(x): return x * x",
        "def double(x): return 2 * min(x, 100)",  # base passes, plus fails
        "def double(x): return 2 * max(x, 1) if x > 2 else float(2 * x)",
        "def double(x): raise ValueError",
        "def double(x): import time; time.sleep(30)",
        "def double(x): return True if x == 1 else 4",
        "def double(x): print(2 * x)",
        "def double(x:",
        "def other(x): return 2 * x",
        "import sys\ndef double(x): sys.exit(0)",
        "from collections import Counter\ndef double(x): return sum(Counter('ab').values()) * x",
    ],
    12: [
        "def half(x): return x * 0.5",
        "def half(x): return x / 2 + 1e-8",
        "def half(x): return x / 2 + 1e-3",
        "def half(x): return x // 2 if x % 2 == 0 else x / 2",  # 0 for 0.0
        "from fractions import Fraction\ndef half(x): return Fraction(x) / 2",
        "def half(x): return float('nan')",
        "def half(x): return [x / 2]",
    ],
    14: [
        "def roughly(x): return [x * 3.001, 1.005]",
        "def roughly(x): return [x * 3.1, 1.0]",
        "def roughly(x): return (x * 3.0, 1.0)",
        "def roughly(x): return [x * 3, 1]",
        "def roughly(x): return [x * 3.001, 1.0, 1.0]",
        "def roughly(x): return [[x * 3.001], [1.0]]",
        "def roughly(x): return {x * 3.0, 1.0}",
    ],
    116: [
        "def kind(x): return 'tuple', x",
        "def kind(x): return ['tuple', x]",
        "def kind(x): return 'tuple', list(x)",
        "def kind(x): return type(x).__name__, x[:1]",
    ],
    249: [
        "def intersection_array(a, b): return set(a) & set(b)",
        "def intersection_array(a, b): return tuple(sorted(set(a) & set(b)))",
        "def intersection_array(a, b): return dict.fromkeys(x for x in b if x in a)",
        "def intersection_array(a, b): return a",
        "def intersection_array(a, b): return 5",
        "def intersection_array(a, b): return [[x] for x in a]",
        "def intersection_array(a, b): return [float(x) for x in b]",
    ],
    434: [
        "import re\ndef text_match_three(s): return re.search('bbb', s)",
        "def text_match_three(s): return 'bbb' in s",
        "def text_match_three(s): return 'found' if 'bbb' in s else None",
        "def text_match_three(s): return 'found'",
        "def text_match_three(s): return 'bbb' not in s",
        "def text_match_three(s): return iter(s) if 'bbb' in s else None",
    ],
    295: ["def sum_div(n): return 0", "def sum_div(n): return 7 if n == 8 else 16", "def sum_div(n): return 0.0"],
    558: [
        "def digit_distance_nums(a, b): return sum(abs(int(x) - int(y)) for x, y in zip(f'{a:02}', f'{b:02}'))",
        "def digit_distance_nums(a, b): return sum(map(int, str(abs(a - b))))",
        "def digit_distance_nums(a, b): return 1",
    ],
}  # fmt: skip


def by_evalplus(folder: Path, data: Path, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Let EvalPlus' own command grade programs, and return its results by task."""
    path = write(folder / "samples.jsonl", samples)
    done = subprocess.run(
        [sys.executable, "-m", "evalplus.evaluate", "--dataset", "mbpp", "--samples", str(path), "--parallel", "2"],
        env={**os.environ, "MBPP_OVERRIDE_PATH": str(data), "XDG_CACHE_HOME": str(folder), "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads((folder / "samples_eval_results.json").read_text())["eval"])


@needs_sandbox
def test_honest_programs_get_what_evalplus_itself_gives_them(tmp_path: Path) -> None:
    """EvalPlus grades the same programs on the same file; every status of every program is the same."""
    data = write(tmp_path / "MbppPlus.jsonl", TASKS)
    samples = [
        {"task_id": f"Mbpp/{number}", "solution": solution}
        for number, solutions in SOLUTIONS.items()
        for solution in solutions
    ]
    theirs = by_evalplus(tmp_path, data, samples)

    items = [item for part in ("test", "validation") for item in read("mbpp_plus", data, TASKS, part)]
    grade, asked, _ = gradable(BENCHMARKS["mbpp_plus"], items, unsafe_no_sandbox=False)
    assert asked == items
    different, sandbox = {}, Sandbox()
    for item in items:
        truths = truths_of(item, sandbox)
        assert isinstance(truths, dict)
        for result in theirs[item.doc["task_id"]]:
            ours = failures(result["solution"], truths, sandbox)
            for name in ("base", "plus"):
                if (ours[name] is None) != (result[f"{name}_status"] == "pass"):
                    different[item.id, name, result["solution"]] = (ours[name], result[f"{name}_status"])
    assert different == {}
    statuses = {(r["base_status"], r["plus_status"]) for results in theirs.values() for r in results}
    assert {("pass", "pass"), ("pass", "fail"), ("fail", "fail")} <= statuses
    assert grade(SOLUTIONS[11][0], items[0]) == {"plus": True, "base": True}
    assert grade("def double(x):\n    return 2 * min(x, 100)", items[0]) == {"plus": False, "base": True}
    assert grade("def double(x):\n    return 2 if x == 1 else 2 * x - (x == 2)", items[0]) == {
        "plus": False,
        "base": False,
    }


@needs_sandbox
@pytest.mark.parametrize("name", ["tiny", pytest.param("SmolLM2-135M-Instruct", marks=pytest.mark.real)])
def test_a_models_answers_get_what_evalplus_itself_gives_them(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """Of the tasks one holds its own solution, one no model can know, and one may go either way."""
    solved = task(21, "f", "def f(x):\n    return x", [[1]], [[2]])
    solved |= {"prompt": "def f(x):\n    return x\n", "canonical_solution": ""}
    easy = task(23, "add", "def add(a, b):\n    return a + b", [[1, 2]], [[3, -4]])
    easy["prompt"] = '"""\nWrite a function to add two numbers.\nassert add(1, 2) == 3\n"""\n'
    tasks = [solved, task(22, "quux", "def quux(x):\n    return 31 * x + 7", [[1]], [[2]]), easy]
    data = tmp_path / "MbppPlus.jsonl"
    benchmark = BENCHMARKS["mbpp_plus"]
    grade, items, _ = gradable(benchmark, read("mbpp_plus", data, tasks), unsafe_no_sandbox=False)
    path = str(tiny.llama) if name == "tiny" else str(prepare_models() / name)
    outcomes = answer_items(
        HfEngine.open(path, load=LoadOptions("cpu", "float32")),
        items,
        fine_tuned=False,
        grade=grade,
        metric="plus",
        max_new_tokens=48,
        stop=benchmark.stop,
    )
    pairs = list(zip(items, outcomes, strict=True))
    samples = [{"task_id": item.doc["task_id"], "solution": sanitized(o.response, item)} for item, o in pairs]
    theirs = by_evalplus(tmp_path, data, samples)
    for item, outcome in pairs:
        (result,) = theirs[item.doc["task_id"]]
        base, plus = (result[f"{part}_status"] == "pass" for part in ("base", "plus"))
        assert outcome.graded == {"base": base, "plus": base and plus}
    assert not outcomes[1].correct
    assert outcomes[0].correct or name != "tiny"  # a model that can write may define it once more, otherwise


def test_the_test_split_is_taken_from_the_file(tmp_path: Path) -> None:
    rows = [*TASKS, task(600, "later", "def later(x):\n    return x", [[1]], [])]
    path = tmp_path / "MbppPlus.jsonl.gz"
    items = read("mbpp_plus", path, rows)
    assert [item.doc["task_id"] for item in items] == [f"Mbpp/{number}" for number in (11, 12, 14, 116, 249, 434, 295)]
    assert items[0].prompt == '"""\nWrite double.\n"""\n'
    with pytest.raises(DataError, match="no question of subtask train here"):
        read("mbpp_plus", path, rows, "train")
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        read_benchmark("mbpp_plus", BENCHMARKS["mbpp_plus"], data=str(path), subtask="test")


@needs_sandbox
def test_reference_solutions_are_run_once_and_graded_alike_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = read("mbpp_plus", tmp_path / "MbppPlus.jsonl", TASKS)
    ran: list[str] = []
    original = Sandbox.run

    def run(self: Sandbox, program: str, *given: Any) -> Result:
        ran.append(program)
        return original(self, program, *given)

    monkeypatch.setattr(Sandbox, "run", run)
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
    first = [truths_of(item, Sandbox()) for item in items]
    assert len(ran) == 2 * len(items) == len(list((tmp_path / "cache/references").iterdir()))
    again = [truths_of(item, Sandbox()) for item in items]
    assert len(ran) == 2 * len(items)
    for one, other, item in zip(first, again, items, strict=True):
        assert isinstance(one, dict)
        assert isinstance(other, dict)
        for name in ("base", "plus"):
            assert one[name].limits == other[name].limits
            assert [check.call for check in one[name].checks] == [check.call for check in other[name].checks]
        for solution in SOLUTIONS[int(item.doc["task_id"].removeprefix("Mbpp/"))][:2]:
            assert failures(solution, one, Sandbox()) == failures(solution, other, Sandbox())
    del ran[:]
    other_inputs = replace(items[0], doc=items[0].doc | {"plus_input": [[5]]})
    other_solution = replace(items[0], reference="def double(x):\n    return 3 * x")
    for changed, runs in ((other_inputs, 1), (other_solution, 2)):
        truths_of(changed, Sandbox())
        assert len(ran) == runs
        del ran[:]


@needs_sandbox
def test_a_reference_solution_that_failed_or_whose_file_is_damaged_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
    call = [Call("f", [1])]

    def replies(program: str) -> list[Reply] | str:
        return reference_replies(program, call, Limits(), Sandbox(), made_from=1)

    assert replies("def f(x): return 1 / 0") == "ZeroDivisionError"
    assert not (tmp_path / "cache/references").exists()
    first = replies("def f(x): return float('nan'), 2**70")
    (path,) = (tmp_path / "cache/references").iterdir()
    assert isinstance(first, list)
    assert str(replies("def f(x): return float('nan'), 2**70")) == str(first)
    path.write_text(path.read_text()[:-5])
    anew = replies("def f(x): return float('nan'), 2**70")
    assert isinstance(anew, list)
    assert str(anew[0].value) == str(first[0].value)
    assert json.loads(path.read_text())[0]["seconds"] == anew[0].seconds
    monkeypatch.setenv("TUNESHIFT_CACHE", str(path))
    with pytest.raises(DataError, match="set TUNESHIFT_CACHE to a folder that can be written"):
        replies("def f(x): return x")


@needs_sandbox
def test_a_task_without_truth_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        task(11, "f", "def f(x):\n    return 1 / 0", [[1]], [[2]]),
        task(12, "f", "def f(x):\n    return float('nan')", [[1]], [[2]]),
        task(13, "f", "def f(x):\n    return iter([])", [[1]], [[2]]),
        TASKS[0] | {"task_id": "Mbpp/14"},
    ]
    items = read("mbpp_plus", tmp_path / "MbppPlus.jsonl", rows)
    _, asked, described = gradable(BENCHMARKS["mbpp_plus"], items, unsafe_no_sandbox=False)
    assert asked == items[3:]
    assert sorted(described["left_out"].values()) == [1, 2]


def test_a_response_becomes_the_program_that_evalplus_would_run(tmp_path: Path) -> None:
    from evalplus.sanitize import sanitize

    (item,) = read("mbpp_plus", tmp_path / "MbppPlus.jsonl", TASKS[:1])
    responses = [
        "def double(x):\n    return 2 * x\n\nprint(double(3))\nthis is no code",
        "```python\nimport math\ndef helper(x):\n    return x\ndef double(x):\n    return helper(x) * 2\n```",
        "import os\nLIMIT = 3\ndef unused():\n    return 1\ndef double(x):\n    return x * LIMIT",
    ]
    for response in responses:
        assert sanitized(response, item) == sanitize(item.prompt + response, entrypoint="double")
    assert "helper" in sanitized(responses[1], item)
    for unreadable in ("\ud800", "a." * 100_000 + "a"):
        assert sanitized(unreadable, item) == item.prompt + unreadable


# A whole run -------------------------------------------------------------------------------------------------------

SHORT = [{**QUESTION, "task_id": 11 + n, "text": f"double it {n}"} for n in range(4)]
SHORT[3] = {**SHORT[3], "test_list": ["assert double(2) == 4 == double(2)"]}


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run between tiny models, judged on three exercises; a fourth cannot be."""
    folder = tmp_path_factory.mktemp("mbpp")
    write(folder / "mbpp.jsonl", SHORT)
    config = write_project(folder, tiny, evaluation={"task": "mbpp", "data": "mbpp.jsonl", "max_new_tokens": 8})
    assert run_cli("transfer", str(config), "--run-dir", str(folder / "run")) == 3
    return folder / "run"


@needs_sandbox
def test_a_transfer_is_judged_by_running_programs(finished: Path) -> None:
    verdict = json.loads((finished / "verdict.json").read_text())
    asked = verdict["questions"]
    assert (asked["task"], asked["subtask"], asked["metric"]) == ("mbpp", "test", "pass_at_1")
    assert asked["sandbox"].startswith("bubblewrap")
    assert asked["left_out"] == {"an assert is not of the form call == value": 1}
    assert (verdict["after"]["correct"], verdict["after"]["n"]) == (0, 3)
    outcomes = read_jsonl(finished / "evaluation/after.jsonl")
    assert [row["graded"] for row in outcomes] == [{"pass_at_1": False}] * 3


@needs_sandbox
def test_a_trained_run_is_asked_mbpp_plus(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One prompt holds its own solution, so every answer to it is right, and none to the other."""
    row = task(11, "f", "def f(x):\n    return x", [[1]], [[2]])
    solved = {**row, "task_id": "Mbpp/12", "prompt": "def f(x):\n    return x\n", "canonical_solution": ""}
    path = write(finished / "MbppPlus.jsonl", [row, solved])
    capsys.readouterr()
    settings = {"task": "mbpp_plus", "data": str(path), "max_new_tokens": 8, "stop": ["\n"]}
    assert run_cli("evaluate", str(finished), "--set", f"evaluation={json.dumps(settings)}", "--json") == 3
    verdict = json.loads(capsys.readouterr().out.splitlines()[-1])
    for arm in ("before", "after", "source"):
        assert set(verdict[arm]["by_metric"]) == {"plus", "base"}
        assert (verdict[arm]["correct"], verdict[arm]["n"]) == (1, 2)
        assert verdict[arm]["by_metric"]["base"]["correct"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "mbpp"}, "needs `data`"),
        ({"task": "mbpp", "data": "mbpp.jsonl", "harness": "lm_eval"}, "runs programs, which is done here only"),
        ({"task": "mbpp_plus", "data": "mbpp.jsonl", "metric": "pass_at_1"}, "none of mbpp_plus's: plus, base"),
        ({"task": "mbpp", "data": "mbpp.jsonl", "subtask": "dev"}, "subtask 'dev' is none of mbpp's"),
        ({"data": "test.jsonl", "unsafe_no_sandbox": True}, "`unsafe_no_sandbox` belongs to mbpp and mbpp_plus"),
    ],
)
def test_a_wrong_setting_is_refused(
    tiny: Tiny, tmp_path: Path, settings: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_project(tmp_path, tiny)
    loaded = json.loads(config.read_text())
    config.write_text(json.dumps({**loaded, "evaluation": settings}))
    assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_a_sandbox_a_run_is_refused_before_it_starts(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "mbpp.jsonl", SHORT)
    config = write_project(tmp_path, tiny, evaluation={"task": "mbpp", "data": "mbpp.jsonl", "max_new_tokens": 8})
    monkeypatch.setattr("tuneshift.sandbox._problem", lambda: "bubblewrap is not installed")
    assert run_cli("transfer", str(config), "--run-dir", str(tmp_path / "run")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "apt-get install bubblewrap" in said
    assert "Or set evaluation.unsafe_no_sandbox: true" in said
    assert not (tmp_path / "run/ledger.sqlite").exists()


def test_without_a_sandbox_the_setting_that_is_read_is_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "mbpp.jsonl", SHORT)
    monkeypatch.setattr("tuneshift.sandbox._problem", lambda: "bubblewrap is not installed")
    regression = {"task": "mbpp", "data": "mbpp.jsonl"}
    loaded = load_config(write_project(tmp_path, tiny, evaluation={"regression": regression}))
    with pytest.raises(SandboxError, match=r"Or set evaluation\.regression\.unsafe_no_sandbox: true"):
        read_inputs(loaded.config, folder=tmp_path)
    loaded = load_config(write_project(tmp_path, tiny, criterion={"name": "exec"}))
    with pytest.raises(SandboxError, match=r"criterion exec: .*apt-get install.*Or use another criterion") as caught:
        read_inputs(loaded.config, folder=tmp_path)
    assert "unsafe_no_sandbox" not in str(caught.value)
