"""What generators really write, and what must come out of it."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tuneshift.prompts.parsing import (
    extract_text,
    fill_template,
    parse_list,
)

ABC = ["What is the tallest mountain?", "Name two rivers.", "Who wrote Faust?"]

FORMS = {
    "dots": "1. {}\n2. {}\n3. {}",
    "dots from six": "6. {}\n7. {}\n8. {}",
    "dots over ten": "9. {}\n10. {}\n11. {}",
    "right-aligned numbers": " 9. {}\n10. {}\n11. {}",
    "zero-padded": "01. {}\n02. {}\n03. {}",
    "first line lost its space": "1. {}\n 2. {}\n 3. {}",
    "escaped dots": "1\\. {}\n2\\. {}\n3\\. {}",
    "no space behind": "1.{}\n2.{}\n3.{}",
    "parentheses": "1) {}\n2) {}\n3) {}",
    "both parentheses": "(1) {}\n(2) {}\n(3) {}",
    "hashes": "#1: {}\n#2: {}\n#3: {}",
    "bold numbers": "**1.** {}\n**2.** {}\n**3.** {}",
    "bold numbers, bare dots": "**1**. {}\n**2**. {}\n**3**. {}",
    "bold lines": "**1. {}**\n**2. {}**\n**3. {}**",
    "colons": "1: {}\n2: {}\n3: {}",
    "examples": "Example 1: {}\nExample 2: {}\nExample 3: {}",
    "bold examples": "**Example 1:** {}\n\n**Example 2:** {}\n\n**Example 3:** {}",
    "headings": "### Example 1\n{}\n\n### Example 2\n{}\n\n### Example 3\n{}",
    "samples with dashes": "Sample 3 - {}\nSample 4 - {}\nSample 5 - {}",
    "samples with long dashes": "Sample 3 \u2013 {}\nSample 4 \u2013 {}\nSample 5 \u2013 {}",
    "rules between": "Example 1:\n{}\n\n---\n\nExample 2:\n{}\n\n---\n\nExample 3:\n{}\n\n---",
    "quotes": '1. "{}"\n2. "{}"\n3. "{}"',
    "curly quotes": "1. \u201c{}\u201d\n2. \u201c{}\u201d\n3. \u201c{}\u201d",
    "bold quotes": '1. **"{}"**\n2. **"{}"**\n3. **"{}"**',
    "blank lines between": "1. {}\n\n2. {}\n\n3. {}",
    "Windows line ends": "1. {}\r\n2. {}\r\n3. {}\r\n",
    "introduction and closing": "Here are 3 more:\n\n1. {}\n2. {}\n3. {}\n\nLet me know if you need more!",
    "closing without a blank line": "Sure!\n1. {}\n2. {}\n3. {}\nI hope these help!",
    "closing of no known phrase": "1. {}\n2. {}\n3. {}\n\nDiese Fragen decken mehrere Themen ab.",
    "introduction of no known phrase": "Drei weitere Fragen\n1. {}\n2. {}\n3. {}",
    "introduction with a number": "I wrote 3, as in the year\n2024. They follow.\n\n1. {}\n2. {}\n3. {}",
    "preamble of bullets": "I kept them:\n- short\n- varied\n\n1. {}\n2. {}\n3. {}",
    "in a fence": "Here you go:\n```\n1. {}\n2. {}\n3. {}\n```\nLet me know if this works.",
    "hyphens": "- {}\n- {}\n- {}",
    "asterisks": "* {}\n* {}\n* {}",
    "bullets": "\u2022 {}\n\u2022 {}\n\u2022 {}",
    "bullets in chatter": "Of course! Here are 3:\n\n- {}\n- {}\n- {}\n\nFeel free to ask for more.",
    "blocks": "{}\n\n{}\n\n{}",
    "blocks in chatter": "Here are 3 more samples:\n\n{}\n\n{}\n\n{}\n\nWould you like more?",
    "blocks between rules": "{}\n\n---\n\n{}\n\n---\n\n{}",
    "blocks in a fence": "Here are 3 samples:\n\n```text\n{}\n\n{}\n\n{}\n```",
    "lines": "{}\n{}\n{}\n",
    "lines in chatter": "Sure, here are 3 more questions:\n{}\n{}\n{}\nHope this helps!",
    "lines between blank lines": "Here are 3 more texts:\n\n{}\n{}\n{}\n\nLet me know if you like them.",
    "lines in a fence": "```\n{}\n{}\n{}\n```",
    "JSON": '["{}", "{}", "{}"]',
    "JSON in lines": '[\n  "{}",\n  "{}",\n  "{}"\n]',
    "JSON with a comma too many": '["{}", "{}", "{}",]',
    "JSON in a fence": 'Sure, no problem.\n\n```json\n["{}", "{}", "{}"]\n```\n\nLet me know!\n\n1. Really',
    "JSON in chatter": 'Here are 3 more samples:\n["{}", "{}", "{}"]\nLet me know if you need more.',
    "JSON in an object": '{{"samples": [\n"{}",\n"{}",\n"{}"]}}',
    "JSON that breaks off": '["{}", "{}", "{}", "What is the sm',
    "JSON with a damaged tail": '["{}", "{}", "{}", "say "hi" twice", "x"]',
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_forms(form: str) -> None:
    assert parse_list(form.format(*ABC), asked=3) == ABC


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_more_than_asked(form: str) -> None:
    assert parse_list(form.format(*ABC), asked=2) == ABC[:2]


@pytest.mark.parametrize("key", ["prompt", "text", "question", "input", "instruction"])
def test_json_objects(key: str) -> None:
    listed = json.dumps([{"id": 7, key: text, "tags": ["x"]} for text in ABC], indent=2)
    assert parse_list(listed, asked=3) == ABC
    assert parse_list(f"Here you go:\n\n```json\n{listed}\n```\nEnjoy!", asked=3) == ABC


def test_json_leaves_out_what_is_not_a_sample() -> None:
    mixed = [
        {"prompt": "a"},
        {"other": "b"},
        {"instruction": "c", "input": ""},
        {"text": 4},
        "",
        "\ud83d",
        "d",
    ]
    assert parse_list(json.dumps(mixed), asked=9) == ["a", "c", "d"]


CODE = """Here are 3 more samples:

1. What does this print?

```python
def f(x):

    # 2. doubles x
    return {"a": [x, 2 * x]}

print(f(3))
```

2. Rewrite without a loop:
total = 0

for i in range(3):
    total += i
3. Explain
   this {text} and {} template.

Let me know if you want harder ones!"""


def test_code_items_keep_their_blank_lines_and_braces() -> None:
    first, second, third = parse_list(CODE, asked=3)
    assert first.startswith("What does this print?\n\n```python\ndef f(x):\n\n    # 2.")
    assert first.endswith("print(f(3))\n```")
    assert second == "Rewrite without a loop:\ntotal = 0\n\nfor i in range(3):\n    total += i"
    assert third == "Explain\n   this {text} and {} template."


ADVERSARIAL = {
    "number inside a line": (
        "1. add 3. things\n2. see 1. and 2. there",
        ["add 3. things", "see 1. and 2. there"],
    ),
    "number that is not next": ("1. Sort:\n7. b\n9. a\n2. Next", ["Sort:\n7. b\n9. a", "Next"]),
    "decimal at the start of a line": ("1. Round\n2.5 up\n2. Next", ["Round\n2.5 up", "Next"]),
    "time at the start of a line": ("1: At\n2:30 what?\n2: Next", ["At\n2:30 what?", "Next"]),
    "steps in another style": ("1. Do\nStep 2: a\n2) b\n2. Next", ["Do\nStep 2: a\n2) b", "Next"]),
    "inner list, indented": (
        "1. Rank:\n   1. a\n   2. b\n   3. c\n2. Next\n3. Last",
        ["Rank:\n   1. a\n   2. b\n   3. c", "Next", "Last"],
    ),
    "bullets inside numbers": ("1. Pick:\n- a\n- b\n2. Next", ["Pick:\n- a\n- b", "Next"]),
    "numbers inside bullets": ("- Rank:\n1. a\n2. b\n- Next", ["Rank:\n1. a\n2. b", "Next"]),
    "bullets inside bullets": ("- Pick:\n  - a\n  - b\n- Next", ["Pick:\n  - a\n  - b", "Next"]),
    "list inside a fence": ("1. Fix:\n```\n1. a\n2. b\n```\n2. Next", ["Fix:\n```\n1. a\n2. b\n```", "Next"]),
    "array inside numbers": ('1. Sort:\n["b", "a"]\n2. Next', ['Sort:\n["b", "a"]', "Next"]),
    "array inside blocks": ('What is it?\n["b", "a"]\n\nNext', ['What is it?\n["b", "a"]', "Next"]),
    "numbers inside JSON": ('["Rank:\\n1. a\\n2. b", "Next"]', ["Rank:\n1. a\n2. b", "Next"]),
    "raw line breaks inside JSON": ('["Rank:\n1. a\n2. b", "Next"]', ["Rank:\n1. a\n2. b", "Next"]),
    "lists in the fences of blocks": (
        "Fix:\n```yaml\n- a\n\n- b\n```\n\nRun:\n```sh\n- c\n```",
        ["Fix:\n```yaml\n- a\n\n- b\n```", "Run:\n```sh\n- c\n```"],
    ),
    "blocks that are fences": ("```\na\nb\n```\n```\nc\n```\n\nd", ["```\na\nb\n```\n```\nc\n```", "d"]),
    "first line shared by blocks": (
        "Here is a question:\nWho?\n\nHere is a question:\nWhy?",
        ["Here is a question:\nWho?", "Here is a question:\nWhy?"],
    ),
    "words that only look like a closing": (
        "play jazz\nlet me know if it rains in Rome",
        ["play jazz", "let me know if it rains in Rome"],
    ),
    "title in bold": ("1. **Maths** add\n2. **Art** draw", ["**Maths** add", "**Art** draw"]),
    "title in bold with its number": (
        "**1. Maths** add 2**3\n**2. Art** draw",
        ["Maths add 2**3", "Art draw"],
    ),
    "two quotations": ('1. "a" or "b"\n2. "c"', ['"a" or "b"', "c"]),
    "code after an empty marker line": ("1.\n    if x:\n        y\n2.\n    z", ["if x:\n    y", "z"]),
    "empty items": ('1. a\n2.\n3. ""\n4. b', ["a", "b"]),
    "unicode": ("1. 東京は？\n2. 🗻 naïve “x” y", ["東京は？", "🗻 naïve “x” y"]),  # noqa: RUF001
    "lone item": ("Here is one more sample:\n6. Who?", ["Who?"]),
    "number in the last of some lines": ("Who?\nWhat?\n3. of May?", ["Who?", "What?", "3. of May?"]),
    "year in the first of some lines": ("2001: whose film?\nWho?", ["2001: whose film?", "Who?"]),
    "Windows line ends inside": ("1. a\r\nb\r\n2. c", ["a\nb", "c"]),
    "JSON behind unknown words": ('Bitte sehr.\n\n["a", "b"]', ["a", "b"]),
    "JSON damaged in an element": ('["a", "b", "say "hi" twice", "c"]', ["a", "b"]),
    "nothing": ("", []),
    "blank": (" \n\n\t\n", []),
    "chatter alone": ("Sure! I can help with that.", []),
}


@pytest.mark.parametrize(("text", "items"), ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
def test_adversarial(text: str, items: list[str]) -> None:
    assert parse_list(text, asked=9) == items


def test_one_asked_is_one_item_of_any_number_of_lines() -> None:
    assert parse_list("Here is one more sample:\n\nRoses are red,\nviolets are?", asked=1) == [
        "Roses are red,\nviolets are?"
    ]


def test_asking_for_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="asked = 0"):
        parse_list("1. a", asked=0)


def is_plain(text: str) -> bool:
    return text == text.strip() != "" and not re.match(r"[\"'*\u201c]", text)


single_lines = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), min_size=1)
    .map(str.strip)
    .filter(is_plain),
    min_size=1,
    max_size=12,
)


@given(texts=single_lines, start=st.integers(0, 30))
@example(texts=["2. a", "1. b", "3"], start=1)
@example(texts=["```", "x", "```"], start=1)
@example(texts=["a", "Let me know if you need more", "Sure!"], start=6)
@example(texts=["---", "[", '{"prompt": "a"}'], start=1)
def test_numbered_round_trip(texts: list[str], start: int) -> None:
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start))
    assert parse_list(listed, asked=len(texts)) == texts


@given(texts=single_lines, bullet=st.sampled_from("-*\u2022"))
@example(texts=["- a", "1. b", "2. c"], bullet="-")
def test_bullet_round_trip(texts: list[str], bullet: str) -> None:
    assert parse_list("\n".join(f"{bullet} {text}" for text in texts), asked=len(texts)) == texts


@given(
    texts=single_lines,
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
    key=st.none() | st.just("text"),
)
def test_json_round_trip(texts: list[str], indent: int | None, ascii_only: bool, key: str | None) -> None:
    elements = [{key: text} for text in texts] if key else texts
    listed = json.dumps(elements, indent=indent, ensure_ascii=ascii_only)
    assert parse_list(f"Here you go:\n```json\n{listed}\n```", asked=len(texts)) == texts


fragments = st.sampled_from(
    ["1. ", "2) ", "- ", "\n", "\n\n", "```", "**", '["', '"]', "{", "Sample 1", ":", '"', "a "]
)


@given(st.lists(fragments | st.text(max_size=5), max_size=40).map("".join), st.integers(1, 5))
def test_no_output_breaks_the_parser(text: str, asked: int) -> None:
    items = parse_list(text, asked=asked)
    assert len(items) <= asked
    assert all(item == item.strip() != "" for item in items)


@pytest.mark.parametrize(
    "unit",
    ["\n", " \n", "1. a\n", "- \n", "```\n", "```x\na", '["', "[{", "**", "here are one:", "---\n", '"', " "],
)
@pytest.mark.timeout(30)
def test_degenerate_repetition_does_not_hang(unit: str) -> None:
    assert len(parse_list(unit * (8000 // len(unit)), asked=20)) <= 20


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("1. a one\n2. b two\n3. c thr", ["a one", "b two"]),
        ("1. a one\n2. b two\n3.", ["a one", "b two"]),
        ("1. a one\n2. b two\n3. c three\n4. d four\n5. e fi", ["a one", "b two", "c three"]),
        ('["a one", "b two", "c thr', ["a one", "b two"]),
        ("a one\n\nb two\n\nc thr", ["a one", "b two"]),
        ("a o", []),
        ("", []),
    ],
)
def test_of_a_text_that_was_cut_off_only_the_half_item_is_left_out(text: str, items: list[str]) -> None:
    assert parse_list(text, asked=3, finished=False) == items


def test_a_model_that_is_stuck_on_line_breaks_is_read_at_once() -> None:
    """Quadratic in the line breaks, this took longer than any run."""
    assert parse_list("1. a\n2. b\n3. c" + "\n" * 2_000_000, asked=3) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("prompt", "template", "text"),
    [
        ("any {prompt}", None, "any {prompt}"),
        ("Q: Who?\nA:", "Q: {text}\nA:", "Who?"),
        ("Q: {text} {0}\nA:", "Q: {text}\nA:", "{text} {0}"),
        ('{"q": "Who?"} {}', '{"q": "{text}"} {}', "Who?"),
        ("Q: \nA:", "Q: {text}\nA:", ""),
        ("Q: Who?", "Q: {text}\nA:", None),
        ("Who?\nA:", "Q: {text}\nA:", None),
        ("aba", "ab{text}ba", None),
    ],
)
def test_extract_text(prompt: str, template: str | None, text: str | None) -> None:
    assert extract_text(prompt, template) == text


@given(text=st.text(), head=st.text(), tail=st.text(), has_template=st.booleans())
@example(text="{text}", head="{", tail="}{}", has_template=True)
def test_fill_then_extract_is_the_identity(text: str, head: str, tail: str, has_template: bool) -> None:
    template = head + "{text}" + tail if has_template else None
    assert extract_text(fill_template(text, template), template) == text


@pytest.mark.parametrize("template", ["", "no placeholder {}", "{text} twice {text}"])
def test_a_template_has_one_placeholder(template: str) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        fill_template("x", template)
    with pytest.raises(ValueError, match="exactly once"):
        extract_text("x", template)
