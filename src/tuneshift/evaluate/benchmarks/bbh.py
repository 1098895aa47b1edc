"""BIG-Bench Hard: 27 subtasks that models find hard (Suzgun et al. 2022, arXiv 2210.09261).

Prompts, stop strings and gradings are those of the harness's group `bbh_zeroshot`, version 3. Its flexible filter
differs by subtask (lm_eval/tasks/bbh/zeroshot/utils.py, MIT licence); the functions here find the same answers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import Field

from tuneshift.datafiles import Item
from tuneshift.errors import ConfigError
from tuneshift.evaluate.benchmarks.base import Benchmark, Question
from tuneshift.evaluate.benchmarks.filters import INVALID, exact_match, extract

IGNORED = (r"\.$", ",", "\n", r"\\", '"')
NUMBER_WORDS = (  # verbatim; groups of the form (?|...) need the package `regex`
    "((?:(?:zero|one|two|three|four|five|(?:twen|thir|for|fif|six|seven|nine)(?|teen|ty)|eight(?:|een|y)|ten|eleven|twelve"
    "|fourteen|hundred|thousand|(?:m|b|tr)illion)(?:zero|one|two|three|four|five|(?:twen|thir|for|fif|six|seven|nine)"
    "(?:|teen|ty)|eight(?|een|y)|ten|eleven|twelve|fourteen|hundred|thousand|(?:m|b|tr)illion|[^\\S\r\n]|,|and|&)+)?"
    "(?:zero|one|two|three|four|five|(?:twen|thir|for|fif|six|seven|nine)(?|teen|ty)|eight(?|een|y)|ten|eleven|twelve"
    "|fourteen|hundred|thousand|(?:m|b|tr)illion))"
)


class BbhQuestion(Question):
    """A question with its options, if it has some, and the answer."""

    input: str = Field(min_length=1)
    target: str = Field(min_length=1)


def letter(response: str, question: str) -> str:
    """Return the first "(X)"; else the first option that is named by its text; else the letter behind a colon.

    Options are lettered as they come, whatever their letters are.
    """
    if found := re.findall(r"(\([A-Z]\))", response):
        return str(found[0])
    options = [_plain(text.strip()) for text in re.findall(r"\([A-Z]\)([^\n^(]*)", question)]
    letters = [chr(ord("A") + number) for number in range(len(options))]
    by_text = dict(zip(options, letters, strict=True))
    longest_first = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    if (found := re.findall(longest_first, _plain(response))) and (named := found[0].strip()):
        return f"({by_text[named]})" if named in by_text else str(named)
    if (found := re.findall(rf":[\s]*({'|'.join(letters)})", response)) and found[0]:
        return f"({found[0]})"
    return INVALID


def number(response: str, _: str) -> str:
    """Return the first number in digits, else the first one in words.

    Words that are no number, where the harness ends with an error, are no answer here.

    Raises:
        ConfigError: a package that reads number words is missing.
    """
    try:
        import regex
        from word2number import w2n
    except ImportError as error:
        raise ConfigError(
            f"evaluation.subtask: {error.name} is not installed, and numbers in words are read by it, as in the "
            "harness. Install it with pip install 'tuneshift[eval]'."
        ) from error
    if found := re.findall("([-0-9]+)", response):
        return str(found[0])
    words = regex.findall(NUMBER_WORDS, response.lower())
    try:
        return str(w2n.word_to_num(words[0].strip())) if words else INVALID
    except ValueError:
        return INVALID


def meaning(response: str, _: str, *, values: dict[str, str]) -> str:
    """Return the value of the pattern that the response matches first, case aside."""
    found = extract("|".join(values), response.lower())
    return next((value for pattern, value in values.items() if re.search(pattern, found)), INVALID)


def words(response: str, question: str) -> str:
    """Return the listed words in the order in which the response has them last."""
    listed = question.split("List:")[1].split()
    found = re.findall("|".join(rf"\b{word}\b" for word in listed), response)
    return " ".join(reversed(dict.fromkeys(reversed(found))))


def match(response: str, _: str, *, pattern: str) -> str:
    """Return the pattern's first match."""
    return extract(pattern, response)


def _plain(text: str) -> str:
    """Return the text in lower case without punctuation (Unicode's categories P)."""
    return "".join(character for character in text.lower() if not unicodedata.category(character).startswith("P"))


YES_NO = partial(match, pattern=r"\b(Yes|No|yes|no)\b")
PLAUSIBLE = {r"\b(no|not plausible)\b": "no", r"\b(yes|plausible)\b": "yes"}
TRUTHFUL = {
    r"\b(no|does not tell the truth|is not telling the truth)\b": "no",
    r"\b(yes|tells the truth|is telling the truth)\b": "yes",
}
BRACKETS = r"(?<= )([\" \[\(<{}>\)\]]+)|([\" \[\(<{}>\)\]]+)"
DEDUCTION = "A logical deduction task which requires deducing the order of a sequence of objects."
SHUFFLED = (
    "A task requiring determining the final positions of a set of objects given their initial positions and a "
    "description of a sequence of swaps."
)
SNARKS = (
    "Determine which of two sentences is sarcastic.\n\nAccording to Cambridge University Dictionary, sarcasm is "
    "\"the use of remarks that clearly mean the opposite of what they say, made in order to hurt someone's feelings or "
    'to criticize something in a humorous way." Sarcastic sentences often contain satirical or ironic utterances, '
    "hyperboles, ambivalent or witty remarks."
)
NAVIGATE = "Given a series of navigation instructions, determine whether one would end up back at the starting point."
SPORTS = "Determine whether an artificially constructed sentence relating to sports is plausible or not."
COUNTING = "Questions that involve enumerating objects and asking the model to count them."

SUBTASKS: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "boolean_expressions": (
        "Evaluate the result of a random Boolean expression.",
        partial(match, pattern=r"\b(True|False)\b"),
    ),
    "causal_judgement": ("Answer questions about causal attribution.", YES_NO),
    "date_understanding": ("Infer the date from context.", letter),
    "disambiguation_qa": ("Clarify the meaning of sentences with ambiguous pronouns.", letter),
    "dyck_languages": ("Correctly close a Dyck-n word.", partial(match, pattern=BRACKETS)),
    "formal_fallacies": (
        "Distinguish deductively valid arguments from formal fallacies.",
        partial(match, pattern=r"\b(valid|invalid)\b"),
    ),
    "geometric_shapes": ("Name geometric shapes from their SVG paths.", letter),
    "hyperbaton": ("Order adjectives correctly in English sentences.", letter),
    "logical_deduction_five_objects": (DEDUCTION, letter),
    "logical_deduction_seven_objects": (DEDUCTION, letter),
    "logical_deduction_three_objects": (DEDUCTION, letter),
    "movie_recommendation": ("Recommend movies similar to the given list of movies.", letter),
    "multistep_arithmetic_two": ("Solve multi-step arithmetic problems.", number),
    "navigate": (NAVIGATE, YES_NO),
    "object_counting": (COUNTING, number),
    "penguins_in_a_table": ("Answer questions about a table of penguins and their attributes.", letter),
    "reasoning_about_colored_objects": (
        "Answer extremely simple questions about the colors of objects on a surface.",
        letter,
    ),
    "ruin_names": ("Select the humorous edit that 'ruins' the input movie or musical artist name.", letter),
    "salient_translation_error_detection": (
        "Detect the type of error in an English translation of a German source sentence.",
        letter,
    ),
    "snarks": (SNARKS, letter),
    "sports_understanding": (SPORTS, partial(meaning, values=PLAUSIBLE)),
    "temporal_sequences": (
        "Task description: Answer questions about which times certain events could have occurred.",
        letter,
    ),
    "tracking_shuffled_objects_five_objects": (SHUFFLED, letter),
    "tracking_shuffled_objects_seven_objects": (SHUFFLED, letter),
    "tracking_shuffled_objects_three_objects": (SHUFFLED, letter),
    "web_of_lies": (
        "Evaluate a random boolean function expressed as a word problem.",
        partial(meaning, values=TRUTHFUL),
    ),
    "word_sorting": ("Sort a list of words.", words),
}
"""Each subtask's description, which stands before the question, and how its answer is found."""

FREE = ("dyck_languages", "multistep_arithmetic_two", "object_counting", "word_sorting")


def ask(question: BbhQuestion, subtask: str | None) -> tuple[str, str, dict[str, Any]]:
    """Return prompt, reference and the harness's fields.

    Raises:
        ValueError: the subtask is unknown, or a question of `word_sorting` has no list.
    """
    if subtask not in SUBTASKS:
        raise ValueError(f"which subtask is this? Set evaluation.subtask to one of {', '.join(SUBTASKS)}.")
    if subtask == "word_sorting" and not question.input.partition("List:")[2].split():
        raise ValueError(f'input: expected "List:" and words behind it, got {question.input!r}.')
    prompt = f"{SUBTASKS[subtask][0]}\n\nQ: {question.input}\nA:"
    return prompt, question.target, question.model_dump() | {"subtask": subtask}


def grade(response: str, item: Item) -> dict[str, bool]:
    """Grade by the answer found in the response (`flexible_extract`), and by the response whole (`strict_match`).

    A leading space makes `strict_match` wrong, as in the harness.

    Raises:
        ValueError: a word to sort is no pattern, as the harness takes it.
    """
    try:
        answer = SUBTASKS[item.doc["subtask"]][1](response, item.doc["input"])
    except re.error as error:
        raise ValueError(f"input: the harness reads its words as patterns, and one is none ({error}).") from error
    return {
        "flexible_extract": exact_match(answer, item.reference, ignored=IGNORED),
        "strict_match": exact_match(response, item.reference, ignored=IGNORED),
    }


def options(item: Item) -> int | None:
    """Return how many answers the question offers."""
    if item.doc["subtask"] in FREE:
        return None
    lettered = SUBTASKS[item.doc["subtask"]][1] is letter
    return len(re.findall(r"^\([A-Z]\)", item.doc["input"], re.MULTILINE)) if lettered else 2


BBH = Benchmark(
    hub=("SaylorTwift/bbh", None),
    subtasks=SUBTASKS,
    question=BbhQuestion,
    ask=ask,
    bare=lambda question: question.input,
    stem=lambda question: question.input.partition("\nOptions:")[0],
    metrics=("flexible_extract", "strict_match"),
    grade=grade,
    stop=("</s>", "Q:", "<|im_end|>"),
    max_new_tokens=256,  # the harness's default, `max_gen_toks`
    harness_task=lambda item: f"bbh_zeroshot_{item.doc['subtask']}",
    options=options,
)
