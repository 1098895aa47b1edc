"""What docs/performance.md says of speed is what the committed results say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
# Result file, where in it a spread stands, how many decimals the page gives.
RATIOS = [
    ("synthesis", ("ratio",), 1),
    ("training_gemma", ("ratio",), 1),
    ("training_smollm2", ("ratio",), 1),
    ("decode", ("results", 1, "ratio", "hf_reference"), 2),
    ("decode", ("results", 1, "ratio", "hf_reference_32"), 2),
    ("decode", ("results", 1, "ratio", "vllm"), 2),
    ("scaling", ("ratio", "efficiency"), 2),
    ("report_page", ("pages", "real run, 300 candidates", "seconds_to_interactive"), 2),
    ("report_page", ("pages", "made, 10000 candidates", "seconds_to_interactive"), 2),
]


def result(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize(("name", "path", "decimals"), RATIOS)
def test_a_figure_and_its_range_are_those_of_the_result(name: str, path: tuple[str | int, ...], decimals: int) -> None:
    found: Any = result(name)
    for key in path:
        found = found[key]
    low, median, high = (round(found[key], decimals) for key in ("low", "median", "high"))
    assert found["n"] == 5
    shown = re.findall(rf"{median:.{decimals}f}(?: s)? \({low:.{decimals}f} to {high:.{decimals}f}\)", PAGE)
    assert shown


def test_the_rates_are_those_of_the_results() -> None:
    rates = [
        *(result("synthesis")["candidates_per_second"][side]["median"] for side in ("ours", "reference")),
        *(result("scaling")["candidates_per_second"][workers]["median"] for workers in ("2", "1")),
    ]
    assert [f"| {rate:.1f}" in PAGE for rate in rates] == [True] * 4
    for name in ("training_gemma", "training_smollm2"):
        ours, theirs = (spread["median"] for spread in result(name)["tokens_per_second"].values())
        assert f"| {ours:.0f} | {theirs:.0f}: " in PAGE
    best = result("decode")["results"][-1]["tokens_per_second"]
    for side in ("hf_reference", "hf_reference_32", "vllm"):
        assert f"| {best['hf']['median']:.0f} | {best[side]['median']:.0f}: " in PAGE


def test_the_figure_shows_every_result(tmp_path: Path) -> None:
    """Texts and points, not bytes: another matplotlib places them otherwise."""
    drawn = tmp_path / "roofline.svg"
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
    command = [sys.executable, str(ROOT / "benchmarks/roofline.py"), "--output", str(drawn)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=120)
    committed = (ROOT / "docs/roofline.svg").read_text(encoding="utf-8")
    for part in (r"<text[^>]*>([^<]+)</text>", r"<use [^>]*style=\"(fill: #[0-9a-f]{6})"):
        found = re.findall(part, drawn.read_text(encoding="utf-8"))
        assert len(found) > 10
        assert found == re.findall(part, committed)
