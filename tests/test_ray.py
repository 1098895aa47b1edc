"""Workers give what one process gives, whatever happens to them; what they disagree on is refused, and nothing stays.

One engine is held open for the whole module, so that all tests with its layout share its two workers.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from conftest import CORPUS, Tiny, make_adapter, write_project
from test_transfer import run_cli

from tuneshift.config import load_config
from tuneshift.encoding import encode_prompt
from tuneshift.engines.base import Decoding, Engine, ScoreRequest, Weights
from tuneshift.engines.canary import Canary
from tuneshift.engines.opening import open_engine, open_in_worker, open_proved
from tuneshift.engines.options import EngineOptions
from tuneshift.engines.ray import RayEngine
from tuneshift.engines.workers import ATTEMPTS, Layout, placement
from tuneshift.errors import ConfigError, ModelError
from tuneshift.models import LoadOptions
from tuneshift.run.ledger import Ledger
from tuneshift.run.records import Candidate
from tuneshift.wiring import idle_workers

ONE = EngineOptions(load=LoadOptions("cpu", "float32"), batch_size=4, threads=1)
TWO = replace(ONE, workers=2)
IN_ONE, IN_TWO = (["--set", "engine.threads=1", "--set", "engine.batch_size=4"] for _ in range(2))
IN_TWO += ["--set", "engine.workers=2", "--set", "run.device=cpu"]
DECODING = Decoding(temperature=1, max_new_tokens=16, stop=("n",))
CANARIES = CORPUS[:3]
KILLS = 5
ENDED_SECONDS = 20
AGENTS = {
    "ray::DashboardAgent",
    "ray::RuntimeEnvAgent",
}  # Ray's own; after a SIGKILL they try to report it for a minute
NOTHING = "changes nothing"
DISAGREE = "disagree on the seed prompts"


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tiny: Tiny) -> Weights:
    return Weights("tiny-llama", str(tiny.llama), adapter=str(tiny.adapter))


@pytest.fixture(scope="module")
def alone(weights: Weights) -> Engine:
    return open_proved(weights, ONE, CANARIES)[0]


@pytest.fixture(scope="module")
def workers(weights: Weights) -> Iterator[RayEngine]:
    engine, _ = open_proved(weights, TWO, CANARIES)
    assert isinstance(engine, RayEngine)
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the openers of this file
    yield engine
    engine.close()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def prompts_of(engine: Engine) -> list[list[int]]:
    """Return prompts of many lengths, some of them equal, in no order."""
    texts = [text[: 5 + 3 * n] for n in range(9) for text in CORPUS[:3]]
    return [encode_prompt(engine.tokenizer, text) for text in random.Random(0).sample(texts, len(texts))]


def generated(engine: Engine, *, fine_tuned: bool = True) -> list[Any]:
    prompts, told = prompts_of(engine), [0]
    options = {"decoding": DECODING, "fine_tuned": fine_tuned, "told": told.append}
    written = engine.generate(prompts, seeds=range(len(prompts)), **options)  # type: ignore[arg-type]
    assert told == sorted(told)
    assert told[-1] == len(prompts)
    return written


def actors(engine: RayEngine) -> list[Any]:
    return engine._pool._workers


def pid_of(worker: Any) -> int:
    """Ask an actor for its process; it answers once it has done its batch."""
    place: str = worker.place.remote().future().result(60)
    return int(place.rpartition(" ")[2].rstrip(")"))


# The same results


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_workers_write_and_score_exactly_what_one_process_does(
    workers: RayEngine, alone: Engine, fine_tuned: bool
) -> None:
    written = generated(workers, fine_tuned=fine_tuned)
    assert written == generated(alone, fine_tuned=fine_tuned)
    assert len({completion.text for completion in written}) > 5
    pairs = zip(prompts_of(workers), written, strict=True)
    requests = [ScoreRequest(tuple(prompt), c.token_ids) for prompt, c in pairs if c.token_ids]
    assert len(requests) > 3 * ONE.batch_size
    assert workers.score(requests, fine_tuned=fine_tuned) == alone.score(requests, fine_tuned=fine_tuned)


def test_workers_compare_both_sides_exactly_as_one_process_does(workers: RayEngine, alone: Engine) -> None:
    pairs = zip(prompts_of(workers), generated(workers), strict=True)
    requests = [ScoreRequest(tuple(prompt), c.token_ids) for prompt, c in pairs if c.token_ids]
    compared = workers.compare(requests)
    assert compared == alone.compare(requests)
    assert len(set(compared)) > 5


def test_no_requests_give_no_results(workers: RayEngine) -> None:
    assert workers.generate([], seeds=[], decoding=DECODING, fine_tuned=True) == []
    assert workers.score([], fine_tuned=True) == []
    assert workers.compare([]) == []


def test_workers_read_and_describe_as_one_process_does(workers: RayEngine, alone: Engine) -> None:
    assert workers.describe() == {**alone.describe(), "workers": 2, "threads": 1}
    assert workers.reader.vocabulary_size == alone.reader.vocabulary_size
    assert workers.reader.context_length == alone.reader.context_length
    assert workers.tokenizer.name_or_path == alone.tokenizer.name_or_path


def test_two_engines_of_equal_weights_are_two(workers: RayEngine, tiny: Tiny) -> None:
    plain = Weights("tiny-llama", str(tiny.llama))
    first, second = (open_engine(plain, TWO) for _ in range(2))
    wanted = generated(first, fine_tuned=False)
    first.close()
    assert generated(second, fine_tuned=False) == wanted
    second.close()


@pytest.fixture(scope="module")
def project(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"), tiny)


@pytest.fixture(scope="module")
def reference(project: Path) -> Path:
    """A whole transfer in one process with one thread."""
    run = project.parent / "reference"
    assert run_cli("transfer", str(project), "--run-dir", str(run), *IN_ONE) == 3
    return run


def outcome(run: Path) -> tuple[bytes, list[Candidate]]:
    with Ledger(run / "ledger.sqlite") as ledger:
        return (run / "dataset/kept.jsonl").read_bytes(), ledger.candidates()


def test_a_transfer_on_two_workers_makes_the_same_files(
    workers: RayEngine, project: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = project.parent / "two"
    assert run_cli("transfer", str(project), "--run-dir", str(run), *IN_TWO, "--json") == 3
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert outcome(run) == outcome(reference)
    for arm in ("before", "after", "source"):
        assert (run / f"evaluation/{arm}.jsonl").read_bytes() == (reference / f"evaluation/{arm}.jsonl").read_bytes()
    engines = json.loads((run / "manifest.json").read_text())["engines"]
    assert engines["fine_tuned_and_base"]["workers"] == 2


# Lost workers


def test_killed_workers_cost_nothing_but_time(
    workers: RayEngine, project: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []

    def kill() -> None:
        chance = random.Random(1)
        for number in range(KILLS):
            pid = pid_of(actors(workers)[number % 2])  # it has just begun its next batch, or opens a model
            time.sleep(chance.uniform(0, 0.2))
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killer = threading.Thread(target=kill)
    run, synthesis = project.parent / "killed", project.parent / "synthesis.json"
    synthesis.write_text(json.dumps(json.loads(project.read_text()) | {"evaluation": None}))
    killer.start()
    assert run_cli("transfer", str(synthesis), "--run-dir", str(run), *IN_TWO, "--json") == 0
    assert len(killed) == len(set(killed)) == KILLS  # before the run's end
    killer.join()
    assert len(capsys.readouterr().out.splitlines()) == 1  # Ray tells of each on stdout, unless it is kept from it
    dataset, candidates = outcome(run)
    assert len({candidate.id for candidate in candidates}) == len(candidates)
    assert (dataset, candidates) == outcome(reference)


def open_and_die(
    weights: Weights, options: EngineOptions, prompts: Sequence[str] | None
) -> tuple[Engine, Canary | None]:
    """Open an engine whose process ends when it is asked to write: the kernel's killer, made certain."""
    engine = open_engine(weights, options)
    engine.generate = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
    return engine, None


def test_a_batch_that_ends_its_worker_each_time_is_given_up(workers: RayEngine, tiny: Tiny) -> None:
    engine = RayEngine(Weights("deadly", str(tiny.gemma)), TWO, open_and_die)
    with pytest.raises(ModelError, match=rf"ended its worker {ATTEMPTS} times.*engine.batch_size, now 4"):
        engine.generate([[3, 4]], seeds=[0], decoding=DECODING, fine_tuned=False)
    engine.close()


# What workers disagree on


def open_one_otherwise(
    weights: Weights, options: EngineOptions, prompts: Sequence[str] | None
) -> tuple[Engine, Canary | None]:
    """Open another adapter in the worker that comes second: a node whose files differ."""
    assert weights.adapter is not None
    folder = Path(weights.adapter)
    try:
        (folder.parent / "first").touch(exist_ok=False)
    except FileExistsError:
        weights = replace(weights, adapter=str(folder.parent / "other"))
    return open_in_worker(weights, options, prompts)


@pytest.mark.parametrize(("scale", "refusal"), [(0, NOTHING), (0.5, DISAGREE)])
def test_a_worker_with_another_adapter_is_refused(
    workers: RayEngine, weights: Weights, tiny: Tiny, tmp_path: Path, scale: float, refusal: str
) -> None:
    shutil.copytree(tiny.adapter, tmp_path / "adapter")
    make_adapter(tiny.llama, tmp_path / "other", scale=scale, seed=2)
    planted = replace(weights, adapter=str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match=refusal):
        RayEngine(planted, TWO, open_one_otherwise, CANARIES)


def test_a_worker_that_starts_anew_proves_itself_anew(
    workers: RayEngine, weights: Weights, tiny: Tiny, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(tiny.adapter, tmp_path / "adapter"))
    engine, canary = open_proved(replace(weights, adapter=str(adapter)), TWO, CANARIES)
    assert isinstance(engine, RayEngine)
    assert canary.base_drift == 0
    other = make_adapter(tiny.llama, tmp_path / "other", scale=0.5, seed=2)
    shutil.copy(other / "adapter_model.safetensors", adapter)
    generated(engine)  # what is open stays as it was
    os.kill(pid_of(actors(engine)[0]), signal.SIGKILL)
    with pytest.raises(ModelError, match=rf"{adapter}: the workers on .* and .* {DISAGREE}"):
        soon(lambda: not generated(engine), 60)  # the other worker does it all, until the new one is there
    engine.close()


# Errors


def test_an_error_of_a_worker_comes_through_as_itself(workers: RayEngine, alone: Engine) -> None:
    asked: dict[str, Any] = {"seeds": [0, 1], "decoding": DECODING, "fine_tuned": True}
    with pytest.raises(ModelError) as expected:
        alone.generate([[3, 4], [99_999]], **asked)
    with pytest.raises(ModelError) as found:
        workers.generate([[3, 4], [99_999]], **asked)
    assert type(found.value) is ModelError
    assert str(found.value) == str(expected.value)
    assert generated(workers) == generated(alone)


def test_a_model_that_is_not_there_is_the_user_s_error(workers: RayEngine, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_engine(Weights("none", str(tmp_path / "none")), TWO)


def test_more_workers_than_there_is_room_for_are_refused_at_once(workers: RayEngine, weights: Weights) -> None:
    with pytest.raises(ConfigError, match=r"engine.workers = 4096: each takes 1 CPUs and 0 GPUs .* there is room for"):
        open_engine(weights, replace(TWO, workers=4096))


def test_without_ray_the_message_says_what_to_install(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'tuneshift\[ray\]'"):
        open_engine(weights, replace(TWO, workers=3))


def layout(workers: int, *, threads: int | None = None, device: str = "auto", gpus: int = 1) -> Layout:
    return Layout(workers, None, threads, device, gpus)


@pytest.mark.parametrize(
    ("asked", "nodes", "needs"),
    [
        (layout(2), [{"CPU": 8}], {"CPU": 4, "GPU": 0}),
        (layout(3), [{"CPU": 8}], {"CPU": 2, "GPU": 0}),
        (layout(2, threads=3), [{"CPU": 8}], {"CPU": 3, "GPU": 0}),
        (layout(3), [{"CPU": 8}, {"CPU": 8}], {"CPU": 4, "GPU": 0}),  # 16 / 3 = 5 would leave the third without a node
        (layout(2), [{"CPU": 8, "GPU": 2}], {"CPU": 4, "GPU": 1}),
        (layout(2), [{"CPU": 64}, {"CPU": 8, "GPU": 2}], {"CPU": 4, "GPU": 1}),  # the head has no GPU
        (layout(2, device="cpu"), [{"CPU": 8, "GPU": 1}], {"CPU": 4, "GPU": 0}),
        (layout(2, gpus=4), [{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 4}], {"CPU": 8, "GPU": 4}),
    ],
)
def test_a_worker_takes_its_share_of_the_machines(
    asked: Layout, nodes: list[dict[str, float]], needs: dict[str, int]
) -> None:
    assert placement(asked, nodes) == needs


@pytest.mark.parametrize(
    ("asked", "nodes", "room"),
    [
        (layout(3), [{"CPU": 2}], 2),
        (layout(2, threads=2), [{"CPU": 3}], 1),
        (layout(3), [{"CPU": 64, "GPU": 2}], 2),
        (layout(1, device="cuda"), [{"CPU": 64}], 0),
        (layout(2, gpus=2), [{"CPU": 64, "GPU": 3}, {"CPU": 64, "GPU": 1}], 1),  # GPUs of two machines are no pair
        (layout(1), [], 0),
    ],
)
def test_workers_without_room_are_refused(asked: Layout, nodes: list[dict[str, float]], room: int) -> None:
    with pytest.raises(ConfigError, match=rf"engine.workers = {asked.workers}: .* there is room for {room} of them"):
        placement(asked, nodes)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"synthesis": {"calls_per_round": 4, "per_call": 20}, "engine": {"workers": 2}},
            "set engine.batch_size to 40",
        ),
        ({"synthesis": {"calls_per_round": 4, "per_call": 20}, "engine": {"workers": 2, "batch_size": 40}}, None),
        (
            {"synthesis": {"calls_per_round": 4, "per_call": 20}, "engine": {"workers": 3, "batch_size": 40}},
            "2 batches",
        ),
        ({"synthesis": {"calls_per_round": 1, "per_call": 1}}, None),
    ],
)
def test_a_round_with_too_few_batches_is_told(tiny: Tiny, tmp_path: Path, sections: Any, said: str | None) -> None:
    warning = idle_workers(load_config(write_project(tmp_path, tiny, **sections)).config)
    assert warning is None if said is None else said in (warning or "")


def test_the_others_do_the_work_of_a_worker_that_does_not_come_back(workers: RayEngine, alone: Engine) -> None:
    import ray

    ray.kill(actors(workers)[0])  # as with a node that is gone: it is not started anew; the last test of these workers
    assert generated(workers) == generated(alone)


# What stays


def started(project: Path, run: Path, mark: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a transfer on two workers; all its processes carry `mark` in their environment."""
    command = [sys.executable, "-m", "tuneshift", "transfer", str(project), "--run-dir", str(run), *IN_TWO, *arguments]
    environment = os.environ | {"TUNESHIFT_TEST_MARK": mark}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def marked(mark: str) -> dict[int, str]:
    """Return the processes that carry `mark`, by what they call themselves."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"TUNESHIFT_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue
    return {pid: name for pid, name in found.items() if name}  # a zombie has no command line


def soon(reached: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not reached() and time.monotonic() < end:
        time.sleep(0.1)
    return reached()


def rounds(run: Path) -> int:
    if not (run / "ledger.sqlite").exists():
        return 0
    with Ledger(run / "ledger.sqlite") as ledger:
        return len(ledger.rounds())


@pytest.mark.parametrize("ending", ["done", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_of_ray_outlives_the_run(tiny: Tiny, tmp_path: Path, ending: str | signal.Signals) -> None:
    synthesis = {"target_size": 4} if ending == "done" else {"target_size": 10_000, "max_candidates": 100_000}
    project = write_project(tmp_path, tiny, synthesis=synthesis, evaluation=None)
    run, mark = tmp_path / "run", uuid4().hex
    with started(project, run, mark) as process:
        if isinstance(ending, signal.Signals):
            assert soon(lambda: rounds(run) > 1 or process.poll() is not None, 120)
            seen = marked(mark)
            process.send_signal(ending)
            assert any("ray::" in name for name in seen.values())
        printed, told = process.communicate(timeout=120)
    expected = {"done": 0, signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    assert process.returncode == expected[ending], told
    tolerated = AGENTS if ending == signal.SIGKILL else set()
    assert soon(lambda: set(marked(mark).values()) <= tolerated, ENDED_SECONDS), marked(mark)
    assert "Traceback" not in told
    if ending != "done":
        assert printed == ""


def test_a_cluster_that_is_not_there_is_the_user_s_error(tiny: Tiny, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    address = f"127.0.0.1:{free}"
    process = started(write_project(tmp_path, tiny), tmp_path / "run", "none", "--set", f"engine.ray_address={address}")
    printed, told = process.communicate(timeout=120)
    assert process.returncode == 2, told
    assert f"engine.ray_address: {address} cannot be joined ([Errno 111] Connection refused)" in told
    assert printed == ""
