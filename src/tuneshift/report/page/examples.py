"""The page's examples: every candidate with both responses, token by token where they can be told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from string import ascii_lowercase, ascii_uppercase, digits
from typing import TYPE_CHECKING, Any

from tuneshift.criteria import Criterion, decide
from tuneshift.report.page.sources import Sources, or_missing
from tuneshift.run.records import Candidate, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_BUDGET = 15_000_000  # characters of all texts, so that a page of 10,000 candidates stays below 40 MB; a guess
LEAST_TEXT = 300  # characters that every text has, however many there are; a guess
TOKEN_BUDGET = 800_000  # tokens with their surprise, at about 10 bytes each; a guess at what a browser holds easily
DIGITS = ascii_uppercase + ascii_lowercase + digits + "+/"  # base64's, in which a surprise is written


def examples(sources: Sources) -> dict[str, Any]:
    """Return every candidate as a row, and what had to be left out of the rows.

    A row's `stuck` is the reason for which no threshold can keep it, `null` where one can. A response is its text, or
    its text in `pieces`, a token each, with the `surprise` of each and of the end under F and under B, `null` where B
    did not sample these tokens.
    """
    candidates = sources.candidates
    limit = max(LEAST_TEXT, TEXT_BUDGET // (3 * max(1, len(candidates))))
    pieces = or_missing(lambda: _all_pieces(candidates, sources.source_tokenizer, limit))
    split: dict[tuple[str, str], list[str]] = {} if "missing" in pieces else pieces  # type: ignore[assignment]
    rows = [_row(candidate, sources.count_eos, split, limit) for candidate in candidates]
    answers = sum((c.y_f is not None) + (c.y_b is not None) for c in candidates)
    from_b = {(c.id, "b"): c.y_b for c in candidates if c.y_b is not None}
    return {
        "rows": rows,
        "digits": DIGITS,
        "text_limit": limit,
        "clipped": sum(_is_clipped(c, limit) for c in candidates),
        "answers": answers,
        "shaded": len(split),
        "answers_of_b": len(from_b),
        "shaded_under_b": sum(r.base_logprobs is not None and key in split for key, r in from_b.items()),
        "shading_missing": pieces.get("missing"),  # type: ignore[call-overload]
    }


def _row(candidate: Candidate, count_eos: bool, pieces: dict[tuple[str, str], list[str]], limit: int) -> dict[str, Any]:
    # `none` keeps whatever any rule can judge, so what it says else holds at every threshold.
    judged = decide(candidate, Criterion("none", count_eos=count_eos))
    unscored = candidate.y_f is not None and judged.reason.endswith("-unscored")
    responses = {
        role: response and _response(response, count_eos, pieces.get((candidate.id, role)), limit)
        for role, response in (("f", candidate.y_f), ("b", candidate.y_b))
    }
    return {
        "id": candidate.id,
        "round": candidate.round,
        "call": candidate.call_id,
        "text": clip(candidate.text, limit),
        "kept": candidate.kept,
        "reason": candidate.reason,
        "stuck": None if judged.kept or unscored else judged.reason,
        **responses,
    }


def _response(response: Response, count_eos: bool, pieces: list[str] | None, limit: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ppl": response.finite_perplexity(count_eos=count_eos),
        "tokens": response.n_tokens,
        "end": response.finish_reason,
    }
    if pieces is None:
        return found | {"text": clip(response.text, limit)}
    under_f = packed_surprise(response.token_logprobs, response.eos_logprob)
    known = response.base_logprobs is not None
    under_b = packed_surprise(response.base_logprobs or (), response.base_eos_logprob) if known else None
    return found | {"pieces": pieces, "surprise": {"F": under_f, "B": under_b}}


def packed_surprise(logprobs: Sequence[float], eos_logprob: float | None) -> str:
    """Return the surprise of each token, and of the end where there is one, in hundredths of a nat, as one short text.

    Each is 1 more than its hundredths, 0 where it is not finite, written as source maps write numbers (ECMA-426,
    base64 VLQ, here without a sign): five bits a digit, the least first, and 32 is added to every digit but the last.
    So a token of more than 74 % probability takes one digit. As JSON numbers they would take the page beyond its 6 MB
    (tests/test_page.py).
    """
    found = []
    for logprob in (*logprobs, *(() if eos_logprob is None else (eos_logprob,))):
        left = max(0, round(-100 * logprob)) + 1 if math.isfinite(logprob) else 0
        while left >= 32:
            found.append(DIGITS[32 + left % 32])
            left //= 32
        found.append(DIGITS[left])
    return "".join(found)


def clip(text: str, limit: int) -> str:
    """Return the text, or its beginning with how much more there is."""
    return text if len(text) <= limit else f"{text[:limit]} [and {len(text) - limit} more characters]"


def _is_clipped(candidate: Candidate, limit: int) -> bool:
    texts = [candidate.text, *(response.text for response in (candidate.y_f, candidate.y_b) if response)]
    return any(len(text) > limit for text in texts)


def _all_pieces(
    candidates: Sequence[Candidate], tokenizer: PreTrainedTokenizerBase, limit: int
) -> dict[tuple[str, str], list[str]]:
    """Return responses cut into their tokens by candidate and role, of kept ones first, within the budget."""
    chosen: list[tuple[tuple[str, str], Response]] = []
    left = TOKEN_BUDGET
    for candidate in sorted(candidates, key=lambda c: not c.kept):  # a stable sort
        for role, response in (("f", candidate.y_f), ("b", candidate.y_b)):
            if response is not None and 0 < response.n_tokens <= left and len(response.text) <= limit:
                chosen.append(((candidate.id, role), response))
                left -= response.n_tokens
    found = token_pieces([response for _, response in chosen], tokenizer)
    return {key: pieces for (key, _), pieces in zip(chosen, found, strict=True) if pieces is not None}


def token_pieces(responses: Sequence[Response], tokenizer: PreTrainedTokenizerBase) -> list[list[str] | None]:
    """Return each response's text cut into its tokens; `None` where the tokens do not spell the text.

    Where several tokens spell one character, the last of them has it.
    """
    if not responses:
        return []
    offsets: list[Any] = [None] * len(responses)
    if tokenizer.is_fast:
        texts = [response.text for response in responses]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        offsets = [
            spans if tuple(ids) == response.token_ids else None
            for ids, spans, response in zip(encoded["input_ids"], encoded["offset_mapping"], responses, strict=True)
        ]
    return [
        _cut(response.text, [start for start, _ in spans]) if spans else _spelt(response, tokenizer)
        for response, spans in zip(responses, offsets, strict=True)
    ]


def _cut(text: str, starts: list[int]) -> list[str]:
    bounds = [0, *starts[1:], len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


def _spelt(response: Response, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """Return the tokens' own texts, for ids that are not what the tokenizer makes of the text."""
    pieces = [str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in response.token_ids]
    return pieces if "".join(pieces) == response.text else None
