"""Every export says what the pairs say, and loads in the library that it is for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import yaml
from conftest import Tiny
from pydantic import BaseModel, ConfigDict, ValidationError
from test_transfer import run_cli

from tuneshift.errors import RunDirectoryError
from tuneshift.exports import FORMATS, read_pairs, write_export
from tuneshift.run.directory import RunDirectory, jsonl
from tuneshift.run.ledger import Ledger, RoundSummary
from tuneshift.run.records import Candidate, GeneratorCall, Response

# id: prompt, y_f, y_b
PAIRS: dict[str, tuple[str, str, str | None]] = {
    "r0-c0-p0": ("Request: play jazz\nIntent:", " SearchEvent", " i like jazz"),
    "r0-c0-p1": ('Request: "{book}" a table\nIntent:', " BookRestaurant\n", None),
    "r0-c0-p2": ("Request: rate this novel\nIntent:", " RateBook", "RateBook "),
    "r0-c0-p3": ("Request: wie wird\u2028das Wetter?\nIntent:", " GetWeather", ""),
}


def response(text: str) -> Response:
    return Response(text, (5, 6), (-0.25, -0.5), None, "eos", reencoded=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run whose ledger and dataset hold PAIRS."""
    directory = RunDirectory(tmp_path / "run")
    directory.dataset.parent.mkdir(parents=True)
    candidates = [
        Candidate(name, 0, "r0-c0", p, p, True, "kept", response(f), None if b is None else response(b))
        for name, (p, f, b) in PAIRS.items()
    ]
    with Ledger(directory.ledger) as ledger:
        ledger.record_calls([GeneratorCall("r0-c0", 0, (), "", ("",), (True,), 1, 0.1, {})])
        ledger.record_round(RoundSummary(0, 1.5, 1.0, {}), candidates)
    rows = [
        {"id": name, "prompt": p, "response": f, "ppl_f": 1.5, "ppl_b": None if b is None else 9.0}
        for name, (p, f, b) in PAIRS.items()
    ]
    directory.dataset.write_text(jsonl(rows), encoding="utf-8")
    return directory.path


def exported(run: Path, name: str, output: Path) -> list[Path]:
    return write_export(FORMATS[name](read_pairs(RunDirectory.existing(run))), output)


def loaded(kind: str, path: Path, cache: Path) -> list[dict[str, Any]]:
    from datasets import load_dataset

    return list(load_dataset(kind, data_files=str(path), split="train", cache_dir=str(cache)))


@pytest.mark.parametrize("name", ["prompt-completion", "messages", "alpaca", "sharegpt", "axolotl", "dpo", "parquet"])
def test_each_format_loads_in_datasets_as_often_as_there_are_rows(run: Path, tmp_path: Path, name: str) -> None:
    paths = exported(run, name, tmp_path / "out")
    data = next(path for path in paths if path.name not in ("dataset_info.json", "axolotl.yaml"))
    rows = loaded("parquet" if name == "parquet" else "json", data, tmp_path / "cache")
    assert len(rows) == (2 if name == "dpo" else len(PAIRS))


def test_every_format_is_tested_above_and_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(FORMATS) == {"prompt-completion", "messages", "alpaca", "sharegpt", "axolotl", "dpo", "parquet"}
    assert run_cli("export", "--help") == 0
    said = "".join(capsys.readouterr().out.split()).replace("│", "")
    documented = (Path(__file__).parents[1] / "docs/publishing.md").read_text()
    assert all(name in said and f"| `{name}` |" in documented for name in FORMATS)


def test_texts_stay_as_they_were_trained_on(run: Path, tmp_path: Path) -> None:
    (path,) = exported(run, "prompt-completion", tmp_path / "out.jsonl")
    assert [(row["prompt"], row["completion"]) for row in loaded("json", path, tmp_path / "cache")] == [
        (prompt, y_f) for prompt, y_f, _ in PAIRS.values()
    ]


def test_parquet_tells_a_missing_answer_from_an_empty_one(run: Path, tmp_path: Path) -> None:
    (path,) = exported(run, "parquet", tmp_path / "out.parquet")
    rows = loaded("parquet", path, tmp_path / "cache")
    assert [row["base_response"] for row in rows] == [y_b for _, _, y_b in PAIRS.values()]
    assert [row["ppl_b"] for row in rows] == [9.0, None, 9.0, 9.0]
    assert [row["id"] for row in rows] == list(PAIRS)


# --- LLaMA-Factory. Source: hiyouga/LLaMA-Factory, data/README.md at 2ad9871: every field, with its default ---


class Documented(BaseModel):
    """What the documentation names and nothing else, each value of the type that it tells."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Columns(Documented):
    prompt: str = "instruction"
    query: str = "input"
    response: str = "output"
    history: str | None = None
    messages: str = "conversations"
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None


class Tags(Documented):
    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


class Description(Documented):
    """An entry of `dataset_info.json`; the sources before `file_name` go before it, and none is a file here."""

    hf_hub_url: None = None
    ms_hub_url: None = None
    script_url: None = None
    cloud_file_name: None = None
    file_name: str
    formatting: Literal["alpaca", "sharegpt"] = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    columns: Columns = Columns()
    tags: Tags = Tags()


class AlpacaRow(Documented):
    instruction: str
    input: str = ""
    output: str
    system: str | None = None
    history: list[tuple[str, str]] | None = None


def prompts_and_replies(description: Description, row: dict[str, Any]) -> tuple[str, str]:
    """Read a row as the documentation says that it is read."""
    columns, tags = description.columns, description.tags
    if description.formatting == "alpaca":
        known = AlpacaRow(**row)
        assert (columns.prompt, columns.query, columns.response) == ("instruction", "input", "output")
        return "\n".join(filter(None, (known.instruction, known.input))), known.output
    assert set(row) == {columns.messages}
    turns = row[columns.messages]
    assert [set(turn) for turn in turns] == [{tags.role_tag, tags.content_tag}] * 2
    # "human and observation should appear in odd positions, while gpt and function should appear in even positions"
    assert [turn[tags.role_tag] for turn in turns] == [tags.user_tag, tags.assistant_tag]
    return turns[0][tags.content_tag], turns[1][tags.content_tag]


def test_sharegpt_is_what_llama_factory_documents(run: Path, tmp_path: Path) -> None:
    exported(run, "sharegpt", tmp_path / "data")
    info = json.loads((tmp_path / "data/dataset_info.json").read_text())
    assert list(info) == ["tuneshift"]  # the name that docs/publishing.md gives
    description = Description(**info["tuneshift"])
    assert description.formatting == "sharegpt"
    rows = loaded("json", tmp_path / "data" / description.file_name, tmp_path / "cache")
    assert [prompts_and_replies(description, row) for row in rows] == [
        (prompt, y_f.strip()) for prompt, y_f, _ in PAIRS.values()
    ]


def test_alpaca_is_what_llama_factory_documents(run: Path, tmp_path: Path) -> None:
    exported(run, "alpaca", tmp_path / "data/tuneshift.jsonl")
    documented = (Path(__file__).parents[1] / "docs/publishing.md").read_text()
    (entry,) = re.findall(r'`("tuneshift": {.*?})`', documented)
    description = Description(**json.loads(f"{{{entry}}}")["tuneshift"])
    assert description.formatting == "alpaca"
    rows = loaded("json", tmp_path / "data" / description.file_name, tmp_path / "cache")
    assert [prompts_and_replies(description, row) for row in rows] == [
        (prompt, y_f.strip()) for prompt, y_f, _ in PAIRS.values()
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"file": "a.jsonl"},
        {"file_name": "a.jsonl", "formatting": "messages"},
        {"file_name": "a.jsonl", "columns": {"conversations": "messages"}},
        {"file_name": "a.jsonl", "tags": {"role": "from"}},
        {"file_name": "a.jsonl", "hf_hub_url": "me/pairs"},
    ],
)
def test_another_description_is_none_of_llama_factory(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Description(**wrong)


def test_other_datasets_in_the_folder_are_not_written_over(run: Path, tmp_path: Path) -> None:
    exported(run, "sharegpt", tmp_path / "data")
    exported(run, "sharegpt", tmp_path / "data")  # the same again changes nothing
    (tmp_path / "data/dataset_info.json").write_text('{"mine": {}}')
    with pytest.raises(RunDirectoryError, match="holds something else"):
        exported(run, "sharegpt", tmp_path / "data")
    assert (tmp_path / "data/dataset_info.json").read_text() == '{"mine": {}}'


@pytest.mark.parametrize("taken", [Path.mkdir, lambda path: path.write_text("mine")])
def test_a_single_file_is_not_written_over_either(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], taken: Callable[[Path], object]
) -> None:
    output = tmp_path / "seeds.jsonl"
    taken(output)
    before = output.stat()
    assert run_cli("export", str(run), "--output", str(output)) == 2
    assert f"{output}: is there already" in capsys.readouterr().err.replace("\n", " ")
    assert output.stat() == before
    exported(run, "alpaca", tmp_path / "new.jsonl")
    exported(run, "alpaca", tmp_path / "new.jsonl")  # the same again changes nothing


def test_an_export_reads_a_run_that_goes_on_and_writes_nothing_into_it(run: Path) -> None:
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    before, directory = content(), RunDirectory.existing(run)
    pairs = read_pairs(directory)
    assert content() == before
    with Ledger(directory.ledger) as ledger, ledger._transaction():
        ledger._db.execute("INSERT INTO meta VALUES ('half', 'done')")
        assert read_pairs(directory) == pairs


# --- Axolotl. Source: axolotl-ai-cloud/axolotl, src/axolotl/utils/schemas/datasets.py (SFTDataset and
# UserDefinedPrompterType) and prompt_strategies/user_defined.py ---

SFT_KEYS = {"path", "split", "type", "input_transform", "shards", "shards_idx", "preprocess_shards", "conversation",
            "chat_template", "chat_template_jinja", "data_files", "input_format", "name", "ds_type", "field",
            "field_human", "field_model", "field_messages", "field_tools", "field_thinking", "roles_to_train",
            "train_on_eos", "roles", "drop_system_message", "trust_remote_code", "revision"}  # fmt: skip
PROMPTER_KEYS = {"system_prompt", "system_format", "field_system", "field_instruction", "field_input", "field_output",
                 "format", "no_input_format"}  # fmt: skip


def test_axolotl_gets_the_pairs_as_its_schema_says(run: Path, tmp_path: Path) -> None:
    exported(run, "axolotl", tmp_path / "data")
    config = yaml.safe_load((tmp_path / "data/axolotl.yaml").read_text())
    assert config["train_on_inputs"] is False
    (dataset,) = config["datasets"]
    assert set(dataset) <= SFT_KEYS
    kind = dataset["type"]
    assert set(kind) <= PROMPTER_KEYS
    assert all(isinstance(value, str) for value in kind.values())
    assert "{input}" not in kind["no_input_format"]
    rows = loaded(dataset["ds_type"], tmp_path / "data" / dataset["path"], tmp_path / "cache")
    for row, (prompt, y_f, _) in zip(rows, PAIRS.values(), strict=True):
        # Axolotl fills the prompt's format and encodes prompt and response apart, with EOS behind the response.
        assert kind["no_input_format"].format(instruction=row[kind["field_instruction"]]) == prompt
        assert row[kind["field_output"]] == y_f


def test_axolotl_learns_what_tuneshift_learns(run: Path, tmp_path: Path, tiny: Tiny) -> None:
    pytest.importorskip("axolotl", reason="needs pip install --no-deps axolotl==0.19.0")
    from axolotl.prompt_strategies import load
    from axolotl.utils.schemas.datasets import SFTDataset
    from transformers import AutoTokenizer

    from tuneshift.distill import Pair, tokenize_pairs

    exported(run, "axolotl", tmp_path / "data")
    config = yaml.safe_load((tmp_path / "data/axolotl.yaml").read_text())
    kind = SFTDataset(**config["datasets"][0]).type.model_dump(exclude_none=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny.gemma)  # it has a BOS
    strategy = load("user_defined", tokenizer, SimpleNamespace(**config, sequence_len=512), kind)
    ours = tokenize_pairs([Pair(p, y_f) for p, y_f, _ in PAIRS.values()], tokenizer, max_length=None)
    rows = loaded("json", tmp_path / "data" / config["datasets"][0]["path"], tmp_path / "cache")
    for row, own in zip(rows, ours, strict=True):
        theirs = strategy.tokenize_prompt(row)
        assert (theirs["input_ids"], theirs["labels"]) == (own["input_ids"], own["labels"])


# --- preferences ---


def test_dpo_takes_only_pairs_where_b_said_something_else_and_tells_the_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("export", str(run), "--format", "dpo", "--output", str(tmp_path / "out.jsonl")) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert rows == [
        {"prompt": "Request: play jazz\nIntent:", "chosen": " SearchEvent", "rejected": " i like jazz"},
        {"prompt": "Request: wie wird\u2028das Wetter?\nIntent:", "chosen": " GetWeather", "rejected": ""},
    ]
    said = capsys.readouterr().err
    assert "2 rows; left out: 1 without an answer of B, 1 where B says the same" in said


def test_dpo_without_any_answer_of_b_says_how_to_get_them(run: Path) -> None:
    rows = [{**row, "base_response": None} for row in read_pairs(RunDirectory.existing(run))]
    with pytest.raises(RunDirectoryError, match="complete_scores: true"):
        FORMATS["dpo"](rows)


@pytest.mark.parametrize("name", ["sharegpt", "axolotl", "parquet"])
def test_what_is_no_single_text_needs_a_place(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("export", str(run), "--format", name) == 2
    assert "Give --output" in capsys.readouterr().err
    assert run_cli("export", str(run), "--format", "csv") == 2
    assert "sharegpt" in capsys.readouterr().err


# --- trl ---


def trainer_settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
    }


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def opened(tiny: Tiny) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    tokenizer.chat_template = TEMPLATE
    return AutoModelForCausalLM.from_pretrained(tiny.llama), tokenizer


@pytest.mark.parametrize("name", ["prompt-completion", "messages"])
def test_trl_trains_on_the_rows(run: Path, tmp_path: Path, tiny: Tiny, name: str) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    (path,) = exported(run, name, tmp_path / "out.jsonl")
    model, tokenizer = opened(tiny)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**trainer_settings(tmp_path / "trained")),
        train_dataset=Dataset.from_list(loaded("json", path, tmp_path / "cache")),
        processing_class=tokenizer,
    )
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["input_ids"]).count("SearchEvent") == 1
    if name == "prompt-completion":  # the loss is on the response and EOS alone
        learnt = [label for label in row["labels"] if label != -100]
        assert tokenizer.decode(learnt) == f" SearchEvent{tokenizer.eos_token}"
    assert trainer.train().global_step == 1


def test_trl_prefers_f_over_b(run: Path, tmp_path: Path, tiny: Tiny) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    (path,) = exported(run, "dpo", tmp_path / "out.jsonl")
    model, tokenizer = opened(tiny)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**trainer_settings(tmp_path / "trained")),
        train_dataset=Dataset.from_list(loaded("json", path, tmp_path / "cache")),
        processing_class=tokenizer,
    )
    assert trainer.train().global_step == 1
