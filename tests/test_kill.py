"""A run that is killed at any instant ends, when it is started again, exactly as one that was never stopped.

Each start is a child of a fork server that has the heavy libraries loaded, so it costs a fraction of a second.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Tiny, write_jsonl, write_project
from safetensors.torch import load_file

from tuneshift.errors import RunDirectoryError
from tuneshift.models import file_sha256
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate

PRELOADED = [
    "torch", "torch._dynamo", "transformers", "transformers.trainer", "transformers.models.llama.modeling_llama",
    "transformers.models.gemma3.modeling_gemma3", "peft", "trl", "trl.trainer.sft_trainer", "datasets", "scipy.stats",
    "tuneshift.cli", "tuneshift.console", "tuneshift.pipeline",
]  # fmt: skip
NO_IMPROVEMENT = 3  # random models do not improve
KILLED = -signal.SIGKILL
KILLED_RUNS = 20
SERVER = multiprocessing.get_context("forkserver")


# --- what runs in a child ---


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def before_round_is_committed(act: Callable[[], None], number: int) -> None:
    """Act when generator calls are recorded and answered, but their round is not."""
    original = Ledger.record_round

    def record_round(self: Ledger, summary: Any, candidates: Any) -> None:
        if summary.round == number:
            act()
        original(self, summary, candidates)

    Ledger.record_round = record_round  # type: ignore[method-assign]


def inside_the_commit_of_a_round(act: Callable[[], None], number: int) -> None:
    """Act when the round's own row is written and its candidates are not."""
    original = Ledger.record_round

    class Acting(list[Any]):
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            if self.passes == 2:
                act()
            return super().__iter__()

    def record_round(self: Ledger, summary: Any, candidates: Any) -> None:
        original(self, summary, Acting(candidates) if summary.round == number else candidates)

    Ledger.record_round = record_round  # type: ignore[method-assign]


def after_calls_are_recorded(act: Callable[[], None], number: int) -> None:
    """Act right after the generator's raw text is stored."""
    original = Ledger.record_calls

    def record_calls(self: Ledger, calls: Any) -> None:
        original(self, calls)
        if calls[0].round == number:
            act()

    Ledger.record_calls = record_calls  # type: ignore[method-assign]


def before_a_checkpoint_is_sealed(act: Callable[[], None], number: int) -> None:
    """Act when the checkpoint of epoch `number` is written but not sealed."""
    _around_a_seal(number, before=act)


def after_a_checkpoint_is_sealed(act: Callable[[], None], number: int) -> None:
    """Act when the checkpoint of epoch `number` is written and sealed."""
    _around_a_seal(number, after=act)


def _around_a_seal(
    number: int, *, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
) -> None:
    import tuneshift.distill as module

    original, seen = module._seal, []

    def seal(checkpoint: Path) -> None:
        seen.append(checkpoint)
        if len(seen) == number:
            before()
        original(checkpoint)
        if len(seen) == number:
            after()

    module._seal = seal


def after_a_training_step(act: Callable[[], None], number: int) -> None:
    """Act in the middle of an epoch."""
    import tuneshift.distill as module

    original = module._epoch_callback

    def epoch_callback(on_step: Callable[..., None]) -> Any:
        def acting(done: int, total: int, numbers: Mapping[str, float]) -> None:
            on_step(done, total, numbers)
            if done == number:
                act()

        return original(acting)

    module._epoch_callback = epoch_callback


def while_a_file_is_written(act: Callable[[], None], name: str) -> None:
    """Act when a file's new content is written beside it and not yet in its place."""
    original = Path.replace

    def replace(self: Path, target: Any) -> Path:
        if Path(target).name == name:
            act()
        return original(self, target)

    Path.replace = replace  # type: ignore[method-assign]


def after_a_file_is_written(act: Callable[[], None], name: str) -> None:
    """Act right after a file has got its new content."""
    original = Path.replace

    def replace(self: Path, target: Any) -> Path:
        moved = original(self, target)
        if Path(target).name == name:
            act()
        return moved

    Path.replace = replace  # type: ignore[method-assign]


def while_the_ledger_is_made(act: Callable[[], None], after: bool) -> None:
    """Act when the run is described but its ledger does not exist yet, or is new and empty."""
    import tuneshift.run.resume as module

    original = Ledger.__init__

    def init(self: Ledger, path: Path) -> None:
        if after:
            original(self, path)
        act()
        original(self, path)

    module.Ledger.__init__ = init  # type: ignore[method-assign]


def child(arguments: list[str], log: str, failpoint: tuple[Any, ...] | None) -> None:
    """Run the command line with its output in a file; `failpoint` is a function above with its arguments."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    gc.freeze()  # a third of a run's time were collections that walk the preloaded libraries
    if failpoint:
        place, *rest = failpoint
        place(*rest)
    from tuneshift import cli

    sys.argv = ["tuneshift", *arguments]
    cli.main()


# --- what starts and judges them ---


@dataclass(frozen=True)
class Starter:
    """Starts the same transfer in one run directory after another."""

    config: Path

    def start(self, run: Path, *arguments: str, failpoint: tuple[Any, ...] | None = None) -> BaseProcess:
        command = ["transfer", str(self.config), "--run-dir", str(run), *arguments]
        process = SERVER.Process(target=child, args=(command, str(self.log(run)), failpoint))
        process.start()
        return process

    def finish(self, run: Path, *arguments: str, failpoint: tuple[Any, ...] | None = None) -> int:
        """Start, wait and return the exit code; negative is the signal that ended it."""
        process = self.start(run, *arguments, failpoint=failpoint)
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"did not end within two minutes: {self.printed(run)}")
        code = process.exitcode
        process.close()
        assert code is not None
        return code

    def log(self, run: Path) -> Path:
        return run.with_name(f"{run.name}.log")

    def printed(self, run: Path) -> str:
        return self.log(run).read_text() if self.log(run).exists() else ""


@dataclass(frozen=True)
class Outcome:
    """What a finished run must have in common with every other of the same configuration."""

    dataset: str
    adapter: dict[str, torch.Tensor]
    evaluation: dict[str, bytes]
    candidates: list[Candidate]
    files: frozenset[str]

    @classmethod
    def of(cls, run: Path) -> Outcome:
        with Ledger(run / "ledger.sqlite") as ledger:
            candidates = ledger.candidates()
        return cls(
            dataset=hashlib.sha256((run / "dataset/kept.jsonl").read_bytes()).hexdigest(),
            adapter=load_file(run / "adapter/adapter_model.safetensors"),
            evaluation={path.name: path.read_bytes() for path in (run / "evaluation").glob("*.jsonl")},
            candidates=candidates,
            files=frozenset(str(path.relative_to(run)) for path in run.rglob("*")),
        )


@dataclass(frozen=True)
class Reference:
    """A run that nothing stopped, and how long it took in seconds from its start to its end."""

    outcome: Outcome
    seconds: float


@pytest.fixture(scope="module")
def starter(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Starter:
    SERVER.set_forkserver_preload(PRELOADED)
    folder = tmp_path_factory.mktemp("kill")
    config = write_project(
        folder,
        tiny,
        generator={"max_new_tokens": 24},
        synthesis={"target_size": 10, "per_call": 3, "calls_per_round": 1, "max_new_tokens": 16},
        criterion={"keep_rate": 0.9},
        distill={"num_train_epochs": 3, "learning_rate": 0.01},
    )
    return Starter(config)


@pytest.fixture(scope="module")
def reference(starter: Starter) -> Reference:
    warm = starter.config.parent / "warm"  # the server itself starts here
    assert starter.finish(warm) == NO_IMPROVEMENT, starter.printed(warm)
    run = starter.config.parent / "reference"
    started = time.monotonic()
    assert starter.finish(run) == NO_IMPROVEMENT, starter.printed(run)
    seconds = time.monotonic() - started
    return Reference(Outcome.of(run), seconds)


@pytest.fixture
def run(starter: Starter, request: pytest.FixtureRequest) -> Path:
    """Return the place of a new run directory beside the configuration."""
    return starter.config.parent / request.node.name.translate(str.maketrans("[]/ ", "____"))


def differences(run: Path, reference: Reference) -> list[str]:
    """Return in what a finished run differs from one that nothing stopped."""
    found, expected = Outcome.of(run), reference.outcome
    different = []
    if found.candidates != expected.candidates:
        different.append("the ledger's candidates")
    if found.dataset != expected.dataset:
        different.append("sha256 of dataset/kept.jsonl")
    if found.adapter.keys() != expected.adapter.keys() or not all(
        torch.equal(found.adapter[name], expected.adapter[name]) for name in expected.adapter
    ):
        different.append("the adapter's weights")
    if found.evaluation != expected.evaluation:
        different.append("evaluation/*.jsonl")
    different += [f"{name} is left behind" for name in sorted(found.files - expected.files)]
    different += [f"{name} is missing" for name in sorted(expected.files - found.files)]
    return different


# --- the reference ---


def test_the_reference_is_large_enough_to_be_stopped_in_every_stage(starter: Starter, reference: Reference) -> None:
    run = starter.config.parent / "reference"
    with Ledger(run / "ledger.sqlite") as ledger:
        assert 6 <= len(ledger.rounds()) <= 9
    training = json.loads((run / "training.json").read_text())
    assert (training["steps"], len(training["losses"])) == (9, 3)  # three steps an epoch
    assert {"verdict.json", "manifest.json", "evaluation/source.jsonl"} <= reference.outcome.files
    assert not [name for name in reference.outcome.files if name.startswith("checkpoints")]
    assert any(value.abs().max() > 0 for name, value in reference.outcome.adapter.items() if "lora_B" in name)


def test_two_runs_that_nothing_stopped_are_equal(starter: Starter, reference: Reference) -> None:
    assert differences(starter.config.parent / "warm", reference) == []


# --- SIGKILL at random instants ---


def kill_at_random(starter: Starter, run: Path, rng: random.Random, *, times: int, within: float) -> None:
    """Start a run and kill it, up to `times` times, at instants of its first `within` seconds; once at least."""
    landed = 0
    while landed < times:
        process = starter.start(run)
        process.join(rng.uniform(0, within))
        process.kill()
        process.join()
        if process.exitcode == KILLED:
            landed += 1
        elif landed:
            return  # what the kills before had left to do was done sooner
        else:
            shutil.rmtree(run)
            within *= 0.8  # the machine is quicker now than it was for the reference
        process.close()


def test_twenty_runs_killed_at_random_instants_end_as_one_that_nothing_stopped(
    starter: Starter, reference: Reference
) -> None:
    rng, wrong = random.Random(20), {}
    for number in range(KILLED_RUNS):
        run = starter.config.parent / f"random-{number}"
        kill_at_random(starter, run, rng, times=rng.randint(1, 3), within=reference.seconds)
        code = starter.finish(run)
        different = differences(run, reference) if code == NO_IMPROVEMENT else [f"exit code {code}"]
        if different:
            wrong[run.name] = (different, starter.printed(run))
    assert wrong == {}


# --- SIGKILL at named instants ---

INSTANTS: dict[str, tuple[Any, ...]] = {
    "before the ledger exists": (while_the_ledger_is_made, die, False),
    "when the ledger is empty": (while_the_ledger_is_made, die, True),
    "after a round's calls are recorded": (after_calls_are_recorded, die, 3),
    "after calls are answered and before their round is committed": (before_round_is_committed, die, 4),
    "inside the commit of a round": (inside_the_commit_of_a_round, die, 2),
    "in the first epoch": (after_a_training_step, die, 2),
    "before an epoch's checkpoint is sealed": (before_a_checkpoint_is_sealed, die, 2),
    "after an epoch's checkpoint is sealed": (after_a_checkpoint_is_sealed, die, 1),
    "in the middle of an epoch after a checkpoint": (after_a_training_step, die, 5),
    "between the training's record and the evaluation": (after_a_file_is_written, die, "training.json"),
    "between two arms of the evaluation": (after_a_file_is_written, die, "before.jsonl"),
    "between the verdict and the report": (after_a_file_is_written, die, "verdict.json"),
    "between the report and the manifest": (after_a_file_is_written, die, "report.md"),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_run_killed_at_a_named_instant_ends_as_one_that_nothing_stopped(
    starter: Starter, reference: Reference, run: Path, instant: str
) -> None:
    assert starter.finish(run, failpoint=INSTANTS[instant]) == KILLED, starter.printed(run)
    assert starter.finish(run) == NO_IMPROVEMENT, starter.printed(run)
    assert differences(run, reference) == []


WRITTEN = [
    "config.yaml", "kept.jsonl", "training.json", "before.jsonl", "after.jsonl", "source.jsonl", "base.jsonl",
    "verdict.json", "report.md", "report.html", "manifest.json",
]  # fmt: skip


def test_a_run_killed_while_each_of_its_files_is_written_leaves_no_half_of_one(
    starter: Starter, reference: Reference, run: Path
) -> None:
    for name in WRITTEN:
        code = starter.finish(run, failpoint=(while_a_file_is_written, die, name))
        assert (name, code) == (name, KILLED), starter.printed(run)
        assert not list(run.rglob(name))
    assert starter.finish(run) == NO_IMPROVEMENT, starter.printed(run)
    assert differences(run, reference) == []


def test_generator_calls_that_were_recorded_are_not_made_again(
    starter: Starter, reference: Reference, run: Path
) -> None:
    assert starter.finish(run, failpoint=(before_round_is_committed, die, 2)) == KILLED
    with Ledger(run / "ledger.sqlite") as ledger:
        recorded = ledger.calls()
        assert [summary.round for summary in ledger.rounds()] == [0, 1]
    assert recorded[-1].round == 2
    assert starter.finish(run) == NO_IMPROVEMENT, starter.printed(run)
    with Ledger(run / "ledger.sqlite") as ledger:
        assert ledger.calls()[: len(recorded)] == recorded  # their seconds too, which never repeat


def test_a_killed_run_can_be_shown(starter: Starter, run: Path) -> None:
    from tuneshift.report.status import run_status

    assert starter.finish(run, failpoint=(before_round_is_committed, die, 2)) == KILLED
    status = run_status(run, examples=1)
    assert (status["phase"], status["rounds"]) == ("synthesis", 2)


def test_a_stopped_training_goes_on_at_its_newest_checkpoint(starter: Starter, reference: Reference, run: Path) -> None:
    assert starter.finish(run, failpoint=(after_a_checkpoint_is_sealed, die, 2)) == KILLED
    # Had it begun anew, this start would die in the first epoch.
    code = starter.finish(run, failpoint=(after_a_training_step, die, 1))
    assert code == NO_IMPROVEMENT, starter.printed(run)
    assert differences(run, reference) == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "sealed.json"])
def test_a_torn_checkpoint_is_never_continued(starter: Starter, reference: Reference, run: Path, name: str) -> None:
    assert starter.finish(run, failpoint=(after_a_checkpoint_is_sealed, die, 2)) == KILLED
    newest = max(run.glob("checkpoints/checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: len(content) // 2])
    assert starter.finish(run) == NO_IMPROVEMENT, starter.printed(run)
    assert differences(run, reference) == []


def test_a_run_that_starts_anew_under_another_configuration_is_described_by_that_one(
    starter: Starter, run: Path
) -> None:
    assert starter.finish(run, failpoint=(while_the_ledger_is_made, die, False)) == KILLED
    assert starter.finish(run, "--set", "synthesis.target_size=3") == NO_IMPROVEMENT, starter.printed(run)
    assert len((run / "dataset/kept.jsonl").read_text().splitlines()) == 3
    assert yaml.safe_load((run / "config.yaml").read_text())["synthesis"]["target_size"] == 3


def test_a_killed_evaluation_of_other_questions_leaves_the_runs_own_evidence(
    starter: Starter, reference: Reference, run: Path
) -> None:
    shutil.copytree(starter.config.parent / "reference", run)
    items = write_jsonl(starter.config.parent / "one.jsonl", [{"prompt": "a b", "reference": "c"}])
    arguments = ["evaluate", str(run), "--set", f"evaluation.data={items}"]
    for failpoint, code in (((after_a_file_is_written, die, "after.jsonl"), KILLED), (None, NO_IMPROVEMENT)):
        process = SERVER.Process(target=child, args=(arguments, str(starter.log(run)), failpoint))
        process.start()
        process.join(120)
        assert process.exitcode == code, starter.printed(run)
        vouched = json.loads((run / "manifest.json").read_text())["files"]
        assert vouched == {name: file_sha256(run / name) for name in vouched}
    assert len(list(run.glob("evaluations/*/*.jsonl"))) == 4


# --- two processes, one directory ---


def test_a_new_ledger_may_be_opened_by_several_at_once(tmp_path: Path) -> None:
    def opened(path: Path) -> str | None:
        with Ledger(path) as ledger:
            ledger.set_meta(name="new")
            return ledger.meta("name")

    for number in range(10):
        with ThreadPoolExecutor(8) as pool:  # `show` beside a run that has just begun
            assert set(pool.map(opened, [tmp_path / f"{number}.sqlite"] * 8)) == {"new"}


def test_a_second_process_is_refused_and_changes_nothing(starter: Starter, run: Path) -> None:
    with RunDirectory(run):
        before = {path: path.read_bytes() for path in run.rglob("*")}
        assert starter.finish(run) == 2
        assert {path: path.read_bytes() for path in run.rglob("*")} == before
    printed = starter.printed(run)
    assert f"{run}: in use by process {os.getpid()} on " in printed
    assert "give another --run-dir" in printed
    assert "Traceback" not in printed


def test_the_lock_of_a_killed_process_does_not_block(starter: Starter, run: Path) -> None:
    assert starter.finish(run, failpoint=(before_round_is_committed, die, 0)) == KILLED
    assert (run / ".lock").read_text().startswith("process ")
    with RunDirectory(run):
        assert (run / ".lock").read_text().startswith(f"process {os.getpid()} ")


def test_a_process_that_waits_with_the_lock_names_itself_to_the_next(starter: Starter, run: Path) -> None:
    first = starter.start(run, failpoint=(before_round_is_committed, wait, 0))
    try:
        until(lambda: (run / ".lock").is_file() and "process" in (run / ".lock").read_text(), first)
        with pytest.raises(RunDirectoryError, match=f"in use by process {first.pid} on "), RunDirectory(run):
            pass
    finally:
        first.kill()
        first.join()


def wait() -> None:
    time.sleep(120)


def until(condition: Callable[[], bool], process: BaseProcess) -> None:
    while not condition():
        assert process.is_alive()
        time.sleep(0.01)


# --- SIGINT ---

INTERRUPTED: dict[str, tuple[Any, ...]] = {
    "in a round": (before_round_is_committed, interrupt, 3),
    "inside the commit of a round": (inside_the_commit_of_a_round, interrupt, 3),
    "in an epoch": (after_a_training_step, interrupt, 5),
    "in the evaluation": (after_a_file_is_written, interrupt, "before.jsonl"),
    "in a round, by a batch system": (before_round_is_committed, terminate, 3),
    "in an epoch, by a batch system": (after_a_training_step, terminate, 5),
}


@pytest.mark.parametrize("instant", INTERRUPTED)
def test_an_interrupted_run_says_that_its_state_is_saved_and_goes_on(
    starter: Starter, reference: Reference, run: Path, instant: str
) -> None:
    code = 143 if INTERRUPTED[instant][1] is terminate else 130  # as shells tell a signal
    assert starter.finish(run, failpoint=INTERRUPTED[instant]) == code, starter.printed(run)
    printed = starter.printed(run)
    assert starter.finish(run) == NO_IMPROVEMENT, starter.printed(run)
    assert differences(run, reference) == []
    assert "tuneshift: interrupted; the state is saved" in printed
    assert "Traceback" not in printed


def test_a_run_interrupted_before_anything_was_made_leaves_nothing(starter: Starter, run: Path) -> None:
    assert starter.finish(run, failpoint=(while_a_file_is_written, interrupt, "config.yaml")) == 130
    assert starter.finish(run, "--set", "synthesis.target_size=3") == NO_IMPROVEMENT, starter.printed(run)
