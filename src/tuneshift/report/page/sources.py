"""What the page is made from: the run's stored records, and the user's files and tokenizers where they still are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tuneshift.config import LoadedConfig
from tuneshift.datafiles import Item, Seed, read_seeds
from tuneshift.errors import RunDirectoryError, TuneShiftError
from tuneshift.models import file_sha256, load_tokenizer
from tuneshift.questions import read_items_of
from tuneshift.run.directory import RunDirectory, read_json
from tuneshift.run.ledger import Ledger, RoundSummary
from tuneshift.run.records import Candidate, GeneratorCall
from tuneshift.run.resume import changed_inputs
from tuneshift.run.stored import counts_eos, stored_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Built = TypeVar("Built")


def or_missing(build: Callable[[], Built]) -> Built | dict[str, str]:
    """Return what `build` makes, or {"missing": why it cannot be made}."""
    try:
        return build()
    except (TuneShiftError, OSError) as error:
        return {"missing": str(error)}


@dataclass(frozen=True)
class Sources:
    """A run's records, read once; what lies outside the run directory is read when it is first needed.

    `origin` is what the manifest says of models and environment. The user's files and the tokenizers may be gone or
    changed since the run: then reading them raises a `TuneShiftError` or an `OSError`.
    """

    run: RunDirectory
    ledger: Ledger
    origin: dict[str, Any]

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """The evaluated outcome."""
        return dict(read_json(self.run.verdict))

    @cached_property
    def training(self) -> dict[str, Any]:
        """What the training did."""
        return dict(read_json(self.run.training))

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Every candidate, in the order in which they were written."""
        return self.ledger.candidates()

    @cached_property
    def calls(self) -> dict[str, GeneratorCall]:
        """The generator's calls by id."""
        return {call.id: call for call in self.ledger.calls()}

    @cached_property
    def rounds(self) -> list[RoundSummary]:
        """The committed rounds."""
        return self.ledger.rounds()

    @cached_property
    def count_eos(self) -> bool:
        """Whether perplexities count the EOS as a token."""
        return counts_eos(self.ledger)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting, defaults included, as written."""
        return dict(json.loads(self.ledger.meta("settings") or "{}"))

    @cached_property
    def loaded(self) -> LoadedConfig:
        """The run's configuration."""
        return stored_config(self.run, self.ledger)

    @cached_property
    def seeds(self) -> list[Seed]:
        """The seeds that the run was started with."""
        config = self.loaded.config
        found = read_seeds(Path(config.seeds), config.prompt_template)
        self._check_unchanged("seeds", file_sha256(Path(config.seeds)))
        return found

    @cached_property
    def held_out(self) -> list[Item]:
        """The questions of the evaluation, none where none is configured."""
        section = self.loaded.config.evaluation
        if section is None:
            return []
        items, digest = read_items_of(section)
        self._check_unchanged("evaluation.data", digest)
        return items

    @cached_property
    def source_tokenizer(self) -> PreTrainedTokenizerBase:
        """F's tokenizer, whose tokens are scored."""
        models = self.origin["models"]
        model = models.get("source.model") or models["source.base"]
        return load_tokenizer(model["path"], trust_remote_code=self.loaded.config.run.trust_remote_code)

    @cached_property
    def target_tokenizer(self) -> PreTrainedTokenizerBase:
        """T's tokenizer, from the trained adapter's folder."""
        return load_tokenizer(str(self.run.adapter))

    def _check_unchanged(self, name: str, digest: str) -> None:
        if changed_inputs(self.ledger, {name: digest}):
            raise RunDirectoryError(f"{name}: this file holds something else than when the run was started.")
