"""The boundary between prompt and response, with tokenizers of the three kinds that drop or merge characters."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tuneshift.encoding import decode_response, encode_prompt, encode_response, first_stop, truncate_at_stop

SPECIAL = ["<pad>", "<eos>", "<bos>"]
LINES = [
    "play some jazz\nplay some rock\n",
    "the cat sat.\n\nthe dog sat.\n\n",
    "prix: 5 €, 12 € et 7 €\n",
    "naïve café\n",
]


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE as of GPT-2: every byte is a token, and frequent sequences are too (also across spaces)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return wrap(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """BPE as of SentencePiece: a word starts with "▁", and the first one's is dropped when decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return wrap(tokenizer)


def ending(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer with the special tokens of `template` around a text."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return tokenizer


BYTES, PIECES = byte_level(), metaspace()
PROMPT = tuple(encode_prompt(BYTES, "the cat:"))

texts = st.text(st.sampled_from("ab t€é😀\n.:"), max_size=12)
token_ids = st.lists(st.integers(0, len(BYTES) - 1), max_size=16)
stops = st.lists(st.sampled_from(["\n", "a", " t", "€", "é.", "\n\n", "😀", "the", "t."]), min_size=1, max_size=3)


def pieces(tokenizer: PreTrainedTokenizerFast, *parts: str) -> list[int]:
    """Return ids, with each of `parts` being one token or several, never joined to the next one."""
    return [token for part in parts for token in encode_response(tokenizer, part)]


def spelled(ids: Sequence[int]) -> str:
    """Return the text of byte-level ids from the bytes of each token, without the tokenizer's decoder."""
    # GPT-2's table: printable bytes stand for themselves, the others for the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}
    names = [name for name in BYTES.convert_ids_to_tokens(list(ids)) if name not in SPECIAL]
    return bytes(table[character] for name in names for character in name).decode(errors="replace")


# Joining


def test_a_prompt_gets_the_tokenizer_s_own_bos() -> None:
    ids = encode_prompt(ending(byte_level(), "<bos> $A"), "the cat")
    assert ids[0] == 2
    assert ids.count(2) == 1
    assert spelled(ids) == "the cat"


def test_a_prompt_loses_the_eos_that_a_tokenizer_appends() -> None:
    ids = encode_prompt(ending(byte_level(), "<bos> $A <eos>"), "the cat")
    assert (ids[0], ids.count(1)) == (2, 0)
    assert spelled(ids) == "the cat"


def test_a_prompt_of_nothing_but_an_appended_eos_keeps_one_token_to_start_from() -> None:
    assert encode_prompt(ending(byte_level(), "$A <eos>"), "") == [1]


def test_a_response_gets_no_special_tokens() -> None:
    ids = encode_response(ending(byte_level(), "<bos> $A <eos>"), " sat.")
    assert not {0, 1, 2} & set(ids)
    assert spelled(ids) == " sat."


@settings(deadline=None)
@given(texts, texts)
def test_prompt_and_response_join_to_the_whole_text(prompt: str, response: str) -> None:
    tokenizer = ending(byte_level(), "<bos> $A")
    ids = [*encode_prompt(tokenizer, prompt), *encode_response(tokenizer, response)]
    assert spelled(ids) == prompt + response


@settings(deadline=None)
@given(texts, texts)
def test_a_decoded_response_is_what_was_encoded(prompt: str, response: str) -> None:
    assert decode_response(BYTES, encode_prompt(BYTES, prompt), encode_response(BYTES, response)) == response


# Decoding


def test_a_decoded_response_keeps_its_leading_space() -> None:
    ids = PIECES("the cat sat.", add_special_tokens=False)["input_ids"]
    start = PIECES("the cat", add_special_tokens=False)["input_ids"]
    assert ids[: len(start)] == start
    assert PIECES.decode(ids[len(start) :]) == "sat."  # what decoding the response alone would give
    assert decode_response(PIECES, start, ids[len(start) :]) == " sat."


def test_prompt_and_response_decode_to_the_whole_text_wherever_they_are_parted() -> None:
    ids = PIECES("the cat sat.", add_special_tokens=False)["input_ids"]
    parts = [PIECES.decode(ids[:at]) + decode_response(PIECES, ids[:at], ids[at:]) for at in range(len(ids) + 1)]
    assert parts == ["the cat sat."] * (len(ids) + 1)


def test_special_tokens_do_not_appear_in_a_decoded_response() -> None:
    assert decode_response(BYTES, [2, *PROMPT], [*pieces(BYTES, " sat"), 1]) == " sat"


@settings(deadline=None)
@given(token_ids)
def test_any_ids_decode_to_the_text_of_their_bytes(ids: list[int]) -> None:
    assert decode_response(BYTES, PROMPT, ids) == spelled(ids)


# Stop strings


def test_a_response_without_a_stop_string_is_not_cut() -> None:
    assert truncate_at_stop(BYTES, PROMPT, pieces(BYTES, " sat."), ["\n", "dog"]) is None
    assert truncate_at_stop(BYTES, PROMPT, pieces(BYTES, " sat."), []) is None
    assert truncate_at_stop(BYTES, PROMPT, [], ["\n"]) is None


def test_a_stop_string_in_the_prompt_alone_cuts_nothing() -> None:
    assert truncate_at_stop(BYTES, pieces(BYTES, "the cat\n"), pieces(BYTES, " sat."), ["\n", "cat"]) is None


def test_a_stop_string_at_a_token_boundary_keeps_the_tokens_before_it() -> None:
    before = pieces(BYTES, " s", "a", "t")
    cut = truncate_at_stop(BYTES, PROMPT, [*before, *pieces(BYTES, "\n", "more")], ["\n"])
    assert cut is not None
    assert (cut.text, cut.kept) == (" sat", len(before))


def test_a_stop_string_that_spans_tokens_keeps_the_tokens_before_it() -> None:
    cut = truncate_at_stop(BYTES, PROMPT, pieces(BYTES, "b", "x", "y", "z"), ["xyz"])
    assert cut is not None
    assert (cut.text, cut.kept) == ("b", 1)


def test_a_stop_string_that_begins_inside_a_token_keeps_no_tokens() -> None:
    (token,) = pieces(BYTES, ".\n")  # one token: the corpus has it often
    cut = truncate_at_stop(BYTES, PROMPT, [*pieces(BYTES, "b"), token], ["\n"])
    assert cut is not None
    assert (cut.text, cut.kept) == ("b.", None)


def test_a_response_that_begins_with_a_stop_string_keeps_nothing() -> None:
    cut = truncate_at_stop(BYTES, PROMPT, pieces(BYTES, "\n", "sat"), ["\n"])
    assert cut is not None
    assert (cut.text, cut.kept) == ("", 0)


@pytest.mark.parametrize("stop", [["x", "y"], ["y", "x"], ["xzy", "y", "x"]])
def test_of_several_stop_strings_the_first_in_the_text_wins(stop: list[str]) -> None:
    cut = truncate_at_stop(BYTES, PROMPT, pieces(BYTES, "b", "b", "x", "b", "y"), stop)
    assert cut is not None
    assert (cut.text, cut.kept) == ("bb", 2)


def test_a_stop_string_written_twice_cuts_at_the_first() -> None:
    cut = truncate_at_stop(BYTES, PROMPT, pieces(BYTES, "b", "x", "b", "x"), ["x"])
    assert cut is not None
    assert (cut.text, cut.kept) == ("b", 1)


def test_a_character_of_several_tokens_before_the_stop_string_is_kept_whole() -> None:
    smile = pieces(BYTES, "😀")
    assert len(smile) == 4  # one token a byte: the corpus does not have it
    cut = truncate_at_stop(BYTES, PROMPT, [*smile, *pieces(BYTES, "\n")], ["\n"])
    assert cut is not None
    assert (cut.text, cut.kept) == ("😀", 4)


def test_a_stop_string_of_several_tokens_to_a_character_is_found() -> None:
    smile = pieces(BYTES, "😀")
    cut = truncate_at_stop(BYTES, PROMPT, [*pieces(BYTES, "b"), *smile, *smile], ["😀"])
    assert cut is not None
    assert (cut.text, cut.kept) == ("b", 1)


def test_half_a_character_before_the_stop_string_does_not_disturb_the_cut() -> None:
    half = pieces(BYTES, "😀")[:2]
    cut = truncate_at_stop(BYTES, PROMPT, [*pieces(BYTES, "b"), *half, *pieces(BYTES, "\n")], ["\n"])
    assert cut is not None
    assert cut.text == "b\N{REPLACEMENT CHARACTER}"
    assert cut.kept is not None
    assert spelled([*pieces(BYTES, "b"), *half][: cut.kept]) == cut.text


@settings(deadline=None)
@given(token_ids | texts.map(lambda text: encode_response(BYTES, text)), stops)
def test_the_kept_tokens_spell_the_text_before_the_stop(ids: list[int], stop: list[str]) -> None:
    whole = spelled(ids)
    positions = [at for at in range(len(whole)) if any(whole[at:].startswith(s) for s in stop)]
    cut = truncate_at_stop(BYTES, PROMPT, ids, stop)
    if not positions:
        assert cut is None
        return
    assert cut is not None
    assert cut.text == whole[: positions[0]]
    if cut.kept is None:
        assert cut.text not in [spelled(ids[:kept]) for kept in range(len(ids) + 1)]
    else:
        assert spelled(ids[: cut.kept]) == cut.text


@pytest.mark.parametrize(("text", "position"), [("", None), ("abc", 1), ("xbc", 1), ("acb", 1), ("aaa", None)])
def test_the_first_stop_is_the_leftmost_of_all(text: str, position: int | None) -> None:
    assert first_stop(text, ["c", "b"]) == position
