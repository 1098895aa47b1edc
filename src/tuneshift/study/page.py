"""`results.html`: a study on one page that opens from disk, of the same parts as a run's `report.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tuneshift.report.page.results import results_page
from tuneshift.report.tables import Table, conclusion
from tuneshift.sections.study import MODELS
from tuneshift.study.tables import differences, introduction, sections

Row = dict[str, Any]
NO_COSTS = {"missing": "The times and the generator's costs were not kept with these results."}


def study_page(results: Row, costs: Table | None, command: Sequence[str]) -> str:
    """Return the page of what `results.json` holds; `costs` is `None` where they were not kept."""
    return results_page(
        results["study"],
        kind="study",
        conclusion=conclusion(differences(results)),
        introduction=[introduction(results)],
        sections=sections(results),
        command=command,
        costs=costs or NO_COSTS,
        settings=yaml.safe_dump(results["settings"], sort_keys=False, allow_unicode=True),
    )


def cost_table(results: Row, timings: Sequence[Row], usage: Mapping[str, Sequence[Row]]) -> Table:
    """Return what each cell took: `timings` are the trials' in their order, `usage` its generators' API.

    Trials that share candidates, or a training, share their time; cells that share a training each have it.
    """
    trials = [row for row in results["rows"] if row["arm"] not in MODELS]
    table = []
    for cell, found in results["cells"].items():
        levels = found["levels"].items()
        own = [
            (row, timing)
            for row, timing in zip(trials, timings, strict=True)
            if all(row[axis] == level for axis, level in levels)
        ]
        written = {timing["replicate"]: timing["synthesis_seconds"] for _, timing in own}
        trained = {row["training"]: timing["training_seconds"] for row, timing in own if row["training"] is not None}
        times = [f"{sum(written.values()):.0f}", str(len(trained)), f"{sum(trained.values()):.0f}"]
        table.append([cell, *times, _spent(usage[cell])])
    return Table(["cell", "candidates, s", "trainings", "trainings, s", "hosted generator"], table)


def _spent(usage: Sequence[Row]) -> str:
    if not usage:
        return "none"
    read, written = (sum(one[f"{kind}_tokens"] for one in usage) for kind in ("prompt", "completion"))
    costs = [one["cost"] for one in usage]
    cost = "no prices configured" if None in costs else f"{sum(costs):.4g} in the currency of its prices"
    return f"{read:,} tokens read, {written:,} written; {cost}"
