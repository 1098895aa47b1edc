"""Which generated prompts are worth an answer: the checks that need no model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from tuneshift.prompts.parsing import fill_template
from tuneshift.run.records import Candidate, GeneratorCall

if TYPE_CHECKING:
    from tuneshift.prompts.contamination import HeldOut

SIGN = re.compile(r"-(?=\d)")
BRACKET = re.compile(r"[()\[\]{}]")
UNANSWERED = "unanswered"
"""The reason of a candidate that passed the screen and has no answer yet."""


def normalize(text: str) -> str:
    """Return the form in which two texts count as the same: case, punctuation, spacing and encoding aside.

    Letters, numbers, marks (in many scripts a vowel is one) and symbols stay, and of punctuation what computes:
    operators, brackets, each a word of its own, and the sign of a number.
    """
    folded = SIGN.sub("\N{MINUS SIGN}", unicodedata.normalize("NFKC", text).casefold())
    spaced = BRACKET.sub(r" \g<0> ", folded)
    return " ".join(
        "".join(c if unicodedata.category(c)[0] in "LMNS" or c in "*/%&#@()[]{}" else " " for c in spaced).split()
    )


class Screen:
    """Turns a call's texts into candidates, each with the reason for which it is dropped or `UNANSWERED`.

    Args:
        seeds: prompts of the seeds; a copy of one teaches nothing new.
        held_out: questions of the evaluation; training on one would make the verdict worthless.
        seen: prompts of candidates generated before.
        fits: tells whether a prompt leaves room for a response.
        template: the prompt's template; see `Config.prompt_template`.
    """

    def __init__(
        self,
        *,
        seeds: Iterable[str],
        held_out: HeldOut,
        seen: Iterable[str],
        fits: Callable[[str], bool],
        template: str | None,
    ) -> None:
        self._known = {normalize(prompt): "duplicate" for prompt in seen}
        self._known |= {normalize(prompt): "copy of a seed" for prompt in seeds}
        self._held_out = held_out
        self._fits = fits
        self._template = template

    def sift(self, call: GeneratorCall, texts: Sequence[str | None]) -> list[Candidate]:
        """Return one candidate for each text of a call, in order; what is new counts as seen from then on."""
        candidates = []
        for number, text in enumerate(texts):
            prompt = fill_template(text or "", self._template)
            candidates.append(
                Candidate(
                    id=f"{call.id}-p{number:03d}",
                    round=call.round,
                    call_id=call.id,
                    text=text or "",
                    prompt=prompt,
                    kept=False,
                    reason=self._reason(text, prompt),
                )
            )
        return candidates

    def _reason(self, text: str | None, prompt: str) -> str:
        if text is None:
            return "unfinished or unreadable prompt"
        if not normalize(text):
            return "empty prompt"
        if self._held_out.given_away_by(prompt, text):
            return "in the evaluation set"
        form = normalize(prompt)
        if form in self._known:
            return self._known[form]
        self._known[form] = "duplicate"
        return UNANSWERED if self._fits(prompt) else "prompt too long"
