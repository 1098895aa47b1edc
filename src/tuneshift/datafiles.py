"""Reading the user's JSONL and JSON files: seeds and evaluation items, with the place named in every error."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneshift.distill import Pair
from tuneshift.errors import DataError
from tuneshift.prompts.parsing import extract_text

HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""A surrogate: JSON can spell half of a character, and no file can hold it as UTF-8."""


@dataclass(frozen=True)
class Seed:
    """An example prompt of what the adapter is for; `text` is its part of the template, `id` names it in parents.

    `place` is file:line, for messages.
    """

    id: str
    place: str
    text: str
    prompt: str
    response: str | None


@dataclass(frozen=True)
class Item:
    """A held-out question with its reference answer; `place` is file:line, for messages.

    `doc` holds a benchmark's own fields, by which it grades, and `bare` the question's own text, by which it would be
    known without what the prompt puts around it; there may be several forms.
    """

    id: str
    place: str
    prompt: str
    reference: str
    doc: dict[str, Any] = field(default_factory=dict)
    bare: tuple[str, ...] = ()


def read_seeds(path: Path, template: str | None) -> list[Seed]:
    """Read seeds: one {"prompt", "response" (optional)} a line.

    Raises:
        DataError: the file or a line is wrong, a prompt does not follow `template`, or there is no seed.
    """
    seeds: list[Seed] = []
    for number, row in _rows(path, required=("prompt",), optional=("response",)):
        text = extract_text(row["prompt"], template)
        if text is None or not text.strip():
            raise DataError(
                f"{path}:{number}: the prompt {row['prompt']!r} does not follow prompt_template {template!r} with "
                "some text. Correct the line or the template."
            )
        if any(seed.prompt == row["prompt"] for seed in seeds):
            raise DataError(f"{path}:{number}: this prompt stands in an earlier line already. Remove one of them.")
        seeds.append(Seed(f"s{len(seeds):03d}", f"{path}:{number}", text.strip(), row["prompt"], row.get("response")))
    if not seeds:
        raise DataError(f'{path}: no seed in this file. Write about five lines such as {{"prompt": "..."}}.')
    return seeds


def read_prompts(path: Path, template: str | None) -> list[str]:
    """Read prompts that the user already has, one {"prompt", "response" (optional, not read)} a line, as texts.

    A text is the prompt's part of the template, as for seeds; prompts may repeat.

    Raises:
        DataError: the file or a line is wrong, a prompt does not follow `template`, or there is no prompt.
    """
    texts = []
    for number, row in _rows(path, required=("prompt",), optional=("response",)):
        text = extract_text(row["prompt"], template)
        if text is None:
            raise DataError(
                f"{path}:{number}: the prompt {row['prompt']!r} does not follow prompt_template {template!r}. "
                "Correct the line or the template."
            )
        texts.append(text.strip())
    if not texts:
        raise DataError(f'{path}: no prompt in this file. Write lines such as {{"prompt": "..."}}.')
    return texts


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs to learn, one {"prompt", "response"} a line.

    Raises:
        DataError: the file or a line is wrong, or there is no pair.
    """
    pairs = [
        Pair(row["prompt"], row["response"]) for _, row in _rows(path, required=("prompt", "response"), optional=())
    ]
    if not pairs:
        raise DataError(f'{path}: no pair in this file. Write lines such as {{"prompt": "...", "response": "..."}}.')
    return pairs


def read_items(path: Path) -> list[Item]:
    """Read evaluation items: one {"prompt", "reference"} a line.

    Raises:
        DataError: the file or a line is wrong, or there is no item.
    """
    rows = _rows(path, required=("prompt", "reference"), optional=())
    items = [Item(f"e{number:05d}", f"{path}:{number}", row["prompt"], row["reference"]) for number, row in rows]
    if not items:
        raise DataError(f'{path}: no item in this file. Write lines such as {{"prompt": "...", "reference": "..."}}.')
    return items


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) for each line of a JSONL file that is not blank; the file may be compressed (.gz).

    A file that ends in .json holds one list of objects, which may be the value of "examples".

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    data = _read(path)
    if path.suffix != ".json":
        yield from ((f"{path}:{number}", row) for number, row in _lines(path, data))
        return
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). Expected one list of objects.") from error
    rows = value.get("examples") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f'{path}: expected a list of objects, or {{"examples": [...]}}, got {type(value).__name__}.')
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, number {number} of the list: expected an object, got {type(row).__name__}.")
        yield f"{path}, number {number} of the list", row


def _read(path: Path) -> bytes:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason}). Give the path of a JSONL file.") from error
    return data.removeprefix(b"\xef\xbb\xbf")


def _lines(path: Path, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each line that is not blank."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: byte {error.start + 1} is not UTF-8. Save the file as UTF-8.") from error
        if not text:
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not valid JSON ({error}). Each line is one JSON object.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected an object, got {type(row).__name__}.")
        yield number, row


def _rows(path: Path, *, required: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each line that is not blank, checked for its keys and types."""
    expected = " and ".join(f'"{key}"' for key in required)
    for number, row in _lines(path, _read(path)):
        unknown = sorted(set(row) - set(required) - set(optional))
        missing = [key for key in required if key not in row]
        if missing or unknown:
            raise DataError(
                f"{path}:{number}: expected the keys {expected}"
                + (f" (optional: {', '.join(optional)})" if optional else "")
                + f", got {', '.join(sorted(row)) or 'none'}. Rename or remove keys so that they match."
            )
        for key, value in row.items():
            if not isinstance(value, str) or (key == "prompt" and not value.strip()) or HALF_CHARACTER.search(value):
                raise DataError(
                    f"{path}:{number}: {key} must be a string with some text, of whole characters, got {value!r}."
                )
        yield number, row
