"""Starting a run's ledger, and continuing one: only the same configuration on the same inputs may go on.

Until the training is done its own settings may change: a step that does not fit into memory costs no candidates.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping

from tuneshift.config import LoadedConfig
from tuneshift.configfile import difference, read_mapping
from tuneshift.errors import ResumeRefused
from tuneshift.run.directory import RunDirectory
from tuneshift.run.ledger import Ledger


def open_ledger(loaded: LoadedConfig, run: RunDirectory, digests: Mapping[str, str]) -> Ledger:
    """Start a run's ledger or continue it; from here on the directory outlives an error.

    `digests` are the sha256 of the files that the user named, by setting.

    Raises:
        ResumeRefused: it was started with settings or files that give other results; the message shows the difference.
        RunDirectoryError: the directory is new to TuneShift and holds other files.
    """
    resumed = check_resumable(loaded, run, digests)
    run.keep()
    if not resumed:
        run.describe(loaded.raw, loaded.folder)
    ledger = Ledger(run.ledger)
    if resumed and (ledger.meta("fingerprint") != loaded.fingerprint or changed_inputs(ledger, digests)):
        run.describe(loaded.raw, loaded.folder)
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # of a training with other settings
    ledger.set_meta(
        fingerprint=loaded.fingerprint,
        synthesis_fingerprint=loaded.synthesis_fingerprint,
        inputs=json.dumps(digests),
        folder=str(loaded.folder),
        name=loaded.name,
        settings=json.dumps(loaded.settings(), ensure_ascii=False),
        count_eos=json.dumps(loaded.config.criterion.count_eos),  # what a ${VARIABLE} in the settings had for a value
    )
    return ledger


def check_resumable(loaded: LoadedConfig, run: RunDirectory, digests: Mapping[str, str]) -> bool:
    """Tell whether the directory holds a run to continue; see `open_ledger` for what it raises."""
    if not run.ledger.exists():
        run.check_unused()
        return False
    run.keep()
    with Ledger(run.ledger) as ledger:
        before, other = ledger.meta("fingerprint"), changed_inputs(ledger, digests)
        same_synthesis = ledger.meta("synthesis_fingerprint") == loaded.synthesis_fingerprint
    if before is None:
        return False
    if same_synthesis and not run.training.exists():
        before, other = loaded.fingerprint, [name for name in other if not name.startswith("distill.")]
    refusal = (
        f"{run.path}: this run was started with {{}}, so its results cannot be continued{{}} Give another --run-dir"
    )
    if before != loaded.fingerprint:
        changed = difference(read_mapping(run.config), loaded.raw)
        shown = "\n".join(f"  {line}" for line in changed) or "  a ${VARIABLE}, a default or a path has another value"
        raise ResumeRefused(refusal.format("another configuration", f":\n{shown}\n") + ", or undo the change.")
    if other:
        raise ResumeRefused(refusal.format(f"other content in {', '.join(other)}", ".") + ", or restore the file.")
    return True


def changed_inputs(ledger: Ledger, digests: Mapping[str, str]) -> list[str]:
    """Return the settings in `digests` whose files hold something else than when the run was started."""
    inputs = json.loads(ledger.meta("inputs") or "{}")
    return [name for name, digest in digests.items() if inputs.get(name) != digest]


def synthesis_finished(run: RunDirectory) -> bool:
    """Tell whether the loop has met a stop rule, so that its models need not be loaded again."""
    with Ledger(run.ledger) as ledger:
        return ledger.meta("stop_reason") is not None
