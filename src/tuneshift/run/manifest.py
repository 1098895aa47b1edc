"""The manifest: what a run is made of and where; written last, so that its existence vouches for the rest."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import tuneshift
from tuneshift.errors import RunDirectoryError
from tuneshift.models import file_sha256
from tuneshift.run.directory import RunDirectory, read_json, write_json
from tuneshift.run.ledger import Ledger

MAX_HASHED_BYTES = 2**34  # about half a minute of hashing; a guess at what a run's end may cost
LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers", "numpy", "scipy")


def write_manifest(run: RunDirectory, origin: dict[str, Any]) -> None:
    """Write `manifest.json`: sha256 of every artefact, and the run's `origin`."""
    artefacts = [run.config, run.dataset, run.dataset_card, run.training, run.verdict, run.report, run.page]
    artefacts += sorted(run.evaluation.glob("*.json*"))
    artefacts += sorted(run.figures.glob("*"))
    artefacts += sorted(path for path in run.adapter.glob("*") if path.is_file())
    files = {str(p.relative_to(run.path)): file_sha256(p) for p in artefacts if p.exists()}
    write_json(run.manifest, {"fingerprint": origin["fingerprint"], "files": files, **origin})


def origin(ledger: Ledger) -> dict[str, Any]:
    """Return what a run was made from and on: models with the sha256 of their weights, inputs, versions, device.

    It is read once, when the run finishes, and stays: a report that is written again later, by another version or on
    another machine, tells the same.
    """
    if (known := ledger.meta("origin")) is not None:
        return dict(json.loads(known))
    described = json.loads(ledger.meta("models") or "{}")
    found = {
        "fingerprint": ledger.meta("fingerprint"),
        "inputs": json.loads(ledger.meta("inputs") or "{}"),
        "models": {role: {**model, **_weights(model["path"])} for role, model in described.items()},
        "engines": json.loads(ledger.meta("engines") or "null"),
        **environment(),
    }
    ledger.set_meta(origin=json.dumps(found))
    return found


def read_manifest(run: RunDirectory) -> dict[str, Any]:
    """Return the manifest of a finished run, with proof that the files are those that it vouches for.

    Raises:
        RunDirectoryError: the run is not finished, or files are missing or hold something else.
    """
    if not run.manifest.is_file():
        raise RunDirectoryError(f"{run.path}: the run is not finished. Start `tuneshift transfer` again.")
    manifest: dict[str, Any] = read_json(run.manifest)
    vouched = manifest["files"].items()
    changed = [name for name, digest in vouched if not _is_file_with(run.path / name, digest)]
    if changed:
        raise RunDirectoryError(
            f"{run.path}: {', '.join(changed)}: missing or not what manifest.json vouches for. Restore the files; "
            "where you changed them on purpose, `tuneshift report` writes a manifest of what is there."
        )
    return manifest


def _is_file_with(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest


def _weights(model: str) -> dict[str, Any]:
    """Return the sha256 of a model's weights, or why there is none, and the revision of one that came from the Hub."""
    folder = (None if Path(model).is_absolute() else _cached(model)) or Path(model)
    found = {"revision": folder.name if folder.parent.name == "snapshots" else None}  # as the Hub's cache is laid out
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return {**found, "sha256": None, "reason": "no local folder of weights"}
    if sum(file.stat().st_size for file in files) > MAX_HASHED_BYTES:
        return {**found, "sha256": None, "reason": f"larger than {MAX_HASHED_BYTES} bytes"}
    return {**found, "sha256": {file.name: file_sha256(file) for file in files}}


def _cached(model: str) -> Path | None:
    """Return the folder of the Hub's cache that holds what was loaded by an id; its name is the revision."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(model, name) for name in ("config.json", "adapter_config.json")]
    except HFValidationError:  # a server's address
        return None
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def environment() -> dict[str, Any]:
    """Return versions, hardware and the code's git state: what a reader needs to judge a number."""
    return {
        "tuneshift": tuneshift.__version__,
        "git": git_state(Path(tuneshift.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "cuda": _cuda_devices(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit that `folder` is checked out at and whether it has local changes; `None` outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.parents[1]:
            return None  # an installed copy inside somebody else's repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _cuda_devices() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
