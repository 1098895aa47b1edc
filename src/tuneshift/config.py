"""The configuration: one YAML file, checked at the door and described once.

Every field's description states its unit; help texts, docs/configuration.md and the JSON schema are made from it.
Unknown keys are errors that name the nearest key, and all errors are reported at once. Relative paths start at the
YAML file's folder. `${VAR}` is replaced by the environment's value in memory only: the run directory keeps
the text as it was written.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from tuneshift.configfile import apply_override, expand_variables, read_mapping
from tuneshift.errors import ConfigError
from tuneshift.sections.base import PathText, Section
from tuneshift.sections.distill import DistillSection
from tuneshift.sections.engine import EngineSection
from tuneshift.sections.evaluation import EvaluationSection
from tuneshift.sections.models import GeneratorSection, SourceSection, TargetSection
from tuneshift.sections.run import RunSection
from tuneshift.sections.synthesis import CriterionSection, SynthesisSection, name_alone

Checked = TypeVar("Checked", bound=BaseModel)
SECRET = (("api_key",), ("base_url",))  # a wrong value may hold a key or a password after all, and is not shown


class Config(Section):
    """A whole configuration."""

    source: SourceSection = Field(description="What is moved.")
    target: TargetSection = Field(description="Where it goes.")
    generator: GeneratorSection = Field(default_factory=GeneratorSection, description="Who writes prompts.")
    seeds: PathText = Field(description='JSONL with {"prompt": ..., "response": ... (optional)} a line.')
    prompt_template: str | None = Field(
        None, description="A prompt with one {text}, which is what is generated; null: the whole prompt is."
    )
    synthesis: SynthesisSection = Field(default_factory=SynthesisSection, description="The loop.")
    criterion: Annotated[CriterionSection, BeforeValidator(name_alone)] = Field(
        default_factory=CriterionSection, description="The rule that keeps; a name alone sets `name`."
    )
    distill: DistillSection = Field(default_factory=DistillSection, description="The target's training.")
    evaluation: EvaluationSection | None = Field(None, description="The verdict's questions; null: no verdict.")
    engine: EngineSection = Field(default_factory=EngineSection, description="What runs the models.")
    run: RunSection = Field(default_factory=RunSection, description="Where and how the run happens.")

    @model_validator(mode="before")
    @classmethod
    def _a_hosted_generator_sees_responses_only_where_that_is_written(cls, value: Any) -> Any:
        """Ask a generator behind an API for prompts alone, unless `back_generation` is written."""
        generator, synthesis = (value.get(name, {}) for name in ("generator", "synthesis"))
        if isinstance(generator, dict) and generator.get("api") and isinstance(synthesis, dict):
            return {**value, "synthesis": {"back_generation": 0.0} | synthesis}
        return value

    @model_validator(mode="after")
    def _one_fine_tuning(self) -> Config:
        given = (self.source.adapter is not None) + (self.source.model is not None)
        if given > 1 or (given == 0 and self.engine.kind != "openai"):
            raise ValueError(
                "source: give exactly one of `adapter` (a PEFT adapter) and `model` (a full checkpoint); with "
                "`engine.kind: openai` it may be none"
            )
        return self

    @model_validator(mode="after")
    def _criterion_can_be_measured(self) -> Config:
        name, whole = self.criterion.name, ("kl", "entropy_drop")
        if name in whole and self.engine.kind != "hf":
            raise ValueError(
                f"criterion {name} needs engine.kind: hf, since servers do not tell whole distributions; `lift` is the "
                "like of it from single tokens"
            )
        if name in (*whole, "lift") and self.source.substitute_base is not None:
            raise ValueError(
                f"criterion {name} compares F with B token by token, and source.substitute_base has other tokens: "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _template_has_text_once(self) -> Config:
        if self.prompt_template is not None and self.prompt_template.count("{text}") != 1:
            raise ValueError(f"prompt_template must contain {{text}} exactly once, got {self.prompt_template!r}")
        return self


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration with what it was made from.

    `raw` is the mapping as written, with overrides and without expanded variables; `folder` is where its relative
    paths start; `fingerprint` changes when a setting that can change results does (what files hold is not in it),
    and `synthesis_fingerprint` when one of them that is not the training's does.
    """

    config: Config
    raw: dict[str, Any]
    folder: Path
    name: str
    fingerprint: str
    synthesis_fingerprint: str

    def settings(self) -> dict[str, Any]:
        """Return every setting, defaults included, as written: what came from a variable stays the variable's name."""
        settings: dict[str, Any] = self.config.model_dump(mode="json")
        _overlay(settings, self.raw)
        return settings


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, override and check a YAML file.

    Raises:
        ConfigError: the file cannot be read or is wrong; the message lists every error.
    """
    raw = read_mapping(path)
    return check_config(raw, folder=path.resolve().parent, name=path.stem, overrides=overrides, shown_as=str(path))


def check_config(
    raw: Mapping[str, Any], *, folder: Path, name: str, overrides: Sequence[str] = (), shown_as: str
) -> LoadedConfig:
    """Apply overrides to a raw mapping, expand variables and check it; see `load_config`."""
    merged = copy.deepcopy(dict(raw))
    for override in overrides:
        apply_override(merged, override)
    config = validate(Config, merged, folder=folder, shown_as=shown_as)
    results = result_settings(config)
    whole, synthesis = _fingerprint(results), _fingerprint({**results, "distill": None})
    return LoadedConfig(
        config=config, raw=merged, folder=folder, name=name, fingerprint=whole, synthesis_fingerprint=synthesis
    )


def _fingerprint(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that can change results: all but where it lies, who follows it, how models are reached.

    A preset is not among them: the settings that it stands for are.
    """
    relevant = config.model_dump(mode="json")
    relevant["synthesis"].pop("preset")
    for where in ("dir", "trackers"):
        relevant["run"].pop(where)
    api, engine = relevant["generator"].pop("api"), relevant.pop("engine")
    if api is not None:
        relevant["generator"]["api"] = {key: api[key] for key in ("base_url", "model")}
    served = {side: engine[side] and engine[side]["model"] for side in ("fine_tuned", "base")}
    relevant["engine"] = {key: engine[key] for key in ("kind", "batch_size", "max_model_len")} | served
    return relevant


def validate(root: type[Checked], raw: Mapping[str, Any], *, folder: Path, shown_as: str) -> Checked:
    """Expand a raw mapping's variables and return it as a `root`, whose relative paths start at `folder`.

    Raises:
        ConfigError: it is wrong; the message lists every error.
    """
    expanded = expand_variables(dict(raw), shown_as=shown_as)
    try:
        return root.model_validate(expanded, context={"folder": str(folder)})
    except ValidationError as error:
        problems = {_place(problem, root): problem for problem in reversed(error.errors())}  # a union: one a member
        lines = [_describe(*place, problem, raw) for place, problem in reversed(problems.items())]
        raise ConfigError(f"{shown_as}: {len(lines)} error(s) in the configuration:\n" + "\n".join(lines)) from None


def _overlay(settings: dict[str, Any], raw: Mapping[str, Any]) -> None:
    """Put what was written over the settings; a section that was written as a name alone stays a section."""
    for key, value in raw.items():
        if isinstance(settings.get(key), dict) and isinstance(value, dict):
            _overlay(settings[key], value)
        elif not isinstance(settings.get(key), dict):
            settings[key] = value


def section_class(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field holds, also under names of the user's own; `None` for a plain setting."""
    return _section_in(field.annotation)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _place(problem: Any, root: type[BaseModel]) -> tuple[tuple[str, ...], type[BaseModel]]:
    """Return where an error is: in the file's keys, without the names of a union's members; and the innermost section.

    `names` counts how many of the next keys are names that the user gave.
    """
    keys: list[str] = []
    section: type[BaseModel] | None = root
    innermost, names = root, 0
    for depth, part in enumerate(problem["loc"]):
        unknown = problem["type"] == "extra_forbidden" and depth == len(problem["loc"]) - 1
        field = section.model_fields.get(str(part)) if section is not None and names == 0 else None
        if field is not None:
            section, names = section_class(field), _names(field.annotation)
            innermost = section or innermost
        elif names > 0:
            names -= 1
        elif not (unknown or (section is None and isinstance(part, int))):
            continue
        keys.append(str(part))
    return tuple(keys), innermost


def _names(annotation: Any) -> int:
    """Return how many mappings with keys of the user's own are nested in each other."""
    return 1 + _names(get_args(annotation)[1]) if get_origin(annotation) is dict else 0


def _describe(keys: tuple[str, ...], section: type[BaseModel], problem: Any, raw: Mapping[str, Any]) -> str:
    """Return one line for an error: key, problem, the value as it was written, for an unknown key the nearest one."""
    where = ".".join(keys) or "configuration"
    if problem["type"] == "extra_forbidden":
        known = list(section.model_fields)
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.0)[0]
        return f"  {where}: unknown key; did you mean `{near}`? Known keys: {', '.join(known)}"
    written: Any = raw if keys[-1:] not in SECRET else None
    for key in keys:
        written = written.get(key) if isinstance(written, Mapping) else None
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"  {where}: {message}" + ("" if written is None or isinstance(written, Mapping) else f" (got {written!r})")
