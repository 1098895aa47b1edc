"""Which questions of the evaluation a prompt gives away: a target that is trained on it has seen them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from tuneshift.datafiles import Item
from tuneshift.prompts.screening import normalize

LEAST_WORDS = 8
"""Words of the shortest question that is looked for inside of a prompt. GPT-3's least n-gram (Brown et al. 2020, arXiv
2005.14165, appendix C): shorter ones are found by chance."""


class HeldOut:
    """Questions that must not be trained on, by what gives them away: their prompts, and their own texts.

    A prompt gives a question away where it equals one of these after `normalize`, or contains one whole that has at
    least `LEAST_WORDS` words. Where an operator follows, or a bracket behind a bracket, the text is the beginning of
    another formula.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._ids: dict[str, set[str]] = defaultdict(set)
        self._by_opening: dict[str, list[str]] = defaultdict(list)
        for item in items:
            for form in map(normalize, (item.prompt, *item.bare)):
                self._ids[form].add(item.id)
        for form in self._ids:
            opening = next(_openings(form), None)  # words that operators join count as one there
            if opening is not None and len(re.findall(r"\w+", form)) >= LEAST_WORDS:
                self._by_opening[opening].append(form)

    def given_away_by(self, *prompts: str) -> set[str]:
        """Return the ids of the items that one of the prompts gives away."""
        forms = list(map(normalize, prompts))
        found = [own for form in forms for own in (form, *self._contained(form))]
        return set().union(*(self._ids.get(own, set()) for own in found))

    def _contained(self, form: str) -> Iterator[str]:
        for opening in _openings(form):
            for own in self._by_opening.get(opening, ()):
                follows = r"[\w()\[\]{}]" if own[-1].isalnum() else r"\w"
                if own in form and re.search(rf"(?<!\S){re.escape(own)}(?= {follows}|$)", form):
                    yield own


def _openings(form: str) -> Iterator[str]:
    """Yield every run of `LEAST_WORDS` words."""
    words = form.split()
    return (" ".join(words[at : at + LEAST_WORDS]) for at in range(len(words) - LEAST_WORDS + 1))
