"""The configuration's `generator.api`: where a hosted prompt generator is, how it is asked, and what it may cost."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tuneshift.configfile import VARIABLE
from tuneshift.sections.base import Section


def _server_address(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#@]+[^\s?#@]*", value):
        raise ValueError("it must be http:// or https://, without a user name, `?` or `#`")
    return value


def _variable_alone(value: str) -> str:
    if not VARIABLE.fullmatch(value):
        raise ValueError(
            "it must be a variable such as ${OPENAI_API_KEY}: a key in a file or in the shell's history is "
            "soon somebody else's. Export it, and revoke this one if it was shared"
        )
    return value


BaseUrl = Annotated[str, AfterValidator(_server_address)]
KeyVariable = Annotated[str, AfterValidator(_variable_alone)]


class ApiSection(Section):
    """A hosted G, for example the paper's GPT-4o, behind any server that knows OpenAI's chat completions.

    It sees seeds and kept prompts, and responses with `synthesis.back_generation` alone; `tuneshift plan` asks it for
    20 prompts. Only `base_url` and `model` belong to what a run is: the others may change when a stopped run is
    continued.
    """

    base_url: BaseUrl = Field(
        "https://api.openai.com/v1", description="Address, up to what precedes `/chat/completions`."
    )
    model: str = Field("gpt-4o", min_length=1, description="The model's name on that server (paper: GPT-4o).")
    api_key: KeyVariable | None = Field(
        None,
        description="`${VARIABLE}` whose value is the key, for example `${OPENAI_API_KEY}`; it is read when the first "
        "request is made and stored nowhere. null: no key, for a local server.",
    )
    limit_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="What the server calls the length limit; OpenAI's reasoning models know the second."
    )
    concurrency: int = Field(
        8, ge=1, description="Requests at the same time; a round has `synthesis.calls_per_round` to make."
    )
    requests_per_minute: float | None = Field(None, gt=0, description="Rate limit, evenly spaced; null: none.")
    tokens_per_minute: float | None = Field(
        None, gt=0, description="Rate limit; a request counts with the most tokens that it may take. null: none."
    )
    timeout: float = Field(60, gt=0, description="Seconds without a byte from the server after which to ask again.")
    max_attempts: int = Field(10, ge=1, description="Attempts at one request before the run stops.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Budget of the run in tokens, prompts included; checked before each request. In a study it holds "
        "for all cells and replicates that ask this model together. null: none.",
    )
    max_cost: float | None = Field(None, gt=0, description="The same in the currency of the prices. null: none.")
    price_per_million_input_tokens: float | None = Field(None, ge=0, description="Price of 1,000,000 prompt tokens.")
    price_per_million_output_tokens: float | None = Field(None, ge=0, description="Price of 1,000,000 written tokens.")

    @model_validator(mode="after")
    def _cost_needs_prices(self) -> ApiSection:
        prices = (self.price_per_million_input_tokens, self.price_per_million_output_tokens)
        if (self.max_cost is not None and None in prices) or prices.count(None) == 1:
            raise ValueError("`max_cost` needs both price_per_million_input_tokens and price_per_million_output_tokens")
        return self
