"""What anybody may be told of a run's models and settings: Hub ids, licences, and settings without places and keys."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROLES = {
    "source.base": "B, the source's base",
    "source.adapter": "F, the source's adapter",
    "source.model": "F, the source's fine-tuned checkpoint",
    "source.substitute_base": "B's substitute",
    "target.model": "T, the target",
    "generator.model": "G, the prompt generator",
    "generator.api": "G, the prompt generator behind an API",
}
"""The roles of `named_models`, for people."""

HUB_SECONDS = 5.0  # for the Hub to tell a model's licence, which a run can do without; a guess
PLACE = re.compile(r"(~\w*|\.{0,2})/[^\n{}]*|[^\n{}]*/\.\./[^\n{}]*")
PRIVATE = re.compile(r"(\w*_)?(api_key|base_url|address|token|secret|password)")
ADDRESS = re.compile(r"[a-z]+://\S*", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """The identifier of a licence, `None` with the reason where it is not known."""

    identifier: str | None
    reason: str | None = None

    def __str__(self) -> str:
        return self.identifier or f"not known ({self.reason})"


@dataclass(frozen=True)
class PublicModel:
    """A model of a run as a card names it; `hub_id` is `None` where it came from a folder or a server."""

    role: str
    name: str
    hub_id: str | None
    licence: Licence


def public_name(reference: str) -> str:
    """Return a Hub id as it is, and of a local path only its last part: a card may be published."""
    return Path(reference).name if Path(reference).is_absolute() else reference


def public_models(models: Mapping[str, Mapping[str, str]]) -> dict[str, PublicModel]:
    """Return a run's models by role, from what `named_models` says of them."""
    found = {}
    for role, model in models.items():
        reference, path = model["reference"], model["path"]
        served = role == "generator.api"
        hub_id = None if served or Path(reference).is_absolute() else reference
        licence = Licence(None, "behind an API, whose terms apply") if served else licence_of(hub_id or path)
        name = " ".join(public_name(reference).replace("`", "'").split())  # a folder may be called anything
        found[role] = PublicModel(role, name, hub_id, licence)
    return found


def common_licence(models: Mapping[str, PublicModel]) -> Licence:
    """Return the licence that all models have; where they differ or one is not known, it is not ours to choose."""
    found = {model.licence.identifier for model in models.values()}
    if len(found) == 1 and None not in found:
        return Licence(found.pop())
    return Licence(None, "the models' licences differ or are not known, and all of them may apply")


@functools.cache
def licence_of(model: str) -> Licence:
    """Return what the card of a model says, which is a folder by its absolute path or a Hub id."""
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HTTPError

    folder = Path(model)
    try:
        if not folder.is_absolute():
            card = HfApi().model_info(model, timeout=HUB_SECONDS).card_data
        elif (folder / "README.md").is_file():
            card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data
        else:
            return Licence(None, "there is no README.md in the model's folder")
    except (OSError, ValueError, TypeError, yaml.YAMLError, HTTPError) as error:
        return Licence(None, f"the model's card cannot be read: {type(error).__name__}")
    data = {} if card is None else vars(card)
    name = data.get("license_name") if data.get("license") == "other" else data.get("license")
    return Licence(name) if isinstance(name, str) else Licence(None, "the model's card names none")


def public_settings(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration without keys and addresses of servers, and the names of what was left out.

    Of places in a file system outside the configuration's folder only the last part stays. A list's items are treated
    as settings of their own, named by their place.
    """
    shown: dict[str, Any] = {}
    left_out: list[str] = []
    for key, value in raw.items():
        if isinstance(value, Mapping):
            shown[key], inner = public_settings(value)
            left_out += [f"{key}.{name}" for name in inner]
        elif PRIVATE.fullmatch(key) or (isinstance(value, str) and ADDRESS.fullmatch(value)):
            left_out.append(key)
        elif isinstance(value, list):
            items, inner = public_settings({str(place): item for place, item in enumerate(value)})
            left_out += [f"{key}.{place}" for place in inner]
            if items or not value:
                shown[key] = list(items.values())
        elif isinstance(value, str) and PLACE.fullmatch(value):
            shown[key] = Path(value).name
        else:
            shown[key] = value
    return shown, left_out
