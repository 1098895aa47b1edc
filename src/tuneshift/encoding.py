"""Where text becomes token ids, and back: the boundary between prompt and response lives here only.

The contract, shared by generation, scoring, training and evaluation:

* the prompt is encoded with the tokenizer's own special tokens (a BOS where the model has one);
* the response is encoded without special tokens and appended, so a response owns its leading space;
* training appends one EOS; perplexity counts response tokens without it;
* a response ends before the first stop string, and its tokens are cut before anything is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the prompt's token ids, with the special tokens the tokenizer adds at the start.

    Tokenizers that also append an EOS (T5 style) would end the text before the response starts, so a
    trailing EOS is removed.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=True)["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Return the response's token ids, without special tokens and without EOS."""
    ids: list[int] = tokenizer(response, add_special_tokens=False)["input_ids"]
    return ids


def decode_response(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """Return the text that `response_ids` add behind `prompt_ids`.

    Both are decoded together: tokenizers of the SentencePiece kind drop the space of a text's first token,
    and the response's leading space is part of the response.
    """
    whole = _decode(tokenizer, [*prompt_ids, *response_ids])
    start = _decode(tokenizer, prompt_ids)
    return whole[len(start) :] if whole.startswith(start) else _decode(tokenizer, response_ids)


@dataclass(frozen=True)
class Reader:
    """What a model can read: `context_length` tokens in all, `None` where unknown, of ids below `vocabulary_size`."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int | None
    vocabulary_size: int

    def objection(self, ids: Sequence[int], *, room: int) -> str | None:
        """Tell why the model cannot read a prompt's ids and write `room` tokens behind them; `None` if it can."""
        name = self.tokenizer.name_or_path
        if max(ids, default=0) >= self.vocabulary_size:
            return (
                f"the tokenizer of {name} gives it the token id {max(ids)}, but the model has embeddings for "
                f"{self.vocabulary_size} ids only"
            )
        if self.context_length is not None and len(ids) + room > self.context_length:
            return (
                f"its {len(ids)} tokens and {room} for the response do not fit into the context of {name}, "
                f"{self.context_length} tokens"
            )
        return None

    def can_learn(self, prompt: str, response: str) -> bool:
        """Tell whether the model can read a prompt with its response and the EOS."""
        ids = [*encode_prompt(self.tokenizer, prompt), *encode_response(self.tokenizer, response)]
        return self.objection(ids, room=1) is None


@dataclass(frozen=True)
class Truncation:
    """A response cut before its first stop string.

    `kept` counts the leading tokens that spell `text` exactly; it is `None` when the stop string begins
    inside a token, so that no number of whole tokens spells the text and it has to be encoded anew.
    """

    text: str
    kept: int | None


def truncate_at_stop(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    stop: Sequence[str],
) -> Truncation | None:
    """Cut a response before the first of `stop`; `None` when it contains none of them."""
    text = decode_response(tokenizer, prompt_ids, response_ids)
    cut = first_stop(text, stop)
    if cut is None:
        return None
    for kept in range(len(response_ids) + 1):
        prefix = decode_response(tokenizer, prompt_ids, response_ids[:kept])
        if prefix.startswith(text[:cut]):
            return Truncation(text=text[:cut], kept=kept if prefix == text[:cut] else None)
    raise AssertionError(f"no prefix of {response_ids!r} decodes to {cut} characters of {text!r}")


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return the position of the first stop string in `text`, or `None`."""
    return min((at for s in stop if (at := text.find(s)) >= 0), default=None)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
