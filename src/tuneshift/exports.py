"""The kept pairs in the forms in which other trainers read them: one function a format, `FORMATS` names them.

Chat formats have no place for the white space around a response, so they leave it out; the others keep prompt and
response as they were trained on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tuneshift.dataset import Row, read_rows
from tuneshift.errors import ConfigError, RunDirectoryError
from tuneshift.run.directory import RunDirectory, jsonl, write_atomically
from tuneshift.run.ledger import Ledger

NAME = "tuneshift"  # of the dataset, where a format wants one, and of its file


@dataclass(frozen=True)
class Export:
    """What a format makes of the pairs: files by name, how many rows, and how many pairs were left out, by reason."""

    files: dict[str, bytes]
    rows: int
    left_out: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """Return how many rows there are, and how many pairs are missing for what reason."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count)
        return f"{self.rows} rows" + (f"; left out: {reasons}" if reasons else "")

    def text(self) -> str:
        """Return the one file of an export as text, for a pipe.

        Raises:
            ConfigError: there are several files, or the file is no text.
        """
        if [Path(name).suffix for name in self.files] != [".jsonl"]:
            raise ConfigError(f"{' and '.join(self.files)} cannot go to stdout. Give --output.")
        (content,) = self.files.values()
        return content.decode()


def read_pairs(run: RunDirectory) -> list[Row]:
    """Return the rows of the kept dataset, each with B's response as `base_response`, `None` where B was not asked.

    Raises:
        RunDirectoryError: there is no dataset yet, or a file is damaged.
    """
    rows = read_rows(run.dataset)
    with Ledger(run.ledger, read_only=True) as ledger:
        answers = {candidate.id: candidate.y_b.text for candidate in ledger.candidates() if candidate.y_b is not None}
    return [{**row, "base_response": answers.get(row["id"])} for row in rows]


def prompt_completion(rows: Sequence[Row]) -> Export:
    """Return trl's prompt-completion rows. Source: trl, "Dataset formats and types"."""
    return _lines([{"prompt": row["prompt"], "completion": row["response"]} for row in rows])


def messages(rows: Sequence[Row]) -> Export:
    """Return conversations with roles, as OpenAI's API and trl have them."""
    return _lines([{"messages": _turns(row, "role", "content", ("user", "assistant"))} for row in rows])


def alpaca(rows: Sequence[Row]) -> Export:
    """Return Stanford Alpaca's instruction rows."""
    return _lines([{"instruction": row["prompt"], "input": "", "output": row["response"].strip()} for row in rows])


def sharegpt(rows: Sequence[Row]) -> Export:
    """Return conversations with the `dataset_info.json` by which LLaMA-Factory finds them.

    Source: LLaMA-Factory, data/README.md, "Sharegpt Format".
    """
    info = {NAME: {"file_name": f"{NAME}.jsonl", "formatting": "sharegpt", "columns": {"messages": "conversations"}}}
    export = _lines([{"conversations": _turns(row, "from", "value", ("human", "gpt"))} for row in rows])
    return Export({**export.files, "dataset_info.json": _json(info)}, export.rows)


def axolotl(rows: Sequence[Row]) -> Export:
    """Return prompt and completion with the part of an Axolotl configuration that reads them.

    The prompt is used as it is, without a template around it; the loss is on the completion and the EOS, which Axolotl
    adds. Source: Axolotl, docs/dataset-formats/index.qmd, "Custom Instruct Prompt Format".
    """
    as_it_is = "{instruction}"
    kind = {
        "field_instruction": "prompt",
        "field_output": "completion",
        "format": as_it_is,
        "no_input_format": as_it_is,
    }
    stanza = {"datasets": [{"path": f"{NAME}.jsonl", "ds_type": "json", "type": kind}], "train_on_inputs": False}
    export = prompt_completion(rows)
    return Export({**export.files, "axolotl.yaml": yaml.safe_dump(stanza, sort_keys=False).encode()}, export.rows)


def dpo(rows: Sequence[Row]) -> Export:
    """Return preferences, F's response chosen and B's rejected, where B answered and said something else.

    B's response may be unfinished: it is what B wrote up to the length limit.

    Raises:
        RunDirectoryError: no pair has both.
    """
    reasons = {"without an answer of B": 0, "where B says the same": 0}
    chosen = []
    for row in rows:
        if row["base_response"] is None:
            reasons["without an answer of B"] += 1
        elif row["base_response"].strip() == row["response"].strip():
            reasons["where B says the same"] += 1
        else:
            chosen.append({"prompt": row["prompt"], "chosen": row["response"], "rejected": row["base_response"]})
    if not chosen:
        raise RunDirectoryError(
            f"dpo: none of the {len(rows)} kept pairs has another answer of B to reject. Run `tuneshift transfer` with "
            "synthesis.complete_scores: true, or choose another format."
        )
    export = _lines(chosen)
    return Export(export.files, export.rows, reasons)


def parquet(rows: Sequence[Row]) -> Export:
    """Return the rows with all that is known of them as one Parquet file.

    Ids, texts, perplexities under F, and how each prompt was asked for.
    """
    import pyarrow
    import pyarrow.parquet

    kinds = dict.fromkeys(("id", "prompt", "response", "base_response", "strategy", "cue"), pyarrow.string())
    kinds |= dict.fromkeys(("ppl_f", "ppl_b"), pyarrow.float64()) | {"parents": pyarrow.list_(pyarrow.string())}
    schema = pyarrow.schema(kinds)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), buffer)
    return Export({f"{NAME}.parquet": buffer.getvalue()}, len(rows))


FORMATS: dict[str, Callable[[Sequence[Row]], Export]] = {
    "prompt-completion": prompt_completion,
    "messages": messages,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "axolotl": axolotl,
    "dpo": dpo,
    "parquet": parquet,
}


def make_export(run: RunDirectory, format_name: str) -> Export:
    """Return a run's kept pairs in one of `FORMATS`.

    Raises:
        ConfigError: there is no such format. RunDirectoryError: see `read_pairs` and the format.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"--format {format_name}: expected one of {', '.join(FORMATS)}.")
    return FORMATS[format_name](read_pairs(run))


def write_export(export: Export, output: Path) -> list[Path]:
    """Write an export to the file `output`, or its files into the folder `output` where there are several.

    Raises:
        RunDirectoryError: it cannot be written, or a file is there that holds something else.
    """
    if len(export.files) == 1:
        files, other = dict(zip([output], export.files.values(), strict=True)), "file as --output"
    else:
        files = {output / name: content for name, content in export.files.items()}
        other = "folder as --output, and put together by hand what belongs together"
    taken = [path for path, content in files.items() if _holds_something_else(path, content)]
    if taken:
        raise RunDirectoryError(f"{taken[0]}: is there already and holds something else. Give another {other}.")
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


def _holds_something_else(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() != content
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a folder, or a file that we may not read
        return True


def _turns(row: Row, role: str, text: str, names: tuple[str, str]) -> list[dict[str, str]]:
    user, assistant = names
    return [{role: user, text: row["prompt"]}, {role: assistant, text: row["response"].strip()}]


def _lines(rows: list[Row]) -> Export:
    return Export({f"{NAME}.jsonl": jsonl(rows).encode()}, len(rows))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
