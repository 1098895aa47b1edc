"""What a user can get wrong: every mistake ends in exit code 2, one message with a remedy, and no trace on disk."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import CORPUS, Tiny, make_adapter, make_tokenizer, save, write_jsonl, write_project
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from tuneshift import cli
from tuneshift.run.ledger import Ledger

NOTE = re.compile(r"\d\d:\d\d:\d\d ")  # progress, which goes to stderr too


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Use one thread, and keep the libraries out of garbage collection: both cost more than the tiny models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # a metric's folder is added to it


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one message on stderr; anything else but progress notes fails."""
        lines = [line for line in self.err.splitlines() if not NOTE.match(line)]
        assert lines, "nothing was printed on stderr"
        assert lines[0].startswith("tuneshift: "), self.err
        assert sum(line.startswith("tuneshift: ") for line in lines) == 1, self.err
        return "\n".join(lines).removeprefix("tuneshift: ")


Run = Callable[..., Result]


@pytest.fixture
def tuneshift(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process; an error that escapes it fails the test with its traceback."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        monkeypatch.setattr("sys.argv", ["tuneshift", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return Result(code, *capfd.readouterr())

    return run


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def refusal(tuneshift: Run, folder: Path, config: Path, *arguments: object) -> str:
    """Run a transfer that must be refused without a trace, and return its message."""
    before = everything(folder)
    result = tuneshift("transfer", config, "--run-dir", folder / "run", *arguments)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert everything(folder) == before
    return result.message


def assert_says(message: str, *expected: object) -> None:
    for part in expected:
        assert str(part) in message


# --- seeds and evaluation items ---

LINES = {
    "half an object": (b'{"prompt": "Request: a\\nIntent:"', "Each line is one JSON object"),
    "no JSON at all": (b"Request: a", "Each line is one JSON object"),
    "a deep nest": (b"[" * 100_000, "Each line is one JSON object"),
    "a list": (b'["Request: a\\nIntent:"]', "expected an object, got list"),
    "a wrong key": (b'{"promt": "Request: a\\nIntent:"}', "Rename or remove keys"),
    "a key too many": (b'{"prompt": "Request: a\\nIntent:", "reference": "x", "label": "y"}', "Rename or remove keys"),
    "a number": (b'{"prompt": 5, "reference": "x"}', "prompt must be a string"),
    "null": (b'{"prompt": null, "reference": "x"}', "prompt must be a string"),
    "not a number": (b'{"prompt": NaN, "reference": "x"}', "prompt must be a string"),
    "a blank prompt": (b'{"prompt": "  ", "reference": "x"}', "prompt must be a string with some text"),
    "a byte that is not UTF-8": (b'{"prompt": "caf\xe9", "reference": "x"}', "Save the file as UTF-8"),
    "half a character": (b'{"prompt": "Request: \\ud83d\\nIntent:", "reference": "x"}', "prompt"),
}
SEED_LINES = {
    **{name: (line.replace(b', "reference": "x"', b""), expected) for name, (line, expected) in LINES.items()},
    "a response that is no text": (b'{"prompt": "Request: a\\nIntent:", "response": 1}', "response must be a string"),
    "a prompt that does not follow the template": (b'{"prompt": "play a song"}', "Correct the line or the template"),
    "a prompt with no text in the template": (b'{"prompt": "Request: \\nIntent:"}', "Correct the line or the template"),
    "the first line again": (json.dumps({"prompt": f"Request: {CORPUS[0]}\nIntent:"}).encode(), "Remove one of them"),
}
ITEM_LINES = {
    **LINES,
    "no reference": (b'{"prompt": "Request: a\\nIntent:"}', "Rename or remove keys"),
    "a reference that is no text": (
        b'{"prompt": "Request: a\\nIntent:", "reference": 1}',
        "reference must be a string",
    ),
}


def put_third(path: Path, line: bytes) -> Path:
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]) + b"\n")
    return path


@pytest.mark.parametrize("name", SEED_LINES)
def test_a_wrong_seed_is_refused_by_its_line(tuneshift: Run, tiny: Tiny, tmp_path: Path, name: str) -> None:
    config = write_project(tmp_path, tiny)
    line, expected = SEED_LINES[name]
    path = put_third(tmp_path / "seeds.jsonl", line)
    assert_says(refusal(tuneshift, tmp_path, config), f"{path}:3: ", expected)


@pytest.mark.parametrize("name", ITEM_LINES)
def test_a_wrong_evaluation_item_is_refused_by_its_line(tuneshift: Run, tiny: Tiny, tmp_path: Path, name: str) -> None:
    config = write_project(tmp_path, tiny)
    line, expected = ITEM_LINES[name]
    path = put_third(tmp_path / "test.jsonl", line)
    assert_says(refusal(tuneshift, tmp_path, config), f"{path}:3: ", expected)


@pytest.mark.parametrize("content", ["", "\n  \n\t\n", "\ufeff"])
@pytest.mark.parametrize("name", ["seeds.jsonl", "test.jsonl"])
def test_an_empty_file_is_refused_with_the_form_of_a_line(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, name: str, content: str
) -> None:
    config = write_project(tmp_path, tiny)
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert_says(refusal(tuneshift, tmp_path, config), tmp_path / name, "no ", 'such as {"prompt": ')


@pytest.mark.parametrize("name", ["seeds.jsonl", "test.jsonl"])
def test_a_missing_file_is_refused_by_its_path(tuneshift: Run, tiny: Tiny, tmp_path: Path, name: str) -> None:
    config = write_project(tmp_path, tiny)
    (tmp_path / name).unlink()
    assert_says(refusal(tuneshift, tmp_path, config), tmp_path / name, "No such file", "Give the path")


@pytest.mark.parametrize("name", ["seeds.jsonl", "test.jsonl"])
def test_a_folder_in_place_of_a_file_is_refused(tuneshift: Run, tiny: Tiny, tmp_path: Path, name: str) -> None:
    config = write_project(tmp_path, tiny)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert_says(refusal(tuneshift, tmp_path, config), tmp_path / name, "Is a directory", "Give the path")


@pytest.mark.parametrize("name", ["seeds.jsonl", "test.jsonl"])
def test_a_prompt_that_is_longer_than_the_context_is_refused_by_its_line(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, name: str
) -> None:
    config = write_project(tmp_path, tiny)
    row = {"prompt": f"Request: {'play ' * 100}\nIntent:"} | ({"reference": "x"} if name == "test.jsonl" else {})
    path = put_third(tmp_path / name, json.dumps(row).encode())
    assert_says(
        refusal(tuneshift, tmp_path, config), f"{path}:3: ", "do not fit into the context", "Shorten the prompt"
    )


# --- the configuration ---


def test_an_unknown_key_is_refused_with_the_nearest(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny, sedes="x")
    assert_says(refusal(tuneshift, tmp_path, config), config, "sedes: unknown key; did you mean `seeds`?")


def test_an_unknown_key_in_an_override_is_refused(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny)
    message = refusal(tuneshift, tmp_path, config, "--set", "synthesis.demo=3")
    assert_says(message, "synthesis.demo: unknown key; did you mean `demos`?")


def test_a_tau_of_1_is_refused(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny, criterion={"name": "ppl_diff", "tau": 1})
    assert_says(refusal(tuneshift, tmp_path, config), config, "criterion.tau: Input should be greater than 1")


def test_a_configuration_that_is_not_there_is_refused(tuneshift: Run, tmp_path: Path) -> None:
    assert_says(refusal(tuneshift, tmp_path, tmp_path / "no.yaml"), tmp_path / "no.yaml", "Give the path")


@pytest.mark.parametrize(
    ("name", "body", "error"),
    [
        ("divides", "1 / 0", "ZeroDivisionError"),
        ("counts_on_a_word", "response.split()[0] == reference.split()[0]", "IndexError"),
    ],
)
def test_a_metric_that_fails_is_refused_before_anything_is_asked(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, name: str, body: str, error: str
) -> None:
    config = write_project(tmp_path, tiny, evaluation={"metric": f"metric_that_{name}.f"})
    (tmp_path / f"metric_that_{name}.py").write_text(f"def f(response, reference):\n    return {body}\n")
    message = refusal(tuneshift, tmp_path, config)
    assert_says(message, "evaluation.metric", error, f"{tmp_path / 'test.jsonl'}:1")


def test_an_answer_that_would_not_fit_is_refused_before_the_synthesis(
    tuneshift: Run, tiny: Tiny, tmp_path: Path
) -> None:
    config = write_project(tmp_path, tiny, evaluation={"max_new_tokens": 250})
    message = refusal(tuneshift, tmp_path, config)
    assert_says(message, f"{tmp_path / 'test.jsonl'}:1", "do not fit into the context", "lower max_new_tokens")


METRICS = {
    "no_such_module_here.f": None,
    "metric_without_it.f": "",
    "metric_no_function.f": "f = 3",
    "metric_with_a_typo.f": "def f(response, reference) return True",
    "metric_that_fails.f": "1 / 0",
    ".f": None,
    "..f": None,
}


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_that_cannot_be_imported_is_refused(tuneshift: Run, tiny: Tiny, tmp_path: Path, metric: str) -> None:
    config = write_project(tmp_path, tiny, evaluation={"metric": metric})
    code = METRICS[metric]
    if code is not None:
        (tmp_path / f"{metric.partition('.')[0]}.py").write_text(code)
    assert_says(refusal(tuneshift, tmp_path, config), f"evaluation.metric: {metric!r}")


def test_a_chat_generator_without_a_chat_template_is_refused(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny, generator={"kind": "chat"})
    message = refusal(tuneshift, tmp_path, config)
    assert_says(message, "no chat template", "generator.kind: few_shot")


@pytest.mark.parametrize("setting", ["device=nonsense", "device=cuda:77", "dtype=float99", "dtype=nn"])
def test_a_device_or_dtype_that_is_not_there_is_refused(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, setting: str
) -> None:
    config = write_project(tmp_path, tiny)
    message = refusal(tuneshift, tmp_path, config, "--set", f"run.{setting}")
    assert_says(message, setting.partition("=")[2])


# --- adapters ---

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.adapter, tmp_path / "adapter"))


@pytest.fixture
def adapter_project(tiny: Tiny, tmp_path: Path, adapter: Path) -> Path:
    return write_project(tmp_path, tiny, source={"adapter": str(adapter)})


@pytest.fixture(scope="module")
def wide_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter for a base of the same name with wider layers."""
    root = tmp_path_factory.mktemp("wide")
    tokenizer = make_tokenizer(44, bos=False)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=len(tokenizer), max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    save(LlamaForCausalLM(config), tokenizer, root / "tiny-llama")
    return make_adapter(root / "tiny-llama", root / "adapter", scale=0.5)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_of_another_base_is_refused(
    tuneshift: Run, tmp_path: Path, adapter: Path, adapter_project: Path
) -> None:
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path="org/other-base")
    message = refusal(tuneshift, tmp_path, adapter_project)
    assert_says(message, adapter, "org/other-base", "source.same_base: true")


def test_an_adapter_of_another_base_is_taken_when_it_is_said_to_be_the_same(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, adapter: Path
) -> None:
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path="org/other-base")
    source = {"adapter": str(adapter), "same_base": True}
    config = write_project(tmp_path, tiny, source=source, synthesis={"target_size": 2})
    assert tuneshift("transfer", config, "--run-dir", tmp_path / "run").code == 3


@pytest.mark.parametrize("same_base", [False, True])
def test_an_adapter_for_layers_of_other_shapes_is_refused(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, wide_adapter: Path, same_base: bool
) -> None:
    source = {"adapter": str(wide_adapter), "same_base": same_base}
    config = write_project(tmp_path, tiny, source=source)
    message = refusal(tuneshift, tmp_path, config)
    assert_says(message, wide_adapter, "does not fit", tiny.llama, "Set source.base")


def drop_a_weight(weights: dict[str, torch.Tensor]) -> None:
    del weights[sorted(weights)[0]]


def add_a_weight(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 32)


def rename_all_weights(weights: dict[str, torch.Tensor]) -> None:
    for name in list(weights):
        weights[name.replace("q_proj", "k_proj")] = weights.pop(name)


def remove_all_weights(weights: dict[str, torch.Tensor]) -> None:
    weights.clear()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop_a_weight, "1 weights are missing"),
        (add_a_weight, "1 fit no module"),
        (rename_all_weights, "weights are missing"),
        (remove_all_weights, "8 weights are missing"),
    ],
)
def test_an_adapter_with_other_weights_than_its_modules_is_refused(
    tuneshift: Run,
    tmp_path: Path,
    adapter: Path,
    adapter_project: Path,
    damage: Callable[[dict[str, torch.Tensor]], None],
    expected: str,
) -> None:
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    damage(weights)
    save_file(weights, adapter / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    message = refusal(tuneshift, tmp_path, adapter_project)
    assert_says(message, adapter, expected, "copy the adapter anew")


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
def test_an_adapter_folder_without_one_of_its_files_is_refused(
    tuneshift: Run, tmp_path: Path, adapter: Path, adapter_project: Path, name: str
) -> None:
    (adapter / name).unlink()
    assert_says(refusal(tuneshift, tmp_path, adapter_project), adapter, f"{name} is missing", "PEFT adapter folder")


def test_an_adapter_folder_that_is_not_there_is_refused(
    tuneshift: Run, tmp_path: Path, adapter: Path, adapter_project: Path
) -> None:
    shutil.rmtree(adapter)
    assert_says(refusal(tuneshift, tmp_path, adapter_project), adapter, "no such adapter folder")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"not JSON", b'"text"', b"5", b"[]", b"[1]", b"null", b"{}", b'{"caf\xe9": 1}']
)
def test_an_adapter_config_that_is_no_json_object_of_an_adapter_is_refused(
    tuneshift: Run, tmp_path: Path, adapter: Path, adapter_project: Path, content: bytes
) -> None:
    (adapter / ADAPTER_CONFIG).write_bytes(content)
    assert_says(refusal(tuneshift, tmp_path, adapter_project), adapter)


@pytest.mark.parametrize(
    "changes", [{"peft_type": "NO_SUCH_TYPE"}, {"peft_type": None}, {"r": "four"}, {"target_modules": ["no_module"]}]
)
def test_an_adapter_config_with_a_wrong_value_is_refused(
    tuneshift: Run, tmp_path: Path, adapter: Path, adapter_project: Path, changes: dict[str, object]
) -> None:
    edit_json(adapter / ADAPTER_CONFIG, **changes)
    assert_says(refusal(tuneshift, tmp_path, adapter_project), adapter)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_adapter_is_refused(
    tuneshift: Run, tmp_path: Path, adapter: Path, adapter_project: Path, size: int
) -> None:
    path = adapter / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    assert_says(refusal(tuneshift, tmp_path, adapter_project), adapter)


def test_an_adapter_that_changes_nothing_is_refused(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    adapter = make_adapter(tiny.llama, tmp_path / "fresh", scale=0)
    config = write_project(tmp_path, tiny, source={"adapter": str(adapter)})
    assert_says(refusal(tuneshift, tmp_path, config), adapter, "changes nothing", "Check that this is the trained")


def test_a_checkpoint_that_equals_the_base_is_refused(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny, source={"adapter": None, "model": str(tiny.llama)})
    assert_says(refusal(tuneshift, tmp_path, config), tiny.llama, "changes nothing")


# --- models ---


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def replace(name: str, content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(content)

    return damage


def only_pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "layers.0.mlp" in name)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.0.mlp" in name)
    weights[name] = weights[name][:5].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def no_eos(folder: Path) -> None:
    tokenizer = make_tokenizer(44, bos=False)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


def larger_vocabulary(folder: Path) -> None:
    tokenizer = make_tokenizer(44, bos=False)
    fillers = [f"<filler {number}>" for number in range(99)]
    tokenizer.add_tokens([*fillers, "Request", "play", "table"])  # ids past the model's last embedding row
    tokenizer.save_pretrained(folder)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "is not there": (shutil.rmtree, "no such model folder"),
    "is a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x"))[0], "no such model folder"),
    "has no config.json": (remove("config.json"), "no config.json"),
    "has only pickled weights": (only_pickled_weights, "does not read pickled weights"),
    "has no weights": (remove("model.safetensors"), "no .safetensors file"),
    "has a config.json that is no JSON": (replace("config.json", "{"), "cannot be loaded"),
    "has a config.json of an unknown kind": (replace("config.json", '{"model_type": "no_such"}'), "cannot be loaded"),
    "has a config.json that is a list": (replace("config.json", "[]"), "cannot be loaded"),
    "has truncated weights": (truncate("model.safetensors", -100), "cannot be loaded"),
    "has weights cut in the header": (truncate("model.safetensors", 50), "cannot be loaded"),
    "has empty weights": (truncate("model.safetensors", 0), "cannot be loaded"),
    "lacks a tensor": (drop_a_tensor, ""),
    "has a tensor of another shape": (reshape_a_tensor, "cannot be loaded"),
    "has a tokenizer without EOS": (no_eos, "no EOS token"),
    "has a truncated tokenizer.json": (truncate("tokenizer.json", 200), "cannot be loaded"),
    "has an empty tokenizer.json": (truncate("tokenizer.json", 0), "cannot be loaded"),
    "has a tokenizer with more tokens than the model": (larger_vocabulary, ""),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("role", ["base", "checkpoint", "substitute", "generator", "target"])
def test_a_model_that_cannot_be_used_is_refused_by_its_path(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, name: str, role: str
) -> None:
    healthy = tiny.gemma if role == "target" else tiny.llama
    model = Path(shutil.copytree(healthy, tmp_path / healthy.name))
    damage, expected = DAMAGES[name]
    damage(model)
    sections: dict[str, dict[str, object]] = {
        "base": {"source": {"base": str(model)}},
        "checkpoint": {"source": {"adapter": None, "model": str(model)}},
        "substitute": {"source": {"substitute_base": str(model)}},
        "generator": {"generator": {"model": str(model)}},
        "target": {"target": {"model": str(model)}},
    }
    config = write_project(tmp_path, tiny, **sections[role])
    assert_says(refusal(tuneshift, tmp_path, config), model, expected)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an encoder-decoder model."""
    tokenizer = make_tokenizer(44, bos=False)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return save(T5ForConditionalGeneration(config), tokenizer, tmp_path_factory.mktemp("t5") / "tiny-t5")


@pytest.mark.parametrize("role", ["source.base", "source.substitute_base", "generator.model", "target.model"])
def test_an_encoder_decoder_model_is_refused(tuneshift: Run, tiny: Tiny, tmp_path: Path, t5: Path, role: str) -> None:
    config = write_project(tmp_path, tiny, source={"same_base": True})
    message = refusal(tuneshift, tmp_path, config, "--set", f"{role}={t5}")
    assert_says(message, t5, "encoder-decoder", "decoder-only")


@pytest.mark.parametrize("key", ["source.base", "source.adapter", "target.model"])
@pytest.mark.parametrize("reference", ["./not-here", "/not/here", "not a name", "a/b/c"])
def test_a_reference_that_is_neither_a_folder_nor_a_hub_id_is_refused(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, key: str, reference: str
) -> None:
    config = write_project(tmp_path, tiny)
    message = refusal(tuneshift, tmp_path, config, "--set", f"{key}={reference}")
    assert_says(message, Path(reference).name)


# --- the run directory ---


def test_a_run_directory_that_is_a_file_is_refused(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny)
    (tmp_path / "taken").write_text("mine")
    message = refusal(tuneshift, tmp_path, config, "--run-dir", tmp_path / "taken")
    assert_says(message, tmp_path / "taken", "File exists", "Give another --run-dir")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_run_directory_under_a_file_is_refused(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny)
    (tmp_path / "taken").write_text("mine")
    message = refusal(tuneshift, tmp_path, config, "--run-dir", tmp_path / "taken" / "run")
    assert_says(message, tmp_path / "taken", "Give another --run-dir")


def test_a_refused_input_leaves_no_folder_above_the_default_run_directory(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_project(tmp_path, tiny)
    (tmp_path / "seeds.jsonl").unlink()
    before = everything(tmp_path)
    assert tuneshift("transfer", config).code == 2
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["adapter", "notes.txt", "config.yaml", "checkpoints"])
def test_a_folder_that_holds_something_else_is_no_run_directory(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, name: str
) -> None:
    config = write_project(tmp_path, tiny)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    result = tuneshift("transfer", config, "--run-dir", tmp_path / "run")
    assert result.code == 2
    assert_says(result.message, tmp_path / "run", f"holds other files ({name})", "Give another --run-dir")
    assert (tmp_path / "run" / name).read_text() == "mine"
    assert everything(tmp_path / "run") == {name, ".lock"}


def test_a_refused_input_leaves_an_existing_folder_as_it_was(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny)
    (tmp_path / "seeds.jsonl").unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = everything(tmp_path)
    assert tuneshift("transfer", config, "--run-dir", tmp_path / "run").code == 2
    assert everything(tmp_path) - {"run/.lock"} == before


# --- found in the middle of a run: what was made so far stays ---


def assert_ledger_shows(tuneshift: Run, run: Path) -> dict[str, object]:
    result = tuneshift("show", run, "--json")
    assert result.code == 0, result.err
    status: dict[str, object] = json.loads(result.out)
    return status


NOTHING_KEPT = {"criterion": {"name": "ppl_diff", "tau": 1.000001}, "synthesis": {"patience": 2}}


def test_a_run_that_keeps_nothing_ends_with_a_diagnosis_that_counts_reasons(
    tuneshift: Run, tiny: Tiny, tmp_path: Path
) -> None:
    config = write_project(tmp_path, tiny, **NOTHING_KEPT)
    run = tmp_path / "run"
    result = tuneshift("transfer", config, "--run-dir", run)
    assert result.code == 2
    message = result.message
    with Ledger(run / "ledger.sqlite") as ledger:
        candidates = ledger.candidates()
    assert_says(message, run, "no candidate was kept", f"{len(candidates)} candidates: ")
    counted = {reason: int(count) for reason, count in re.findall(r"(?:: |, )([a-z_][\w -]*?) (\d+)(?=[,.])", message)}
    assert counted == {
        reason: sum(candidate.reason == reason for candidate in candidates)
        for reason in {candidate.reason for candidate in candidates}
    }


def test_a_run_that_keeps_nothing_leaves_a_ledger_and_no_results(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny, **NOTHING_KEPT)
    run = tmp_path / "run"
    assert tuneshift("transfer", config, "--run-dir", run).code == 2
    assert everything(run) == {".lock", "config.yaml", "ledger.sqlite"}
    status = assert_ledger_shows(tuneshift, run)
    assert (status["kept"], status["rounds"], status["stop_reason"]) == (0, 2, "nothing kept in 2 rounds")


def test_a_run_that_kept_nothing_says_so_again_when_it_is_repeated(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny, **NOTHING_KEPT)
    run = tmp_path / "run"
    first = tuneshift("transfer", config, "--run-dir", run)
    second = tuneshift("transfer", config, "--run-dir", run)
    assert (second.code, second.message) == (2, first.message)


@pytest.mark.parametrize(
    "setting",
    [
        "distill.target_modules=[no_such_module]",
        "distill.trainer_args={no_such_argument: 1}",
        "distill.trainer_args={optim: no_such_optimizer}",
        "distill.trainer_args={num_train_epochs: 3}",
        "distill.trainer_args={loss_type: dft}",
        "distill.trainer_args={hub_token: s3cret}",
        "distill.trainer_args={logging_strategy: 'no'}",
    ],
)
def test_a_training_setting_that_cannot_work_never_loses_the_ledger(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, setting: str
) -> None:
    config = write_project(tmp_path, tiny, synthesis={"target_size": 2})
    run = tmp_path / "run"
    result = tuneshift("transfer", config, "--run-dir", run, "--set", setting)
    assert result.code == 2, result.err
    assert_says(result.message, setting.partition("=")[0])
    if run.exists():  # found after the synthesis
        assert assert_ledger_shows(tuneshift, run)["kept"] != 0


def test_training_arguments_of_another_output_folder_do_not_break_the_run(
    tuneshift: Run, tiny: Tiny, tmp_path: Path
) -> None:
    config = write_project(tmp_path, tiny, synthesis={"target_size": 2})
    elsewhere = f"distill.trainer_args.output_dir={tmp_path / 'elsewhere'}"
    result = tuneshift("transfer", config, "--run-dir", tmp_path / "run", "--set", elsewhere)
    assert result.code == 2, result.err
    assert_says(result.message, "output_dir is set by the run")


def test_training_without_checkpoints_does_not_break_the_run(tuneshift: Run, tiny: Tiny, tmp_path: Path) -> None:
    config = write_project(tmp_path, tiny, synthesis={"target_size": 2})
    no_checkpoints = "distill.trainer_args.save_strategy='no'"
    result = tuneshift("transfer", config, "--run-dir", tmp_path / "run", "--set", no_checkpoints)
    assert result.code == 3, result.err


# --- commands on what is no run ---


def nothing(folder: Path) -> None:
    pass


def an_empty_folder(folder: Path) -> None:
    folder.mkdir()


def a_file(folder: Path) -> None:
    folder.write_text("x")


def a_folder_of_other_files(folder: Path) -> None:
    folder.mkdir()
    (folder / "verdict.json").write_text("{}")


def a_folder_with_a_folder_as_ledger(folder: Path) -> None:
    (folder / "ledger.sqlite").mkdir(parents=True)


@pytest.mark.parametrize("make", [nothing, an_empty_folder, a_file, a_folder_of_other_files,
                                  a_folder_with_a_folder_as_ledger])  # fmt: skip
@pytest.mark.parametrize("command", ["show", "report", "evaluate", "reselect", "export"])
def test_a_command_on_what_is_no_run_is_refused(
    tuneshift: Run, tmp_path: Path, command: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "run")
    before = everything(tmp_path)
    result = tuneshift(command, tmp_path / "run")
    assert result.code == 2
    assert_says(result.message, tmp_path / "run", "no run was started here", "tuneshift transfer")
    assert everything(tmp_path) == before


# --- damaged runs ---


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    config = write_project(folder, tiny, synthesis={"target_size": 3}, distill={"num_train_epochs": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tuneshift", "transfer", str(config), "--run-dir", str(folder / "run")])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    assert exit_.value.code == 3
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished project; its run is `run`."""
    return Path(shutil.copytree(finished, tmp_path / "project"))


def not_sqlite(path: Path) -> None:
    path.write_bytes(b"this is no database, but as long as one\n" * 200)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def header_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flipped_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for start in range(4096, len(data), 4096):  # the header of every page but the first
        data[start : start + 12] = bytes(255 - byte for byte in data[start : start + 12])
    path.write_bytes(data)


def another_application(path: Path) -> None:
    import sqlite3

    path.unlink()
    database = sqlite3.connect(path)
    database.executescript("CREATE TABLE mine (x); PRAGMA user_version = 7; PRAGMA application_id = 42;")
    database.close()


def a_newer_version(path: Path) -> None:
    import sqlite3

    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()


def a_missing_table(path: Path) -> None:
    import sqlite3

    database = sqlite3.connect(path)
    database.execute("DROP TABLE responses")
    database.close()


@pytest.mark.parametrize(
    "damage", [not_sqlite, half, header_only, flipped_pages, another_application, a_newer_version, a_missing_table]
)
@pytest.mark.parametrize("command", ["show", "report", "reselect", "evaluate", "transfer"])
def test_a_damaged_ledger_is_refused_by_its_path(
    tuneshift: Run, project: Path, command: str, damage: Callable[[Path], None]
) -> None:
    run = project / "run"
    if (command, damage) == ("evaluate", a_missing_table):
        pytest.skip("an evaluation reads no responses")
    damage(run / "ledger.sqlite")
    arguments = [project / "config.yaml", "--run-dir", run] if command == "transfer" else [run]
    before = everything(project)
    result = tuneshift(command, *arguments)
    # The copied project has other paths, which `transfer` may see before it reads the damaged part.
    assert result.code == 2 or (command, damage, result.code) == ("transfer", a_missing_table, 4), result.err
    assert_says(result.message, run, "--run-dir")
    assert everything(project) >= before


def test_a_ledger_with_any_flipped_bytes_is_shown_or_refused(tuneshift: Run, project: Path) -> None:
    path = project / "run" / "ledger.sqlite"
    healthy = path.read_bytes()
    codes = set()
    for start in range(0, len(healthy), 331):
        path.write_bytes(healthy[:start] + bytes(255 - b for b in healthy[start : start + 16]) + healthy[start + 16 :])
        result = tuneshift("show", project / "run")
        codes.add(result.code)
        if result.code != 0:
            assert_says(result.message, path)
        for name in ("ledger.sqlite-wal", "ledger.sqlite-shm"):
            (path.parent / name).unlink(missing_ok=True)
    assert codes == {0, 2}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("dataset/kept.jsonl", "export"),
        ("verdict.json", "show"),
        ("verdict.json", "report"),
        ("training.json", "report"),
        ("config.yaml", "reselect"),
        ("config.yaml", "evaluate"),
        ("adapter/adapter_config.json", "evaluate"),
        ("adapter/adapter_model.safetensors", "evaluate"),
    ],
)
@pytest.mark.parametrize("content", [b"", b'{"half": ', b"\xff\xfe"])
def test_a_damaged_result_file_is_refused_by_its_path(
    tuneshift: Run, project: Path, name: str, command: str, content: bytes
) -> None:
    (project / "run" / name).write_bytes(content)
    result = tuneshift(command, project / "run")
    if name == "dataset/kept.jsonl" and not content:
        assert (result.code, result.out) == (0, "")  # no pairs
        return
    assert result.code == 2, result.err
    assert_says(result.message, project / "run" / Path(name).parts[0])


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_text("{half"), lambda path: path.write_text("")]
)
def test_a_changed_configuration_is_refused_where_the_stored_one_is_damaged(
    tuneshift: Run, project: Path, damage: Callable[[Path], object]
) -> None:
    damage(project / "run" / "config.yaml")
    result = tuneshift("transfer", project / "config.yaml", "--run-dir", project / "run", "--set", "run.seed=5")
    assert result.code in (2, 4), result.err
    assert_says(result.message, project / "run")


def test_export_into_a_folder_that_cannot_be_made_is_refused(tuneshift: Run, project: Path) -> None:
    (project / "taken").write_text("mine")
    result = tuneshift("export", project / "run", "--output", project / "taken" / "out.jsonl")
    assert result.code == 2, result.err
    assert_says(result.message, project / "taken")


# --- importing costs nothing ---


@pytest.mark.parametrize("module", ["tuneshift", "tuneshift.cli", "tuneshift.config", "tuneshift.run.directory"])
def test_importing_loads_no_model_library(module: str) -> None:
    heavy = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
    code = f"import {module}, sys; print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_no_model_library() -> None:
    code = (
        "import sys; from tuneshift import cli; sys.argv = ['tuneshift', 'transfer', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--run-dir" in done.stdout


def test_the_projects_files_of_these_tests_are_right_before_they_are_damaged(
    tuneshift: Run, tiny: Tiny, tmp_path: Path, adapter_project: Path
) -> None:
    write_jsonl(tmp_path / "seeds.jsonl", [{"prompt": f"Request: {text}\nIntent:"} for text in CORPUS[:5]])
    result = tuneshift("transfer", adapter_project, "--run-dir", tmp_path / "run", "--set", "synthesis.target_size=2")
    assert result.code == 3, result.err
