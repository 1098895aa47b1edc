"""What all sections of the configuration share: the base class, and paths from the file's folder."""

from __future__ import annotations

import os.path
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def from_folder(value: str, info: ValidationInfo) -> str:
    """Make a path absolute, from the configuration file's folder."""
    folder = Path((info.context or {}).get("folder", "."))
    try:
        return str((folder / Path(value).expanduser()).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"this is no path that can be followed: {error}") from error


def path_or_hub_id(value: str, info: ValidationInfo) -> str:
    """Make a model reference absolute where such a path exists; a Hub id stays as it is."""
    path = from_folder(value, info)
    explicit = value.startswith(("/", "./", "../", "~")) or value.endswith(".gguf")
    return path if explicit or os.path.exists(path) else value


PathText = Annotated[str, AfterValidator(from_folder)]
ModelText = Annotated[str, AfterValidator(path_or_hub_id)]
