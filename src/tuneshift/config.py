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
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo

from tuneshift.apisection import ApiSection, Section
from tuneshift.configfile import apply_override, expand_variables, read_mapping
from tuneshift.enginesection import EngineSection
from tuneshift.errors import ConfigError


def _from_folder(value: str, info: ValidationInfo) -> str:
    """Make a path absolute, from the configuration file's folder."""
    folder = Path((info.context or {}).get("folder", "."))
    try:
        return str((folder / Path(value).expanduser()).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"this is no path that can be followed: {error}") from error


def _path_or_hub_id(value: str, info: ValidationInfo) -> str:
    """Make a model reference absolute where such a path exists; a Hub id stays as it is."""
    path = _from_folder(value, info)
    explicit = value.startswith(("/", "./", "../", "~")) or value.endswith(".gguf")
    return path if explicit or os.path.exists(path) else value


def _generator_model(value: str, info: ValidationInfo) -> str:
    """Leave the names of the run's own models as they are."""
    return value if value in ("source", "base", "target") else _path_or_hub_id(value, info)


PathText = Annotated[str, AfterValidator(_from_folder)]
ModelText = Annotated[str, AfterValidator(_path_or_hub_id)]


class SourceSection(Section):
    """What is moved: the fine-tuned model F and its base B."""

    base: ModelText = Field(description="The base model B: a Hub id, a model folder or a .gguf file.")
    adapter: ModelText | None = Field(None, description="F as a PEFT adapter for `base`: a folder or a Hub id.")
    model: ModelText | None = Field(None, description="F as a full fine-tuned checkpoint, instead of `adapter`.")
    substitute_base: ModelText | None = Field(
        None,
        description="Another model that answers in place of B (paper, section 4.3); F scores its responses.",
    )
    same_base: bool = Field(
        False, description="Accept an adapter whose configuration names its base differently from `base`."
    )


class TargetSection(Section):
    """Where it goes."""

    model: ModelText = Field(description="The target model T: a Hub id, a model folder or a .gguf file.")


class GeneratorSection(Section):
    """The prompt generator G."""

    kind: Literal["few_shot", "chat"] = Field(
        "few_shot",
        description="`few_shot`: any model continues a list of examples. `chat`: an instruct model is asked, through "
        'its chat template, to "Generate 20 more samples like these 5" (paper, section 3.4).',
    )
    model: Annotated[str, AfterValidator(_generator_model)] = Field(
        "target", description="A model, or `source` (F), `base` (B) or `target` (T)."
    )
    instruction: str | None = Field(
        None,
        description="What the examples are: the line above the list (few_shot), or put before the request (chat).",
    )
    temperature: float = Field(1.0, gt=0, le=5, description="Sampling temperature of new prompts.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of the sampling, as probability mass.")
    top_k: int = Field(0, ge=0, description="Sample among this many most likely tokens; 0 is all.")
    max_new_tokens: int = Field(64, ge=1, description="Length limit of one new prompt, in tokens.")
    api: ApiSection | None = Field(
        None, description="A model behind an API writes, with `kind: chat`, instead of `model`; null: `model` does."
    )

    @model_validator(mode="after")
    def _api_speaks_chat(self) -> GeneratorSection:
        if self.api is not None and (self.kind != "chat" or self.top_k != 0):
            raise ValueError(
                "`api` speaks chat completions: set kind: chat, and leave top_k at 0, which they do not know"
            )
        return self


class SynthesisSection(Section):
    """The loop that writes prompts, lets F and B answer, and keeps."""

    target_size: int = Field(250, ge=1, description="Wanted kept pairs (paper, section H.1).")
    demos: int = Field(5, ge=1, description="Examples shown to the generator in a call (paper, section 3.4).")
    per_call: int = Field(20, ge=1, description="New prompts asked of a call (paper, section 3.4).")
    calls_per_round: int = Field(4, ge=1, description="Generator calls of a round; the pool grows between rounds.")
    decoding: Literal["faithful", "greedy"] = Field(
        "faithful",
        description="How F and B answer: `faithful` samples at temperature 1 and top-p 1, as the paper's y ~ p; "
        "`greedy` takes the likeliest token. tau does not carry over from one to the other.",
    )
    max_new_tokens: int = Field(256, ge=1, description="Length limit of a response, in tokens.")
    stop: tuple[str, ...] = Field((), description="Strings that end a response; it is cut before the first of them.")
    complete_scores: bool = Field(
        False,
        description="Let B answer even where F's response alone already fails the criterion; `reselect` can then "
        "decide those too.",
    )
    max_candidates: int = Field(10_000, ge=1, description="Stop after this many candidates, whatever was kept.")
    max_rounds: int = Field(500, ge=1, description="Stop after this many rounds.")
    patience: int = Field(3, ge=1, description="Stop with a diagnosis after this many rounds that kept nothing.")


class CriterionSection(Section):
    """The rule that keeps; see `tuneshift.criteria`."""

    name: Literal[
        "ppl_diff", "asymmetric", "ratio", "low_low", "high_low", "high_high", "none", "random", "disagree"
    ] = Field("ppl_diff", description="The rule; `ppl_diff` keeps where PPL_F(y_f) < tau <= PPL_F(y_b).")
    tau: Annotated[float, Field(gt=1)] | Literal["auto"] = Field(
        1.5,
        description="Threshold, a perplexity above 1 (paper: 1.5), or `auto`: calibrated on the first "
        "`calibration` candidates to keep `keep_rate` of them, then frozen.",
    )
    tau_f: float = Field(1.2, gt=1, description="`asymmetric`: PPL_F(y_f) must be below (paper, Table 8b).")
    tau_b: float = Field(1.6, gt=1, description="`asymmetric`: PPL_F(y_b) must be above (paper, Table 8b).")
    ratio: float = Field(1.5, gt=1, description="`ratio`: PPL_F(y_b) / PPL_F(y_f) at least (paper, Table 8c).")
    keep_rate: float = Field(
        0.2, gt=0, le=1, description="Share to keep, for `random` and `tau: auto` (paper: about 0.2 is kept)."
    )
    calibration: int = Field(200, ge=20, description="Candidates on which `tau: auto` is calibrated.")
    count_eos: bool = Field(False, description="Count the EOS as a response token where one was generated.")


class DistillSection(Section):
    """LoRA and trainer settings under their Hugging Face names; defaults are the paper's (section H.1)."""

    r: int = Field(8, ge=1, description="LoRA rank.")
    lora_alpha: int = Field(16, ge=1, description="LoRA scaling numerator.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before LoRA, a probability.")
    target_modules: tuple[str, ...] | str = Field(
        ("q_proj", "v_proj"), description="Module names that get LoRA, or `all-linear`."
    )
    num_train_epochs: int = Field(20, ge=1, description="Passes over the kept pairs.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate, then linear to zero.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Pairs in a batch, on each device.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches in an optimizer step.")
    trainer_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other argument of trl's SFTConfig (`report_to`, `bf16`, ...); it wins.",
    )
    accelerate: PathText | None = Field(
        None,
        description="An `accelerate` configuration file (FSDP 2, or MULTI_GPU): its processes train together, and a "
        "step learns from that many batches. Null: one device trains.",
    )


class EvaluationSection(Section):
    """The user's own questions, on which the verdict rests."""

    data: PathText = Field(description='JSONL with {"prompt": ..., "reference": ...} a line.')
    metric: str = Field(
        "exact_match",
        description="`exact_match` (surrounding white space aside), `normalized_match` (case, punctuation and white "
        "space aside), `numeric` (last number), `regex` (the last match of `pattern`), or a Python function "
        "`module.function(response, reference) -> bool`, found from the YAML file's folder.",
    )
    pattern: str | None = Field(None, description="`regex`: what to extract, its first group if it has one.")
    max_new_tokens: int | None = Field(None, ge=1, description="Length limit in tokens; that of synthesis if null.")
    stop: tuple[str, ...] | None = Field(None, description="Stop strings; those of synthesis if null.")

    @model_validator(mode="after")
    def _pattern_goes_with_regex(self) -> EvaluationSection:
        if (self.metric == "regex") != (self.pattern is not None):
            raise ValueError("`pattern` and `metric: regex` go together")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from error
        known = ("exact_match", "normalized_match", "numeric", "regex")
        if self.metric not in known and "." not in self.metric:
            raise ValueError(f"metric {self.metric!r} is none of {', '.join(known)} and no dotted path of a function")
        return self


class RunSection(Section):
    """Where and how the run happens."""

    dir: PathText | None = Field(None, description="Run directory; runs/<name of the YAML file> if null.")
    seed: int = Field(0, ge=0, description="Seed from which every random choice is derived.")
    device: str = Field("auto", description="Torch device; `auto` is the first CUDA device, else the CPU.")
    dtype: str = Field(
        "auto", description="Weights' dtype; `auto` is bfloat16 where the hardware has it, else float32."
    )
    trust_remote_code: bool = Field(False, description="Let a model repository's own Python code run.")
    compile: bool = Field(
        False,
        description="Score with compiled layers: quicker after half a minute of compiling. A CPU needs a C++ compiler.",
    )


SECRET = (("api_key",), ("base_url",))  # a wrong value may hold a key or a password after all, and is not shown


def _name_alone(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


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
    criterion: Annotated[CriterionSection, BeforeValidator(_name_alone)] = Field(
        default_factory=CriterionSection, description="The rule that keeps; a name alone sets `name`."
    )
    distill: DistillSection = Field(default_factory=DistillSection, description="The target's training.")
    evaluation: EvaluationSection | None = Field(None, description="The verdict's questions; null: no verdict.")
    engine: EngineSection = Field(default_factory=EngineSection, description="What runs the models.")
    run: RunSection = Field(default_factory=RunSection, description="Where and how the run happens.")

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
    def _template_has_text_once(self) -> Config:
        if self.prompt_template is not None and self.prompt_template.count("{text}") != 1:
            raise ValueError(f"prompt_template must contain {{text}} exactly once, got {self.prompt_template!r}")
        return self


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration with what it was made from.

    `raw` is the mapping as written, with overrides and without expanded variables; `folder` is where its relative
    paths start; `fingerprint` changes when a setting that can change results does (what files hold is not in it).
    """

    config: Config
    raw: dict[str, Any]
    folder: Path
    name: str
    fingerprint: str

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
    try:
        expanded = expand_variables(merged, shown_as=shown_as)
        config = Config.model_validate(expanded, context={"folder": str(folder)})
    except ValidationError as error:
        problems = {_keys(problem): problem for problem in reversed(error.errors())}  # a union has one error a member
        lines = [_describe(keys, problem, merged) for keys, problem in reversed(problems.items())]
        raise ConfigError(f"{shown_as}: {len(lines)} error(s) in the configuration:\n" + "\n".join(lines)) from None
    relevant = config.model_dump(mode="json")
    relevant["run"].pop("dir")
    api, engine = relevant["generator"].pop("api"), relevant.pop("engine")
    if api is not None:
        relevant["generator"]["api"] = {key: api[key] for key in ("base_url", "model")}
    served = {side: engine[side] and engine[side]["model"] for side in ("fine_tuned", "base")}
    relevant["engine"] = {key: engine[key] for key in ("kind", "batch_size", "max_model_len")} | served
    fingerprint = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
    return LoadedConfig(config=config, raw=merged, folder=folder, name=name, fingerprint=fingerprint)


def _overlay(settings: dict[str, Any], raw: Mapping[str, Any]) -> None:
    """Put what was written over the settings; a section that was written as a name alone stays a section."""
    for key, value in raw.items():
        if isinstance(settings.get(key), dict) and isinstance(value, dict):
            _overlay(settings[key], value)
        elif not isinstance(settings.get(key), dict):
            settings[key] = value


def section_class(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field of `Config` holds, or `None` for a plain setting."""
    members = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)


def _keys(problem: Any) -> tuple[str, ...]:
    """Return where an error is, in the file's keys; the names of a union's members are left out."""
    keys: list[str] = []
    section: type[BaseModel] | None = Config
    for depth, part in enumerate(problem["loc"]):
        unknown = problem["type"] == "extra_forbidden" and depth == len(problem["loc"]) - 1
        if section is None:
            if isinstance(part, int) or unknown:
                keys.append(str(part))
        elif part in section.model_fields:
            keys.append(str(part))
            section = section_class(section.model_fields[str(part)])
        elif unknown:
            keys.append(str(part))
    return tuple(keys)


def _describe(keys: tuple[str, ...], problem: Any, raw: Mapping[str, Any]) -> str:
    """Return one line for an error: key, problem, the value as it was written, for an unknown key the nearest one."""
    where = ".".join(keys) or "configuration"
    if problem["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for key in keys[:-1]:
            section = section_class(section.model_fields[key]) or section
        known = list(section.model_fields)
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.0)[0]
        return f"  {where}: unknown key; did you mean `{near}`? Known keys: {', '.join(known)}"
    written: Any = raw if keys[-1:] not in SECRET else None
    for key in keys:
        written = written.get(key) if isinstance(written, Mapping) else None
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"  {where}: {message}" + ("" if written is None or isinstance(written, Mapping) else f" (got {written!r})")
