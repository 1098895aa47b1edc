"""A study on one page: candidates, what the arms choose, trainings, answers, and the table.

Each step makes what is missing of the study's products (`tuneshift.study.products`), so that a study which was killed
goes on where it was, and one that has got another arm trains that arm alone.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tuneshift.config import Config
from tuneshift.console import duration
from tuneshift.distill import inspect_target
from tuneshift.engines.base import Engine
from tuneshift.engines.source import Source
from tuneshift.errors import RunDirectoryError
from tuneshift.measuring import measure_stored
from tuneshift.pipeline import distill_run, synthesize
from tuneshift.progress import SILENT, Progress
from tuneshift.prompts.hosted import HostedGenerator
from tuneshift.run.directory import RunDirectory, jsonl, write_atomically
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Usage
from tuneshift.run.resume import open_ledger
from tuneshift.study.arms import Trial, answered_pairs, decide_arms, unmeasured_criteria
from tuneshift.study.grid import Arm, Study, Unit
from tuneshift.study.products import Products
from tuneshift.study.results import write_results
from tuneshift.wiring import (
    SynthesisModels,
    answer_decoding,
    instruments,
    open_plain,
    open_run_source,
    open_trained,
    synthesis_models,
    training_settings,
)

Model = TypeVar("Model")


class Countdown:
    """Says before each of `total` tasks which it is and, from those before it, how long the rest will take."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self.what, self.total, self.progress = what, total, progress
        self.begun, self.started = 0, time.monotonic()

    def begin(self, label: str) -> None:
        """Announce the next task."""
        past = time.monotonic() - self.started
        left = f"; about {duration(past / self.begun * (self.total - self.begun))} left" if self.begun else ""
        self.begun += 1
        self.progress.note(f"{self.what} {self.begun} of {self.total}: {label}{left}")


def run_study(study: Study, directory: RunDirectory, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Make all that is missing of a study, write its tables, and return the results.

    `directory` is locked by the caller.

    Raises:
        UserError: an input is wrong. ResumeRefused: candidates in the directory are another configuration's.
    """
    describe(study, directory)
    products = Products(directory.path)
    # 1) What needs the source: each unit's candidates, F's and B's answers, F's answers to given prompts.
    use_source(study.units, products, progress)
    # 2) What needs the untrained target, with no other model open.
    use_target(study.units, products, progress)
    # 3) What each arm trains on: decided over the stored candidates, anew each time.
    trials = decide_arms(study.units, products, progress)
    # 4) Trainings, and the target after each; equal datasets are trained on once.
    train_arms(trials, products, progress)
    # 5) One row for each cell, replicate and arm, and what they say together.
    return write_results(study, products, trials, progress)


def describe(study: Study, directory: RunDirectory) -> None:
    """Write down what the study is; from here on the directory outlives an error.

    Raises:
        RunDirectoryError: the directory holds something else.
    """
    if directory.ledger.exists():
        raise RunDirectoryError(f"{directory.path}: holds a run, and a study needs its own. Give another --run-dir.")
    if not directory.is_described():
        directory.check_unused()
    directory.keep()
    directory.describe(study.raw, study.folder)


# --- 1) what needs the source ---


def use_source(units: Sequence[Unit], products: Products, progress: Progress) -> None:
    """Make what F, B and G make; units that differ in their seed alone share the opened models."""
    unfinished = {unit.label for unit in units if not products.synthesized(unit)}
    waiting = [
        unit
        for unit in units
        if unit.label in unfinished
        or not all(path.exists() for path in _from_f(unit, products))
        or unmeasured_criteria(unit, products, by_target=False)
    ]
    countdown = Countdown("Candidates and answers of the source", len(waiting), progress)
    for _, group in itertools.groupby(waiting, key=_models_of):
        members = list(group)
        writes = any(unit.label in unfinished for unit in members)
        with _opened(members[0], writes, progress) as (source, models):
            for unit in members:
                countdown.begin(unit.label)
                if models is not None and unit.label in unfinished:
                    elsewhere = products.spent_elsewhere(unit, units)
                    _write_candidates(unit, products, models, elsewhere, progress)
                for side, model in ((True, "F"), (False, "B")):
                    answer_questions(source.engine, unit, products.outcomes(unit, model), fine_tuned=side)
                for arm in unit.arms:
                    if arm.prompts is not None:
                        _answer_prompts(unit, arm, products.answered(unit, arm), source)
                _measure(unit, products, source=source)


def _from_f(unit: Unit, products: Products) -> list[Path]:
    """Return the files of a unit that the source makes, apart from its candidates."""
    answered = [products.answered(unit, arm) for arm in unit.arms if arm.prompts is not None]
    return [products.outcomes(unit, "F"), products.outcomes(unit, "B"), *answered]


def _measure(unit: Unit, products: Products, *, source: Source | None = None, target: Engine | None = None) -> None:
    """Measure on a unit's candidates what its arms' criteria need of the model that is open."""
    tools = instruments(
        unit.loaded, unit.inputs.seeds, source=partial(_opened_one, source), target=partial(_opened_one, target)
    )
    for criterion in unmeasured_criteria(unit, products, by_target=target is not None):
        with products.synthesis(unit) as run, Ledger(run.ledger) as ledger:
            measure_stored(ledger, criterion, tools)


def _opened_one(model: Model | None) -> Model:
    assert model is not None, "a criterion is measured with F and B, or with T, never with both"
    return model


def _models_of(unit: Unit) -> str:
    """Return what two units have in common when the models that are open for one serve the other."""
    return f"{_seedless(unit).model_dump_json()} {sorted(unit.inputs.digests.items())}"


def _seedless(unit: Unit) -> Config:
    config = unit.loaded.config
    return config.model_copy(update={"run": config.run.model_copy(update={"seed": 0})})


@contextmanager
def _opened(unit: Unit, writes: bool, progress: Progress) -> Iterator[tuple[Source, SynthesisModels | None]]:
    """Open the source, and where candidates are to be written the generator too."""
    if writes:
        with synthesis_models(unit.loaded, unit.inputs, progress) as models:
            yield models.source, models
        return
    with closing(open_run_source(unit.loaded, unit.inputs.seeds, substitute=True)) as source:
        yield source, None


def _write_candidates(
    unit: Unit, products: Products, models: SynthesisModels, elsewhere: Usage, progress: Progress
) -> None:
    if isinstance(models.generator, HostedGenerator):
        models.generator.model.elsewhere = elsewhere
    seed = unit.loaded.config.run.seed  # the models may have been opened for another unit
    own = replace(
        models,
        generator=replace(models.generator, run_seed=seed),
        instruments=replace(models.instruments, run_seed=seed),
    )
    with products.synthesis(unit) as run, open_ledger(unit.loaded, run, unit.inputs.digests) as ledger:
        synthesize(unit.loaded, unit.inputs, own, ledger, progress)


def _answer_prompts(unit: Unit, arm: Arm, path: Path, source: Source) -> None:
    if path.exists() or arm.prompts is None or arm.size is None:
        return
    pairs = answered_pairs(
        source,
        arm.prompts,
        arm.size,
        decoding=answer_decoding(unit.loaded),
        target=inspect_target(training_settings(unit.loaded)),
        run_seed=unit.loaded.config.run.seed,
    )
    write_atomically(path, jsonl([asdict(pair) for pair in pairs]))


# --- 2) and 4) the target before and after ---


def use_target(units: Sequence[Unit], products: Products, progress: Progress) -> None:
    """Make what the untrained target makes: its answers, and the measures of criteria that read it."""
    waiting = [
        unit
        for unit in units
        if not products.outcomes(unit, "T").exists() or unmeasured_criteria(unit, products, by_target=True)
    ]
    countdown = Countdown("Answers of the target before", len(waiting), progress)
    for _, group in itertools.groupby(waiting, key=_target_of):
        members = list(group)
        with closing(open_plain(members[0].loaded, members[0].loaded.config.target.model)) as engine:
            for unit in members:
                countdown.begin(unit.label)
                answer_questions(engine, unit, products.outcomes(unit, "T"), fine_tuned=False)
                _measure(unit, products, target=engine)


def _target_of(unit: Unit) -> str:
    """Return what two units have in common when they open the same target in the same way."""
    return _seedless(unit).model_dump_json(include={"target", "engine", "run"})


def train_arms(trials: Sequence[Trial], products: Products, progress: Progress) -> None:
    """Train a target for each dataset that has none yet, and let it answer its cells' questions."""
    waiting: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.training is not None and not products.outcomes(trial.unit, "T", trial.training).exists():
            waiting.setdefault(trial.training, []).append(trial)
    countdown = Countdown("Training", len(waiting), progress)
    for training, members in waiting.items():
        first = members[0]
        countdown.begin(", ".join(f"{trial.unit.label}, arm {trial.arm}" for trial in members))
        with products.training_directory(training) as directory:
            directory.keep()
            if not directory.training.exists():
                write_atomically(directory.dataset, jsonl([asdict(pair) for pair in first.pairs]))
                distill_run(first.unit.loaded, directory, progress)
            shutil.rmtree(directory.checkpoints, ignore_errors=True)
            with closing(open_trained(first.unit.loaded, directory.adapter)) as engine:
                for trial in members:
                    answer_questions(engine, trial.unit, products.outcomes(trial.unit, "T", training), fine_tuned=True)


def answer_questions(engine: Engine, unit: Unit, path: Path, *, fine_tuned: bool) -> None:
    """Let a model answer a unit's questions, and write the outcomes; what is there is left."""
    if path.exists():
        return
    outcomes = unit.questions.ask(engine, unit.questions.items, fine_tuned=fine_tuned)
    write_atomically(path, jsonl([asdict(outcome) for outcome in outcomes]))
