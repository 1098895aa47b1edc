"""A study on one page: candidates, what the arms choose, trainings, answers, and the table.

Each step makes what is missing of the study's products (`tuneshift.study.products`), so that a study which was killed
goes on where it was, and one that has got another arm trains that arm alone.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from tuneshift.criteria import Criterion, unmeasured
from tuneshift.distill import Pair, inspect_target
from tuneshift.encoding import Reader
from tuneshift.engines.base import Engine
from tuneshift.engines.source import Source
from tuneshift.errors import RunDirectoryError
from tuneshift.measuring import measure_stored
from tuneshift.pipeline import distill_run, synthesize
from tuneshift.progress import SILENT, Progress
from tuneshift.run.directory import CONFIG_HEADER, RunDirectory, jsonl, read_jsonl, write_atomically
from tuneshift.run.ledger import Ledger
from tuneshift.run.resume import open_ledger
from tuneshift.study.arms import Trial, answered_pairs, choose, given_pairs, learnable, readable, rule_label
from tuneshift.study.grid import Arm, Study, Unit
from tuneshift.study.products import Products
from tuneshift.study.results import write_results
from tuneshift.wiring import (
    SynthesisModels,
    answer_decoding,
    criterion_on,
    instruments,
    open_plain,
    open_run_source,
    open_trained,
    synthesis_models,
    training_settings,
)


class Countdown:
    """Says before each of `total` tasks which it is and, from those before it, how long the rest will take."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self.what, self.total, self.progress = what, total, progress
        self.begun, self.started = 0, time.monotonic()

    def begin(self, label: str) -> None:
        """Announce the next task."""
        past = time.monotonic() - self.started
        left = f"; about {past / self.begun * (self.total - self.begun) / 60:.0f} min left" if self.begun else ""
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
    # 2) What each arm trains on: decided over the stored candidates, anew each time.
    trials = decide_arms(study.units, products, progress)
    # 3) The target before, and after each training; equal datasets are trained on once.
    answer_before(study.units, products, progress)
    train_arms(trials, products, progress)
    # 4) One row for each cell, replicate and arm, and what they say together.
    return write_results(study, products, trials, progress)


def describe(study: Study, directory: RunDirectory) -> None:
    """Write down what the study is; from here on the directory outlives an error.

    Raises:
        RunDirectoryError: the directory holds something else.
    """
    if directory.ledger.exists():
        raise RunDirectoryError(f"{directory.path}: holds a run, and a study needs its own. Give another --run-dir.")
    if not (directory.config.is_file() and directory.config.read_text("utf-8").startswith(CONFIG_HEADER)):
        directory.check_unused()
    directory.keep()
    text = yaml.safe_dump(study.raw, sort_keys=False, allow_unicode=True)
    write_atomically(directory.config, f"{CONFIG_HEADER}{study.folder}\n{text}")


# --- 1) what needs the source ---


def use_source(units: Sequence[Unit], products: Products, progress: Progress) -> None:
    """Make what F, B and G make; units that differ in their seed alone share the opened models."""
    unfinished = {unit.label for unit in units if not products.synthesized(unit)}
    waiting = [
        unit
        for unit in units
        if unit.label in unfinished
        or not all(path.exists() for path in _from_f(unit, products))
        or _to_measure(unit, products)
    ]
    countdown = Countdown("Candidates and answers of the source", len(waiting), progress)
    for _, group in itertools.groupby(waiting, key=_models_of):
        members = list(group)
        writes = any(unit.label in unfinished for unit in members)
        with _opened(members[0], writes, progress) as (source, models):
            for unit in members:
                countdown.begin(unit.label)
                if models is not None and unit.label in unfinished:
                    _write_candidates(unit, products, models, progress)
                for side, model in ((True, "F"), (False, "B")):
                    answer_questions(source.engine, unit, products.outcomes(unit, model), fine_tuned=side)
                for arm in unit.arms:
                    if arm.prompts is not None:
                        _answer_prompts(unit, arm, products.answered(unit, arm), source)
                _measure(unit, products, source)


def _from_f(unit: Unit, products: Products) -> list[Path]:
    """Return the files of a unit that the source makes, apart from its candidates."""
    answered = [products.answered(unit, arm) for arm in unit.arms if arm.prompts is not None]
    return [products.outcomes(unit, "F"), products.outcomes(unit, "B"), *answered]


def _to_measure(unit: Unit, products: Products) -> list[Criterion]:
    """Return the criteria of a unit's arms that need measures which its candidates have not got yet."""
    with Ledger(products.synthesis(unit).ledger) as ledger:
        candidates = ledger.candidates()
    criteria = [criterion_on(arm.criterion, candidates) for arm in unit.arms if arm.criterion is not None]
    return [criterion for criterion in criteria if unmeasured(candidates, criterion, gated=False)]


def _measure(unit: Unit, products: Products, source: Source) -> None:
    """Measure on a unit's candidates what its arms' criteria need."""
    with ExitStack() as opened, products.synthesis(unit) as run, Ledger(run.ledger) as ledger:
        target = unit.loaded.config.target.model
        tools = instruments(
            unit.loaded,
            unit.inputs.seeds,
            source=lambda: source,
            target=lambda: opened.enter_context(closing(open_plain(unit.loaded, target))),
        )
        for criterion in _to_measure(unit, products):
            measure_stored(ledger, criterion, tools)


def _models_of(unit: Unit) -> str:
    """Return what two units have in common when the models that are open for one serve the other."""
    config = unit.loaded.config
    seedless = config.model_copy(update={"run": config.run.model_copy(update={"seed": 0})})
    return f"{seedless.model_dump_json()} {sorted(unit.inputs.digests.items())}"


@contextmanager
def _opened(unit: Unit, writes: bool, progress: Progress) -> Iterator[tuple[Source, SynthesisModels | None]]:
    """Open the source, and where candidates are to be written the generator too."""
    if writes:
        with synthesis_models(unit.loaded, unit.inputs, progress) as models:
            yield models.source, models
        return
    source = open_run_source(unit.loaded, unit.inputs.seeds, substitute=True)
    try:
        yield source, None
    finally:
        source.close()


def _write_candidates(unit: Unit, products: Products, models: SynthesisModels, progress: Progress) -> None:
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


# --- 2) what each arm trains on ---


def decide_arms(units: Sequence[Unit], products: Products, progress: Progress) -> list[Trial]:
    """Return the trials of all units, in the order of the study file."""
    targets: dict[str, Reader] = {}
    trials = []
    for unit in units:
        target = unit.loaded.config.target.model
        if target not in targets:
            targets[target] = inspect_target(training_settings(unit.loaded))
        with Ledger(products.synthesis(unit).ledger) as ledger:
            candidates = ledger.candidates()[: unit.candidates]
        usable = learnable(candidates, targets[target])
        for arm in unit.arms:
            criterion = None if arm.criterion is None else criterion_on(arm.criterion, candidates)
            if criterion is not None and arm.size is not None:
                chosen = choose(usable, criterion, arm.size, best=arm.best)
                kept = chosen if isinstance(chosen, str) else [Pair(c.prompt, c.y_f.text) for c in chosen if c.y_f]
            else:
                kept = _elsewhere(unit, arm, products, targets[target], progress)
            pairs, reason = ([], kept) if isinstance(kept, str) else (kept, None)
            trials.append(
                Trial(
                    unit,
                    arm.name,
                    None if criterion is None else rule_label(criterion, best=arm.best),
                    None if criterion is None else len(candidates),
                    pairs,
                    None if reason is not None else products.training(unit, pairs),
                    reason,
                )
            )
    return trials


def _elsewhere(unit: Unit, arm: Arm, products: Products, target: Reader, progress: Progress) -> list[Pair] | str:
    """Return the pairs of an arm that does not choose among candidates, or why there are not as many as it wants."""
    if arm.pairs is not None:
        fitting = readable(arm.pairs, target)
        drawn = given_pairs(fitting, arm.size or len(arm.pairs), unit.loaded.config.run.seed)
        if len(fitting) == len(arm.pairs):
            return drawn
        lost = f"{len(arm.pairs) - len(fitting)} of {len(arm.pairs)} are too long for the target"
        if isinstance(drawn, str):
            return f"{drawn}; {lost}"
        progress.note(f"{unit.label}, arm {arm.name}: of its pairs, {lost} and left out")
        return drawn
    pairs = [Pair(**row) for row in read_jsonl(products.answered(unit, arm))]
    enough = arm.size is not None and len(pairs) == arm.size
    return pairs if enough else f"F answered {len(pairs)} of {arm.size} wanted prompts usably"


# --- 3) the target before and after ---


def answer_before(units: Sequence[Unit], products: Products, progress: Progress) -> None:
    """Let the untrained target answer the questions that it has not answered yet."""
    waiting = {path: unit for unit in units if not (path := products.outcomes(unit, "T")).exists()}
    countdown = Countdown("Answers of the target before", len(waiting), progress)
    for path, unit in waiting.items():
        countdown.begin(unit.cell)
        engine = open_plain(unit.loaded, unit.loaded.config.target.model)
        try:
            answer_questions(engine, unit, path, fine_tuned=False)
        finally:
            engine.close()


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
            engine = open_trained(first.unit.loaded, directory.adapter)
            try:
                for trial in members:
                    answer_questions(engine, trial.unit, products.outcomes(trial.unit, "T", training), fine_tuned=True)
            finally:
                engine.close()


def answer_questions(engine: Engine, unit: Unit, path: Path, *, fine_tuned: bool) -> None:
    """Let a model answer a unit's questions, and write the outcomes; what is there is left."""
    if path.exists():
        return
    outcomes = unit.questions.ask(engine, unit.questions.items, fine_tuned=fine_tuned)
    write_atomically(path, jsonl([asdict(outcome) for outcome in outcomes]))
