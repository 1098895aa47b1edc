"""The page's part on the training: loss by epoch, token lengths, and which tokens are trained."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from tuneshift.dataset import pairs, read_rows
from tuneshift.report.page.sources import Sources, or_missing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_ROWS = 4  # rows of the mask view; a guess at what people look at
SHOWN_TOKENS = 400  # of each; a guess
QUANTILES = (5, 25, 50, 75, 95)


def learning(sources: Sources) -> dict[str, Any]:
    """Return what the training did, and what its rows are in the target's tokens."""
    return {**sources.training, "rows": or_missing(lambda: _rows(sources))}


def _rows(sources: Sources) -> dict[str, Any]:
    from tuneshift.distill import tokenize_pairs

    tokenizer = sources.target_tokenizer
    dataset = tokenize_pairs(pairs(read_rows(sources.run.dataset)), tokenizer, max_length=None)
    trained = [sum(label != -100 for label in labels) for labels in dataset["labels"]]
    given = [len(labels) - own for labels, own in zip(dataset["labels"], trained, strict=True)]
    step = max(1, len(dataset) // SHOWN_ROWS)
    return {
        "lengths": {"prompt": _quantiles(given), "response and end": _quantiles(trained)},
        "examples": [
            tokens_of(dataset[place]["input_ids"], dataset[place]["labels"], tokenizer)
            for place in range(0, len(dataset), step)
        ][:SHOWN_ROWS],
    }


def _quantiles(lengths: list[int]) -> dict[str, float]:
    """Return the least, the quantiles in percent and the greatest of some lengths in tokens."""
    cuts = statistics.quantiles(lengths, n=100, method="inclusive") if len(lengths) > 1 else [lengths[0]] * 99
    return {"least": min(lengths), **{f"{q} %": cuts[q - 1] for q in QUANTILES}, "greatest": max(lengths)}


def tokens_of(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a row's tokens as text and how many of them, from the start, are not trained.

    Where several tokens spell one character, the last of them has it.
    """
    texts, before = [], ""
    for end in range(1, min(len(ids), SHOWN_TOKENS) + 1):
        whole = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if whole.endswith("\ufffd") and end < min(len(ids), SHOWN_TOKENS):
            texts.append("")  # a part of a character
            continue
        texts.append(whole[len(before) :])
        before = whole
    return {"tokens": texts, "untrained": labels.count(-100), "left_out": max(0, len(ids) - SHOWN_TOKENS)}
