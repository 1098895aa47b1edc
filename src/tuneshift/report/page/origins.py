"""The page's part on provenance and risk: models, settings, what kept prompts repeat, and personal data."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from tuneshift.config import Config, section_class
from tuneshift.report.diversity import longest_overlap, words
from tuneshift.report.page.examples import clip
from tuneshift.report.page.sources import Sources, or_missing
from tuneshift.report.page.variety import held_out_texts
from tuneshift.report.privacy import scan
from tuneshift.report.provenance import ROLES, public_models

SHOWN = 300  # characters of an overlapping prompt; a guess


def origins(sources: Sources) -> dict[str, Any]:
    """Return models, environment, unusual settings, overlaps and counts of what looks like personal data."""
    kept = [candidate for candidate in sources.candidates if candidate.kept]
    texts = [candidate.text for candidate in kept]
    public = public_models(sources.origin["models"])
    return {
        "models": [
            {**model, "role": ROLES[role], "licence": str(public[role].licence)}
            for role, model in sources.origin["models"].items()
        ],
        "environment": {key: sources.origin[key] for key in ("python", "platform", "processor", "cores", "cuda")},
        "versions": sources.origin["versions"],
        "git": sources.origin["git"],
        "inputs": sources.origin["inputs"],
        "settings": unusual_settings(Config, sources.settings),
        "overlap": {
            "seeds": or_missing(lambda: _overlap(texts, [seed.text for seed in sources.seeds])),
            "evaluation questions": or_missing(lambda: _overlap(texts, held_out_texts(sources))),
        },
        "personal": scan((c.id, f"{c.prompt}\n{c.y_f.text if c.y_f else ''}") for c in kept),
    }


def unusual_settings(section: type[BaseModel], values: dict[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """Return the settings whose value is not the default, as JSON texts; a required one has no default.

    A setting that is younger than the run, and so is not among its `values`, is none of its own.
    """
    found = []
    for name, field in section.model_fields.items():
        if name not in values:
            continue
        inner, value = section_class(field), values[name]
        if inner is not None and isinstance(value, dict):
            found += unusual_settings(inner, value, f"{prefix}{name}.")
            continue
        default = None
        if not field.is_required():
            usual = field.get_default(call_default_factory=True, validated_data={})
            default = _text(usual.model_dump(mode="json") if isinstance(usual, BaseModel) else usual)
        if _text(value) != default:
            found.append({"key": f"{prefix}{name}", "value": _text(value), "default": default})
    return found


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _overlap(texts: list[str], references: list[str]) -> dict[str, Any]:
    """Return the longest run of words that a kept prompt shares with a reference."""
    found = longest_overlap(texts, references)
    if found is None:
        return {"words": 0, "references": len(references), "text": None, "reference": None, "of": None}
    length, text, reference = found
    return {
        "words": length,
        "references": len(references),
        "text": clip(texts[text], SHOWN),
        "reference": clip(references[reference], SHOWN),
        "of": len(words(texts[text])),
    }
