"""The configuration: one YAML file, checked at the door and described once.

Every field's description states its unit; help texts, docs/configuration.md and the JSON schema are made from it.
Unknown keys are errors that name the nearest key, and all errors are reported at once. Relative paths start at the
YAML file's folder. `${VAR}` is replaced by the environment's value in memory only: the run directory keeps
the text as it was written.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from tuneshift.errors import ConfigError

VARIABLE = re.compile(r"\$\{(\w+)\}")
MAX_BYTES = 2**20  # a configuration is a page; a guess that stops an alias bomb before it is parsed


def _from_folder(value: str, info: ValidationInfo) -> str:
    """Make a path absolute, from the configuration file's folder."""
    folder = Path((info.context or {}).get("folder", "."))
    return str((folder / Path(value).expanduser()).resolve())


def _path_or_hub_id(value: str, info: ValidationInfo) -> str:
    """Make a model reference absolute where such a path exists; a Hub id stays as it is."""
    path = _from_folder(value, info)
    explicit = value.startswith(("/", "./", "../", "~")) or value.endswith(".gguf")
    return path if explicit or Path(path).exists() else value


def _generator_model(value: str, info: ValidationInfo) -> str:
    """Leave the names of the run's own models as they are."""
    return value if value in ("source", "base", "target") else _path_or_hub_id(value, info)


PathText = Annotated[str, AfterValidator(_from_folder)]
ModelText = Annotated[str, AfterValidator(_path_or_hub_id)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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

    @model_validator(mode="after")
    def _one_fine_tuning(self) -> SourceSection:
        if (self.adapter is None) == (self.model is None):
            raise ValueError("give exactly one of `adapter` (a PEFT adapter) and `model` (a full checkpoint)")
        return self


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
    max_candidates: int = Field(10_000, ge=1, description="Stop after this many candidates, whatever was kept.")
    max_rounds: int = Field(500, ge=1, description="Stop after this many rounds.")
    patience: int = Field(3, ge=1, description="Stop with a diagnosis after this many rounds that kept nothing.")


class CriterionSection(Section):
    """The rule that keeps; see `tuneshift.criteria`."""

    name: Literal[
        "ppl_diff", "asymmetric", "ratio", "low_low", "high_low", "high_high", "none", "random", "disagree"
    ] = Field("ppl_diff", description="The rule; `ppl_diff` keeps where PPL_F(y_f) < tau <= PPL_F(y_b).")
    tau: Annotated[float, Field(gt=1, allow_inf_nan=False)] | Literal["auto"] = Field(
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
    per_device_train_batch_size: int = Field(8, ge=1, description="Pairs in a batch.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches in an optimizer step.")
    trainer_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other argument of trl's SFTConfig (`report_to`, `bf16`, ...); it wins.",
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
    run: RunSection = Field(default_factory=RunSection, description="Where and how the run happens.")

    @model_validator(mode="after")
    def _template_has_text_once(self) -> Config:
        if self.prompt_template is not None and self.prompt_template.count("{text}") != 1:
            raise ValueError(f"prompt_template must contain {{text}} exactly once, got {self.prompt_template!r}")
        return self


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration with what it was made from.

    `raw` is the mapping as written, with overrides and without expanded variables; `folder` is where its relative
    paths start; `fingerprint` changes exactly when a setting that can change results changes.
    """

    config: Config
    raw: dict[str, Any]
    folder: Path
    name: str
    fingerprint: str


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, override and check a YAML file.

    Raises:
        ConfigError: the file cannot be read or is wrong; the message lists every error.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML file.") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(data)} bytes, at most {MAX_BYTES} are read. This is no configuration file.")
    try:
        raw = yaml.safe_load(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as `source:` and `target:`, got {type(raw).__name__}.")
    return check_config(raw, folder=path.resolve().parent, name=path.stem, overrides=overrides, shown_as=str(path))


def check_config(
    raw: Mapping[str, Any], *, folder: Path, name: str, overrides: Sequence[str] = (), shown_as: str
) -> LoadedConfig:
    """Apply overrides to a raw mapping, expand variables and check it; see `load_config`."""
    merged: dict[str, Any] = json.loads(json.dumps(raw, default=str))
    for override in overrides:
        _apply(merged, override)
    try:
        config = Config.model_validate(_expand(merged, shown_as), context={"folder": str(folder)})
    except ValidationError as error:
        problems = [_describe(problem) for problem in error.errors()]
        raise ConfigError(
            f"{shown_as}: {len(problems)} error(s) in the configuration:\n" + "\n".join(problems)
        ) from None
    relevant = config.model_dump(mode="json")
    relevant["run"].pop("dir")
    fingerprint = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
    return LoadedConfig(config=config, raw=merged, folder=folder, name=name, fingerprint=fingerprint)


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that differs between two raw mappings, as `key: before -> after`."""
    old, new = _flatten(before), _flatten(after)
    default = "(default)"
    return [
        f"{key}: {old.get(key, default)} -> {new.get(key, default)}"
        for key in sorted(old | new)
        if old.get(key, default) != new.get(key, default)
    ]


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return flat


def _apply(merged: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override!r}: expected key=value, for example --set synthesis.target_size=100.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML. Quote it.") from error
    *sections, last = key.strip().split(".")
    place = merged
    for section in sections:
        inner = place.get(section)
        if isinstance(inner, str) and section == "criterion":
            inner = {"name": inner}
        place[section] = inner if isinstance(inner, dict) else {}
        place = place[section]
    place[last] = value


def _expand(value: Any, shown_as: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(inner, shown_as) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, shown_as) for inner in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(f"{shown_as}: ${{{name}}} is not set in the environment. Export it, or write the value.")
        return os.environ[name]

    return VARIABLE.sub(variable, value)


def _describe(problem: Any) -> str:
    """Return one line for a pydantic error: key, problem, and for an unknown key the nearest known one."""
    # Members of a union (`float`, `literal['auto']`) appear in the location; they are no keys of the file.
    keys = [str(part) for part in problem["loc"] if not re.search(r"[\[\]-]", str(part))]
    where = ".".join(keys) or "configuration"
    if problem["type"] == "extra_forbidden":
        section: Any = Config
        for key in keys[:-1]:
            annotation = section.model_fields[key].annotation
            arguments = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)]
            section = next((a for a in arguments if issubclass(a, BaseModel)), annotation)
        known = list(section.model_fields)
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.0)
        return f"  {where}: unknown key; did you mean `{near[0]}`? Known keys: {', '.join(known)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    shown = "" if problem["type"] == "missing" or isinstance(given, dict) else f" (got {given!r})"
    return f"  {where}: {message}{shown}"
