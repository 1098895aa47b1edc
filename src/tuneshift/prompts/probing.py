"""What F says to single words: the kinds of responses that it knows, before any prompt was written.

A fine-tuning on closed answers is sure of them whatever it is asked: to a word without a question F gives one of the
answers that it learnt, or an invented one. Invented ones are hardly ever said twice (measured, see
benchmarks/results/probes_intents.json).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuneshift.coverage import probed_kinds
from tuneshift.engines.base import Decoding, derive_seed
from tuneshift.engines.source import Source
from tuneshift.prompts.parsing import fill_template
from tuneshift.run.records import Probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST = 64
"""Words that show whether F's answers are closed ones; a guess."""
WORD_STARTS = ("Ġ", "▁")
"""What byte-level BPE and SentencePiece write before a token that begins a word."""


def probe_words(tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int) -> list[str]:
    """Draw `count` lower-case words from a vocabulary, or all where it has fewer.

    Where it does not mark what begins a word, any of its tokens of letters may be one.
    """
    vocabulary = tokenizer.get_vocab()
    marked = [place for token, place in vocabulary.items() if token.startswith(WORD_STARTS)]
    texts = (str(tokenizer.decode([place])).strip() for place in marked or vocabulary.values())
    known = {text for text in texts if text.isalpha() and text == text.lower()}
    return sorted(known, key=lambda word: (derive_seed(seed, "probe", word), word))[:count]


def ask_words(
    source: Source, words: Sequence[str], *, template: str | None, decoding: Decoding, run_seed: int
) -> list[Probe]:
    """Let F answer each of `words` alone in the template; only the `FIRST`, where no two of these get the same answer.

    Then its answers are no closed ones, and further words would show no kind either. An answer that hit its limit is
    half of one and counts as none.
    """
    probes: list[Probe] = []
    for some in filter(None, (words[:FIRST], words[FIRST:])):
        prompts = {f"probe {word}": fill_template(word, template) for word in some}
        answers = source.answer(prompts, decoding=decoding, run_seed=run_seed, worth=lambda y_f: False)
        y_f = [answers[f"probe {word}"].y_f for word in some]
        ended = ["" if answer.finish_reason == "length" else answer.text.strip() for answer in y_f]
        probes += map(Probe, some, ended)
        if not probed_kinds(probes):
            break
    return probes
