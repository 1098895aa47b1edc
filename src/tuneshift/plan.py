"""What a run will cost, from a probe of 20 candidates and a rehearsal of the training."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tuneshift.config import LoadedConfig
from tuneshift.coverage import in_kinds
from tuneshift.dataset import kept_rows, pairs
from tuneshift.distill import Pair
from tuneshift.engines.base import Engine
from tuneshift.evaluate.evidence import Questions
from tuneshift.evaluate.stats import Proportion
from tuneshift.evaluate.verdict import ARMS, detectable_gains
from tuneshift.launch import pairs_per_step, train
from tuneshift.pipeline import synthesis
from tuneshift.preflight import Inputs, objection, read_inputs
from tuneshift.progress import SILENT, Progress
from tuneshift.prompts.stopping import Limits
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate
from tuneshift.run.usage import peak_memory
from tuneshift.wiring import (
    evaluation_questions,
    generator_usage,
    limits_of,
    regression_of,
    synthesis_models,
    training_settings,
)

PROBE = 20  # candidates, as one call of the paper's
REHEARSAL_STEPS = 5  # of which the first warms up; a median of four is not far off
T_ARMS = 2  # before and after; T is taken to be as fast as F


def plan(loaded: LoadedConfig, *, progress: Progress = SILENT) -> dict[str, Any]:
    """Run the preflight and a probe in a temporary folder; return checks and estimates, and write nothing else.

    Seconds and tokens are extrapolated from the probe; what it cannot tell is `None`. Memory is this process's peak.

    Raises:
        UserError: an input is wrong.
    """
    config = loaded.config
    inputs = read_inputs(config, folder=loaded.folder)
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "probe.sqlite") as ledger:
        with synthesis_models(loaded, inputs, progress) as models:
            progress.note(f"Probing with {PROBE} candidates")
            started = time.monotonic()
            probe = replace(
                synthesis(loaded, inputs, models),
                calibration=None,
                limits=Limits(target_size=PROBE, max_candidates=PROBE, max_rounds=1, patience=1),
                calls_per_round=PROBE,  # as many as are needed
            )
            probe.probe(ledger)
            once = time.monotonic() - started  # single words that F is asked, however many candidates there will be
            probe.run(ledger)
            seconds = time.monotonic() - started - once
            evaluation = _evaluation_seconds(loaded, inputs, models.source.engine)
            checks = asdict(models.checks)
        candidates, calls, usage = ledger.candidates(), ledger.calls(), generator_usage(loaded, ledger)
        kept = [candidate for candidate in candidates if candidate.kept]
        learnt = pairs(kept_rows(kept, calls, count_eos=False)) or [
            Pair(s.prompt, s.response or ".") for s in inputs.seeds
        ]
        progress.note(f"Rehearsing {REHEARSAL_STEPS} training steps")
        per_step = _rehearse(loaded, learnt, Path(folder))
    rate = Proportion(len(kept), len(candidates))
    needed = round(_wanted(limits_of(loaded, inputs), kept) / rate.accuracy) if kept else None
    if inputs.prompts and needed is not None and needed > len(inputs.prompts):
        checks["warnings"].append(f"generator.prompts has {len(inputs.prompts)} prompts; about {needed} are needed.")
    settings = training_settings(loaded)
    steps = -(-config.synthesis.target_size // pairs_per_step(settings)) * settings.num_train_epochs
    tokens = sum(call.generated_tokens for call in calls)
    tokens += sum(response.n_tokens for c in candidates for response in (c.y_f, c.y_b) if response is not None)
    return {
        "checks": checks,
        "probe": {"candidates": len(candidates), "kept": len(kept), "seconds": seconds},
        "reasons": dict(Counter(c.reason for c in candidates).most_common()),
        "keep_rate": rate.accuracy,
        "keep_rate_interval": asdict(rate.interval()),
        "candidates_needed": needed,
        "synthesis_seconds": once + seconds / len(candidates) * needed if needed else None,
        "generated_tokens": round(tokens / len(candidates) * needed) if needed else None,
        "generator_usage": _expected(usage, needed / len(candidates) if needed else None),
        "training_steps": steps,
        "training_seconds": per_step * steps,
        **evaluation,
        "questions": len(inputs.items),
        "detectable_gains": detectable_gains(len(inputs.items)) if inputs.items else None,
        **peak_memory(),
        "note": None if kept else "the probe kept nothing, so how many candidates are needed is unknown",
    }


def _wanted(limits: Limits, kept: Sequence[Candidate]) -> int:
    """Return how many pairs the loop will keep: fewer where there are no kinds of responses to balance."""
    return limits.target_size if limits.unbalanced is None or in_kinds(kept) else limits.unbalanced


def _expected(usage: dict[str, Any] | None, factor: float | None) -> dict[str, float | None] | None:
    """Return the tokens and the cost of the generator's API for the whole run; `None` for a local generator."""
    if usage is None:
        return None
    known = {key: usage[key] for key in ("prompt_tokens", "completion_tokens", "cost")}
    return {key: None if factor is None or value is None else value * factor for key, value in known.items()}


def _evaluation_seconds(loaded: LoadedConfig, inputs: Inputs, engine: Engine) -> dict[str, Any]:
    """Return the seconds of all answers of the evaluation, or `None` with the reason."""
    questions, regression = evaluation_questions(loaded, inputs), regression_of(loaded, inputs)
    asked = [] if questions is None else [(questions, len(ARMS))]
    asked += [] if regression is None else [(regression.questions, T_ARMS)]
    if not asked:
        return {"evaluation_seconds": None, "evaluation_reason": "no questions"}
    found = [answering_seconds(engine, one, arms=arms) for one, arms in asked]
    known = [seconds for seconds in found if seconds is not None]
    if len(known) < len(found):
        return {"evaluation_seconds": None, "evaluation_reason": "F can read none of the regression questions"}
    return {"evaluation_seconds": sum(known), "evaluation_reason": None}


def answering_seconds(engine: Engine, questions: Questions, *, arms: int) -> float | None:
    """Return the seconds that `arms` models need for the questions, by F's answers to some of those that F can read.

    `None` where F can read none: regression questions have to fit into the target alone.
    """
    room = questions.described["max_new_tokens"]
    readable = (item for item in questions.items if objection(item.prompt, [engine.reader], room=room) is None)
    probe = list(itertools.islice(readable, PROBE))
    if not probe:
        return None
    started = time.monotonic()
    questions.ask(engine, probe, fine_tuned=True)
    return (time.monotonic() - started) / len(probe) * len(questions.items) * arms


def _rehearse(loaded: LoadedConfig, learnt: list[Pair], folder: Path) -> float:
    """Return the median seconds of a training step, the first (which warms up) left out."""
    settings = training_settings(loaded)
    needed = pairs_per_step(settings) * REHEARSAL_STEPS
    repeated = (learnt * needed)[:needed]
    rehearsal = {"save_strategy": "no"}
    times: list[float] = []
    train(
        repeated,
        replace(settings, num_train_epochs=1, trainer_args={**settings.trainer_args, **rehearsal}),
        output_dir=folder / "rehearsal",
        checkpoint_dir=folder / "checkpoints",
        on_step=lambda *_: times.append(time.monotonic()),
    )
    return statistics.median(after - before for before, after in itertools.pairwise(times))
