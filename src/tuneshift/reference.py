"""The configuration's reference, made from its descriptions: Markdown for people, JSON Schema for editors."""

from __future__ import annotations

import inspect
import json
from typing import Any

from pydantic.fields import FieldInfo

from tuneshift.config import Config, section_class
from tuneshift.sections.study import ArmSection, StudySection


def configuration_reference() -> str:
    """Return every setting with its type, default, unit and effect, as Markdown."""
    top = {name: field for name, field in Config.model_fields.items() if section_class(field) is None}
    parts = [
        "# Configuration",
        "Made by `tuneshift config`; do not edit. Relative paths start at the YAML file's folder, and `${VAR}` is "
        "replaced by the environment's value. Any setting can be overridden with `--set section.key=value`.",
        "## Top level",
        _table(top),
    ]
    study = ["# Study files", inspect.cleandoc(StudySection.__doc__ or ""), _table(StudySection.model_fields)]
    study += ["## Study arms", inspect.cleandoc(ArmSection.__doc__ or ""), _table(ArmSection.model_fields)]
    return "\n\n".join(parts + _sections(Config.model_fields, "") + study) + "\n"


def configuration_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file."""
    return Config.model_json_schema()


def _sections(fields: dict[str, FieldInfo], prefix: str) -> list[str]:
    """Return a heading, a description and a table for each section, the sections inside it behind it."""
    parts: list[str] = []
    for name, field in fields.items():
        section = section_class(field)
        if section is not None:
            parts += [f"## {prefix}{name}", inspect.cleandoc(section.__doc__ or ""), _table(section.model_fields)]
            parts += _sections(section.model_fields, f"{prefix}{name}.")
    return parts


def _table(fields: dict[str, FieldInfo]) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in fields.items():
        description = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{name}` | {_default(field)} | {description} |")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return f"`{json.dumps(value, ensure_ascii=False)}`"
