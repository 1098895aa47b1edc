"""Workers: processes that hold copies of the models, as Ray actors on this machine or on a cluster.

A pool starts them, hands each call to a free one, and ends them with the last engine. What a lost worker had goes to
the next free one; it starts anew, where there is room for it, and opens what the next call names.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tuneshift.encoding import Reader
from tuneshift.engines.base import Engine, Weights
from tuneshift.engines.canary import Canary, Readings, read
from tuneshift.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from tuneshift.engines.options import EngineOptions

logger = logging.getLogger(__name__)

ATTEMPTS = 4  # at a call whose worker ended; a guess: what ended four workers will end the fifth
START_SECONDS = 300  # for the workers' processes, without their models; a guess, about 10 on two cores
CONNECT_SECONDS = 10  # for a cluster's address to answer; a guess
CLOSE_SECONDS = 5  # for workers to free an engine before they are ended; a guess
OBJECT_STORE = 2**27  # bytes; requests and answers are kilobytes, and Ray would reserve a third of the memory
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}
OWN_ENVIRONMENT = {  # of a Ray that serves this run alone
    **ENVIRONMENT,
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for: listen on the loopback address only
    "RAY_AUTH_MODE": "token",
}

Opener = Callable[[Weights, "EngineOptions", Sequence[str] | None], tuple[Engine, Canary | None]]
Call = Callable[[Engine], list[Any]]


@dataclass(frozen=True)
class Layout:
    """How many workers there are, where, and what each takes.

    `address` is a Ray cluster's, `None` for this machine; `threads` are CPUs, `None` for an equal share; `gpus` counts
    where the models run on GPUs: `device` is cuda, or auto and there are any.
    """

    workers: int
    address: str | None
    threads: int | None
    device: str
    gpus: int


@dataclass(frozen=True)
class Wanted:
    """An engine that workers are to hold; with `prompts`, on which it proves itself in every worker.

    `open` is pickled by its name, so it stands at the top level of a module.
    `key` tells engines of equal weights apart.
    """

    weights: Weights
    options: EngineOptions
    prompts: tuple[str, ...] | None
    open: Opener
    key: str = field(default_factory=lambda: uuid4().hex)


@dataclass(frozen=True)
class Opened:
    """What a worker tells of an engine that it has opened; `canary` and `readings` where it proved itself."""

    place: str
    reader: Reader
    description: dict[str, Any]
    canary: Canary | None
    readings: Readings | None


@dataclass(frozen=True)
class Reply:
    """A call's results, and what the worker opened for it, if anything."""

    results: list[Any]
    opened: Opened | None


class Worker:
    """What runs in a worker's process."""

    def __init__(self) -> None:
        self._engines: dict[Wanted, Engine] = {}

    def place(self) -> str:
        """Return where this worker runs."""
        return f"{socket.gethostname()} (process {os.getpid()})"

    def run(self, wanted: Wanted, call: Call | None) -> Reply:
        """Make a call on an engine, opened first where this process does not have it; with `None` only open it."""
        opened = None if wanted in self._engines else self._open(wanted)
        return Reply(call(self._engines[wanted]) if call else [], opened)

    def close(self, wanted: Wanted) -> None:
        """Free an engine."""
        if wanted in self._engines:
            self._engines.pop(wanted).close()

    def _open(self, wanted: Wanted) -> Opened:
        engine, canary = wanted.open(wanted.weights, wanted.options, wanted.prompts)
        self._engines[wanted] = engine
        readings = None
        if wanted.prompts is not None:
            base, fine_tuned = (read(engine, wanted.prompts, fine_tuned=side) for side in (False, True))
            readings = Readings(base, fine_tuned)
        return Opened(self.place(), engine.reader, engine.describe(), canary, readings)


class Pool:
    """The workers of one layout, shared by the engines that are open; see `Pool.joined`."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._engines: list[Wanted] = []
        self._end = ExitStack()
        try:
            self._ray = _connect(layout.address, self._end)
            atexit.register(self._end_all)  # for a program that ends without closing its engines
            needs = placement(layout, [node["Resources"] for node in self._ray.nodes() if node["Alive"]])
            self.threads = needs["CPU"]
            actor = self._ray.remote(Worker).options(
                num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_restarts=-1, max_task_retries=-1
            )
            self._workers = [actor.remote() for _ in range(layout.workers)]
            self._end.callback(lambda: [self._ray.kill(worker) for worker in self._workers])
            self._free: deque[Any] = deque()
            self._starting = {worker.place.remote().future(): worker for worker in self._workers}
            waiting = wait(self._starting, START_SECONDS).not_done
            if waiting:
                raise ConfigError(
                    f"engine.workers = {layout.workers}: {len(waiting)} of them did not start within {START_SECONDS} "
                    "seconds. Other jobs may hold the cluster's CPUs or GPUs: wait for them, or lower engine.workers."
                )
        except BaseException:
            self._end_all()
            raise

    @classmethod
    def joined(cls, layout: Layout) -> Pool:
        """Return the pool of this layout that is running, or start it.

        Raises:
            ConfigError: Ray is not installed, or there is no room for the workers.
        """
        if layout not in _pools:
            _pools[layout] = cls(layout)
        return _pools[layout]

    def run(
        self, wanted: Wanted, calls: Sequence[Call | None], ended: Callable[[int], None] = lambda number: None
    ) -> list[Reply]:
        """Hand each call to a free worker, in order, and return the replies in the same order.

        `ended` is told the number of each call that has ended.

        With as many calls as workers, and none running, each worker gets one.

        Raises:
            ModelError: a call ended its worker again and again. What a call itself raises comes through as it is.
        """
        if wanted not in self._engines:
            self._engines.append(wanted)
        waiting = deque(range(len(calls)))
        running: dict[Future[Reply], tuple[int, Any]] = {}
        replies: dict[int, Reply] = {}
        lost: Counter[int] = Counter()
        try:
            while len(replies) < len(calls):
                while waiting and self._free:
                    number, worker = waiting.popleft(), self._free.popleft()
                    sent = worker.run.options(max_task_retries=0).remote(wanted, calls[number])
                    running[sent.future()] = (number, worker)
                for future in self._ended(running):
                    number, worker = running.pop(future)
                    error = future.exception()
                    if error is None or isinstance(error, self._ray.exceptions.RayTaskError):
                        self._free.append(worker)
                        if error is not None:
                            raise error.cause from error
                        replies[number] = future.result()
                        ended(number)
                        continue
                    self._starting[worker.place.remote().future()] = worker
                    waiting.appendleft(number)
                    lost[number] += 1
                    if lost[number] == ATTEMPTS:
                        raise _given_up(wanted, error) from error
        finally:
            self._free.extend(worker for _, worker in running.values())  # they finish what nobody waits for first
        return [replies[number] for number in range(len(calls))]

    def leave(self, wanted: Wanted) -> None:
        """Free an engine in every worker; the last engine ends the workers, and the Ray that was started for them."""
        if wanted in self._engines:
            self._engines.remove(wanted)
            wait([worker.close.remote(wanted).future() for worker in self._workers], CLOSE_SECONDS)
        if not self._engines:
            _pools.pop(self.layout, None)
            self._end_all()

    def _ended(self, running: Collection[Future[Reply]]) -> list[Future[Reply]]:
        """Return the calls that have ended, once any has or a worker has started; signals are heard, unlike in Ray."""
        limit = None if running else START_SECONDS
        done = wait([*running, *self._starting], limit, FIRST_COMPLETED).done
        if not done:
            raise ModelError(
                f"engine.workers: all of them are lost, and none could start anew within {START_SECONDS} seconds. "
                "Check that the nodes run (`ray status`); the same command continues the run."
            )
        for future in [future for future in self._starting if future.done()]:
            worker = self._starting.pop(future)
            if future.exception() is None:  # else it is gone for good
                self._free.append(worker)
        return [future for future in running if future in done]

    def _end_all(self) -> None:
        atexit.unregister(self._end_all)
        with _uninterrupted():
            self._end.close()


def _given_up(wanted: Wanted, error: BaseException) -> ModelError:
    said = str(error).strip().splitlines()[0]
    return ModelError(
        f"{wanted.weights.name}: a batch ended its worker {ATTEMPTS} times ({said}). Most often memory runs out: lower "
        f"engine.batch_size, now {wanted.options.batch_size}, or synthesis.max_new_tokens, or engine.workers, each of "
        "which holds a copy of the models."
    )


_pools: dict[Layout, Pool] = {}  # a process has one connection to Ray, whoever opens engines


def placement(layout: Layout, nodes: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """Return the CPUs and GPUs of one worker; `nodes` holds what each node has of both.

    By default a worker has as many CPUs as leave room for all of them, so it may use that many threads.

    Raises:
        ConfigError: the nodes have no room for so many workers, which would wait for ever.
    """
    cpus, gpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
    on_gpus = layout.device.startswith("cuda") or (layout.device == "auto" and any(gpus))
    taken = layout.gpus if on_gpus else 0

    def room(threads: int) -> int:
        fits = (min(c // threads, g // taken if taken else math.inf) for c, g in zip(cpus, gpus, strict=True))
        return int(sum(fits))

    tried = range(max(cpus, default=1), 0, -1) if layout.threads is None else [layout.threads]
    for threads in tried:
        if room(threads) >= layout.workers:
            return {"CPU": threads, "GPU": taken}
    least = tried[-1]
    raise ConfigError(
        f"engine.workers = {layout.workers}: each takes {least} CPUs and {taken} GPUs of one machine, and there is "
        f"room for {room(least)} of them: {layout.address or 'this machine'} has {sum(cpus)} CPUs and {sum(gpus)} "
        f"GPUs on {len(nodes)} nodes. Set engine.workers to at most {room(least)}"
        + (", or lower engine.threads." if least > 1 else ", or add nodes before the run starts.")
    )


def _connect(address: str | None, end: ExitStack) -> Any:
    """Return the `ray` module, connected; `end` undoes what was started for it.

    Raises:
        ConfigError: Ray is not installed, does not start, or the cluster cannot be joined.
    """
    for name, value in (OWN_ENVIRONMENT if address is None else ENVIRONMENT).items():
        os.environ.setdefault(name, value)  # before the import, which reads it
    try:
        import ray
        from ray._private import worker as driver
    except ImportError as error:
        raise ConfigError("engine.workers: Ray is not installed. Run: pip install 'tuneshift[ray]'.") from error
    if ray.is_initialized():  # a notebook's own Ray, which goes on afterwards
        return ray
    # Ray prints what it has to say of lost workers to stdout, which is for results, and has no setting for it.
    driver.print_to_stdstream = lambda data, **_: logger.debug("%s", data)
    with _uninterrupted():
        try:
            settings = _own_ray(end) if address is None else _cluster(address)
            end.callback(ray.shutdown)
            ray.init(**settings, log_to_driver=False, logging_level=logging.CRITICAL)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(
                f"engine.workers: Ray does not start ({said}). Set engine.workers: 1 to do without."
                if address is None
                else f"engine.ray_address: {address} cannot be joined ({said}). Check that the cluster runs "
                "(`ray status`) on the same versions of Python and Ray, and that RAY_AUTH_TOKEN is its token."
            ) from error
    return ray


def _cluster(address: str) -> dict[str, Any]:
    """Return the settings that join a cluster; where nothing listens is told at once, and not after minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    return {"address": address}


def _own_ray(end: ExitStack) -> dict[str, Any]:
    """Return the settings of a Ray that this process starts for itself, and ends."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Not in TMPDIR: the path of a socket has at most 107 characters.
    folder = tempfile.mkdtemp(prefix="tuneshift-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
    end.callback(shutil.rmtree, folder, ignore_errors=True)
    allowed = len(os.sched_getaffinity(0))  # a batch system may allow fewer cores than Ray would count
    return {
        "address": "local",
        "num_cpus": allowed if allowed < (os.cpu_count() or 1) else None,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE,
        "_temp_dir": folder,
    }


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back to the end of the block: raised inside Ray's own waiting, an exception is torn."""
    if current_thread() is not main_thread():
        yield
        return
    held: list[int] = []
    endings = (signal.SIGINT, signal.SIGTERM)
    before = {ending: signal.signal(ending, lambda number, frame: held.append(number)) for ending in endings}
    try:
        yield
    finally:
        for ending, handler in before.items():  # Ray, once started, has set one of its own
            signal.signal(ending, handler)
    if held:
        signal.raise_signal(held[0])
