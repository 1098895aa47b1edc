"""What a run tells to whoever watches it from another process: all of it goes through the ledger.

The process that works notes its stage there (`Recorded`); `read_snapshot` reads it with what the rounds amount to. The
reader writes nothing and takes no lock, so it cannot disturb the run, and a run that was killed reads like any other.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tuneshift.engines.api import ApiSettings
from tuneshift.engines.dispatch import cost
from tuneshift.progress import Passing, Progress, Stage
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Counts, Ledger
from tuneshift.run.records import Usage

STAGES = {"preflight": "preflight", "synthesis": "synthesis", "distill": "distillation", "evaluate": "evaluation"}
"""A run's stages, by the names under which the ledger has their seconds, and what a person reads."""
NOTED_SECONDS = 1.0  # at least this long between two notes of one stage: each waits for the disk


class Recorded(Passing):
    """Notes in the ledger how far each stage is, besides telling it on."""

    def __init__(self, to: Progress, ledger: Ledger) -> None:
        super().__init__(to)
        self._ledger = ledger
        self._noted = 0.0

    def show(self, stage: Stage) -> None:
        """Note and pass on a stage."""
        if stage.ended or stage.updated == stage.started or stage.updated - self._noted >= NOTED_SECONDS:
            self._ledger.set_meta(stage=json.dumps(asdict(stage)))
            self._noted = stage.updated
        super().show(stage)


@dataclass(frozen=True)
class Snapshot:
    """A run at one instant.

    `wanted` is how many pairs are to be kept; `cost` is in the currency of the configured prices, `None` without.
    `alive` tells whether the process that worked last still runs, `None` where that is another machine's to know.
    """

    name: str
    phase: str
    alive: bool | None
    wanted: int | None
    counts: Counts
    seconds: dict[str, float]
    stage: Stage | None
    usage: Usage
    cost: float | None


def read_snapshot(run: RunDirectory) -> Snapshot | None:
    """Return how far a run is, `None` before its ledger exists.

    Raises:
        RunDirectoryError: the ledger is damaged, or, for an instant, between two states.
    """
    if not run.ledger.exists():
        return None
    with Ledger(run.ledger, read_only=True) as ledger:
        stop, settings = ledger.meta("stop_reason"), json.loads(ledger.meta("settings") or "{}")
        stage, usage = json.loads(ledger.meta("stage") or "null"), ledger.usage()
        return Snapshot(
            name=ledger.meta("name") or run.path.name,
            phase=phase(run, stop),
            alive=_alive(run.holder()),
            wanted=_wanted(settings.get("synthesis", {})),
            counts=ledger.counts(),
            seconds=ledger.seconds(),
            stage=stage and Stage(**stage),
            usage=usage,
            cost=_cost(settings.get("generator", {}).get("api"), usage),
        )


def by_stage(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return a ledger's seconds by what a person reads; what is no stage of a run stays: `measure`."""
    return {STAGES.get(name, name): value for name, value in seconds.items()}


def phase(run: RunDirectory, stop_reason: str | None) -> str:
    """Return which part of a run is next or under way, from what it has left behind."""
    if run.manifest.exists():
        return "finished"
    if stop_reason is None:
        return "synthesis"
    return "evaluation" if run.training.exists() else "distillation"


def _wanted(synthesis: dict[str, Any]) -> int | None:
    """Return how many pairs the loop wants to keep; `None` where a variable of the run's environment says it."""
    size, times = synthesis.get("target_size"), synthesis.get("oversample", 1)
    return math.ceil(times * size) if isinstance(size, int) and isinstance(times, int | float) else None


def _cost(api: dict[str, Any] | None, usage: Usage) -> float | None:
    if api is None:
        return None
    prices = {key: value for key, value in api.items() if key.startswith("price_") and isinstance(value, str)}
    if prices:  # as written: they come from a variable of the environment of the run
        return None
    return cost(ApiSettings(**api), usage.prompt_tokens, usage.completion_tokens)


def _alive(holder: tuple[int, str] | None) -> bool | None:
    """Tell whether a process runs; one that ended and whose number another process got counts as running."""
    if holder is None:
        return False
    process, host = holder
    if host != socket.gethostname():
        return None
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, and it runs
        return True
    return True
