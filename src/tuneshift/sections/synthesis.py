"""The configuration's `synthesis` and `criterion`: the loop, and the rule that keeps."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from tuneshift.criteria import RULES
from tuneshift.sections.base import Section

LONG_LISTS = {"per_call": 20, "calls_per_round": 4}
PRESETS: dict[str, dict[str, Any]] = {
    "tuneshift": {},
    "paper": {
        **LONG_LISTS,
        "seed_share": None,
        "back_generation": 0.0,
        "probes": 0,
        "oversample": 1.0,
        "select": "first",
    },
}
"""What a preset sets in place of the defaults where nothing is said.

The defaults that are not the paper's are guesses, measured together in studies/results/snips_coverage.json.
"""


def name_alone(value: Any) -> Any:
    """Turn a criterion's bare name into its section."""
    return {"name": value} if isinstance(value, str) else value


def _is_zero(value: Any) -> bool:
    try:
        return float(value) == 0  # a variable's value is text
    except (TypeError, ValueError):
        return False


class SynthesisSection(Section):
    """The loop that writes prompts, lets F and B answer, and keeps."""

    preset: Literal["tuneshift", "paper"] = Field(
        "tuneshift",
        description="What `per_call`, `calls_per_round`, `seed_share`, `back_generation`, `probes`, `oversample` and "
        "`select` are where they are not given: `tuneshift` steers the loop to all that F knows, with "
        "the defaults below; `paper` is the paper's loop, see docs/coverage.md.",
    )
    target_size: int = Field(250, ge=1, description="Wanted kept pairs (paper, section H.1).")
    demos: int = Field(5, ge=1, description="Examples shown to the generator in a call (paper, section 3.4).")
    per_call: int = Field(
        5, ge=1, description="New prompts asked of a call; 20 where `back_generation` is 0 (paper, section 3.4)."
    )
    seed_share: float | None = Field(
        0.5,
        gt=0,
        lt=1,
        description="Weight of all seeds together when an example is drawn; null: a seed counts as a kept prompt does "
        "(paper, section 3.4). "
        "No example is shown twice in a call, so with five seeds and five examples 0.5 shows about two seeds.",
    )
    back_generation: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of calls that ask for prompts to a kind of response: examples are shown with the kinds of "
        "F's responses, without what was copied from their prompts, and the last is wanted. F answers anew, and its "
        "answer is what is kept. With `generator.api` it is 0 unless written, since a hosted generator then sees such "
        "kinds, those of the seeds' responses included.",
    )
    probes: int = Field(
        256,
        ge=0,
        description="Single words of the vocabulary that F is asked before the first round. What it says to more than "
        "one is a kind of response, and backward calls ask for prompts to it before any kept pair shows it. Where no "
        "two of the first 64 get the same answer, no more are asked. 0 where `back_generation` is 0.",
    )
    calls_per_round: int = Field(
        16,
        ge=1,
        description="Generator calls of a round; the pool grows between rounds. 4 where `back_generation` is 0.",
    )
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
    oversample: float = Field(
        2.0,
        ge=1,
        description="Keep this many times `target_size` before pairs are chosen; costs as much more. With `select: "
        "balanced` once is enough where hardly two responses are alike, as between long texts. 1 where `select` is "
        "`first`.",
    )
    select: Literal["first", "random", "balanced"] = Field(
        "balanced",
        description="Which `target_size` of the kept pairs are learnt: the `first`, drawn by a hash of their ids "
        "(`random`), or those that are left when pairs are taken out where most responses are alike (`balanced`).",
    )
    max_candidates: int = Field(10_000, ge=1, description="Stop when F has answered this many candidates.")
    max_rounds: int = Field(500, ge=1, description="Stop after this many rounds.")
    patience: int = Field(
        3,
        ge=1,
        description="Stop with a diagnosis after this many rounds that kept nothing, or in which less than a tenth of "
        "what the generator wrote was new.",
    )

    @model_validator(mode="after")
    def _chooses(self) -> Self:
        if self.probes and not self.back_generation:
            raise ValueError(
                f"synthesis.probes is {self.probes}, but without synthesis.back_generation no call asks for what they "
                "show. Set back_generation above 0, or probes: 0."
            )
        if self.oversample > 1 and self.select == "first":
            raise ValueError(
                f"synthesis.oversample is {self.oversample}, but synthesis.select: first learns the first pairs all "
                "the same. Set select: balanced or random, or oversample: 1."
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _from_preset(cls, value: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        """Lay what is written over the preset, and have what depends on it follow where it is not written."""
        if not isinstance(value, dict):
            return check(value)
        name = value.get("preset")
        settings = (PRESETS[name] if isinstance(name, str) and name in PRESETS else {}) | value
        if _is_zero(settings.get("back_generation")):  # no call asks for a kind of response
            settings = {"probes": 0, **LONG_LISTS} | settings
        if settings.get("select") == "first":
            settings = {"oversample": 1.0} | settings
        return check(settings)


class CriterionSection(Section):
    """The rule that keeps; see `tuneshift.criteria`."""

    name: Literal[
        "ppl_diff",
        "asymmetric",
        "ratio",
        "low_low",
        "high_low",
        "high_high",
        "none",
        "random",
        "length",
        "disagree",
        "lift",
        "kl",
        "entropy_drop",
        "few_shot_base",
        "target_gap",
        "vote",
        "exec",
    ] = Field(
        "ppl_diff",
        description="The rule: `ppl_diff` keeps where PPL_F(y_f) < tau <= PPL_F(y_b). Others: `asymmetric`, `ratio`, "
        "`low_low`, `high_low`, `high_high`, `none`, `random`, `length`, `disagree`. With another pass of a model: "
        "`lift`, `kl`, `entropy_drop`, `few_shot_base`, `target_gap`, `vote`; of the sandbox: `exec`. docs/method.md "
        "has the equations.",
    )
    tau: Annotated[float, Field(gt=1)] | Literal["auto"] = Field(
        1.5,
        description="Threshold, a perplexity above 1 (paper: 1.5), or `auto`: calibrated on the first "
        "`calibration` candidates to keep `keep_rate` of them, then frozen; refused for rules that read no tau.",
    )
    tau_f: float = Field(1.2, gt=1, description="`asymmetric`: PPL_F(y_f) must be below (paper, Table 8b).")
    tau_b: float = Field(1.6, gt=1, description="`asymmetric`: PPL_F(y_b) must be above (paper, Table 8b).")
    ratio: float = Field(1.5, gt=1, description="`ratio`: PPL_F(y_b) / PPL_F(y_f) at least (paper, Table 8c).")
    threshold: float = Field(
        0.405,
        description="`lift`, `kl`, `entropy_drop`: the least to keep, in nats a token; `target_gap`: in nats a byte. "
        "The default is log 1.5, the least margin of `ratio`, and for these rules a guess: `tuneshift measure` tells "
        "the quartiles of a run.",
    )
    vote_share: float = Field(
        0.6, gt=0, le=1, description="`vote`: share of the new answers that must say the same; a guess."
    )
    samples: int = Field(5, ge=1, description="`vote`: new answers of F to each prompt; a guess.")
    keep_rate: float = Field(
        0.2, gt=0, le=1, description="Share to keep, for `random` and `tau: auto` (paper: about 0.2 is kept)."
    )
    calibration: int = Field(200, ge=20, description="Candidates on which `tau: auto` is calibrated.")
    count_eos: bool = Field(False, description="Count the EOS as a response token where one was generated.")

    @model_validator(mode="after")
    def _an_automatic_tau_is_read(self) -> CriterionSection:
        if self.tau == "auto" and "tau" not in RULES[self.name].reads:
            reading = ", ".join(name for name, rule in RULES.items() if "tau" in rule.reads)
            raise ValueError(
                f"`tau: auto` calibrates tau, which criterion {self.name} does not read: leave `tau` out, or use one "
                f"of {reading}"
            )
        return self
