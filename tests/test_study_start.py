"""What the studies start from: files that their script makes of original data."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import write_jsonl
from test_paper import bbh

from tuneshift.datafiles import read_pairs
from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.evaluate.benchmarks.base import read_benchmark, split_held_out

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the script writes to, from rows made here; no source is trained."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "bbh").mkdir()
    (folder / "snips").mkdir()
    (folder / "banking77").mkdir()
    for split, numbers in {"train": range(5100), "test": range(5000, 5400)}.items():  # some questions are in both
        lines = [f'"my card, number {number}",card_{number % 77}' for number in numbers]
        (folder / "banking77" / f"{split}.csv").write_text("\n".join(["text,category", *lines]) + "\n")
    rows = [{"text": f"play song {n % 2050}", "intent": "PlayMusic", "slots": [["track", str(n)]]} for n in range(2100)]
    write_jsonl(folder / "snips/train.jsonl", rows)
    script = str(ROOT / "studies/prepare.py")
    with pytest.MonkeyPatch.context() as patch:
        for subtask in runpy.run_path(script)["SUBTASKS"]:
            questions = {"examples": [bbh(subtask, number) for number in range(20)]}
            (folder / "bbh" / f"{subtask}.json").write_text(json.dumps(questions))
        patch.setattr(sys, "argv", [script, str(folder), "models", "--output", str(folder / "out"), "--data-only"])
        runpy.run_path(script, run_name="__main__")
    return folder / "out"


def test_a_studys_questions_are_in_no_file_that_is_trained_on(made: Path) -> None:
    for own in (made / "bbh").iterdir():
        data = str(own / "questions.json")
        items, _ = read_benchmark("bbh", BENCHMARKS["bbh"], data=data, subtask=own.name)
        asked, _ = split_held_out(items, fraction=0.5, seed=0)  # as `evaluation.held_out` in studies/start/bbh.yaml
        originals = read_pairs(own / "originals.jsonl")
        assert len(asked) == len(originals) == 10
        assert not {item.prompt for item in asked} & {pair.prompt for pair in originals}
        for replicate in range(5):
            seeds = read_pairs(own / f"seeds_{replicate}.jsonl")
            assert len(seeds) == 5
            assert all(seed in originals for seed in seeds)


def test_no_held_out_question_of_banking77_is_among_those_that_are_learnt(made: Path) -> None:
    own = made / "banking77"
    asked = {json.loads(line)["prompt"] for line in (own / "questions.jsonl").read_text().splitlines()}
    learnt, originals = read_pairs(own / "learnt.jsonl"), read_pairs(own / "originals.jsonl")
    assert (len(asked), len(learnt), len(originals)) == (200, 5000, 2000)
    assert not asked & {pair.prompt for pair in [*learnt, *originals]}
    for replicate in range(5):
        assert not asked & {pair.prompt for pair in read_pairs(own / f"seeds_{replicate}.jsonl")}


def test_every_replicate_has_seeds_of_its_own(made: Path) -> None:
    drawn = {(made / "snips" / f"seeds_calls_{replicate}.jsonl").read_text() for replicate in range(5)}
    assert len(drawn) == 5
    originals = read_pairs(made / "snips/originals_intents.jsonl")
    assert len({pair.prompt for pair in originals}) == 2000
    assert {pair.response for pair in originals} == {" PlayMusic"}
