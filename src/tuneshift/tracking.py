"""A run's numbers for experiment trackers, where `run.trackers` names any.

Only what `Progress.log` is given goes out: numbers under names of ours. No prompt, response, setting or file does, and
what a tracker would add by itself (source code, git state, what the terminal shows) is switched off where it can be. A
run that is continued goes on in the same place. A tracker that fails gets no more numbers, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from tuneshift.errors import ConfigError
from tuneshift.evaluate.verdict import ARMS
from tuneshift.progress import Passing, Progress
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger
from tuneshift.run.watching import Recorded

PROJECT = "tuneshift"
"""What trackers file all runs under, unless the environment names another project."""

Log = Callable[[Mapping[str, float], int], Any]
"""Takes numbers by name, and the step that they belong to."""


def check_trackers(names: Sequence[str]) -> None:
    """Prove that the trackers are installed, before anything costs time.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, which trackers make, is no package
            raise ConfigError(f"run.trackers: {name} is not installed. Run: pip install {name}, or leave it out.")


@contextmanager
def followed(progress: Progress, names: Sequence[str], run: RunDirectory, ledger: Ledger) -> Iterator[Progress]:
    """Yield a progress that also notes stages in the ledger, for who watches, and sends numbers to the trackers."""
    recorded = Recorded(progress, ledger)
    if not names:
        yield recorded
        return
    identity = ledger.meta("tracked") or secrets.token_hex(4)
    ledger.set_meta(tracked=identity)
    tracked = Tracked(recorded, names, run.path, identity)
    try:
        yield tracked
    finally:
        tracked.close()


class Tracked(Passing):
    """Sends numbers to trackers, besides telling all on; one that fails is noted once and gets no more."""

    def __init__(self, to: Progress, names: Sequence[str], folder: Path, identity: str) -> None:
        super().__init__(to)
        self._logs: dict[str, Log] = {}
        self._ends = {name: ExitStack() for name in names}
        self._failed: set[str] = set()
        for name, end in self._ends.items():
            with self._outlived(name):
                self._logs[name] = TRACKERS[name](folder, identity, end)

    def log(self, part: str, step: int, numbers: Mapping[str, float | None]) -> None:
        """Send the numbers of a step; what was not measured is left out."""
        measured = {f"{part}/{name}": float(value) for name, value in numbers.items() if value is not None}
        for name, log in self._logs.items():
            if name not in self._failed:
                with self._outlived(name):
                    log(measured, step)
        super().log(part, step, numbers)

    def close(self) -> None:
        """Tell the trackers that no more comes from this process."""
        for name, end in self._ends.items():
            with self._outlived(name):
                end.close()

    @contextmanager
    def _outlived(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a tracker may raise anything, and none may end a run
            if name not in self._failed:
                self._failed.add(name)
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                self.note(f"run.trackers: {name} failed and gets no more numbers; the run goes on ({why}).")


def verdict_numbers(verdict: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of a verdict: each arm's accuracy, the gain, its p value, and the recovery."""
    accuracies = {f"accuracy_{arm}": verdict[arm] and verdict[arm]["accuracy"] for arm in ARMS}
    return accuracies | {name: verdict.get(name) for name in ("difference", "mcnemar_p", "recovery")}


def _shown_name(folder: Path, identity: str) -> str:
    """Return a run's name for people; a folder may be called what no tracker takes for an identifier."""
    return f"{folder.name}-{identity}"


def _tensorboard(folder: Path, identity: str, end: ExitStack) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    end.callback(writer.close)

    def log(numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log


def _wandb(folder: Path, identity: str, end: ExitStack) -> Log:
    import wandb

    # The terminal's output, code and its commit, host, user and paths, and the list of packages stay here.
    quiet = wandb.Settings(
        console="off", silent=True, save_code=False, x_disable_machine_info=True, x_save_requirements=False
    )
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    name = _shown_name(folder, identity)
    run = wandb.init(project=project, id=identity, name=name, resume="allow", dir=str(folder), settings=quiet)
    end.callback(run.finish)
    # The parts of a run count their steps from the start each, which is not what this tracker calls a step.
    run.define_metric("*", step_metric="step")
    return lambda numbers, step: run.log({**numbers, "step": step})


def _mlflow(folder: Path, identity: str, end: ExitStack) -> Log:
    import mlflow

    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    earlier = mlflow.search_runs(filter_string=f"tags.tuneshift = '{identity}'", output_format="list")
    run_id = earlier[0].info.run_id if earlier else None
    mlflow.start_run(run_id=run_id, run_name=_shown_name(folder, identity), tags={"tuneshift": identity})
    end.callback(mlflow.end_run)
    return lambda numbers, step: mlflow.log_metrics(dict(numbers), step=step)


def _trackio(folder: Path, identity: str, end: ExitStack) -> Log:
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)

    def finish() -> None:
        with redirect_stdout(sys.stderr):  # which it prints to, and stdout is for results
            trackio.finish()

    name = _shown_name(folder, identity)  # it has no other identifier
    with redirect_stdout(sys.stderr):
        trackio.init(project=project, name=name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    end.callback(finish)
    return lambda numbers, step: trackio.log(dict(numbers), step=step)


TRACKERS: dict[str, Callable[[Path, str, ExitStack], Log]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
