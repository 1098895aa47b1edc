"""A study's tables: one row for each cell, replicate and arm, every outcome, and what the replicates say together.

No table holds a time but `timings.parquet`, so that a study that was killed writes the same bytes as one that was not.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneshift.errors import ConfigError
from tuneshift.evaluate.seeds import accuracy_over_seeds, difference_over_seeds, seed_test
from tuneshift.evaluate.stats import Interval, holm_family
from tuneshift.evaluate.verdict import points
from tuneshift.progress import Progress
from tuneshift.report.markdown import markdown_table
from tuneshift.run.directory import read_json, read_jsonl, write_atomically, write_json
from tuneshift.run.ledger import Ledger
from tuneshift.sections.study import MODELS
from tuneshift.study.arms import Trial
from tuneshift.study.figures import write_figures
from tuneshift.study.grid import Study, Unit
from tuneshift.study.products import Products

Row = dict[str, Any]


def write_results(study: Study, products: Products, trials: Sequence[Trial], progress: Progress) -> dict[str, Any]:
    """Write all tables and figures of a study whose products are there, and return what `results.json` holds."""
    rows, outcomes, timings = [], [], []
    for unit in study.units:
        for model, letter in zip(MODELS, ("T", "B", "F"), strict=True):
            answers = read_jsonl(products.outcomes(unit, letter))
            rows.append(_row(unit, model, answers=answers))
            outcomes += _outcomes(unit, model, answers)
        for trial in (one for one in trials if one.unit is unit):
            row, answers = _trial_row(trial, products)
            rows.append(row)
            outcomes += _outcomes(unit, trial.arm, answers)
            timings.append(_timing(trial, products))
    cells, root = summary(study, rows, outcomes), products.root
    results = {"study": study.name, "settings": study.raw, "cells": cells, "rows": rows}
    _write_parquet(root / "results.parquet", rows)
    _write_parquet(root / "outcomes.parquet", outcomes)
    _write_parquet(root / "timings.parquet", timings)
    write_json(root / "results.json", results)
    try:
        figures = write_figures(root / "figures", cells)
    except ConfigError as error:
        progress.note(f"Warning: {error}")
        figures = {}
    write_atomically(root / "results.md", f"# Study: {study.name}\n\n{markdown(results, figures)}")
    return results


# --- rows ---


def _key(unit: Unit, arm: str) -> Row:
    return {**unit.levels, "replicate": unit.replicate, "arm": arm}


def _row(unit: Unit, arm: str, *, answers: Sequence[Row], **columns: Any) -> Row:
    """Return a row of `results.parquet`; what was not measured is null."""
    unknown = dict.fromkeys(("criterion", "candidates", "pairs", "steps", "training", "reason"))
    correct, n = sum(answer["correct"] for answer in answers), len(answers)
    measured = (
        {"correct": correct, "n": n, "accuracy": correct / n} if n else dict.fromkeys(("correct", "n", "accuracy"))
    )
    return {**_key(unit, arm), **unknown, **measured, **columns}


def _trial_row(trial: Trial, products: Products) -> tuple[Row, list[Row]]:
    chosen = {"criterion": trial.criterion, "candidates": trial.candidates}
    if trial.training is None:
        return _row(trial.unit, trial.arm, answers=[], reason=trial.reason, **chosen), []
    answers = read_jsonl(products.outcomes(trial.unit, "T", trial.training))
    steps = read_json(products.training_directory(trial.training).training)["steps"]
    trained = {"pairs": len(trial.pairs), "steps": steps, "training": trial.training}
    return _row(trial.unit, trial.arm, answers=answers, **chosen, **trained), answers


def _outcomes(unit: Unit, arm: str, answers: Sequence[Row]) -> list[Row]:
    return [{**_key(unit, arm), "item": answer["id"], "correct": answer["correct"]} for answer in answers]


def _timing(trial: Trial, products: Products) -> Row:
    with Ledger(products.synthesis(trial.unit).ledger) as ledger:
        synthesis = ledger.seconds()["synthesis"]
    training = trial.training and read_json(products.training_directory(trial.training).training)["seconds"]
    return {**_key(trial.unit, trial.arm), "synthesis_seconds": synthesis, "training_seconds": training}


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as one table; a column without a value has the type of its neighbours, text."""
    import pyarrow
    from pyarrow import parquet

    kinds = {"candidates": "int64", "pairs": "int64", "steps": "int64", "correct": "int64", "n": "int64"}
    kinds |= {"accuracy": "double", "synthesis_seconds": "double", "training_seconds": "double"}
    if rows and "item" in rows[0]:
        kinds["correct"] = "bool"
    schema = pyarrow.schema([(name, kinds.get(name, "string")) for name in (rows[0] if rows else {})])
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), buffer)
    write_atomically(path, buffer.getvalue())


# --- what the replicates say together ---


def summary(study: Study, rows: Sequence[Row], outcomes: Sequence[Row]) -> dict[str, Any]:
    """Return, for each cell, its arms with means over replicates, intervals and comparisons with the reference.

    The p values are adjusted for all comparisons of the study together (Holm).
    """
    cells: dict[str, Any] = {}
    for cell, units in study.cells().items():
        answered = _arrays(units, outcomes)
        names = [*MODELS, *study.section.arms]
        own = [row for row in rows if all(row[axis] == level for axis, level in units[0].levels.items())]
        cells[cell] = {
            "levels": dict(units[0].levels),
            "reference": study.section.reference,
            "arms": {name: _arm_summary(name, answered, own, study.section.reference) for name in names},
        }
    compared = {
        (cell, name): arm["difference"]
        for cell, found in cells.items()
        for name, arm in found["arms"].items()
        if arm["difference"]
    }
    for place, adjusted in holm_family({place: one["p"] for place, one in compared.items()}).items():
        compared[place]["p_holm"] = adjusted
    return cells


def _arrays(units: Sequence[Unit], outcomes: Sequence[Row]) -> dict[str, dict[str, list[bool]]]:
    """Return each arm's outcomes by replicate, for the units of one cell."""
    answered: dict[str, dict[str, list[bool]]] = {}
    levels = units[0].levels
    for row in outcomes:
        if all(row[axis] == level for axis, level in levels.items()):
            answered.setdefault(row["arm"], {}).setdefault(row["replicate"], []).append(row["correct"])
    return answered


def _arm_summary(
    name: str, answered: dict[str, dict[str, list[bool]]], rows: Sequence[Row], reference: str
) -> dict[str, Any]:
    """Return one arm's summary; an untrained model that answers alike in every replicate was measured once."""
    import numpy as np

    own, other = answered.get(name, {}), answered.get(reference, {})
    reasons = [f"replicate {row['replicate']}: {row['reason']}" for row in rows if row["arm"] == name and row["reason"]]
    if not own:
        unknown = dict.fromkeys(("items", "accuracy", "interval", "seed_sd", "recovery", "difference"))
        return {"seeds": 0, **unknown, "reason": "; ".join(reasons)}
    seeds = list(own.values())[:1] if name in MODELS and len({str(row) for row in own.values()}) == 1 else own.values()
    accuracy = accuracy_over_seeds(np.array(list(seeds)))
    both = [replicate for replicate in own if replicate in other]
    compared = None
    if both and name != reference and name not in MODELS:
        arms = np.array([other[r] for r in both]), np.array([own[r] for r in both])
        found, test = difference_over_seeds(*arms), seed_test(*arms)
        compared = {
            "value": found.value,
            "interval": _bounds(found.interval),
            "seed_sd": found.seed_sd,
            "item_se": found.item_se,
            "p": test.p_value,
            "p_items": test.p_items,
            "seeds": len(both),
            "reason": test.reason,
        }
    before, source = (np.mean([np.mean(answered[model][r]) for r in own]) for model in ("target before", "source"))
    lead = float(source - before)
    return {
        "seeds": len(seeds),
        "items": len(next(iter(own.values()))),
        "accuracy": accuracy.value,
        "interval": _bounds(accuracy.interval),
        "seed_sd": accuracy.seed_sd,
        "recovery": float(accuracy.value - before) / lead if lead > 0 and name not in MODELS else None,
        "difference": compared,
        "reason": "; ".join(reasons) or None,
    }


def _bounds(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


# --- for people ---

HEADER = [
    "arm",
    "accuracy",
    "95 % interval",
    "items x seeds",
    "pairs",
    "against {}",
    "95 % interval",
    "Holm p",
    "recovery",
]


def markdown(results: dict[str, Any], figures: dict[str, str]) -> str:
    """Return what `results.json` holds as tables; `figures` are the paths of the cells' figures."""
    settings, rows = results["settings"], results["rows"]
    replicates = sorted({row["replicate"] for row in rows})
    parts = [
        f"{settings['candidates']} candidates a cell and replicate, {settings['size']} pairs an arm, replicates "
        f"{', '.join(replicates)}. Intervals draw seeds and items; p values are adjusted over all comparisons "
        "of the study (Holm). Recovery is (arm - target before) / (source - target before)."
    ]
    for cell, found in results["cells"].items():
        own = [row for row in rows if all(row[axis] == level for axis, level in found["levels"].items())]
        header = [name.format(found["reference"]) for name in HEADER]
        parts += [f"## {cell}", markdown_table(header, _table(found, own))]
        parts += [f"- Not trained: {arm}: {one['reason']}" for arm, one in found["arms"].items() if one["reason"]]
        if cell in figures:
            parts.append(f"![{cell}]({figures[cell]})")
    return "\n\n".join(parts) + "\n"


def _table(cell: dict[str, Any], rows: Sequence[Row]) -> list[list[str]]:
    table = []
    for name, arm in cell["arms"].items():
        none = "" if name in (*MODELS, cell["reference"]) else "n/a"  # these are not compared
        sizes = sorted({row["pairs"] for row in rows if row["arm"] == name and row["pairs"] is not None})
        compared, missing = arm["difference"], arm["accuracy"] is None
        table.append(
            [
                name,
                "n/a" if missing else f"{arm['accuracy']:.1%}",
                "n/a" if missing else "{:.1%} to {:.1%}".format(*arm["interval"]),
                "n/a" if missing else f"{arm['items']} x {arm['seeds']}",
                " or ".join(map(str, sizes)),
                points(compared["value"], arm["items"]) if compared else none,
                "{:+.1f} to {:+.1f}".format(*(100 * end for end in compared["interval"])) if compared else none,
                f"{compared['p_holm']:.2g}" if compared else none,
                "" if arm["recovery"] is None else f"{arm['recovery']:.2f}",
            ]
        )
    return table
