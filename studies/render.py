"""Make docs/results.md, with its figures, from the committed results.

    python studies/render.py

studies/results/NAME.json and NAME.parquet are `results.json` and `outcomes.parquet` of `tuneshift study
studies/NAME.yaml`; studies/NAME.md says what it asks and what we read in it, under a heading of its own. The studies
come in the order of ORDER, behind studies/introduction.md. What the outcomes say is computed anew, by this version's
statistics.
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
ORDER = [
    "snips_criteria", "snips_criteria_back", "snips_calls", "snips_weak_source", "snips_thresholds", "snips_generators",
    "snips_substitute", "snips_coverage", "snips_temperature", "snips_ablation", "snips_coverage_calls",
    "banking77_coverage", "bbh_coverage", "bbh",
]  # fmt: skip


def read_results(folder: Path, name: str) -> dict[str, Any]:
    """Return a study's results with this version's statistics."""
    results: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    outcomes = parquet.read_table(folder / f"{name}.parquet").to_pylist()
    return results | summarize(results["settings"], results["rows"], outcomes)


def read_all() -> dict[str, dict[str, Any]]:
    """Return the results of every study that was run, by name, in the order of the page."""
    folder = HERE / "results"
    return {name: read_results(folder, name) for name in ORDER if (folder / f"{name}.json").is_file()}


def page(studies: dict[str, dict[str, Any]]) -> str:
    """Return docs/results.md for these results."""
    parts = [(HERE / "introduction.md").read_text(encoding="utf-8")]
    for name, results in studies.items():
        tables = markdown(results, {cell: f"results/{name}/{cell}.png" for cell in shown_arms(results)})
        command = f"`tuneshift study studies/{name}.yaml`, [result file](../studies/results/{name}.json)"
        said = (HERE / f"{name}.md").read_text(encoding="utf-8")
        parts += [said, command, tables.replace("\n## ", "\n### ")]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    studies = read_all()
    for name, results in studies.items():
        write_figures(PAGE.parent / "results" / name, shown_arms(results))
    PAGE.write_text(page(studies), encoding="utf-8")


if __name__ == "__main__":
    main()
