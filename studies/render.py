"""Make docs/results.md, with its figures, from the committed results.

    python studies/render.py

studies/results/NAME.json and NAME.parquet are `results.json` and `outcomes.parquet` of `tuneshift study
studies/NAME.yaml`; studies/NAME.md says what it asks and what we read in it, under a heading of its own. The studies
come in the order of ORDER. What the outcomes say is computed anew, by this version's statistics.
"""

import json
from pathlib import Path
from typing import Any

from pyarrow import parquet

from tuneshift.study.figures import write_figures
from tuneshift.study.summary import shown_arms, summarize
from tuneshift.study.tables import markdown

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/results.md"
ORDER = ["snips_criteria", "snips_criteria_back", "snips_thresholds", "snips_generators", "snips_substitute"]
INTRODUCTION = """# Results at our scale

Really run, on two cores, with SmolLM2-135M-Instruct and Gemma-3-270M; made by `python studies/render.py` from the
result files in `studies/results/`. `python studies/prepare.py DATA_FOLDER models` makes the sources and data that the
studies start from. [paper.md](paper.md) has what the paper reports with larger models, [studies.md](studies.md) how a
study works, [method.md](method.md#statistics) how its figures are made.
"""


NOT_KEPT = (
    "The outcomes of this study were not kept, so that its figures are those of the version that ran it. Not measured: "
    "gains over the target before, and intervals of recovery."
)


def read_results(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    """Return a study's results and what to say of them: this version's statistics where the outcomes are there."""
    results: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    outcomes = folder / f"{name}.parquet"
    if outcomes.is_file():
        rows = parquet.read_table(outcomes).to_pylist()
        return results | summarize(results["settings"], results["rows"], rows), ""
    return (results, "") if "families" in results else (earlier(results), NOT_KEPT)


def earlier(results: dict[str, Any]) -> dict[str, Any]:
    """Return results of the form before `gain` in today's, with None for what it lacks."""
    compared = 0
    for cell in results["cells"].values():
        for arm in cell["arms"].values():
            recovered, seeds = arm["recovery"], arm["seeds"]
            without = {"value": recovered, "interval": None, "seeds": seeds, "reason": "not measured"}
            arm |= {"gain": None, "recovery": None if recovered is None else {"source": without}}
            if arm["difference"] is not None:
                arm["difference"]["items"] = arm["items"]
                compared += 1
    families = {"reference": compared, "target before": 0, "cells": 0, "interactions": 0}
    return results | {"across": [], "interactions": [], "means": [], "families": families}


def main() -> None:
    parts = [INTRODUCTION]
    for name in ORDER:
        if not (HERE / "results" / f"{name}.json").is_file():
            continue  # not run yet
        results, note = read_results(HERE / "results", name)
        figures = write_figures(PAGE.parent / "results" / name, shown_arms(results))
        tables = markdown(results, {cell: f"results/{path}" for cell, path in figures.items()})
        command = f"`tuneshift study studies/{name}.yaml`, [result file](../studies/results/{name}.json)"
        said = (HERE / f"{name}.md").read_text(encoding="utf-8").strip()
        parts += [said, command, note, tables.replace("\n## ", "\n### ").strip()]
    PAGE.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
