"""An engine on several workers, with the results of one process.

The driver forms the batches that one process would form of the same list, and hands each to a free worker. Floats
depend on who shares a batch and on the number of threads, not on who runs it or when. Workers write nothing: what
they return is put in order here, and committed by whoever asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneshift.encoding import Reader
from tuneshift.engines.base import Comparison, Completion, Decoding, ScoreRequest, Told, Weights, untold
from tuneshift.engines.batching import generation_batches, scoring_batches
from tuneshift.engines.canary import AGREEMENT, Canary
from tuneshift.engines.workers import Call, Layout, Opened, Opener, Pool, Wanted
from tuneshift.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuneshift.engines.options import EngineOptions

logger = logging.getLogger(__name__)


class RayEngine:
    """An `Engine` whose batches are run by workers.

    Args:
        weights: the models; every node finds them under the same path or Hub id.
        options: what each worker runs, and how many there are.
        open: opens the engine inside a worker.
        prompts: what the engine proves itself on in every worker; `None`: it needs no proof.

    Raises:
        ConfigError: Ray is not installed, a cluster cannot be joined, or there is no room for the workers.
        ModelError: a worker cannot open the models, they fail their proof, or two workers disagree.
    """

    def __init__(
        self, weights: Weights, options: EngineOptions, open: Opener, prompts: Sequence[str] | None = None
    ) -> None:
        gpus = options.tensor_parallel_size if options.kind == "vllm" else 1
        device = options.load.device
        self._options = options
        self._pool = Pool.joined(Layout(options.workers, options.ray_address, options.threads, device, gpus))
        own = replace(options, workers=1, ray_address=None, threads=self._pool.threads)
        self._wanted = Wanted(_absolute(weights), own, None if prompts is None else tuple(prompts), open)
        self._opened: list[Opened] = []
        try:
            self._run([None] * options.workers)
        except BaseException:
            self.close()
            raise

    @property
    def canary(self) -> Canary | None:
        """What the first worker proved; the others agree with it."""
        return self._opened[0].canary

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the base and the fine-tuned weights."""
        return self.reader.tokenizer

    @property
    def reader(self) -> Reader:
        """What both the base and the fine-tuned weights can read."""
        return self._opened[0].reader

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        decoding: Decoding,
        fine_tuned: bool,
        told: Told = untold,
    ) -> list[Completion]:
        """Continue each prompt, in order."""
        batches = generation_batches(
            range(len(prompts)),
            length=lambda index: len(prompts[index]),
            max_new_tokens=decoding.max_new_tokens,
            batch_size=self._options.batch_size,
        )

        def call(batch: Sequence[int]) -> Call:
            own, own_seeds = ([of[index] for index in batch] for of in (prompts, seeds))
            return methodcaller("generate", own, seeds=own_seeds, decoding=decoding, fine_tuned=fine_tuned)

        return self._in_order(batches, call, told)

    def score(self, requests: Sequence[ScoreRequest], *, fine_tuned: bool) -> list[tuple[float, ...]]:
        """Return each response token's raw log-probability in nats."""
        return self._read(requests, lambda part: methodcaller("score", part, fine_tuned=fine_tuned))

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return how F and B differ along each response."""
        return self._read(requests, lambda part: methodcaller("compare", part), sides=2)

    def describe(self) -> dict[str, Any]:
        """Return what the first worker loaded, how many workers there are, and the threads of each."""
        return {**self._opened[0].description, "workers": self._options.workers, "threads": self._pool.threads}

    def close(self) -> None:
        """Free the weights in every worker; with the last open engine the workers end."""
        self._pool.leave(self._wanted)

    def _read(
        self, requests: Sequence[ScoreRequest], call: Callable[[list[ScoreRequest]], Call], *, sides: int = 1
    ) -> list[Any]:
        batches = scoring_batches(
            range(len(requests)),
            request=lambda index: requests[index],
            vocabulary_size=self.reader.vocabulary_size,
            batch_size=self._options.batch_size,
            on_cpu=self._opened[0].description.get("device") == "cpu",
            sides=sides,
        )
        return self._in_order(batches, lambda batch: call([requests[index] for index in batch]))

    def _in_order(
        self, batches: Sequence[Sequence[int]], call: Callable[[Sequence[int]], Call], told: Told = untold
    ) -> list[Any]:
        """Return the results of all batches in the order of the indices that they hold."""
        longest_first = list(reversed(batches))  # so that the workers end at about the same time
        results: dict[int, Any] = {}
        done = 0

        def ended(number: int) -> None:
            nonlocal done
            done += len(longest_first[number])
            told(done)

        for batch, part in zip(longest_first, self._run([call(batch) for batch in longest_first], ended), strict=True):
            results.update(zip(batch, part, strict=True))
        return [results[index] for index in range(len(results))]

    def _run(self, calls: Sequence[Call | None], ended: Told = untold) -> list[list[Any]]:
        replies = self._pool.run(self._wanted, calls, ended)
        for reply in replies:
            if reply.opened is not None:
                self._admit(reply.opened)
        return [reply.results for reply in replies]

    def _admit(self, opened: Opened) -> None:
        """Compare what a worker read with all that was read before; after the start it replaces one that was lost."""
        if len(self._opened) >= self._options.workers:
            logger.warning("A worker was lost, and its batch was run again; %s takes its place", opened.place)
        for other in self._opened:
            if other.readings is None or opened.readings is None:
                continue  # a model without a fine-tuning proves nothing
            gap = other.readings.distance(opened.readings)
            if not gap <= AGREEMENT:
                raise ModelError(
                    f"{self._wanted.weights.fine_tuning}: the workers on {other.place} and {opened.place} disagree on "
                    f"the seed prompts by {gap:.2g} nats a token on average; at most {AGREEMENT} are expected from "
                    "rounding. Check that every node has the same files under this name, and that nothing changes "
                    "them during the run."
                )
        self._opened.append(opened)


def _absolute(weights: Weights) -> Weights:
    """Return the weights with absolute paths: a worker on another node has another working folder."""
    paths = {"base": weights.base, "adapter": weights.adapter, "checkpoint": weights.checkpoint}
    found = {role: str(Path(path).absolute()) for role, path in paths.items() if path and Path(path).exists()}
    return replace(weights, **found)
