"""A run directory: the only place that knows its file names, the lock that guards it, and atomic writes.

config.yaml            the configuration as written (variables not expanded)
ledger.sqlite          every generator call, candidate, response and decision
dataset/               kept.jsonl, the kept pairs in the order in which they were kept, and their card
adapter/               the target's PEFT adapter, tokenizer and model card; checkpoints/ while it trains
training.json          what the training did
evaluation/*.jsonl     per-item results of each arm; asked.json: the fingerprint of what each was asked
evaluations/           the same on other questions, with a verdict each; reselected/: other criteria's datasets
verdict.json           the evaluated outcome, with intervals
report.md              all of it, readable; report.html: all of it, to look into; figures/: its figures, for papers
manifest.json          sha256 of the artefacts, versions, device, git commit; written last
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import yaml

from tuneshift.errors import InUse, RunDirectoryError

Parsed = TypeVar("Parsed")
HOLDER = re.compile(r"process (\d+) on (.+)")
"""What the lock's file says."""
CONFIG_HEADER = "# relative paths start at "
"""How a config.yaml begins that a run or a study wrote."""


class Lock:
    """The lock of a folder, which is made where there is none, as a context manager; the kernel frees it after a kill.

    With `wait` it waits for another process that holds the lock, in place of refusing.

    Raises:
        InUse: another process holds the lock. RunDirectoryError: the path is no folder that can be written.
    """

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        self._folder, self._how = folder, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        self._file: int | None = None

    def __enter__(self) -> Lock:
        while self._file is None:
            try:
                self._file = self._locked()
            except OSError as error:
                raise RunDirectoryError(
                    f"{self._folder}: no run directory can be made and locked here ({error.strerror}). Give another "
                    "--run-dir."
                ) from error
        return self

    def _locked(self) -> int | None:
        """Return the locked file; `None` where it was removed before it was locked, so that its lock keeps nobody."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / ".lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, self._how)
            if _is_at(path, file):
                os.ftruncate(file, 0)
                os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return file
        except BlockingIOError as error:
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            message = f"{self._folder}: in use by {holder}. Wait for it, stop it, or give another --run-dir."
            raise InUse(message, self._folder) from error
        except BaseException:  # Ctrl-C, while it waits
            os.close(file)
            raise
        os.close(file)
        return None

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


class RunDirectory:
    """A locked run directory, as a context manager.

    A directory that this process created is removed again, with the folders above it, when the run ends by an error
    before `keep` was called, so that a refused input leaves nothing behind.

    See `Lock` for `wait` and what is raised.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.ledger = path / "ledger.sqlite"
        self.dataset = path / "dataset" / "kept.jsonl"
        self.dataset_card = self.dataset.with_name("README.md")
        self.adapter = path / "adapter"
        self.adapter_card = self.adapter / "README.md"
        self.checkpoints = path / "checkpoints"
        self.training = path / "training.json"
        self.evaluation = path / "evaluation"
        self.evaluations = path / "evaluations"
        self.reselected = path / "reselected"
        self.verdict = path / "verdict.json"
        self.report = path / "report.md"
        self.page = path / "report.html"
        self.figures = path / "figures"
        self.manifest = path / "manifest.json"
        self._lock = Lock(path, wait=wait)
        self._created: list[Path] = []

    def __enter__(self) -> RunDirectory:
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self._lock.__enter__()
        another_s = any(path.name != ".lock" for path in self.path.iterdir())  # it was made while this one waited
        self._created = [] if another_s else missing
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._created:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # another run has come to live in a folder above
                for folder in self._created[1:]:
                    folder.rmdir()
        self._lock.__exit__()

    def keep(self) -> None:
        """Say that the directory holds results from now on and outlives an error."""
        self._created = []

    def describe(self, raw: dict[str, Any], folder: Path) -> None:
        """Write `config.yaml`: settings as written, and the folder at which their relative paths start."""
        text = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
        write_atomically(self.config, f"{CONFIG_HEADER}{folder}\n{text}")

    def is_described(self) -> bool:
        """Tell whether its `config.yaml` is one that `describe` wrote."""
        return self.config.is_file() and self.config.read_bytes().startswith(CONFIG_HEADER.encode())

    def holder(self) -> tuple[int, str] | None:
        """Return the process and the machine that took the lock last, which says nothing of whether they hold it."""
        try:
            found = HOLDER.fullmatch((self.path / ".lock").read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return None
        return (int(found[1]), found[2]) if found else None

    def check_unused(self) -> None:
        """Prove that a new run overwrites nothing here but what an earlier start of a run left.

        Raises:
            RunDirectoryError: the folder holds something else.
        """
        ours = {
            ".lock",
            ".config.yaml.part",
            *(f"ledger.sqlite{suffix}" for suffix in ("", "-wal", "-shm", "-journal")),
        }
        if self.is_described():
            ours.add(self.config.name)
        others = sorted(path.name for path in self.path.iterdir() if path.name not in ours)
        if others:
            raise RunDirectoryError(
                f"{self.path}: holds other files ({', '.join(others[:3])}), and a run would write among them. Give "
                "another --run-dir."
            )

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """Return the directory of a run that was started before.

        Raises:
            RunDirectoryError: there is none.
        """
        run = cls(path)
        if not run.ledger.is_file():
            raise RunDirectoryError(
                f"{path}: holds no ledger.sqlite, so no run was started here. Give the folder that "
                "`tuneshift transfer` printed."
            )
        return run


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that after a crash it holds all of `content` or what it held before.

    The temporary name is the same each time: what a crash left there is written over, not left behind.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise RunDirectoryError(
            f"{path}: cannot be written ({error.strerror}). Free space or mend the permissions, then start again; what "
            "was computed before is kept."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document atomically; not-a-number and infinity are refused, since JSON has neither."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def jsonl(rows: list[dict[str, Any]]) -> str:
    """Return rows as JSON lines, byte for byte the same for the same rows."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_json(path: Path) -> Any:
    """Return what `write_json` wrote.

    Raises:
        RunDirectoryError: the file is missing or damaged.
    """
    return _parse(path, json.loads)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows that `jsonl` rendered; see `read_json` for what it raises."""
    return _parse(path, lambda text: [dict(json.loads(line)) for line in text.split("\n") if line])


def _parse(path: Path, parse: Callable[[str], Parsed]) -> Parsed:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise RunDirectoryError(
            f"{path}: missing or damaged ({error}). Restore it from a backup, or start again with another --run-dir."
        ) from error
