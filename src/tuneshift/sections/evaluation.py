"""The configuration's `evaluation`: the questions on which the verdict rests, and those that must not suffer."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.sections.base import PathText, Section

METRICS = ("exact_match", "normalized_match", "numeric", "regex")
"""Those of one's own questions; a benchmark has its own."""


class HeldOutSection(Section):
    """The part of the questions that is evaluated, for benchmarks that have no split to train on, such as BBH.

    The rest is free for seeds and training: `tuneshift.evaluate.benchmarks.base.split_held_out` returns both.
    """

    fraction: float = Field(0.5, gt=0, lt=1, description="Share of the different questions that is evaluated.")
    seed: int = Field(0, ge=0, description="Which ones: the same seed holds out the same questions.")


def check_metric(metric: str, pattern: str | None) -> None:
    """Refuse a metric that is no name or dotted path, or whose pattern is missing, not its own, or wrong."""
    if (metric == "regex") != (pattern is not None):
        raise ValueError("`pattern` and `metric: regex` go together")
    if pattern is not None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    if metric not in METRICS and "." not in metric:
        raise ValueError(f"metric {metric!r} is none of {', '.join(METRICS)} and no dotted path of a function")


class QuestionsSection(Section):
    """Questions: your own, or a public benchmark's; see docs/evaluation.md."""

    task: Literal["jsonl", "gsm8k", "bbh", "mmlu", "mbpp", "mbpp_plus"] = Field(
        "jsonl",
        description="`jsonl`: your own questions; `gsm8k`, `bbh`, `mmlu`: a benchmark's, asked as "
        "lm-evaluation-harness asks them without examples; `mbpp`, `mbpp_plus`: programming exercises, asked as "
        "EvalPlus asks them, whose answers are run in a sandbox (docs/sandbox.md).",
    )
    data: PathText | None = Field(
        None,
        description='`jsonl`: JSONL with {"prompt": ..., "reference": ...} a line, required. A benchmark: a JSONL or '
        "JSON file with its own fields; null: its dataset on the Hub. `mbpp`: mbpp.jsonl, `mbpp_plus`: MbppPlus.jsonl "
        "or .jsonl.gz; both required.",
    )
    subtask: str | None = Field(
        None,
        description="`bbh`: the subtask, such as `navigate`; null: the name of `data`. `mmlu`: a subject; null: all. "
        "`mbpp`, `mbpp_plus`: `validation`, `train` or `prompt`; null: `test`, task ids 11 to 510.",
    )
    harness: Literal["native", "lm_eval"] = Field(
        "native",
        description="Who grades a benchmark: `native`, this project, as lm-evaluation-harness 0.4.13 does; `lm_eval`, "
        "the installed lm-evaluation-harness itself. `mmlu` needs `lm_eval`.",
    )
    held_out: HeldOutSection | None = Field(None, description="Evaluate a part of the questions; null: all.")
    metric: str | None = Field(
        None,
        description="`jsonl`: `exact_match` (surrounding white space aside; the default), `normalized_match` (case, "
        "white space and punctuation but brackets and operators aside), `numeric` (last number), `regex` (the last "
        "match of `pattern`), or a Python function `module.function(response, reference) -> bool`, found from the "
        "YAML file's folder. `gsm8k`, `bbh`: `flexible_extract` (the default) or `strict_match`; both are reported. "
        "`mmlu`: `acc`. `mbpp`: `pass_at_1`. `mbpp_plus`: `plus` (the default) or `base`; both are reported.",
    )
    pattern: str | None = Field(None, description="`regex`: what to extract, its first group if it has one.")
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="Length limit in tokens; null: that of synthesis for `jsonl`, else the harness's.",
    )
    stop: tuple[str, ...] | None = Field(
        None, description="Stop strings; null: those of synthesis for `jsonl`, else the harness's."
    )
    unsafe_no_sandbox: bool = Field(
        False,
        description="`mbpp`, `mbpp_plus`: run what models write in a bare process, where it can do what you can. Only "
        "for machines that can be lost.",
    )

    @property
    def metric_name(self) -> str:
        """The metric that counts."""
        return self.metric or (METRICS if self.task == "jsonl" else BENCHMARKS[self.task].metrics)[0]

    @property
    def subtask_name(self) -> str | None:
        """The subtask that is asked; `None` where the file's name tells it, or all are."""
        return self.subtask or (None if self.task == "jsonl" else BENCHMARKS[self.task].default_subtask)

    @model_validator(mode="after")
    def _only_programs_need_a_sandbox(self) -> QuestionsSection:
        if self.unsafe_no_sandbox and (self.task == "jsonl" or BENCHMARKS[self.task].grading is None):
            raise ValueError(f"`unsafe_no_sandbox` belongs to mbpp and mbpp_plus: `task: {self.task}` runs no programs")
        return self

    @model_validator(mode="after")
    def _task_has_what_it_needs(self) -> QuestionsSection:
        if self.task != "jsonl":
            return self._check_benchmark()
        if self.data is None:
            raise ValueError("`task: jsonl` needs `data`, a file with your questions; or name a benchmark as `task`")
        if self.subtask is not None or self.harness != "native":
            raise ValueError("`subtask` and `harness` belong to a benchmark: name one as `task`, or leave them out")
        check_metric(self.metric_name, self.pattern)
        return self

    def _check_benchmark(self) -> QuestionsSection:
        benchmark = BENCHMARKS[self.task]
        if self.metric_name not in benchmark.metrics:
            raise ValueError(
                f"metric {self.metric!r} is none of {self.task}'s: {', '.join(benchmark.metrics)}; null is the first"
            )
        if self.pattern is not None:
            raise ValueError("`pattern` and `metric: regex` go together")
        if self.subtask is not None and self.subtask not in benchmark.subtasks:
            known = ", ".join(benchmark.subtasks) or "none"
            raise ValueError(f"subtask {self.subtask!r} is none of {self.task}'s: {known}")
        if self.data is None and benchmark.hub is None:
            raise ValueError(f"`task: {self.task}` needs `data`, its file: see docs/evaluation.md")
        if self.data is None and benchmark.hub and benchmark.hub[1] is None and self.subtask is None:
            raise ValueError(f"`task: {self.task}` needs `subtask`, or `data` with a subtask's name")
        if benchmark.harness_task is None and self.harness == "lm_eval":
            raise ValueError(f"`task: {self.task}` runs programs, which is done here only: set `harness: native`")
        if not benchmark.native and self.harness == "native":
            raise ValueError(f"`task: {self.task}` compares log-likelihoods: set `harness: lm_eval`")
        if not benchmark.native and self.max_new_tokens is not None:
            raise ValueError(f"`task: {self.task}` generates nothing: leave `max_new_tokens` out")
        if self.harness == "lm_eval" and self.stop is not None:
            raise ValueError("`harness: lm_eval` has its own stop strings: leave `stop` out, or set `harness: native`")
        return self


class RegressionSection(QuestionsSection):
    """Questions on something else, which the target answers before and after: did it forget?

    They leave `improved` as it is; the verdict's `regression` tells whether a loss of `margin` is ruled out. The other
    keys are those of `evaluation`.
    """

    margin: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="The loss of accuracy that would matter, as a share of the questions; to rule out 0.02 takes 149 "
        "questions without any loss, and more with some.",
    )


class EvaluationSection(QuestionsSection):
    """The questions on which the verdict rests: your own, or a public benchmark's; see docs/evaluation.md."""

    regression: RegressionSection | None = Field(None, description="Questions on something else; null: not asked.")
