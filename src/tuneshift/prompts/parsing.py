"""Reads the samples out of what a generator model wrote.

Chat models answer "write 20 more samples" with a list of some form, often inside chatter, and seldom in the
form that was asked for. The form is found from the outside in: a list owns every line up to its next marker,
so an item keeps its inner lists, blank lines and code. A guess that goes wrong costs some samples, never the
run: no output makes `parse_list` raise, and what is half a sample or not a sample is dropped where it shows.
"""

from __future__ import annotations

import json
import re
from textwrap import dedent

_NOUN = r"(?:sample|example|prompt|item|question|instruction|text|task|query|queries|problem|request|one|list)s?"
_NUMBERED = re.compile(
    r"^(?P<indent>[ \t]*)(?P<heading>\#{1,6}[ \t]+)?(?P<bold>\*\*)?"
    rf"(?:(?P<label>{_NOUN})[ \t]*)?[#(]?(?P<number>\d{{1,3}})(?(bold)(?:\*\*)?)"
    # "1." but not "1.5"; ":" and "-" only before a space; nothing at all only for "Example 1" on its own.
    r"(?P<delimiter>\\?[.)](?!\d)|:(?=[\s*]|$)|[ \t]*[-\u2013\u2014](?=\s)|(?(label)(?=[ \t]*$)|(?!)))"
    r"(?(bold)(?:\*\*)?)[ \t]*",
    re.MULTILINE | re.IGNORECASE,
)
_BULLET = re.compile(r"^(?P<indent>[ \t]*)(?P<bullet>[-*\u2013](?=[ \t])|\u2022)[ \t]*(?=\S)", re.MULTILINE)
_JSON_START = re.compile(r"^[ \t]*(?:\{\s*\"\w+\"\s*:\s*)?\[\s*(?=[\"{])", re.MULTILINE)
_JSON_NEXT = re.compile(r"\s*(?:(?P<comma>,)\s*|\]|\Z)")
_JSON_KEYS = ("prompt", "text", "question", "instruction", "input")
_FENCED = re.compile(r"```[^\n]*\n.*?^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_GAP = re.compile(r"\n[ \t]*\n\s*?(?=[^\n]*\S)")
_GAP_OR_FENCED = re.compile(rf"{_GAP.pattern}|(?P<fenced>{_FENCED.pattern})", _FENCED.flags)
_NOTHING = re.compile(r"\s*(?:-{3,}|\*{3,}|```\w*)?\s*")
_RULES_AT_END = re.compile(r"(?:\n\s*(?:-{3,}|\*{3,}))+\s*$")
_WRAPPED = re.compile(r"\*\*((?:(?!\*\*).)*)\*\*|\"([^\"]*)\"|'([^']*)'|\u201c([^\u201c\u201d]*)\u201d", re.DOTALL)
_PLEASANTRY = r"(?:(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|no problem|great)\b[,.!: ]*)"
_INTRO = re.compile(
    rf"\W*(?:{_PLEASANTRY}+(?:(?:i can|i'd|i'll|i will|happy to)\b.*)?$|{_PLEASANTRY}*(?:here|below|these"
    rf"|(?:another )?\d+|additional|more|new|similar)\b.*\b{_NOUN}\b.*:\W*$)",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    r"\W*(?:(?:please )?let me know (?:if (?:you|these|this|any|i can)|whether|how|what)\b"
    r"|(?:i )?hope (?:this|these|that|you)\b|(?:please )?feel free to\b|is there anything\b|enjoy!"
    r"|(?:would you like|do you (?:want|need)|if you(?:'d| would)? (?:need|want|like))"
    r" (?:me|more|any|another|additional|further|to)\b"
    rf"|note(?: that|:) (?:these|the|all|i)\b|(?:these|all) {_NOUN} (?:are|cover|should|vary|follow)\b)",
    re.IGNORECASE,
)


def parse_list(text: str, *, asked: int, finished: bool = True) -> list[str]:
    """Return the items that a chat model wrote when it was asked for `asked` more samples, at most `asked`.

    Reads numbered and bullet lists, JSON arrays (of strings, or of objects with one of `_JSON_KEYS`), blocks
    between blank lines, and one item per line; a list may stand inside chatter or a code fence. A number is
    a marker only at the start of a line, in the style of the marker before it, and one above it. An array
    that breaks off keeps what came before. With `asked` = 1 a block is one item, however many lines it has. Of a text
    that is not `finished`, since it hit its length limit, the last item of a list is left out: it may be half of one.
    """
    if asked < 1:
        raise ValueError(f"asked = {asked}: at least one sample has to be asked for")
    text = text.replace("\r\n", "\n").rstrip()
    markers = _outer_list(text)
    items = _json_items(text, before=markers[0].start() if markers else len(text))
    if not items:
        items = _marked_items(text, markers) if markers else _plain_items(text.strip(), asked)
        items = items if finished else items[:-1]
    return [item for item in map(_clean, items) if item][:asked]


def extract_text(prompt: str, template: str | None) -> str | None:
    """Return what stands in `prompt` at the template's "{text}", or None when the prompt has another form.

    Without a template the whole prompt is the text.
    """
    if template is None:
        return prompt
    head, tail = _template_ends(template)
    matches = prompt.startswith(head) and prompt.endswith(tail) and len(prompt) >= len(head) + len(tail)
    return prompt[len(head) : len(prompt) - len(tail)] if matches else None


def fill_template(text: str, template: str | None) -> str:
    """Return the template with `text` at its "{text}"; other braces, in either, mean nothing."""
    if template is None:
        return text
    head, tail = _template_ends(template)
    return head + text + tail


def _template_ends(template: str) -> list[str]:
    ends = template.split("{text}")
    if len(ends) != 2:
        raise ValueError(f"expected {{text}} exactly once in the template, got {template!r}")
    return ends


def _outer_list(text: str) -> list[re.Match[str]]:
    """Return the markers of the outermost numbered or bullet list; none when there is no list.

    Markers inside code fences belong to an item, unless the whole list stands in the only fence.
    """
    masked, fences = _FENCED.subn(lambda fence: "x" * len(fence[0]), text)
    for visible in (masked, text) if fences == 1 else (masked,):
        numbers, bullets = (
            run if len(run) > 1 or (run and _starts_clean(text, run[0].start())) else []
            for run in (_longest_run(visible), _bullets(visible))
        )
        if numbers and bullets:
            # Bullets on both sides of a number hold the numbers; bullets only before them are preamble.
            return bullets if bullets[0].start() < numbers[0].start() < bullets[-1].start() else numbers
        if numbers or bullets:
            return numbers or bullets
    return []


def _bullets(text: str) -> list[re.Match[str]]:
    found = list(_BULLET.finditer(text))
    return [m for m in found if m["bullet"] == found[0]["bullet"] and not _nested(m, found[0])]


def _longest_run(text: str) -> list[re.Match[str]]:
    """Return the longest run of numbers that rise by one in one style, the first of equally long ones."""
    runs: list[list[re.Match[str]]] = []
    waiting: dict[str, list[re.Match[str]]] = {}
    for marker in _NUMBERED.finditer(text):
        parts = (marker[name] or "" for name in ("heading", "bold", "label", "delimiter"))
        style, number = " ".join(part.strip().lower() for part in parts), int(marker["number"])
        own, before = f"{number} {style}", f"{number - 1} {style}"
        run = waiting.get(before)
        if run and not _nested(marker, run[0]):
            del waiting[before]
            run.append(marker)
        else:
            run = [marker]
            runs.append(run)
        if len(run) > len(waiting.get(own, [])):
            waiting[own] = run
    return max(runs, key=len, default=[])


def _nested(marker: re.Match[str], first: re.Match[str]) -> bool:
    # One column of slack: generated text often loses the first line's leading space.
    return len(marker["indent"]) > len(first["indent"]) + 1


def _starts_clean(text: str, start: int) -> bool:
    """Whether nothing, a fence or an introduction stands before `start`."""
    line = text[:start].rstrip().rpartition("\n")[2].strip()
    return not line or line.startswith("```") or line.endswith((":", ":**")) or bool(_INTRO.match(line))


def _marked_items(text: str, markers: list[re.Match[str]]) -> list[str]:
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    items = [text[marker.end() : end] for marker, end in zip(markers, ends, strict=True)]
    items[-1] = _without_closing(items[-1], others=items[:-1])
    # "**1. Title** body": the bold that the marker opened closes inside the item.
    pairs = zip(markers, items, strict=True)
    return [item.replace("**", "", 1) if marker[0].count("**") == 1 else item for marker, item in pairs]


def _without_closing(item: str, *, others: list[str]) -> str:
    """Return the last item of a list without the chatter behind the list."""
    one_liners = len(others) > 1 and all("\n" not in other.strip() for other in others)
    for gap in _GAP.finditer(item, len(item) - len(item.lstrip())):
        rest = item[gap.end() :]
        if _CLOSING.match(rest) or (one_liners and not rest.startswith((" ", "\t", "```"))):
            return item[: gap.start()]
    head, newline, last = item.rstrip().rpartition("\n")
    return head if newline and _CLOSING.match(last) else item


def _json_items(text: str, *, before: int) -> list[str]:
    for start in _JSON_START.finditer(text, 0, before):
        if _starts_clean(text, start.start()) or text[: start.start()].endswith("\n\n"):
            return _json_array(text, start.end())
    return []


def _json_array(text: str, at: int) -> list[str]:
    """Return the samples of the array whose first element starts at `at`, up to its end or first damage."""
    decoder = json.JSONDecoder(strict=False)
    items: list[str] = []
    while True:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return items
        behind = _JSON_NEXT.match(text, at)
        if isinstance(value, dict):
            value = next((value[key] for key in _JSON_KEYS if value.get(key)), None)
        if isinstance(value, str) and behind:
            items.append(value)
        if not behind or not behind["comma"]:
            return items
        at = behind.end()


def _plain_items(text: str, asked: int) -> list[str]:
    """Return the blocks between blank lines, or the lines of the only block when several were asked for."""
    # Blank lines inside a fence do not part blocks.
    blocks = _without_chatter(_GAP_OR_FENCED.sub(lambda m: m["fenced"] or "\0", text).split("\0"))
    if len(blocks) != 1 or asked == 1:
        return blocks
    if _FENCED.fullmatch(blocks[0]) and blocks[0].count("```") == 2:
        return _plain_items(blocks[0].partition("\n")[2].rpartition("\n")[0], asked)
    return _without_chatter(blocks[0].split("\n"))


def _without_chatter(parts: list[str]) -> list[str]:
    parts = [part for part in parts if not _NOTHING.fullmatch(part)]
    while parts:
        line, _, rest = parts[0].partition("\n")
        shared = any(part.startswith(line) for part in parts[1:])
        if shared or not _INTRO.match(line):
            break
        parts = [rest, *parts[1:]] if rest else parts[1:]
    while parts and _CLOSING.match(parts[-1]):
        parts.pop()
    return [*parts[:-1], _without_closing(parts[-1], others=[])] if parts else []


def _clean(item: str) -> str:
    """Return the item without what surrounds it; nothing when a tokenizer could not encode it."""
    item = _RULES_AT_END.sub("", dedent(item).strip())
    if item.count("```") % 2:
        item = re.sub(r"\n[ \t]*```$", "", item)
    while wrapped := _WRAPPED.fullmatch(item.strip()):
        item = wrapped[wrapped.lastindex or 0]
    # Half of a surrogate pair, which JSON can spell, is no text: tokenizers refuse it.
    return "" if re.search("[\ud800-\udfff]", item) else item.strip()
