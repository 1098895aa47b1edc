"""The configuration's `engine`: what runs the models of a run, and on how many workers."""

from __future__ import annotations

import os.path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from tuneshift.sections.api import BaseUrl, KeyVariable
from tuneshift.sections.base import Section


def _python_from_folder(value: str, info: ValidationInfo) -> str:
    """Make a path absolute, from the configuration's folder; a link stays one, as a virtual environment has them."""
    folder = str((info.context or {}).get("folder", "."))
    return os.path.abspath(os.path.join(folder, os.path.expanduser(value)))


class EndpointSection(Section):
    """A model behind a server with OpenAI's completions that also returns prompt log-probabilities, such as vLLM's."""

    base_url: BaseUrl = Field(description="Address, up to what precedes `/completions`.")
    model: str = Field(min_length=1, description="The model's name on that server.")
    api_key: KeyVariable | None = Field(None, description="`${VARIABLE}` whose value is the key; null: no key.")


class EngineSection(Section):
    """What runs the models.

    Only `kind`, `batch_size`, `max_model_len` and the endpoints' models belong to what a run is: the other settings may
    change when a stopped run is continued.
    """

    kind: Literal["hf", "vllm", "openai"] = Field(
        "hf",
        description="`hf`: transformers and peft, in this process. `vllm`: a vLLM server that the run starts and ends. "
        "`openai`: F and B behind servers of your own, at `fine_tuned` and `base`.",
    )
    batch_size: int = Field(
        128,
        ge=1,
        description="Rows that are run together, and what a worker is handed at a time. Another size rounds otherwise.",
    )
    workers: int = Field(
        1, ge=1, description="Copies of the models that share the work, each a Ray actor; 1: this process, without Ray."
    )
    ray_address: str | None = Field(
        None,
        description="A Ray cluster, `host:6379`, `ray://host:10001` or `auto`, which then also runs a single worker; "
        "null: this machine, for `workers` above 1.",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of each worker; null: the machine's cores, shared among the workers."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="`vllm`: GPUs over which each copy of a model is spread.")
    gpu_memory_utilization: float = Field(
        0.85, gt=0, lt=1, description="`vllm`: share of a GPU's memory for all models of a run that are open at once."
    )
    max_model_len: int = Field(
        4096, ge=16, description="`vllm`: tokens of a prompt with its response; at most the model's own context."
    )
    python: Annotated[str, AfterValidator(_python_from_folder)] | None = Field(
        None, description="`vllm`: path of the Python of the virtual environment that has vLLM; null: this one."
    )
    reference_check: bool = Field(
        True,
        description="`vllm`, `openai`: compare log-probabilities of the seeds with transformers' at start-up, which "
        "loads the source there once. `false` where it does not fit into one device.",
    )
    fine_tuned: EndpointSection | None = Field(None, description="`openai`: where F is.")
    base: EndpointSection | None = Field(None, description="`openai`: where B is.")

    @model_validator(mode="after")
    def _endpoints_go_with_openai(self) -> EngineSection:
        if {self.kind == "openai"} != {self.fine_tuned is not None, self.base is not None}:
            raise ValueError("`kind: openai` and both of `fine_tuned` and `base` go together")
        if self.kind == "openai" and (self.workers > 1 or self.ray_address is not None):
            raise ValueError("`kind: openai` has its workers behind the server: leave `workers` and `ray_address` out")
        return self
