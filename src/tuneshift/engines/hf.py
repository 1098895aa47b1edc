"""The Hugging Face engine: one set of weights serves a model with and without its adapter.

Batches are formed by `tuneshift.engines.batching`, so a repeated call gives the same floats. A batch that
does not fit into memory is halved and tried again.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from tuneshift.adapters import attach_adapter, changes_its_base, merged_copy, read_adapter_config
from tuneshift.encoding import Reader
from tuneshift.engines.base import (
    Comparison,
    Completion,
    Decoding,
    ScoreRequest,
    Told,
    as_completion,
    check_ids,
    untold,
)
from tuneshift.engines.batching import BATCH_SIZE, generation_batches, scoring_batches
from tuneshift.engines.decoding import Row, compare_distributions, decode, token_logprobs
from tuneshift.errors import ModelError
from tuneshift.models import (
    LoadOptions,
    compile_layers,
    context_length,
    enough_memory,
    free_memory,
    is_out_of_memory,
    load_causal_lm,
    load_tokenizer,
    text_ends,
    vocabulary_size,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class HfEngine:
    """An `Engine` on transformers and peft.

    Args:
        model: the base weights.
        tokenizer: the tokenizer of both.
        name: what the model is called in the manifest.
        fine_tuned_model: a full fine-tuned checkpoint; with `None`, `attach` may add an adapter to the base weights.
        batch_size: the most rows that are run together.
        compiled: score with compiled layers. Decoding stays as it is: its steps gain nothing (measured).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        fine_tuned_model: PreTrainedModel | None = None,
        batch_size: int = BATCH_SIZE,
        compiled: bool = False,
    ) -> None:
        self._base: Any = model
        self._fine_tuned: Any = fine_tuned_model
        self._adapted: Any = None
        self._how: str | None = None  # the adapter is run
        self._tokenizer = tokenizer
        self._name = name
        self._batch_size = batch_size
        self._fine_tuned_name: str | None = fine_tuned_model.config._name_or_path if fine_tuned_model else None
        self._parameters = sum(parameter.numel() for parameter in model.parameters())  # before an adapter joins them
        both = [model, *([fine_tuned_model] if fine_tuned_model else [])]
        self.eos_ids = text_ends([one.generation_config for one in both], tokenizer)
        self._readable = replace(
            self.reader, context_length=None
        )  # longer texts are a matter of quality, not of memory
        # Padding is masked, but it is embedded: an id that exists will do where the tokenizer's has no embedding.
        self._pad_id = min(int(tokenizer.pad_token_id), self.reader.vocabulary_size - 1)
        self._compiled = compiled
        self._compile(model, fine_tuned_model)

    @classmethod
    def open(
        cls, path: str, *, load: LoadOptions, fine_tuned: str | None = None, batch_size: int = BATCH_SIZE
    ) -> HfEngine:
        """Load a model and its tokenizer, and with `fine_tuned` a full fine-tuned checkpoint beside it."""
        tokenizer = load_tokenizer(fine_tuned or path, trust_remote_code=load.trust_remote_code)
        second = load_causal_lm(fine_tuned, load) if fine_tuned else None
        first = load_causal_lm(path, load)
        return cls(first, tokenizer, name=path, fine_tuned_model=second, batch_size=batch_size, compiled=load.compile)

    def attach(self, adapter: str, *, merge: bool | None = None) -> None:
        """Add a PEFT adapter; from now on `fine_tuned=True` runs with it and `fine_tuned=False` without it.

        With `merge` the fine-tuned side is a second copy of the weights with the adapter added in, where its kind
        allows. That is the default on a CPU: there an adapter's small products take as long as the weights' own. On a
        GPU one set of weights serves both sides, but for an adapter that changes its base: that always has a copy.

        Raises:
            ModelError: the adapter does not fit, or is of a kind that cannot be run.
        """
        if merge is None:
            merge = self._base.device.type == "cpu"
        self._fine_tuned = merged_copy(self._base, adapter) if merge else None
        self._adapted, self._how = None, "merged"
        if self._fine_tuned is None and changes_its_base(read_adapter_config(adapter)):
            self._fine_tuned = attach_adapter(copy.deepcopy(self._base), adapter).get_base_model()
            self._how = "on a copy"
        elif self._fine_tuned is None:
            self._adapted, self._how = attach_adapter(self._base, adapter), "switched"
        self._fine_tuned_name = adapter
        self._compile(self._fine_tuned)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the base and the fine-tuned weights."""
        return self._tokenizer

    @property
    def reader(self) -> Reader:
        """What both the base and the fine-tuned weights can read."""
        both = [model for model in (self._base, self._fine_tuned) if model is not None]
        rows = min(map(vocabulary_size, both))
        return Reader(self._tokenizer, context_length(self._base.config), rows)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        decoding: Decoding,
        fine_tuned: bool,
        told: Told = untold,
    ) -> list[Completion]:
        """Continue each prompt, in order; equal prompts of a batch are read once."""
        import torch

        check_ids(self._readable, prompts)
        rows = [Row(tuple(prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        batches = generation_batches(
            rows,
            length=lambda row: len(row.prompt),
            max_new_tokens=decoding.max_new_tokens,
            batch_size=self._batch_size,
        )
        with self._weights(fine_tuned) as model, torch.compiler.set_stance("force_eager"):
            done = 0
            for batch in batches:
                self._halving(batch, lambda part: self._decode(model, part, decoding))
                done += len(batch)
                told(done)
        written = [(row.prompt, row.ids, row.logprobs) for row in rows]
        return [as_completion(self._tokenizer, *row, eos_ids=self.eos_ids, stop=decoding.stop) for row in written]

    def score(self, requests: Sequence[ScoreRequest], *, fine_tuned: bool) -> list[tuple[float, ...]]:
        """Return each response token's raw log-probability in nats, with the head on response rows only."""
        with self._weights(fine_tuned) as model:
            return self._in_batches(requests, lambda part: self._score(model, part))

    def compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        """Return how F and B differ along each response; both read the same batches."""
        sizes = {vocabulary_size(model) for model in (self._base, self._fine_tuned) if model is not None}
        if len(sizes) > 1:
            raise ModelError(
                f"{self._name}: F and B have vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens, so their "
                "distributions cannot be compared. The criterion `lift` compares the tokens of the response alone."
            )
        return self._in_batches(requests, self._compare, sides=2)

    def describe(self) -> dict[str, Any]:
        """Return what was loaded and where it runs."""
        return {
            "engine": "hf",
            "model": self._name,
            "fine_tuned": self._fine_tuned_name,
            "adapter": self._how,
            "device": str(self._base.device),
            "dtype": str(self._base.dtype).removeprefix("torch."),
            "compiled": self._compiled,
            "architecture": type(self._base).__name__,
            "parameters": self._parameters,
        }

    def close(self) -> None:
        """Free the weights."""
        self._base = self._fine_tuned = self._adapted = None
        free_memory()

    def _compile(self, *models: PreTrainedModel | None) -> None:
        for model in models:
            if self._compiled and model is not None:
                compile_layers(model)

    @contextmanager
    def _weights(self, fine_tuned: bool) -> Iterator[Any]:
        """Yield the model to run, under `inference_mode`, with the adapter switched as asked."""
        import torch

        with torch.inference_mode():
            if fine_tuned and self._fine_tuned is not None:
                yield self._fine_tuned
            elif self._adapted is None:
                if fine_tuned:
                    raise ModelError(f"{self._name}: no adapter or fine-tuned checkpoint is loaded")
                yield self._base
            elif fine_tuned:
                yield self._adapted.get_base_model()
            else:
                with self._adapted.disable_adapter():
                    yield self._adapted.get_base_model()

    def _decode(self, model: Any, rows: Sequence[Row], decoding: Decoding) -> list[Row]:
        tail = 4 + max(map(len, decoding.stop), default=0)  # tokens that surely hold a stop string that just ended

        def stopped(row: Row) -> bool:
            if not decoding.stop:
                return False
            text = self._tokenizer.decode(row.ids[-tail:], skip_special_tokens=True)
            return any(stop in text for stop in decoding.stop)

        for row in rows:  # a batch that ran out of memory starts over
            row.ids, row.logprobs, row.finished = [], [], False
        decode(
            model,
            rows,
            decoding=decoding,
            eos_ids=self.eos_ids,
            pad_id=self._pad_id,
            stopped=stopped,
        )
        return list(rows)

    def _in_batches(
        self, requests: Sequence[ScoreRequest], run: Callable[[Sequence[ScoreRequest]], list[Result]], *, sides: int = 1
    ) -> list[Result]:
        """Return the results of `run` on the requests, in order."""
        check_ids(self._readable, [(*request.prompt_ids, *request.response_ids) for request in requests])
        results: dict[int, Result] = {}
        batches = scoring_batches(
            range(len(requests)),
            request=lambda index: requests[index],
            vocabulary_size=self.reader.vocabulary_size,
            batch_size=self._batch_size,
            on_cpu=self._base.device.type == "cpu",
            sides=sides,
        )
        for batch in batches:
            results.update(zip(batch, self._halving([requests[index] for index in batch], run), strict=True))
        return [results[index] for index in range(len(requests))]

    def _score(self, model: Any, requests: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
        import torch

        targets = [token for request in requests for token in request.response_ids]
        logits = self._response_logits(model, requests)
        logprobs = token_logprobs(logits, torch.tensor(targets, device=logits.device))
        parts = logprobs.split([len(request.response_ids) for request in requests])
        return [tuple(part.tolist()) for part in parts]

    def _compare(self, requests: Sequence[ScoreRequest]) -> list[Comparison]:
        sides = []
        for fine_tuned in (True, False):
            with self._weights(fine_tuned) as model:
                sides.append(self._response_logits(model, requests))
        parts = compare_distributions(*sides).split([len(request.response_ids) for request in requests], -1)
        return [Comparison(*part.mean(-1).tolist()) for part in parts]

    def _response_logits(self, model: Any, requests: Sequence[ScoreRequest]) -> torch.Tensor:
        """Return the raw logits from which each response token was chosen, shape [response tokens, V]."""
        import torch

        device, width = model.device, max(len(r.prompt_ids) + len(r.response_ids) for r in requests)
        ids = torch.full((len(requests), width), self._pad_id, device=device)
        rows = torch.zeros_like(ids, dtype=torch.bool)
        for line, request in enumerate(requests):
            start, end = len(request.prompt_ids), len(request.prompt_ids) + len(request.response_ids)
            ids[line, :end] = torch.tensor([*request.prompt_ids, *request.response_ids], device=device)
            rows[line, start - 1 : end - 1] = True  # the position before a token predicts it
        # Padding stands on the right, where no token looks: attention that is plainly causal needs no mask for it.
        logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits
        return logits

    def _halving(self, batch: Sequence[Item], run: Callable[[Sequence[Item]], list[Result]]) -> list[Result]:
        """Run a batch; when it does not fit into memory, run its halves.

        Raises:
            MemoryLimitError: a single row does not fit.
        """
        if len(batch) == 1:
            with enough_memory("A single prompt with its response", "Lower synthesis.max_new_tokens."):
                return run(batch)
        try:
            return run(batch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        logger.warning("a batch of %d rows does not fit into memory; halving it", len(batch))
        free_memory()
        middle = len(batch) // 2
        return self._halving(batch[:middle], run) + self._halving(batch[middle:], run)
