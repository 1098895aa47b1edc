"""What a study makes, and where it lies: each product under the fingerprint of all that it is made from.

So a product is made once, whichever units and arms share it; and a study that goes on, or has got another arm, makes
what is not there yet.

config.yaml                   the study file as written
synthesis/CELL/REPLICATE/     a run directory that ends with its candidates
answered/FINGERPRINT.jsonl    given prompts with F's answers
trainings/FINGERPRINT/        dataset, adapter and training.json of an arm
outcomes/FINGERPRINT.jsonl    a model's answers to the questions, graded
results.*, outcomes.parquet, timings.parquet, figures/
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneshift.config import result_settings
from tuneshift.configfile import read_mapping
from tuneshift.distill import Pair
from tuneshift.errors import ResumeRefused
from tuneshift.run.directory import Lock, RunDirectory
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import NO_USAGE, Usage
from tuneshift.run.resume import check_resumable, synthesis_finished
from tuneshift.study.grid import Arm, Unit


@dataclass(frozen=True)
class Products:
    """The products of a study in its folder."""

    root: Path

    def synthesis(self, unit: Unit) -> RunDirectory:
        """Return the run directory of a unit's candidates."""
        return RunDirectory(self.root / "synthesis" / unit.cell / unit.replicate)

    def synthesized(self, unit: Unit) -> bool:
        """Tell whether a unit has its candidates.

        Raises:
            ResumeRefused: they were made by another configuration, from other files, or of another number.
        """
        run = self.synthesis(unit)
        if not run.ledger.exists():
            return False
        if run.is_described():
            before = read_mapping(run.config)["synthesis"]["max_candidates"]
            if before != unit.candidates:
                raise ResumeRefused(
                    f"{self.root}: its candidates were written for `candidates: {before}`, and the study now says "
                    f"{unit.candidates}. Give another --run-dir, or undo the change; `size` and arms may change."
                )
        return check_resumable(unit.loaded, run, unit.inputs.digests) and synthesis_finished(run)

    def budget(self, unit: Unit) -> AbstractContextManager[object]:
        """Return what lets one process at a time pay a hosted generator, so that the limits hold for all units."""
        pays = unit.loaded.config.generator.api is not None and not self.synthesized(unit)
        return Lock(self.root / "synthesis") if pays else nullcontext()

    def shared(self, paths: Sequence[Path]) -> AbstractContextManager[object]:
        """Return what lets one process at a time make files of answers that several units share; the others wait."""
        missing = not all(path.exists() for path in paths)
        return Lock(self.root / "outcomes", wait=True) if missing else nullcontext()

    def spent_elsewhere(self, unit: Unit, units: Sequence[Unit]) -> Usage:
        """Return what the other units took of the hosted model that writes a unit's prompts, whatever its limits."""
        api = unit.loaded.config.generator.api
        usage = NO_USAGE
        for other in units:
            asked, path = other.loaded.config.generator.api, self.synthesis(other).ledger
            if api is None or asked is None or path == self.synthesis(unit).ledger or not path.exists():
                continue
            if (asked.base_url, asked.model) == (api.base_url, api.model):
                with Ledger(path) as ledger:
                    usage += ledger.usage()
        return usage

    def answered(self, unit: Unit, arm: Arm) -> Path:
        """Return the file of an arm's prompts with F's answers."""
        settings = result_settings(unit.loaded.config)
        answering = {key: settings["synthesis"][key] for key in ("decoding", "max_new_tokens", "stop")}
        made_from = {"prompts": arm.prompts, "size": arm.size, "answering": answering, "weights": _source(unit)}
        name = _fingerprint(**made_from, **{key: settings[key] for key in ("target", "engine", "run")})
        return self.root / "answered" / f"{name}.jsonl"

    def training(self, unit: Unit, pairs: Sequence[Pair]) -> str:
        """Return the fingerprint of a unit's training on `pairs`."""
        settings = result_settings(unit.loaded.config)
        made_from = {key: settings[key] for key in ("target", "distill", "run")}
        processes = unit.inputs.digests.get("distill.accelerate")
        return _fingerprint(pairs=[asdict(pair) for pair in pairs], processes=processes, **made_from)

    def training_directory(self, training: str) -> RunDirectory:
        """Return the directory of a training: a run directory that holds a dataset and what was learnt from it."""
        return RunDirectory(self.root / "trainings" / training)

    def outcomes(self, unit: Unit, model: str, training: str | None = None) -> Path:
        """Return the file of what `F`, `B` or `T` answered to a unit's questions; `training` made T's adapter."""
        settings = result_settings(unit.loaded.config)
        weights = {"target": settings["target"], "training": training} if model == "T" else _source(unit)
        run = {key: value for key, value in settings["run"].items() if key != "seed"}  # answers are greedy
        asked = unit.questions.fingerprint()
        name = _fingerprint(model=model, weights=weights, engine=settings["engine"], run=run, questions=asked)
        return self.root / "outcomes" / f"{name}.jsonl"


def _source(unit: Unit) -> dict[str, Any]:
    settings = result_settings(unit.loaded.config)
    return {"source": settings["source"], "adapter": unit.inputs.digests.get("source.adapter")}


def _fingerprint(**made_from: Any) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
