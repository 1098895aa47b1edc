"""What `results.json` holds, as tables for people: every figure with its items and seeds, and what p values cover."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from tuneshift.evaluate.verdict import points
from tuneshift.report.tables import Section, Table
from tuneshift.sections.study import MODELS

Row = dict[str, Any]
NOTHING = "n/a"
ALIKE = (
    "Of some comparisons it says how many seeds are alike: there both arms chose the same pairs, so they do not "
    "differ, and nothing was measured."
)
LEAST = (
    "With seeds that differ as these do, one comparison of two arms by itself shows (p < 0.05) every other time a "
    "difference of {:.0f} points at best, {:.0f} in the median and {:.0f} at worst; Holm's adjustment asks for more."
)
COVERAGE = (
    "Where trainings differ, intervals over few seeds are too narrow: of three seeds, 83 % held the truth at worst in "
    "place of 95 % (measured, docs/method.md). So a claim rests on the p values, which keep their level."
)
ONE_REPLICATE = "One replicate: intervals and p values are about these trainings, not about others."


def markdown(results: Row, figures: dict[str, str]) -> str:
    """Return what `results.json` holds as Markdown; `figures` are the figures' paths, by cell and mean."""
    told = [section.markdown(figures.get(section.figure)) for section in sections(results)]
    return "\n\n".join([introduction(results), *told]) + "\n"


def sections(results: Row) -> list[Section]:
    """Return what `results.json` holds: a section for each cell, for what is between cells, and for each mean."""
    wanted = results["settings"]["candidates"]
    cells = [_cell(name, found, results["rows"], wanted) for name, found in results["cells"].items()]
    between = _between_cells(results["across"], results["interactions"])
    return [*cells, *([between] if between else []), *map(_mean, results["means"])]


def differences(results: Row) -> dict[str, dict[str, tuple[float, float]]]:
    """Return (difference, adjusted p value) of each arm by name: from the reference, and from the target before."""
    several = len(results["cells"]) > 1
    return {
        other: {
            f"{name} ({cell})" if several else name: (arm[key]["value"], arm[key]["p_holm"])
            for cell, found in results["cells"].items()
            for name, arm in found["arms"].items()
            if arm[key] is not None and arm[key].get("p_holm") is not None
        }
        for other, key in ((results["settings"]["reference"], "difference"), ("the target before", "gain"))
    }


def introduction(results: Row) -> str:
    """Return what was compared, and what the figures rest on."""
    settings, families = results["settings"], results["families"]
    replicates = sorted({row["replicate"] for row in results["rows"]})
    said = {
        "reference": f"with {settings['reference']}",
        "target before": "with the target before",
        "cells": "between cells",
        "interactions": "of differences between cells",
    }
    adjusted = ", ".join(f"{families[name]} {text}" for name, text in said.items() if families[name])
    against = [arm["difference"] for cell in results["cells"].values() for arm in cell["arms"].values()]
    compared = [one for one in [*against, *results["across"]] if one is not None]
    least = sorted(100 * one["least_shown"] for one in compared if one.get("least_shown"))
    shown = f" {LEAST.format(least[0], median(least), least[-1])}" if least else ""
    alike = f" {ALIKE}" if any(one["alike"] and one["seeds"] for one in compared) else ""
    return (
        f"{settings['candidates']} candidates a cell and replicate, {settings['size']} pairs an arm, {len(replicates)} "
        f"replicates ({', '.join(replicates)}). Intervals draw seeds and items together (one seed: items alone). "
        f"{COVERAGE if len(replicates) > 1 else ONE_REPLICATE} p values are adjusted (Holm) within each family of the "
        f"study's comparisons: {adjusted or 'none'}.{shown}{alike} Recovery is (arm - target before) / (bound - "
        "target before)."
    )


def _cell(name: str, found: Row, rows: Sequence[Row], wanted: int) -> Section:
    own = [row for row in rows if all(row[axis] == level for axis, level in found["levels"].items())]
    counted = {row["replicate"]: row["candidates"] for row in own if row["candidates"] is not None}
    fewer = [
        f"Replicate {one}: {count} of {wanted} candidates; its generator had no more, or nothing new."
        for one, count in counted.items()
        if count < wanted
    ]
    tables = [_arms(found["arms"], own, found["chance"]), _against(found), _recovery(found["arms"])]
    return Section(
        title=name,
        tables=[table for table in tables if table.rows],
        notes=[f"Not trained: {arm}: {one['reason']}" for arm, one in found["arms"].items() if one["reason"]] + fewer,
        figure=name,
        caption="Right answers, mean over replicates with 95 % interval; squares are not trained.",
        intervals=_intervals(found["arms"]),
    )


def _intervals(arms: Row) -> list[Row]:
    """Return a figure's rows: every arm that was measured."""
    return [
        {
            "name": name,
            "kind": "untrained" if name in MODELS else "trained",
            "value": arm["accuracy"],
            "low": arm["interval"][0],
            "high": arm["interval"][1],
        }
        for name, arm in arms.items()
        if arm["accuracy"] is not None
    ]


def _arms(arms: Row, rows: Sequence[Row], chance: float | None) -> Table:
    """Return every arm's accuracy, and its gain over the target before; above them what guessing gets, where known."""
    header = ["arm", "accuracy", "95 % interval", "items x seeds", "pairs", "gain over target before"]
    table = [] if chance is None else [["guessing", f"{chance:.1%}", *[""] * 6]]
    for name, arm in arms.items():
        sizes = sorted({row["pairs"] for row in rows if row["arm"] == name and row["pairs"] is not None})
        none = "" if name in MODELS else NOTHING
        table.append([name, *_accuracy(arm), " or ".join(map(str, sizes)), *_compared(arm["gain"], none)])
    return Table([*header, "95 % interval", "Holm p"], table)


def _against(cell: Row) -> Table:
    """Return every arm's difference from the reference."""
    names = [name for name in cell["arms"] if name not in (*MODELS, cell["reference"])]
    header = ["arm", f"against {cell['reference']}", "95 % interval", "Holm p", "items x seeds"]
    table = [[name, *_compared(found := cell["arms"][name]["difference"]), _sizes(found)] for name in names]
    return Table(header, table)


def _recovery(arms: Row) -> Table:
    """Return every arm's recovery of each bound, with its interval or the reason for none."""
    found = {name: arm["recovery"] for name, arm in arms.items() if arm["recovery"]}
    bounds = list(dict.fromkeys(bound for recovered in found.values() for bound in recovered))
    header = [name for bound in bounds for name in (f"recovery of {bound}", "95 % interval", "items x seeds")]
    table = [
        [name, *(text for bound in bounds for text in _recovered(recovered.get(bound), arms[name]["items"]))]
        for name, recovered in found.items()
    ]
    return Table(["arm", *header], table)


def _recovered(found: Row | None, items: int) -> list[str]:
    if found is None:  # the bound itself
        return [""] * 3
    if found["value"] is None:
        return [f"{NOTHING}: {found['reason']}", "", ""]
    interval = found["reason"] if found["interval"] is None else "{:.2f} to {:.2f}".format(*found["interval"])
    return [f"{found['value']:.2f}", interval, f"{items} x {found['seeds']}"]


def _between_cells(across: Sequence[Row], interactions: Sequence[Row]) -> Section | None:
    """Return each arm's difference between an axis' first level and the others, and that of its lead."""
    if not across:
        return None
    header = ["axis", "elsewhere", "arm", "levels", "difference", "95 % interval", "Holm p", "items x seeds"]
    named = [(one["arm"], one) for one in across]
    named += [(f"{one['arm']} less {one['reference']}", one) for one in interactions]
    table = [
        [
            one["axis"],
            ", ".join(f"{axis}={level}" for axis, level in one["levels"].items()),
            name,
            f"{one['level']} against {one['first']}",
            *_compared(one),
            _sizes(one),
        ]
        for name, one in named
    ]
    said = (
        "The same arm on the same questions, paired by item and replicate. An arm less the reference: by how much more "
        "it leads in the one cell than in the other."
    )
    return Section("Between cells", said, [Table(header, table)])


def _mean(mean: Row) -> Section:
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
    return Section(
        title=f"Mean over {mean['axis']}{elsewhere}",
        text=said,
        tables=[Table(header, table)],
        notes=[f"Not averaged: {name}: {arm['reason']}" for name, arm in mean["arms"].items() if arm["reason"]],
        figure=mean["name"],
        caption="Right answers, mean over cells and replicates with 95 % interval; squares are not trained.",
        intervals=_intervals(mean["arms"]),
    )


def _accuracy(arm: Row) -> list[str]:
    if arm["accuracy"] is None:
        return [NOTHING] * 3
    return [f"{arm['accuracy']:.1%}", "{:.1%} to {:.1%}".format(*arm["interval"]), _sizes(arm)]


def _compared(found: Row | None, none: str = NOTHING) -> list[str]:
    """Return difference, interval and adjusted p value, in points."""
    if found is None:
        return [none] * 3
    if found["value"] is None:
        return [f"{NOTHING}: {found['reason']}", "", ""]
    ends = "{:+.1f} to {:+.1f}".format(*(100 * end for end in found["interval"]))
    return [points(found["value"], found["items"]), ends, f"{found['p_holm']:.2g}" if "p_holm" in found else ""]


def _sizes(found: Row | None) -> str:
    if found is None or not found["seeds"]:
        return NOTHING
    alike = f", {found['alike']} alike" if found.get("alike") else ""
    return f"{found['items']} x {found['seeds']}{alike}"
