"""The exceptions a user of TuneShift can meet.

* TuneShiftError
  * UserError               exit 2: something the user can mend; printed as one paragraph
    · ConfigError           the YAML file or a `--set` override
    · DataError             a seed, evaluation or prompt file
    · ModelError            a model, adapter or tokenizer
    · GeneratorError        the prompt generator's API: it refuses, keeps failing, or the budget is reached
    · TrainingError         the processes of a training failed
    · MemoryLimitError      a model, a batch or a training step does not fit into memory
    · SandboxError          code that a model wrote cannot be run safely on this machine
    · PublishError          the run is not fit to be published, or the Hub refuses
    · RunDirectoryError     a run directory: missing, damaged, or (InUse) another process writes into it
    · NothingKeptError      the criterion kept no candidate; carries the diagnosis
  * ResumeRefused           exit 4: the run directory belongs to another configuration

* Interrupted               exit 130 or 143: Ctrl-C or SIGTERM; the state is saved

Every message says what is wrong, the value, what was expected, and the remedy.
Anything else that escapes is a bug: exit 1, with its traceback.
"""

from pathlib import Path
from signal import SIGINT


class TuneShiftError(Exception):
    """Base of every error that TuneShift raises on purpose."""


class UserError(TuneShiftError):
    """Something the user can mend."""


class ConfigError(UserError):
    """The configuration file or an override is wrong."""


class DataError(UserError):
    """A seed or evaluation file is wrong; the message names the file and the line."""


class ModelError(UserError):
    """A model, adapter or tokenizer cannot be used as asked."""


class GeneratorError(UserError):
    """The prompt generator's API refuses or keeps failing, or the budget is reached; what was paid for is kept."""


class TrainingError(UserError):
    """The processes of a training failed, for example for want of memory; its checkpoints are kept."""


class MemoryLimitError(UserError):
    """A model, a batch or a training step does not fit into the memory of the GPU or the machine."""


class SandboxError(UserError):
    """Code that a model wrote cannot be run safely on this machine."""


class PublishError(UserError):
    """A run is not fit to be published, or the Hub refuses it."""


class RunDirectoryError(UserError):
    """A run directory is missing, in use by another process, or damaged."""


class InUse(RunDirectoryError):
    """Another process writes into the run directory at `path`."""

    def __init__(self, message: str, path: Path = Path()) -> None:
        super().__init__(message)
        self.path = path


class NothingKeptError(UserError):
    """No candidate was kept for several rounds; the message carries the diagnosis."""


class ResumeRefused(TuneShiftError):
    """The run directory was made by a configuration that would give other results."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Like `KeyboardInterrupt` no `Exception`: no library swallows it, and it is ours to report."""

    def __init__(self, signal: int = SIGINT) -> None:
        self.signal = signal
