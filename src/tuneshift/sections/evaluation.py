"""The configuration's `evaluation`: the questions on which the verdict rests."""

from __future__ import annotations

import re

from pydantic import Field, model_validator

from tuneshift.sections.base import PathText, Section


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
