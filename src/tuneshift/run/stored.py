"""Reading a run's configuration back from its directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tuneshift.config import LoadedConfig, check_config
from tuneshift.configfile import read_mapping
from tuneshift.errors import RunDirectoryError
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger


def counts_eos(ledger: Ledger) -> bool:
    """Tell whether the run's criterion counts the EOS as a response token; a run that was not described has none."""
    return bool(json.loads(ledger.meta("count_eos") or "false"))


def stored_config(run: RunDirectory, ledger: Ledger, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Return the configuration that the run was started with, with `overrides` applied.

    Raises:
        RunDirectoryError: the directory does not hold it whole. ConfigError: an override is wrong.
    """
    folder, name = ledger.meta("folder"), ledger.meta("name")
    if folder is None or name is None or not run.config.is_file():
        raise RunDirectoryError(
            f"{run.path}: the run stopped before it was described. Start `tuneshift transfer` again."
        )
    raw = read_mapping(run.config)
    return check_config(raw, folder=Path(folder), name=name, overrides=overrides, shown_as=str(run.config))
