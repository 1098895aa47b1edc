"""The configuration: what loads, what is refused and how it says so, and what a fingerprint covers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tuneshift.config import Config, LoadedConfig, load_config
from tuneshift.configfile import MAX_BYTES, difference, lay_over
from tuneshift.errors import ConfigError
from tuneshift.evaluate.benchmarks import BENCHMARKS
from tuneshift.run.directory import RunDirectory
from tuneshift.run.resume import open_ledger
from tuneshift.sections.synthesis import PRESETS

SMALLEST = """\
source: {base: org/base, adapter: org/adapter}
target: {model: org/target}
generator: {kind: few_shot, model: base, instruction: Requests to a voice assistant.}
seeds: seeds.jsonl
prompt_template: "Request: {text}\\nIntent:"
synthesis: {target_size: 250, stop: ["\\n"], max_new_tokens: 16}
criterion: {name: ppl_diff, tau: 1.5}
evaluation: {data: test.jsonl, metric: exact_match}
"""


def write(folder: Path, text: str = SMALLEST, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *overrides: str) -> LoadedConfig:
    return load_config(write(folder), overrides)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def refused(folder: Path, *overrides: str) -> str:
    return refusal(write(folder), *overrides)


def sections() -> dict[str, type[BaseModel]]:
    """Return every section's model by its name, the top level as ''."""
    found: dict[str, type[BaseModel]] = {"": Config}
    for name, field in Config.model_fields.items():
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                found[name] = candidate
    return found


def leaves() -> Iterator[str]:
    """Yield every setting's dotted name."""
    for section, model in sections().items():
        for name in model.model_fields:
            if section or name not in sections():
                yield f"{section}.{name}".lstrip(".")


# --- what loads ---


def test_the_smallest_complete_file_loads_with_every_default(tmp_path: Path) -> None:
    config = load(tmp_path).config
    assert config.model_dump(mode="json") == {
        "source": {
            "base": "org/base", "adapter": "org/adapter", "model": None, "substitute_base": None, "same_base": False,
        },
        "target": {"model": "org/target"},
        "generator": {
            "kind": "few_shot",
            "prompts": None, "model": "base", "instruction": "Requests to a voice assistant.", "temperature": 1.0,
            "top_p": 1.0, "top_k": 0, "max_new_tokens": 64, "api": None,
        },
        "seeds": str(tmp_path / "seeds.jsonl"),
        "prompt_template": "Request: {text}\nIntent:",
        "synthesis": {
            "preset": "tuneshift", "target_size": 250, "demos": 5, "per_call": 5, "seed_share": 0.5,
            "back_generation": 1.0, "probes": 256, "calls_per_round": 16, "decoding": "faithful",
            "max_new_tokens": 16, "stop": ["\n"], "complete_scores": False, "oversample": 2.0, "select": "balanced",
            "max_candidates": 10_000, "max_rounds": 500, "patience": 3,
        },
        "criterion": {
            "name": "ppl_diff", "tau": 1.5, "tau_f": 1.2, "tau_b": 1.6, "ratio": 1.5, "threshold": 0.405,
            "vote_share": 0.6, "samples": 5, "keep_rate": 0.2,
            "calibration": 200, "count_eos": False,
        },
        "distill": {
            "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"],
            "num_train_epochs": 20, "learning_rate": 2e-5, "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1, "trainer_args": {}, "accelerate": None,
        },
        "evaluation": {
            "task": "jsonl", "data": str(tmp_path / "test.jsonl"), "subtask": None, "harness": "native",
            "held_out": None, "metric": "exact_match", "pattern": None, "max_new_tokens": None, "stop": None,
            "unsafe_no_sandbox": False, "regression": None,
        },
        "engine": {
            "kind": "hf", "batch_size": 128, "workers": 1, "ray_address": None, "threads": None,
            "tensor_parallel_size": 1, "gpu_memory_utilization": 0.85, "max_model_len": 4096, "python": None,
            "reference_check": True,
            "fine_tuned": None, "base": None,
        },
        "run": {
            "dir": None, "seed": 0, "device": "auto", "dtype": "auto", "trust_remote_code": False, "compile": False,
            "trackers": [],
        },
    }  # fmt: skip


def test_only_source_target_and_seeds_are_required(tmp_path: Path) -> None:
    text = "source: {base: a, adapter: b}\ntarget: {model: c}\nseeds: s.jsonl\n"
    config = load_config(write(tmp_path, text)).config
    assert (config.criterion.name, config.criterion.tau) == ("ppl_diff", 1.5)
    assert (config.synthesis.target_size, config.synthesis.demos, config.synthesis.per_call) == (250, 5, 5)
    assert config.evaluation is None
    assert config.generator.model == "target"


@pytest.mark.parametrize("missing", ["source", "target", "seeds"])
def test_a_missing_required_section_is_named(tmp_path: Path, missing: str) -> None:
    raw = yaml.safe_load(SMALLEST)
    del raw[missing]
    assert f"  {missing}: Field required" in refusal(write(tmp_path, json.dumps(raw)))


def test_a_criterion_may_be_a_name_alone(tmp_path: Path) -> None:
    raw = yaml.safe_load(SMALLEST) | {"criterion": "ratio"}
    assert load_config(write(tmp_path, json.dumps(raw))).config.criterion.name == "ratio"


def test_tau_may_be_auto(tmp_path: Path) -> None:
    assert load(tmp_path, "criterion.tau=auto").config.criterion.tau == "auto"


@pytest.mark.parametrize("name", ["ratio", "none", "random", "disagree", "kl", "vote", "exec"])
def test_an_automatic_tau_of_a_rule_that_reads_none_is_refused(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path, f"criterion={{name: {name}, tau: auto}}")
    assert f"criterion: `tau: auto` calibrates tau, which criterion {name} does not read: leave `tau` out" in message
    assert "use one of ppl_diff, low_low, high_low, high_high, length, few_shot_base" in message
    assert refused(tmp_path, f"criterion={name}", "criterion.tau=auto") == message


@pytest.mark.parametrize("override", ["criterion=ratio", "criterion.name=ratio"])
def test_an_automatic_tau_does_not_go_over_to_a_rule_that_reads_none(tmp_path: Path, override: str) -> None:
    raw = yaml.safe_load(SMALLEST) | {"criterion": {"name": "ppl_diff", "tau": "auto", "ratio": 1.2}}
    path = write(tmp_path, json.dumps(raw))
    criterion = load_config(path, [override]).config.criterion
    assert (criterion.name, criterion.tau, criterion.ratio) == ("ratio", 1.5, 1.2)
    assert load_config(path, [override.replace("ratio", "low_low")]).config.criterion.tau == "auto"
    assert load_config(path, [override, "criterion.tau=2"]).config.criterion.tau == 2
    above = {"criterion": "ratio" if "name" not in override else {"name": "ratio"}}
    assert lay_over(raw, above)["criterion"] == {"name": "ratio", "ratio": 1.2}
    assert lay_over(raw, {"criterion": "low_low"})["criterion"]["tau"] == "auto"
    assert raw["criterion"]["tau"] == "auto"


def test_a_loaded_configuration_knows_its_folder_and_name(tmp_path: Path) -> None:
    loaded = load_config(write(tmp_path, name="intents.yaml"))
    assert (loaded.folder, loaded.name) == (tmp_path, "intents")


def test_a_configuration_cannot_be_changed_after_loading(tmp_path: Path) -> None:
    config = load(tmp_path).config
    with pytest.raises(ValueError, match="frozen"):
        config.synthesis.target_size = 3  # type: ignore[misc]


# --- what is refused, and how it says so ---


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sedes", "seeds"),
        ("synthesys", "synthesis"),
        ("prompt_templat", "prompt_template"),
        ("prompt-template", "prompt_template"),
        ("source.bsae", "base"),
        ("target.modle", "model"),
        ("generator.temprature", "temperature"),
        ("synthesis.target_siz", "target_size"),
        ("synthesis.target-size", "target_size"),
        ("criterion.taus", "tau"),
        ("distill.target_module", "target_modules"),
        ("evaluation.metrics", "metric"),
        ("run.sead", "seed"),
    ],
)
class TestUnknownKeys:
    def test_in_the_file_names_the_nearest_key(self, tmp_path: Path, key: str, nearest: str) -> None:
        raw = yaml.safe_load(SMALLEST)
        *section, last = key.split(".")
        place = raw.setdefault(section[0], {}) if section else raw
        place[last] = "x"
        message = refusal(write(tmp_path, json.dumps(raw)))
        assert f"  {key}: unknown key; did you mean `{nearest}`?" in message

    def test_in_an_override_names_the_nearest_key(self, tmp_path: Path, key: str, nearest: str) -> None:
        assert f"  {key}: unknown key; did you mean `{nearest}`?" in refused(tmp_path, f"{key}=x")


@pytest.mark.parametrize("key", ["a[0]", "[x]", "-", " ", "q_proj.weight", "1"])
def test_a_key_of_any_form_is_refused_by_its_name(tmp_path: Path, key: str) -> None:
    raw = yaml.safe_load(SMALLEST) | {key: 1}
    assert f"  {key}: unknown key" in refusal(write(tmp_path, json.dumps(raw)))


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, "synthesis.demos=0", "criterion.ratio=1", "run.sead=3", "evaluation.metric=nope")
    assert "4 error(s)" in message
    for key in ("synthesis.demos", "criterion.ratio", "run.sead", "evaluation"):
        assert f"\n  {key}: " in message
    assert message.startswith(f"{tmp_path / 'config.yaml'}: ")


def test_one_mistake_is_one_error_where_a_setting_has_two_forms(tmp_path: Path) -> None:
    assert "1 error(s)" in refused(tmp_path, "criterion.tau=1")


def test_an_error_of_the_whole_file_does_not_hide_those_of_sections(tmp_path: Path) -> None:
    message = refused(tmp_path, "prompt_template=no text here", "source.model=org/other")
    assert "give exactly one of `adapter`" in message


@pytest.mark.parametrize("tau", ["1", "1.0", "0.5", "0", "-2", ".nan", ".inf", "-.inf", "high", "[1.5]", "null"])
def test_a_tau_that_is_no_perplexity_above_1_is_refused(tmp_path: Path, tau: str) -> None:
    assert "  criterion.tau: " in refused(tmp_path, f"criterion.tau={tau}")


def test_the_refusal_of_tau_says_what_was_expected_and_given(tmp_path: Path) -> None:
    message = refused(tmp_path, "criterion.tau=0.9")
    assert "criterion.tau: Input should be greater than 1 (got 0.9)" in message


FLOATS = [
    "generator.temperature", "generator.top_p", "criterion.tau_f", "criterion.tau_b", "criterion.ratio",
    "criterion.threshold", "criterion.vote_share", "criterion.keep_rate", "distill.lora_dropout",
    "synthesis.seed_share", "synthesis.back_generation", "synthesis.oversample",
    "distill.learning_rate", "engine.gpu_memory_utilization",
]  # fmt: skip


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", FLOATS)
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, key: str, value: str) -> None:
    assert f"  {key}: " in refused(tmp_path, f"{key}={value}")


COUNTS = [
    "generator.max_new_tokens", "synthesis.target_size", "synthesis.demos", "synthesis.per_call",
    "synthesis.calls_per_round", "synthesis.max_new_tokens", "synthesis.max_candidates", "synthesis.max_rounds",
    "synthesis.patience", "criterion.calibration", "criterion.samples", "distill.r",
    "distill.lora_alpha", "distill.num_train_epochs",
    "distill.per_device_train_batch_size", "distill.gradient_accumulation_steps", "evaluation.max_new_tokens",
    "engine.batch_size", "engine.workers", "engine.tensor_parallel_size", "engine.max_model_len",
]  # fmt: skip


@pytest.mark.parametrize("value", ["-1", "0", "1.5", "many", "[]"])
@pytest.mark.parametrize("key", COUNTS)
def test_a_count_below_1_or_no_whole_number_is_refused(tmp_path: Path, key: str, value: str) -> None:
    assert f"  {key}: " in refused(tmp_path, f"{key}={value}")


@pytest.mark.parametrize("key", ["generator.top_k", "synthesis.probes", "run.seed"])
def test_a_negative_value_is_refused_where_0_has_a_meaning(tmp_path: Path, key: str) -> None:
    assert load(tmp_path, f"{key}=0").config is not None
    assert f"  {key}: " in refused(tmp_path, f"{key}=-1")


def test_the_lists_above_cover_every_number_setting(tmp_path: Path) -> None:
    config = load(tmp_path, "evaluation.max_new_tokens=3", "synthesis.seed_share=0.5").config.model_dump()
    numbers = {
        f"{section}.{key}"
        for section, values in config.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if type(value) in (int, float)
    }
    assert numbers == {*FLOATS, *COUNTS, "criterion.tau", "generator.top_k", "synthesis.probes", "run.seed"}


def test_both_an_adapter_and_a_checkpoint_are_refused(tmp_path: Path) -> None:
    assert "source: give exactly one of `adapter`" in refused(tmp_path, "source.model=org/full")


def test_neither_an_adapter_nor_a_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "source: give exactly one of `adapter`" in refused(tmp_path, "source.adapter=null")


def test_a_checkpoint_instead_of_an_adapter_is_taken(tmp_path: Path) -> None:
    config = load(tmp_path, "source.adapter=null", "source.model=org/full").config
    assert (config.source.adapter, config.source.model) == (None, "org/full")


@pytest.mark.parametrize("template", ["no place", "{text} and {text}", "{TEXT}", ""])
def test_a_template_without_exactly_one_text_is_refused(tmp_path: Path, template: str) -> None:
    message = refused(tmp_path, f"prompt_template={json.dumps(template)}")
    assert f"must contain {{text}} exactly once, got {template!r}" in message


def test_other_braces_in_a_template_mean_nothing(tmp_path: Path) -> None:
    template = '{"q": "{text}", "n": {}}'
    assert load(tmp_path, f"prompt_template={json.dumps(template)}").config.prompt_template == template


def test_a_pattern_without_the_regex_metric_is_refused(tmp_path: Path) -> None:
    assert "`pattern` and `metric: regex` go together" in refused(tmp_path, "evaluation.pattern=x+")


def test_the_regex_metric_without_a_pattern_is_refused(tmp_path: Path) -> None:
    assert "`pattern` and `metric: regex` go together" in refused(tmp_path, "evaluation.metric=regex")


def test_a_pattern_that_is_no_regular_expression_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, "evaluation.metric=regex", 'evaluation.pattern="("')
    assert "pattern '(' is not a regular expression: missing ), unterminated subpattern" in message


def test_the_regex_metric_with_its_pattern_is_taken(tmp_path: Path) -> None:
    evaluation = load(tmp_path, "evaluation.metric=regex", "evaluation.pattern=x+").config.evaluation
    assert evaluation is not None
    assert evaluation.pattern == "x+"


def test_an_unknown_metric_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    message = refused(tmp_path, "evaluation.metric=accuracy")
    assert "'accuracy' is none of exact_match, normalized_match, numeric, regex" in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{}", "`task: jsonl` needs `data`"),
        ("{data: a.jsonl, subtask: navigate}", "`subtask` and `harness` belong to a benchmark"),
        ("{data: a.jsonl, harness: lm_eval}", "`subtask` and `harness` belong to a benchmark"),
        ("{task: gsm8k, metric: exact_match}", "is none of gsm8k's: flexible_extract, strict_match; null is the first"),
        ("{task: gsm8k, metric: regex, pattern: a}", "is none of gsm8k's"),
        ("{task: gsm8k, pattern: a}", "`pattern` and `metric: regex` go together"),
        ("{task: gsm8k, subtask: algebra}", "subtask 'algebra' is none of gsm8k's: none"),
        ("{task: bbh}", "`task: bbh` needs `subtask`, or `data` with a subtask's name"),
        ("{task: bbh, subtask: navigation}", "subtask 'navigation' is none of bbh's: boolean_expressions, "),
        ("{task: mmlu}", "`task: mmlu` compares log-likelihoods: set `harness: lm_eval`"),
        ("{task: mmlu, harness: lm_eval, max_new_tokens: 3}", "generates nothing: leave `max_new_tokens` out"),
        ("{task: bbh, subtask: navigate, harness: lm_eval, stop: [a]}", "`harness: lm_eval` has its own stop strings"),
        ("{task: gsm8k, held_out: {fraction: 1}}", "evaluation.held_out.fraction: Input should be less than 1"),
        ("{task: gsm8k, held_out: {fraction: 0}}", "evaluation.held_out.fraction: Input should be greater than 0"),
        ("{task: gsm8k, held_out: {seed: -1}}", "evaluation.held_out.seed: "),
        ("{task: arc}", "evaluation.task: Input should be 'jsonl', 'gsm8k', "),
    ],
)
def test_questions_that_do_not_fit_together_are_refused(tmp_path: Path, settings: str, expected: str) -> None:
    assert expected in refused(tmp_path, f"evaluation={settings}")


@pytest.mark.parametrize("task", BENCHMARKS)
def test_every_benchmark_is_a_task_and_has_its_first_metric(tmp_path: Path, task: str) -> None:
    harness = "native" if BENCHMARKS[task].native else "lm_eval"
    settings = f"{{task: {task}, data: a.json, harness: {harness}}}"
    evaluation = load(tmp_path, f"evaluation={settings}").config.evaluation
    assert evaluation is not None
    assert evaluation.metric_name == BENCHMARKS[task].metrics[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected sections such as `source:` and `target:`, got NoneType"),
        ("# only a comment\n", "got NoneType"),
        ("- source\n- target\n", "got list"),
        ("just words\n", "got str"),
        ("source:\n\tbase: x\n", "not valid YAML"),
        ("source: [1, 2\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system [echo]\n", "not valid YAML"),
        ("a: *nowhere\n", "not valid YAML"),
        ("a: \x07\n", "not valid YAML"),
        ("run: {seed: 2024-13-45}\n", ""),  # looks like a date, and is none
        ("run: {seed: 12:99:99}\n", ""),
        ("run: {seed: " + "9" * 5000 + "}\n", ""),  # more digits than Python turns into a number
        ("2024-01-01: x\n", ""),
        ("!!binary aGk=: x\n", ""),
        ("null: x\n", ""),
        ("? [a, b]\n: x\n", ""),
        ("a: &a [*a]\n", ""),
        ("[" * 5000, ""),
        ("a: " + "{a: " * 5000, ""),
    ],
)
def test_a_file_that_is_no_mapping_of_sections_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_a_yaml_error_names_line_and_column(tmp_path: Path) -> None:
    assert "line 3, column 1" in refusal(write(tmp_path, "source:\n  base: x\n\tadapter: y\n"))


def test_a_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"seeds: caf\xe9.jsonl\n")
    assert refusal(path) == f"{path}: byte 10 is not UTF-8. Save the file as UTF-8."


def test_a_file_larger_than_a_mebibyte_is_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "#" * MAX_BYTES)
    assert "at most 1048576 are read" in refusal(path)


def test_a_file_of_a_mebibyte_is_read(tmp_path: Path) -> None:
    padding = "#" * (MAX_BYTES - len(SMALLEST))
    assert load_config(write(tmp_path, SMALLEST + padding)).config.synthesis.target_size == 250


@pytest.mark.parametrize("name", ["missing.yaml", ".", "missing/config.yaml"])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    assert "cannot be read" in refusal(tmp_path / name)


def test_a_small_file_that_unfolds_to_gigabytes_is_refused_in_little_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]  # ten to the tenth strings
    path = write(tmp_path, "\n".join(lines))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from tuneshift.config import load_config; from tuneshift.errors import ConfigError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "try: load_config(Path(sys.argv[1]))\n"
        "except ConfigError: sys.exit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "")


# --- paths ---


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("margin=0", "evaluation.regression.margin"),
        ("margin=1", "evaluation.regression.margin"),
        ("metric=regex", "`pattern` and `metric: regex` go together"),
        ("metric=accuracy", "'accuracy' is none of exact_match"),
        ("marginn=0.1", "did you mean `margin`"),
    ],
)
def test_regression_questions_are_checked_as_the_evaluations_are(tmp_path: Path, setting: str, said: str) -> None:
    assert said in refused(tmp_path, "evaluation.regression.data=other.jsonl", f"evaluation.regression.{setting}")


@pytest.mark.parametrize("key", ["seeds", "evaluation.data", "run.dir", "generator.prompts"])
def test_a_relative_path_starts_at_the_yaml_files_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir("/")
    loaded = load(tmp_path, f"{key}=data/x", *ALSO.get(key, []))
    value: Any = loaded.config
    for part in key.split("."):
        value = getattr(value, part)
    assert value == str(tmp_path / "data/x")


def test_a_relative_configuration_path_starts_relative_paths_at_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner")
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("inner/config.yaml")).config.seeds == str(tmp_path / "inner/seeds.jsonl")


MODEL_KEYS = ["source.base", "source.adapter", "source.substitute_base", "target.model", "generator.model"]


def model_named(loaded: LoadedConfig, key: str) -> str:
    section, name = key.split(".")
    return str(getattr(getattr(loaded.config, section), name))


@pytest.mark.parametrize("key", MODEL_KEYS)
@pytest.mark.parametrize("reference", ["HuggingFaceTB/SmolLM2-135M", "gpt2"])
def test_a_hub_id_stays_as_it_is(tmp_path: Path, key: str, reference: str) -> None:
    assert model_named(load(tmp_path, f"{key}={reference}"), key) == reference


@pytest.mark.parametrize("key", MODEL_KEYS)
def test_a_model_folder_beside_the_yaml_file_is_found(tmp_path: Path, key: str) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert model_named(load(tmp_path, f"{key}=models/mine"), key) == str(tmp_path / "models/mine")


@pytest.mark.parametrize("reference", ["./org/model", "../org/model", "file.gguf"])
def test_a_model_that_can_only_be_a_path_is_made_absolute(tmp_path: Path, reference: str) -> None:
    expected = str((tmp_path / reference).resolve())
    assert load(tmp_path, f"target.model={reference}").config.target.model == expected


@pytest.mark.parametrize("name", ["source", "base", "target"])
def test_the_runs_own_models_stay_names_where_such_folders_exist(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert load(tmp_path, f"generator.model={name}").config.generator.model == name


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load(tmp_path, "seeds=~/s.jsonl").config.seeds == str(tmp_path / "home/s.jsonl")


@pytest.mark.parametrize("key", ["seeds", "target.model"])
@pytest.mark.parametrize("value", ["~nobody-has-this-name/x", "x" * 300, '"a\\0b"', '"\\ud800"', "loop/x"])
def test_a_path_that_cannot_exist_never_escapes_as_another_error(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    try:
        load(tmp_path, f"{key}={value}")
    except ConfigError as error:
        assert key in str(error)  # noqa: PT017 - some of these load


# --- variables ---


def test_a_variable_expands_anywhere_in_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("KIND", "small")
    loaded = load(tmp_path, "seeds=${WHERE}/${KIND}.jsonl")
    assert loaded.config.seeds == str(tmp_path / "elsewhere/small.jsonl")


def test_a_variable_expands_inside_lists_and_free_mappings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", "END")
    config = load(tmp_path, "synthesis.stop=['${MARK}']", "distill.trainer_args={run_name: '${MARK}'}").config
    assert config.synthesis.stop == ("END",)
    assert config.distill.trainer_args == {"run_name": "END"}


def test_a_variable_expands_where_a_number_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNT", "12")
    assert load(tmp_path, "synthesis.target_size=${COUNT}").config.synthesis.target_size == 12


def test_a_variable_that_is_not_set_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNESHIFT_UNSET", raising=False)
    message = refused(tmp_path, "seeds=${TUNESHIFT_UNSET}/s.jsonl")
    assert "${TUNESHIFT_UNSET} is not set in the environment" in message


def test_an_expanded_value_is_not_in_raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN", "s3cret")
    loaded = load(tmp_path, "seeds=${HIDDEN}.jsonl", "distill.trainer_args.run_name=${HIDDEN}")
    assert loaded.config.seeds.endswith("/s3cret.jsonl")
    assert "s3cret" not in json.dumps(loaded.raw)
    assert loaded.raw["seeds"] == "${HIDDEN}.jsonl"


def test_an_expanded_value_is_not_in_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN", "s3cret")
    loaded = load(tmp_path, "seeds=${HIDDEN}.jsonl")
    with RunDirectory(tmp_path / "run") as run, open_ledger(loaded, run, {}):
        pass
    stored = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"${HIDDEN}.jsonl" in stored
    assert b"s3cret" not in stored


def test_an_expanded_value_is_not_in_an_error_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN", "s3cret")
    assert "s3cret" not in refused(tmp_path, "synthesis.demos=${HIDDEN}")


def test_another_value_of_a_variable_is_another_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNT", "12")
    first = load(tmp_path, "synthesis.target_size=${COUNT}")
    monkeypatch.setenv("COUNT", "13")
    second = load(tmp_path, "synthesis.target_size=${COUNT}")
    assert first.raw == second.raw
    assert first.fingerprint != second.fingerprint


# --- overrides ---


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("synthesis.target_size=7", "synthesis.target_size", 7),
        ("criterion.tau=1.7", "criterion.tau", 1.7),
        ("criterion.count_eos=true", "criterion.count_eos", True),
        ("synthesis.stop=[a, 'b=c']", "synthesis.stop", ("a", "b=c")),
        ("distill.target_modules=all-linear", "distill.target_modules", "all-linear"),
        ("prompt_template='{text}='", "prompt_template", "{text}="),
        ("prompt_template=null", "prompt_template", None),
        ("distill.trainer_args={bf16: true, optim: sgd}", "distill.trainer_args", {"bf16": True, "optim": "sgd"}),
        ("distill.trainer_args.optim=sgd", "distill.trainer_args", {"optim": "sgd"}),
        (" run.seed =3", "run.seed", 3),
        ("generator.instruction=", "generator.instruction", None),
    ],
)
def test_an_override_is_a_yaml_value(tmp_path: Path, override: str, key: str, value: Any) -> None:
    found: Any = load(tmp_path, override).config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_override_creates_a_section_that_the_file_does_not_have(tmp_path: Path) -> None:
    loaded = load(tmp_path, "distill.r=4", "run.seed=9")
    assert (loaded.config.distill.r, loaded.config.run.seed) == (4, 9)
    assert loaded.raw["distill"] == {"r": 4}


def test_a_later_override_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "run.seed=1", "run.seed=2").config.run.seed == 2


def test_a_criterions_name_alone_overrides_a_criterion_mapping(tmp_path: Path) -> None:
    assert load(tmp_path, "criterion=ratio").config.criterion.name == "ratio"


def test_a_criterions_setting_can_be_added_to_a_name_alone(tmp_path: Path) -> None:
    criterion = load(tmp_path, "criterion=ratio", "criterion.ratio=2").config.criterion
    assert (criterion.name, criterion.ratio) == ("ratio", 2.0)


def test_an_override_leaves_the_other_settings_of_its_section(tmp_path: Path) -> None:
    synthesis = load(tmp_path, "synthesis.demos=2").config.synthesis
    assert (synthesis.demos, synthesis.max_new_tokens, synthesis.stop) == (2, 16, ("\n",))


@pytest.mark.parametrize("override", ["target_size", "=3", "  =3", "run.seed=[", "run.seed=*x", "seeds=&a [*a]"])
def test_an_override_that_cannot_be_read_is_refused_by_its_text(tmp_path: Path, override: str) -> None:
    assert repr(override) in refused(tmp_path, override)


def test_a_date_in_an_override_can_be_compared_on_resuming(tmp_path: Path) -> None:
    before = load(tmp_path, "distill.trainer_args.run_name=2024-01-01")
    after = load(tmp_path, "distill.trainer_args.run_name=2024-01-02")
    [line] = difference(before.raw, after.raw)
    assert line.startswith("distill.trainer_args.run_name: ")


def test_a_difference_lists_each_setting_that_changed(tmp_path: Path) -> None:
    before, after = load(tmp_path), load(tmp_path, "synthesis.target_size=100", "distill.r=4", "criterion=none")
    assert difference(before.raw, after.raw) == [
        'criterion.name: "ppl_diff" -> "none"',  # a bare name leaves the thresholds
        "distill.r: (default) -> 4",
        "synthesis.target_size: 250 -> 100",
    ]


# --- the fingerprint ---

CHANGES = {
    "source.base": "org/other", "source.adapter": "org/other", "source.model": "org/full",
    "source.substitute_base": "org/other", "source.same_base": "true", "target.model": "org/other",
    "generator.kind": "chat", "generator.model": "target", "generator.instruction": "Other.",
    "generator.temperature": "0.7", "generator.top_p": "0.9", "generator.top_k": "50",
    "generator.prompts": "logged.jsonl", "generator.max_new_tokens": "65", "generator.api": "{model: other}",
    "seeds": "other.jsonl",
    "prompt_template": "'Q: {text}'",
    "synthesis.target_size": "251", "synthesis.demos": "4", "synthesis.per_call": "10",
    "synthesis.calls_per_round": "3", "synthesis.decoding": "greedy", "synthesis.max_new_tokens": "17",
    "synthesis.complete_scores": "true", "synthesis.preset": "paper",
    "synthesis.seed_share": "0.4", "synthesis.back_generation": "0.5", "synthesis.oversample": "3",
    "synthesis.select": "random", "synthesis.probes": "64",
    "synthesis.stop": "['###']", "synthesis.max_candidates": "100", "synthesis.max_rounds": "100",
    "synthesis.patience": "2", "criterion.name": "ratio", "criterion.tau": "1.6", "criterion.tau_f": "1.3",
    "criterion.tau_b": "1.7", "criterion.ratio": "1.6", "criterion.keep_rate": "0.3", "criterion.calibration": "100",
    "criterion.threshold": "0.5", "criterion.vote_share": "0.8", "criterion.samples": "9",
    "criterion.count_eos": "true", "distill.r": "4", "distill.lora_alpha": "8", "distill.lora_dropout": "0",
    "distill.target_modules": "all-linear", "distill.num_train_epochs": "3", "distill.learning_rate": "0.001",
    "distill.per_device_train_batch_size": "4", "distill.gradient_accumulation_steps": "2",
    "distill.trainer_args": "{optim: sgd}", "distill.accelerate": "fsdp.yaml", "evaluation.data": "other.jsonl",
    "evaluation.metric": "numeric", "evaluation.task": "gsm8k", "evaluation.subtask": "navigate",
    "evaluation.harness": "lm_eval", "evaluation.held_out": "{fraction: 0.5}",
    "evaluation.unsafe_no_sandbox": "true",
    "evaluation.pattern": "x+", "evaluation.max_new_tokens": "9", "evaluation.stop": "['###']",
    "evaluation.regression": "{data: other.jsonl}", "run.seed": "1",
    "run.device": "cpu", "run.dtype": "float32", "run.trust_remote_code": "true",
    "engine.kind": "vllm", "engine.batch_size": "64", "engine.max_model_len": "64",
    "engine.fine_tuned": "{base_url: 'http://h/v1', model: other}",
    "engine.base": "{base_url: 'http://h/v1', model: other}",
    "run.compile": "true",
}  # fmt: skip
ALSO = {
    "source.model": ["source.adapter=null"],
    "evaluation.pattern": ["evaluation.metric=regex"],
    "evaluation.task": ["evaluation.metric=null"],
    "evaluation.subtask": ["evaluation.task=bbh", "evaluation.metric=null"],
    "evaluation.harness": ["evaluation.task=gsm8k", "evaluation.metric=null"],
    "evaluation.unsafe_no_sandbox": ["evaluation.task=mbpp", "evaluation.metric=null"],
    "generator.api": ["generator.kind=chat"],
    "generator.prompts": ["generator.kind=file"],
    "criterion.threshold": ["criterion.name=lift"],
    "criterion.vote_share": ["criterion.name=vote"],
    "criterion.samples": ["criterion.name=vote"],
    "synthesis.oversample": ["synthesis.select=balanced"],
    "synthesis.probes": ["synthesis.back_generation=0.5"],
    "engine.fine_tuned": ["engine.kind=openai", "engine.base={base_url: 'http://h/v1', model: m}"],
    "engine.base": ["engine.kind=openai", "engine.fine_tuned={base_url: 'http://h/v1', model: m}"],
}
WHERE_IT_RUNS = {
    "run.dir", "run.trackers", "engine.workers", "engine.ray_address", "engine.threads", "engine.tensor_parallel_size",
    "engine.gpu_memory_utilization", "engine.python",
    "engine.reference_check",
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_setting_changes_the_fingerprint(tmp_path: Path, key: str) -> None:
    changed = load(tmp_path, f"{key}={CHANGES[key]}", *ALSO.get(key, []))
    assert changed.fingerprint != load(tmp_path).fingerprint


def test_a_preset_and_the_settings_that_it_stands_for_have_one_fingerprint(tmp_path: Path) -> None:
    spelt_out = [f"synthesis.{key}={'null' if value is None else value}" for key, value in PRESETS["paper"].items()]
    assert load(tmp_path, *spelt_out).fingerprint == load(tmp_path, "synthesis.preset=paper").fingerprint


def test_what_depends_on_a_setting_follows_it_where_it_is_not_written(tmp_path: Path) -> None:
    section = load(tmp_path, "synthesis.back_generation=0").config.synthesis
    assert (section.probes, section.per_call, section.calls_per_round, section.oversample) == (0, 20, 4, 2)
    section = load(tmp_path, "synthesis.back_generation='0'", "synthesis.per_call=7").config.synthesis
    assert (section.probes, section.per_call, section.calls_per_round) == (0, 7, 4)
    section = load(tmp_path, "synthesis.select=first").config.synthesis
    assert (section.probes, section.per_call, section.oversample) == (256, 5, 1)


HOSTED = ("generator.kind=chat", "generator.api={model: other}")


@pytest.mark.parametrize(
    ("said", "share", "probes"),
    [
        ([], 0, 0),
        (["preset=tuneshift"], 0, 0),
        (["preset=tuneshift", "back_generation=0.5"], 0.5, 256),
        (["back_generation=1", "probes=0"], 1, 0),
        (["preset=paper"], 0, 0),
    ],
)
def test_a_hosted_generator_is_shown_responses_only_where_that_is_written(
    tmp_path: Path, said: list[str], share: float, probes: int
) -> None:
    section = load(tmp_path, *HOSTED, *(f"synthesis.{one}" for one in said)).config.synthesis
    assert (section.back_generation, section.probes) == (share, probes)


def test_probes_for_a_hosted_generator_that_is_shown_no_responses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"synthesis\.probes is 8, but without synthesis\.back_generation no call"):
        load(tmp_path, *HOSTED, "synthesis.probes=8")


def test_every_setting_is_in_one_of_the_lists_above() -> None:
    assert set(leaves()) - set(CHANGES) == WHERE_IT_RUNS


@pytest.mark.parametrize("setting", ["run.dir=elsewhere", "engine.workers=2", "engine.threads=1"])
def test_where_a_run_happens_does_not_change_the_fingerprint(tmp_path: Path, setting: str) -> None:
    assert load(tmp_path, setting).fingerprint == load(tmp_path).fingerprint


def test_a_default_that_is_written_out_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    assert load(tmp_path, "distill.r=8", "generator.top_k=0").fingerprint == load(tmp_path).fingerprint


def test_the_files_name_and_the_order_of_its_keys_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    turned = dict(reversed(yaml.safe_load(SMALLEST).items()))
    other = write(tmp_path, yaml.safe_dump(turned, sort_keys=False), name="other.yaml")
    assert load_config(other).fingerprint == load(tmp_path).fingerprint


# --- what is described ---


@pytest.mark.parametrize("key", sorted({*leaves(), *sections()} - {""}))
def test_every_setting_is_described(key: str) -> None:
    section, _, name = key.rpartition(".")
    description = sections()[section].model_fields[name].description
    assert description
    assert description.strip().endswith(".")


# --- anything at all ---

KEYS = st.sampled_from([part for key in leaves() for part in key.split(".")]) | st.text(max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.dates()
    | st.sampled_from(["{text}", "${HOME}", "${NOT_SET_ANYWHERE}", "~", "~x", "/", "auto", "x.y", "all-linear", "["])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
# Complete files with some settings replaced: they pass the first checks and reach the later ones.
REPLACED = st.dictionaries(st.sampled_from(sorted(leaves())), SCALARS | st.lists(SCALARS, max_size=2), max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("anything")


def loads_or_refuses(path: Path, *overrides: str) -> None:
    try:
        loaded = load_config(path, overrides)
    except ConfigError as error:
        assert str(error)  # noqa: PT017 - loading may also succeed
    else:
        assert loaded.config.source.base is not None


@settings(max_examples=300, deadline=None)
@given(mapping=st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_mapping_loads_or_is_refused_as_a_configuration(folder: Path, mapping: dict[str, Any]) -> None:
    loads_or_refuses(write(folder, yaml.safe_dump(mapping, allow_unicode=True)))


@settings(max_examples=300, deadline=None)
@given(replaced=REPLACED)
def test_any_value_of_any_setting_loads_or_is_refused(folder: Path, replaced: dict[str, Any]) -> None:
    raw = yaml.safe_load(SMALLEST)
    for key, value in replaced.items():
        section, _, name = key.rpartition(".")
        (raw.setdefault(section, {}) if section else raw)[name] = value
    loads_or_refuses(write(folder, yaml.safe_dump(raw, allow_unicode=True)))


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_load_or_are_refused(folder: Path, content: bytes) -> None:
    path = folder / "bytes.yaml"
    path.write_bytes(content)
    loads_or_refuses(path)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(sorted(leaves())) | st.text(max_size=12), text=st.text(max_size=20))
def test_any_override_loads_or_is_refused(folder: Path, key: str, text: str) -> None:
    loads_or_refuses(write(folder), f"{key}={text}")


def test_loading_a_configuration_leaves_the_environment_alone(tmp_path: Path) -> None:
    before = dict(os.environ)
    load(tmp_path)
    assert dict(os.environ) == before
