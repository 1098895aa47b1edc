"""A study on one page: candidates, what the arms choose, trainings, answers, and the table.

Each step makes what is missing of the study's products (`tuneshift.study.products`), so that a study which was killed
goes on where it was, and one that has got another arm trains that arm alone. A product in the making is locked, so that
several processes share a study's work.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tuneshift.config import Config
from tuneshift.console import duration
from tuneshift.distill import inspect_target
from tuneshift.engines.base import Engine
from tuneshift.engines.source import Source
from tuneshift.errors import InUse, RunDirectoryError
from tuneshift.evaluate.verdict import detectable_sentence
from tuneshift.measuring import measure_stored
from tuneshift.pipeline import distill_run, synthesize
from tuneshift.progress import SILENT, Progress
from tuneshift.prompts.hosted import HostedGenerator
from tuneshift.run.directory import Lock, RunDirectory, jsonl, write_atomically
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
PAUSE = 1.0
"""Seconds between two looks at what other processes hold; a guess."""


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


def run_study(study: Study, root: Path, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Make all that is missing of a study in the folder `root`, write its tables, and return the results.

    Several processes may run the same study, for example one for each GPU: each makes what no other one is making, and
    all end with the same tables.

    Raises:
        UserError: an input is wrong. ResumeRefused: candidates in the directory are another configuration's.
    """
    if RunDirectory(root).ledger.exists():
        raise RunDirectoryError(f"{root}: holds a run, and a study needs its own. Give another --run-dir.")
    with RunDirectory(root, wait=True) as directory:
        describe(study, directory)
    for n in sorted({len(unit.questions.items) for unit in study.units}):
        progress.note(f"With one training an arm: {detectable_sentence(n)}")
    products = Products(root)
    while True:
        trials, held = make_missing(study.units, products, progress)
        if not held:
            break
        progress.note(f"Waiting for other processes, which make what is left: {held[0]}, {len(held)} in all")
        wait_for_any(held)
    # 5) One row for each cell, replicate and arm, and what they say together.
    with RunDirectory(root, wait=True):
        return write_results(study, products, trials, progress)


def make_missing(units: Sequence[Unit], products: Products, progress: Progress) -> tuple[list[Trial], list[Path]]:
    """Make what is missing and free; return the trials, and the folders that other processes hold."""
    # 1) What needs the source: each unit's candidates, F's and B's answers, F's answers to given prompts.
    held = use_source(units, products, progress)
    # 2) What needs the untrained target, with no other model open.
    answered = [unit for unit in units if not lacks_source(unit, products)]
    held += use_target(answered, products, progress)
    # 3) What each arm trains on: decided over the stored candidates, anew each time.
    trials = decide_arms([unit for unit in answered if not lacks_target(unit, products)], products, progress)
    # 4) Trainings, and the target after each; equal datasets are trained on once.
    held += train_arms(trials, products, progress)
    return trials, held


def describe(study: Study, directory: RunDirectory) -> None:
    """Write down what the study is; from here on the directory outlives an error.

    Raises:
        RunDirectoryError: the directory holds something else.
    """
    if not directory.is_described():
        directory.check_unused()
    directory.keep()
    directory.describe(study.raw, study.folder)


def wait_for_any(held: Sequence[Path]) -> None:
    """Wait until one of the folders is locked no more."""
    while True:
        for path in held:
            with suppress(InUse), Lock(path):
                return
        time.sleep(PAUSE)


def serve(
    what: str,
    units: Sequence[Unit],
    products: Products,
    progress: Progress,
    *,
    lacks: Callable[[Unit, Products], bool],
    key: Callable[[Unit], str],
    opened: Callable[[list[Unit]], AbstractContextManager[Model]],
    make: Callable[[Unit, RunDirectory, Model], None],
) -> list[Path]:
    """Let `make` give each unit `what` it lacks, with models that are opened once for units of the same `key`.

    Returns the folders that other processes hold, which are left to them; for these no model is opened.
    """
    waiting = [unit for unit in units if lacks(unit, products)]
    countdown, held = Countdown(what, len(waiting), progress), []
    for _, group in itertools.groupby(waiting, key=key):
        members = list(group)
        with ExitStack() as stack:
            models: list[Model] = []
            for unit in members:
                try:
                    with products.budget(unit), products.synthesis(unit) as run:
                        if not lacks(unit, products):
                            continue  # another process has made it since
                        countdown.begin(unit.label)
                        models = models or [stack.enter_context(opened(members))]
                        make(unit, run, models[0])
                except InUse as error:
                    held.append(error.path)
    return held


# --- 1) what needs the source ---


def use_source(units: Sequence[Unit], products: Products, progress: Progress) -> list[Path]:
    """Make what F, B and G make; see `serve`."""

    def make(unit: Unit, run: RunDirectory, models: tuple[Source, SynthesisModels | None]) -> None:
        source, writing = models
        if writing is not None and not products.synthesized(unit):
            _write_candidates(unit, run, writing, products.spent_elsewhere(unit, units), progress)
        with products.shared(_from_f(unit, products)):
            for side, model in ((True, "F"), (False, "B")):
                answer_questions(source.engine, unit, products.outcomes(unit, model), fine_tuned=side)
            for arm in unit.arms:
                if arm.prompts is not None:
                    _answer_prompts(unit, arm, products.answered(unit, arm), source)
        _measure(unit, run, products, source=source)

    return serve(
        "Candidates and answers of the source",
        units,
        products,
        progress,
        lacks=lacks_source,
        key=_models_of,
        opened=lambda members: _opened(members[0], not all(map(products.synthesized, members)), progress),
        make=make,
    )


def lacks_source(unit: Unit, products: Products) -> bool:
    """Tell whether something of a unit is missing that the source makes."""
    return (
        not products.synthesized(unit)
        or not all(path.exists() for path in _from_f(unit, products))
        or bool(unmeasured_criteria(unit, products, by_target=False))
    )


def _from_f(unit: Unit, products: Products) -> list[Path]:
    """Return the files of a unit that the source makes, apart from its candidates."""
    answered = [products.answered(unit, arm) for arm in unit.arms if arm.prompts is not None]
    return [products.outcomes(unit, "F"), products.outcomes(unit, "B"), *answered]


def _measure(
    unit: Unit, run: RunDirectory, products: Products, *, source: Source | None = None, target: Engine | None = None
) -> None:
    """Measure on a unit's candidates what its arms' criteria need of the model that is open."""
    tools = instruments(
        unit.loaded, unit.inputs.seeds, source=partial(_opened_one, source), target=partial(_opened_one, target)
    )
    for criterion in unmeasured_criteria(unit, products, by_target=target is not None):
        with Ledger(run.ledger) as ledger:
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
    unit: Unit, run: RunDirectory, models: SynthesisModels, elsewhere: Usage, progress: Progress
) -> None:
    if isinstance(models.generator, HostedGenerator):
        models.generator.model.elsewhere = elsewhere
    seed = unit.loaded.config.run.seed  # the models may have been opened for another unit
    own = replace(
        models,
        generator=replace(models.generator, run_seed=seed),
        instruments=replace(models.instruments, run_seed=seed),
    )
    with open_ledger(unit.loaded, run, unit.inputs.digests) as ledger:
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


def use_target(units: Sequence[Unit], products: Products, progress: Progress) -> list[Path]:
    """Make what the untrained target makes: its answers, and the measures of criteria that read it; see `serve`."""

    def make(unit: Unit, run: RunDirectory, target: Engine) -> None:
        path = products.outcomes(unit, "T")
        with products.shared([path]):
            answer_questions(target, unit, path, fine_tuned=False)
        _measure(unit, run, products, target=target)

    return serve(
        "Answers of the target before",
        units,
        products,
        progress,
        lacks=lacks_target,
        key=_target_of,
        opened=lambda members: closing(open_plain(members[0].loaded, members[0].loaded.config.target.model)),
        make=make,
    )


def lacks_target(unit: Unit, products: Products) -> bool:
    """Tell whether something of a unit is missing that the untrained target makes."""
    return not products.outcomes(unit, "T").exists() or bool(unmeasured_criteria(unit, products, by_target=True))


def _target_of(unit: Unit) -> str:
    """Return what two units have in common when they open the same target in the same way."""
    return _seedless(unit).model_dump_json(include={"target", "engine", "run"})


def train_arms(trials: Sequence[Trial], products: Products, progress: Progress) -> list[Path]:
    """Train a target for each dataset that has none yet, and let it answer its cells' questions.

    Returns the folders that other processes hold, which are left to them.
    """
    waiting: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.training is not None and lacks_answers(trial, products):
            waiting.setdefault(trial.training, []).append(trial)
    countdown, held = Countdown("Training", len(waiting), progress), []
    for training, members in waiting.items():
        try:
            with products.training_directory(training) as directory:
                if any(lacks_answers(trial, products) for trial in members):  # no other process has made them since
                    countdown.begin(", ".join(f"{trial.unit.label}, arm {trial.arm}" for trial in members))
                    train_and_ask(members, directory, products, progress)
        except InUse as error:
            held.append(error.path)
    return held


def lacks_answers(trial: Trial, products: Products) -> bool:
    """Tell whether the target that a trial trains has not answered its unit's questions."""
    return not products.outcomes(trial.unit, "T", trial.training).exists()


def train_and_ask(trials: Sequence[Trial], directory: RunDirectory, products: Products, progress: Progress) -> None:
    """Train on the pairs that all of `trials` chose, and let the target answer each unit's questions by its engine."""
    first = trials[0]
    directory.keep()
    if not directory.training.exists():
        write_atomically(directory.dataset, jsonl([asdict(pair) for pair in first.pairs]))
        distill_run(first.unit.loaded, directory, progress)
    shutil.rmtree(directory.checkpoints, ignore_errors=True)
    for _, group in itertools.groupby(sorted(trials, key=_opened_by), key=_opened_by):
        members = list(group)
        with closing(open_trained(members[0].unit.loaded, directory.adapter)) as engine:
            for trial in members:
                path = products.outcomes(trial.unit, "T", trial.training)
                answer_questions(engine, trial.unit, path, fine_tuned=True)


def _opened_by(trial: Trial) -> str:
    return _target_of(trial.unit)


def answer_questions(engine: Engine, unit: Unit, path: Path, *, fine_tuned: bool) -> None:
    """Let a model answer a unit's questions, and write the outcomes; what is there is left."""
    if path.exists():
        return
    outcomes = unit.questions.ask(engine, unit.questions.items, fine_tuned=fine_tuned)
    write_atomically(path, jsonl([asdict(outcome) for outcome in outcomes]))
