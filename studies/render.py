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
    "snips_substitute", "snips_coverage", "snips_ablation", "snips_coverage_calls", "bbh_coverage", "bbh",
]  # fmt: skip


def read_results(folder: Path, name: str) -> dict[str, Any]:
    """Return a study's results with this version's statistics."""
    results: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    outcomes = parquet.read_table(folder / f"{name}.parquet").to_pylist()
    return results | summarize(results["settings"], results["rows"], outcomes)


def main() -> None:
    parts = [(HERE / "introduction.md").read_text(encoding="utf-8")]
    for name in ORDER:
        if not (HERE / "results" / f"{name}.json").is_file():
            continue  # not run yet
        results = read_results(HERE / "results", name)
        figures = write_figures(PAGE.parent / "results" / name, shown_arms(results))
        tables = markdown(results, {cell: f"results/{path}" for cell, path in figures.items()})
        command = f"`tuneshift study studies/{name}.yaml`, [result file](../studies/results/{name}.json)"
        said = (HERE / f"{name}.md").read_text(encoding="utf-8").strip()
        parts += [said, command, tables.replace("\n## ", "\n### ").strip()]
    PAGE.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
