"""From a YAML file's text to a plain mapping: safe reading, `--set` overrides, variables, and differences.

Plain means: mappings with text keys, lists, text, numbers, booleans and null. Dates stay text, and anchors are refused:
a page of settings needs neither, and a few lines of anchors can unfold to gigabytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tuneshift.criteria import RULES
from tuneshift.errors import ConfigError

VARIABLE = re.compile(r"\$\{(\w+)\}")
MAX_BYTES = 2**20  # a configuration is a page; a guess


class _PlainLoader(yaml.SafeLoader):
    """`SafeLoader` without dates and without anchors."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own form
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not supported in a configuration")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping of sections.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML file.") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(data)} bytes, at most {MAX_BYTES} are read. This is no configuration file.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    raw = parse_yaml(text, shown_as=str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as `source:` and `target:`, got {type(raw).__name__}.")
    return raw


def parse_yaml(text: str, *, shown_as: str) -> Any:
    """Return what a YAML text says, in plain values.

    Raises:
        ConfigError: it is not valid YAML, or not plain.
    """
    try:
        value = yaml.load(text, Loader=_PlainLoader)
        return _plain(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{shown_as}: not valid YAML: {' '.join(str(error).split())[:300]}") from error


def apply_override(merged: dict[str, Any], override: str) -> None:
    """Set one `key=value` in a raw mapping; sections on the way are made, and a criterion's bare name becomes one.

    Raises:
        ConfigError: it has another form.
    """
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r}: expected key=value, for example --set synthesis.target_size=100.")
    value = parse_yaml(text, shown_as=f"--set {override!r}")
    *sections, last = key.strip().split(".")
    if last == "criterion" and isinstance(value, str):  # a bare name leaves the thresholds as they are
        sections, last = [*sections, last], "name"
    place = merged
    for section in sections:
        inner = place.get(section)
        if isinstance(inner, str) and section == "criterion":
            inner = {"name": inner}
        place[section] = inner if isinstance(inner, dict) else {}
        place = place[section]
    place[last] = value
    if sections[-1:] == ["criterion"] and last == "name":
        _leave_automatic_tau(place)


def lay_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the raw mapping `below` with the settings of `above` over it: sections are merged, all else is replaced.

    A criterion's bare name leaves the thresholds as they are, as `apply_override` does.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if key == "criterion":
            old, value = ({"name": side} if isinstance(side, str) else side for side in (old, value))
        merged[key] = lay_over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        if key == "criterion" and isinstance(old, Mapping) and isinstance(value, Mapping) and "tau" not in value:
            _leave_automatic_tau(merged[key])
    return merged


def _leave_automatic_tau(criterion: dict[str, Any]) -> None:
    """Drop the `tau: auto` of the rule before, where the one of the new name reads none."""
    rule = RULES.get(str(criterion.get("name")))
    if rule is not None and "tau" not in rule.reads and criterion.get("tau") == "auto":
        del criterion["tau"]


def expand_variables(value: Any, *, shown_as: str) -> Any:
    """Return `value` with each `${VAR}` replaced by the environment's value; an `api_key` stays the variable's name.

    Raises:
        ConfigError: a variable is not set.
    """
    if isinstance(value, dict):
        # A key is read when a request is made: nothing that is printed or stored ever holds it.
        return {k: v if k == "api_key" else expand_variables(v, shown_as=shown_as) for k, v in value.items()}
    if isinstance(value, list):
        return [expand_variables(inner, shown_as=shown_as) for inner in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(f"{shown_as}: ${{{name}}} is not set in the environment. Export it, or write the value.")
        return os.environ[name]

    return VARIABLE.sub(variable, value)


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that differs between two raw mappings, as `key: before -> after`."""
    old, new = flatten(before), flatten(after)
    default = "(default)"
    return [
        f"{key}: {old.get(key, default)} -> {new.get(key, default)}"
        for key in sorted(old | new)
        if old.get(key, default) != new.get(key, default)
    ]


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return each setting of nested sections under its full name, as JSON."""
    flat: dict[str, str] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is no text; quote it")
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"{value!r} is neither text, number, boolean, list nor mapping; quote it")
