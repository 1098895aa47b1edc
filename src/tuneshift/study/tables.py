"""What `results.json` holds, as tables for people: every figure with its items and seeds, and what p values cover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tuneshift.evaluate.verdict import points
from tuneshift.report.markdown import markdown_table
from tuneshift.sections.study import MODELS

Row = dict[str, Any]
NOTHING = "n/a"
COVERAGE = (
    "Where trainings differ, intervals over few seeds are too narrow: of three seeds, 83 % held the truth at worst in "
    "place of 95 % (measured, docs/method.md). So a claim rests on the p values, which keep their level."
)
ONE_REPLICATE = "One replicate: intervals and p values are about these trainings, not about others."


def markdown(results: Row, figures: dict[str, str]) -> str:
    """Return what `results.json` holds as tables; `figures` are the figures' paths, by cell and mean."""
    parts = [_introduction(results)]
    for cell, found in results["cells"].items():
        own = [row for row in results["rows"] if all(row[axis] == level for axis, level in found["levels"].items())]
        parts += [f"## {cell}", _arms(found["arms"], own), _against(found), _recovery(found["arms"])]
        parts += [f"- Not trained: {arm}: {one['reason']}" for arm, one in found["arms"].items() if one["reason"]]
        if cell in figures:
            parts.append(f"![{cell}]({figures[cell]})")
    parts += [
        _between_cells(results["across"], results["interactions"]),
        *(_mean(mean, figures) for mean in results["means"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(results: Row) -> str:
    settings, families = results["settings"], results["families"]
    replicates = sorted({row["replicate"] for row in results["rows"]})
    said = {
        "reference": f"with {settings['reference']}",
        "target before": "with the target before",
        "cells": "between cells",
        "interactions": "of differences between cells",
    }
    adjusted = ", ".join(f"{families[name]} {text}" for name, text in said.items() if families[name])
    return (
        f"{settings['candidates']} candidates a cell and replicate, {settings['size']} pairs an arm, {len(replicates)} "
        f"replicates ({', '.join(replicates)}). Intervals draw seeds and items together (one seed: items alone). "
        f"{COVERAGE if len(replicates) > 1 else ONE_REPLICATE} p values are adjusted (Holm) within each family of the "
        f"study's comparisons: {adjusted or 'none'}. Recovery is (arm - target before) / (bound - target before)."
    )


def _arms(arms: Row, rows: Sequence[Row]) -> str:
    """Return every arm's accuracy, and its gain over the target before."""
    header = ["arm", "accuracy", "95 % interval", "items x seeds", "pairs", "gain over target before"]
    table = []
    for name, arm in arms.items():
        sizes = sorted({row["pairs"] for row in rows if row["arm"] == name and row["pairs"] is not None})
        none = "" if name in MODELS else NOTHING
        table.append([name, *_accuracy(arm), " or ".join(map(str, sizes)), *_compared(arm["gain"], none)])
    return markdown_table([*header, "95 % interval", "Holm p"], table)


def _against(cell: Row) -> str:
    """Return every arm's difference from the reference."""
    names = [name for name in cell["arms"] if name not in (*MODELS, cell["reference"])]
    header = ["arm", f"against {cell['reference']}", "95 % interval", "Holm p", "items x seeds"]
    table = [[name, *_compared(found := cell["arms"][name]["difference"]), _sizes(found)] for name in names]
    return markdown_table(header, table) if table else ""


def _recovery(arms: Row) -> str:
    """Return every arm's recovery of each bound, with its interval or the reason for none."""
    found = {name: arm["recovery"] for name, arm in arms.items() if arm["recovery"]}
    bounds = list(dict.fromkeys(bound for recovered in found.values() for bound in recovered))
    if not bounds:
        return ""
    header = [name for bound in bounds for name in (f"recovery of {bound}", "95 % interval", "items x seeds")]
    table = [
        [name, *(text for bound in bounds for text in _recovered(recovered.get(bound), arms[name]["items"]))]
        for name, recovered in found.items()
    ]
    return markdown_table(["arm", *header], table)


def _recovered(found: Row | None, items: int) -> list[str]:
    if found is None:  # the bound itself
        return [""] * 3
    if found["value"] is None:
        return [f"{NOTHING}: {found['reason']}", "", ""]
    interval = found["reason"] if found["interval"] is None else "{:.2f} to {:.2f}".format(*found["interval"])
    return [f"{found['value']:.2f}", interval, f"{items} x {found['seeds']}"]


def _between_cells(across: Sequence[Row], interactions: Sequence[Row]) -> str:
    """Return each arm's difference between an axis' first level and the others, and that of its lead."""
    if not across:
        return ""
    header = ["axis", "elsewhere", "arm", "levels", "difference", "95 % interval", "Holm p", "items x seeds"]
    named = [(one["arm"], one) for one in across]
    named += [(f"{one['arm']} less {one['reference']}", one) for one in interactions]
    table = [
        [
            one["axis"],
            ", ".join(f"{axis}={level}" for axis, level in one["levels"].items()),
            name,
            f"{one['level']} against {one['first']}",
            *(_compared(one) if one["value"] is not None else [f"{NOTHING}: {one['reason']}", "", ""]),
            _sizes(one),
        ]
        for name, one in named
    ]
    said = (
        "The same arm on the same questions, paired by item and replicate. An arm less the reference: by how much more "
        "it leads in the one cell than in the other."
    )
    return f"## Between cells\n\n{said}\n\n{markdown_table(header, table)}"


def _mean(mean: Row, figures: dict[str, str]) -> str:
    """Return the mean over the levels of an axis, of which each asks its own questions."""
    header = ["arm", "accuracy", "95 % interval", "items x seeds", "gain over target before", "95 % interval"]
    header += [f"against {mean['reference']}", "95 % interval"]
    table = []
    for name, arm in mean["arms"].items():
        none = "" if name in MODELS else NOTHING
        row = [name, *_accuracy(arm), *_compared(arm["gain"], none)[:2]]
        table.append([*row, *_compared(arm["difference"], "" if name == mean["reference"] else none)[:2]])
    elsewhere = "".join(f", {axis}={level}" for axis, level in mean["levels"].items())
    said = (
        f"{len(mean['cells'])} cells with the same weight each; a resample draws each cell's items, and a seed for all "
        "cells at once. Intervals alone: no test was made."
    )
    left_out = [f"- Not averaged: {name}: {arm['reason']}" for name, arm in mean["arms"].items() if arm["reason"]]
    image = [f"![{mean['name']}]({figures[mean['name']]})"] if mean["name"] in figures else []
    heading = f"## Mean over {mean['axis']}{elsewhere}"
    return "\n\n".join([heading, said, markdown_table(header, table), *left_out, *image])


def _accuracy(arm: Row) -> list[str]:
    if arm["accuracy"] is None:
        return [NOTHING] * 3
    return [f"{arm['accuracy']:.1%}", "{:.1%} to {:.1%}".format(*arm["interval"]), _sizes(arm)]


def _compared(found: Row | None, none: str = NOTHING) -> list[str]:
    """Return difference, interval and adjusted p value, in points."""
    if found is None:
        return [none] * 3
    ends = "{:+.1f} to {:+.1f}".format(*(100 * end for end in found["interval"]))
    return [points(found["value"], found["items"]), ends, f"{found['p_holm']:.2g}" if "p_holm" in found else ""]


def _sizes(found: Row | None) -> str:
    return f"{found['items']} x {found['seeds']}" if found is not None and found["seeds"] else NOTHING
