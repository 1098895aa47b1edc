"""A study's tables: one row for each cell, replicate and arm, every outcome, and what the replicates say together.

No table holds a time but `timings.parquet`, and the page beside them, so that a study that was killed writes the same
bytes as one that was not.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneshift.errors import ConfigError
from tuneshift.progress import Progress
from tuneshift.run.directory import read_json, read_jsonl, write_atomically, write_json
from tuneshift.run.ledger import Ledger
from tuneshift.run.manifest import environment
from tuneshift.sections.study import MODELS
from tuneshift.study.arms import Trial
from tuneshift.study.figures import write_figures
from tuneshift.study.grid import Study, Unit
from tuneshift.study.page import cost_table, study_page
from tuneshift.study.products import Products
from tuneshift.study.summary import shown_arms, summarize
from tuneshift.study.tables import markdown
from tuneshift.wiring import generator_usage

Row = dict[str, Any]
CONSTANT = ("tuneshift", "python", "platform", "processor", "versions")
"""What `results.json` tells of its environment: not the commit, which may move while a study runs, nor the GPUs and
cores, of which each of several processes may see others."""


def write_results(study: Study, products: Products, trials: Sequence[Trial], progress: Progress) -> dict[str, Any]:
    """Write tables, figures and page of a study whose products are there, and return what `results.json` holds."""
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
    root = products.root
    read = study.section.model_dump(include={"candidates", "size", "reference"})  # a ${VARIABLE} has its value here
    settings = study.raw | read
    described = {"study": study.name, "settings": settings, "environment": _environment()}
    results = {**described, **summarize(settings, rows, outcomes), "rows": rows}
    _write_parquet(root / "results.parquet", rows)
    _write_parquet(root / "outcomes.parquet", outcomes)
    _write_parquet(root / "timings.parquet", timings)
    write_json(root / "results.json", results)
    try:
        figures = write_figures(root / "figures", shown_arms(results))
    except ConfigError as error:
        progress.note(f"Warning: {error}")
        figures = {}
    write_atomically(root / "results.md", f"# Study: {study.name}\n\n{markdown(results, figures)}")
    usage = {cell: _usage(units, products) for cell, units in study.cells().items()}
    command = ["tuneshift", "study", str(study.path.resolve()), "--run-dir", str(root.resolve())]
    write_atomically(root / "results.html", study_page(results, cost_table(results, timings, usage), command))
    return results


def _environment() -> Row:
    """Return where the tables were written: versions and machine, the same for every process of a study."""
    found = environment()
    return {name: found[name] for name in CONSTANT}


# --- rows ---


def _key(unit: Unit, arm: str) -> Row:
    return {**unit.levels, "replicate": unit.replicate, "arm": arm}


def _row(unit: Unit, arm: str, *, answers: Sequence[Row], **columns: Any) -> Row:
    """Return a row of `results.parquet`; what was not measured is null.

    `questions` is the fingerprint of what was asked: cells with the same one asked the same. `chance` is the share
    right of guessing.
    """
    unknown = dict.fromkeys(("criterion", "candidates", "pairs", "steps", "training", "reason"))
    unknown |= {"questions": unit.questions.fingerprint(), "chance": unit.questions.chance}
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


def _usage(units: Sequence[Unit], products: Products) -> list[Row]:
    """Return what the units' requests to a generator's API took; a local generator has none."""
    found = []
    for unit in units:
        with Ledger(products.synthesis(unit).ledger) as ledger:
            found.append(generator_usage(unit.loaded, ledger))
    return [one for one in found if one is not None]


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as one table; a column without a value has the type of its neighbours, text."""
    import pyarrow
    from pyarrow import parquet

    kinds = {"candidates": "int64", "pairs": "int64", "steps": "int64", "correct": "int64", "n": "int64"}
    kinds |= {"accuracy": "double", "chance": "double", "synthesis_seconds": "double", "training_seconds": "double"}
    if rows and "item" in rows[0]:
        kinds["correct"] = "bool"
    schema = pyarrow.schema([(name, kinds.get(name, "string")) for name in (rows[0] if rows else {})])
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), buffer)
    write_atomically(path, buffer.getvalue())
