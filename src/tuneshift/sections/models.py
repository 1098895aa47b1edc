"""The configuration's `source`, `target` and `generator`: the models of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from tuneshift.sections.api import ApiSection
from tuneshift.sections.base import ModelText, PathText, Section, path_or_hub_id


def _generator_model(value: str, info: ValidationInfo) -> str:
    """Leave the names of the run's own models as they are."""
    return value if value in ("source", "base", "target") else path_or_hub_id(value, info)


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

    kind: Literal["few_shot", "chat", "file"] = Field(
        "few_shot",
        description="`few_shot`: any model continues a list of examples. `chat`: an instruct model is asked, through "
        'its chat template, to "Generate 20 more samples like these 5" (paper, section 3.4). `file`: no model writes; '
        "the prompts are those of `prompts`.",
    )
    prompts: PathText | None = Field(
        None,
        description='`file`: JSONL with {"prompt": ..., "response": ... (optional, not read)} a line, for example '
        "logged requests. Drawn without replacement, in an order that `run.seed` sets; the loop ends with the last.",
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

    @property
    def opens_model(self) -> bool:
        """Whether prompts are written by a model that this run opens, or has open."""
        return self.kind != "file" and self.api is None

    @model_validator(mode="after")
    def _prompts_go_with_file(self) -> GeneratorSection:
        if (self.kind == "file") != (self.prompts is not None):
            raise ValueError("`prompts` and `kind: file` go together")
        return self

    @model_validator(mode="after")
    def _api_speaks_chat(self) -> GeneratorSection:
        if self.api is not None and (self.kind != "chat" or self.top_k != 0):
            raise ValueError(
                "`api` speaks chat completions: set kind: chat, and leave top_k at 0, which they do not know"
            )
        return self
