"""Sizes against real tensors, against counts that are published, and against what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, write_project
from safetensors.torch import load_file
from test_transfer import run_cli
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, MixtralConfig, Qwen2Config

import tuneshift.sizing as sizing
from tuneshift.demo import prepare_models
from tuneshift.distill import TrainingSettings, add_lora
from tuneshift.errors import ModelError
from tuneshift.loss import logit_bytes, response_loss
from tuneshift.sizing import (
    DEVICES,
    TRAINED_BYTES,
    AdapterSize,
    Device,
    activation_bytes,
    adapter_size,
    decode_flops,
    decode_seconds,
    kv_cache_bytes,
    model_size,
    score_flops,
    train_flops,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
QV = ("q_proj", "v_proj")
# As in the configurations that their makers publish.
LLAMA_70B = LlamaConfig(
    hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672,
    vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
QWEN_72B = Qwen2Config(
    hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=29568,
    vocab_size=152064, max_position_embeddings=32768, tie_word_embeddings=False, use_sliding_window=False,
)  # fmt: skip
SMALL_LLAMA = LlamaConfig(
    hidden_size=576, num_hidden_layers=3, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
    vocab_size=1000, tie_word_embeddings=True,
)  # fmt: skip


def result(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


@pytest.fixture(scope="module")
def real() -> dict[str, Path]:
    folder = prepare_models()
    return {"smollm2": folder / "SmolLM2-135M-Instruct", "gemma": folder / "gemma-3-270m"}


# Exact counts


def test_a_llama_s_parameters_are_those_of_its_matrices() -> None:
    c, size = LLAMA_70B, model_size(LLAMA_70B)
    attention = 2 * c.hidden_size * c.hidden_size + 2 * c.hidden_size * c.num_key_value_heads * 128
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    assert size.body == c.num_hidden_layers * layer + c.hidden_size
    assert size.parameters == size.body + 2 * c.vocab_size * c.hidden_size == 70_553_706_496  # "70.6B"
    assert model_size(QWEN_72B).parameters == 72_706_203_648  # "72.7B"; its queries, keys and values have biases


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_parameters_are_those_of_the_loaded_model(name: str, tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(getattr(tiny, name))
    size = model_size(model.config)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.head == model.get_output_embeddings().weight.numel()
    assert size.parameters == size.body + size.head  # both tie their embeddings


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_parameters_and_cache_are_those_of_the_real_models(name: str, real: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(real[name], dtype=torch.bfloat16)
    size = model_size(model.config)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.parameters == {"smollm2": 134_515_008, "gemma": 268_098_176}[name]
    for tokens in (40, 700):  # Gemma's window is 512
        assert kv_cache_bytes(size, tokens=tokens, rows=2, dtype_bytes=2) == cache_bytes(model, tokens, rows=2)


def cache_bytes(model: Any, tokens: int, *, rows: int) -> int:
    """Return the bytes of the tensors that a model's cache holds after reading `rows` texts of `tokens` tokens."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.eval()(input_ids=torch.full((rows, tokens), 5), past_key_values=cache, use_cache=True)
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


@pytest.mark.parametrize("tokens", [1, 15, 16, 50])  # the Gemma's window is 16
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_the_cache_is_as_large_as_its_tensors(name: str, tokens: int, tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(getattr(tiny, name), dtype=torch.float32)
    expected = kv_cache_bytes(model_size(model.config), tokens=tokens, rows=3, dtype_bytes=4)
    assert expected == cache_bytes(model, tokens, rows=3)


@pytest.mark.real
def test_an_adapter_is_as_large_as_its_file(real: dict[str, Path]) -> None:
    folder = ROOT / "examples/snips/adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    base = AutoConfig.from_pretrained(real["smollm2"])
    size = adapter_size(base, r=config["r"], target_modules=config["target_modules"])
    assert size.parameters == sum(tensor.numel() for tensor in weights.values())
    assert size.inputs == sum(tensor.shape[1] for name, tensor in weights.items() if "lora_A" in name)


def test_adam_keeps_what_is_counted_for_an_adapter(tiny: Tiny) -> None:
    model = add_lora(AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.bfloat16), TrainingSettings(""))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.full((1, 4), 5)).logits.sum().backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    kept = sum(tensor.nbytes for p in trained for tensor in (p.data, p.grad) if tensor is not None)
    kept += sum(tensor.nbytes for tensor in moments)
    counted = adapter_size(AutoConfig.from_pretrained(tiny.llama), r=8, target_modules=QV)
    assert counted.parameters * TRAINED_BYTES == kept


# Activations


def kept_for_backward(config: Any, *, rows: int, tokens: int, checkpointed: bool, dtype: torch.dtype) -> int:
    """Return the bytes that autograd keeps in one training step, weights and logits aside."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = add_lora(base, TrainingSettings("")).train()
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    ids = torch.randint(5, 900, (rows, tokens))
    labels = torch.where(torch.arange(tokens) < tokens - 1, -100, ids)
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not (tensor.dim() and tensor.shape[-1] == config.vocab_size):
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        response_loss(model, batch, None)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_are_near_what_autograd_keeps(dtype: torch.dtype) -> None:
    kept = kept_for_backward(SMALL_LLAMA, rows=4, tokens=64, checkpointed=False, dtype=dtype)
    size, adapter = model_size(SMALL_LLAMA), adapter_size(SMALL_LLAMA, r=8, target_modules=QV)
    assert activation_bytes(size, adapter, tokens=4 * 64, dtype_bytes=dtype.itemsize) == pytest.approx(kept, rel=0.15)


def test_checkpointing_keeps_each_layers_input_and_works_on_one_layer() -> None:
    kept = kept_for_backward(SMALL_LLAMA, rows=4, tokens=64, checkpointed=True, dtype=torch.bfloat16)
    size, adapter = model_size(SMALL_LLAMA), adapter_size(SMALL_LLAMA, r=8, target_modules=QV)
    arguments = {"tokens": 4 * 64, "dtype_bytes": 2}
    inputs = activation_bytes(size, adapter, **arguments, checkpointed=True)  # type: ignore[arg-type]
    inputs -= activation_bytes(size, adapter, **arguments) // size.layers  # type: ignore[arg-type]
    assert inputs == pytest.approx(kept, rel=0.6)  # few layers: the last norm's part shows


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_activations_of_the_real_models_are_within_a_factor_of_1_4(name: str, real: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(real[name])
    kept = kept_for_backward(config, rows=2, tokens=64, checkpointed=False, dtype=torch.bfloat16)
    expected = activation_bytes(
        model_size(config), adapter_size(config, r=8, target_modules=QV), tokens=2 * 64, dtype_bytes=2
    )
    assert 1 / 1.4 < expected / kept < 1.4


# FLOPs and seconds


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SMALL_LLAMA)
    size, ids = model_size(SMALL_LLAMA), torch.zeros((2, 16), dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    assert score_flops(size, tokens=32, scored=32) == pytest.approx(counter.get_total_flops(), rel=0.02)  # attention
    assert score_flops(size, tokens=32, scored=32) == 32 * decode_flops(size)


def test_a_training_step_s_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = add_lora(AutoModelForCausalLM.from_config(SMALL_LLAMA), TrainingSettings(""))
    ids = torch.zeros((2, 16), dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    counted = counter.get_total_flops()
    # The first layer's backward pass ends at its adapters, and the adapters come on top.
    assert train_flops(model_size(SMALL_LLAMA), tokens=32, labels=32) == pytest.approx(counted, rel=0.2)


@pytest.mark.real
def test_training_flops_agree_with_the_measured_share_of_the_peak(real: dict[str, Path]) -> None:
    measured = result("training_gemma")
    size = model_size(AutoConfig.from_pretrained(real["gemma"]))
    flops = train_flops(size, tokens=measured["tokens"], labels=measured["response_tokens"]) / measured["tokens"]
    share = flops * measured["tokens_per_second"]["ours"]["median"] / measured["gemm_peak_flops"]
    assert share == pytest.approx(measured["share_of_gemm_peak"]["ours"]["median"], rel=0.1)


@pytest.mark.real
def test_no_measured_decoding_is_quicker_than_the_device_allows(
    real: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, peaks = result("decode"), result("training_gemma")
    monkeypatch.setattr(sizing, "COMPUTE_EFFICIENCY", 1.0)
    monkeypatch.setattr(sizing, "BANDWIDTH_EFFICIENCY", 1.0)
    here = Device(peaks["gemm_peak_flops"], measured["memory_bytes_per_second"], 24 * 2**30)
    size = model_size(AutoConfig.from_pretrained(real["smollm2"]))
    for row in measured["results"]:
        least = decode_seconds(size, here, devices=1, tokens=1000, rows=row["rows"], context=64, dtype_bytes=2)
        assert 1000 / least > row["tokens_per_second"]["hf"]["high"]


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_one_row_reads_the_weights_and_many_rows_compute(device: Device) -> None:
    size = model_size(LLAMA_70B)
    one, many = (
        decode_seconds(size, device, devices=8, tokens=rows, rows=rows, context=1, dtype_bytes=2) for rows in (1, 4096)
    )
    weights = (size.body + size.head) * 2 / (device.bandwidth * sizing.BANDWIDTH_EFFICIENCY) / 8
    assert one == pytest.approx(weights, rel=1e-3)
    assert many == pytest.approx(decode_flops(size) * 4096 / (device.flops * sizing.COMPUTE_EFFICIENCY) / 8)


# Memory that was measured


@pytest.mark.real
def test_the_measured_peak_of_training_is_within_a_factor_of_2(real: dict[str, Path]) -> None:
    measured = result("training_gemma")
    config = AutoConfig.from_pretrained(real["gemma"])
    size, adapter = model_size(config), adapter_size(config, r=8, target_modules=QV)
    steps = measured["rows"] / measured["batch"]
    expected = size.parameters * 2 + adapter.parameters * TRAINED_BYTES
    expected += activation_bytes(size, adapter, tokens=round(measured["tokens"] / steps), dtype_bytes=2)
    expected += logit_bytes(round(measured["response_tokens"] / steps), size.vocabulary)
    assert 0.5 < (expected + 2**30) / measured["peak_memory_bytes"]["ours"] < 2


@pytest.mark.real
@pytest.mark.parametrize("name", ["demo_intents", "demo_calls"])
def test_the_measured_peak_of_the_demo_is_within_a_factor_of_2_5(name: str, real: dict[str, Path]) -> None:
    source, target = (model_size(AutoConfig.from_pretrained(real[key])) for key in ("smollm2", "gemma"))
    weights = 2 * (2 * source.parameters + target.parameters)  # on a CPU F is a merged copy; G is the target
    cache = kv_cache_bytes(source, tokens=128, rows=128, dtype_bytes=2)
    expected = weights + cache + 2**28 + 2**30  # one scoring batch's logits, and the libraries
    assert 1 / 2.5 < expected / result(name)["verdict"]["peak_memory_bytes"] < 2.5


# What is refused


def test_a_mixture_of_experts_is_refused() -> None:
    config = MixtralConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=64, num_attention_heads=4)
    with pytest.raises(ModelError, match=r"mixtral: num_local_experts is 8, but .* dense models only. Use .*plan"):
        model_size(config)


def test_checkpointing_needs_less_only_with_layers_to_leave_out() -> None:
    size, adapter = model_size(SMALL_LLAMA), AdapterSize(0, 0)
    whole, checkpointed = (
        activation_bytes(size, adapter, tokens=10, dtype_bytes=2, checkpointed=value) for value in (False, True)
    )
    assert checkpointed < whole


# The command


@pytest.fixture
def large(tmp_path: Path) -> list[str]:
    """The 70B example with its models' configurations, and no weights."""
    for name, config in (("source", LLAMA_70B), ("target", QWEN_72B)):
        config.save_pretrained(tmp_path / name)
    overrides = [f"source.base={tmp_path / 'source'}", f"target.model={tmp_path / 'target'}"]
    return ["size", str(ROOT / "configs/llama3_70b.yaml"), *(part for text in overrides for part in ("--set", text))]


@pytest.mark.parametrize("device", ["A100-80GB", "L40S"])
def test_the_documents_tables_are_what_the_command_prints(
    device: str, large: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*large, "--device", device) == 0
    printed = capsys.readouterr().out
    document = (ROOT / "docs/sizing.md").read_text()
    assert printed in re.findall(r"```text\n(.*?)```", document, re.DOTALL)


def test_the_fewest_devices_fit_and_half_of_them_do_not(large: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def found(*arguments: str) -> dict[str, Any]:
        assert run_cli(*large, "--json", *arguments) == 0
        return dict(json.loads(capsys.readouterr().out))

    part = found()["synthesis"]
    assert part["kv_cache_bytes_per_token"] == 320 * 1024  # 2 x 8 heads x 128 x 80 layers x 2 bytes
    fewest = part["fewest_devices"]
    for devices, fits in ((fewest, True), (fewest // 2, False)):
        assert found("--set", f"engine.tensor_parallel_size={devices}")["synthesis"]["fits"] is fits


def test_one_device_holds_no_70b(large: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*large, "--json", "--set", "distill.accelerate=null") == 0
    part = json.loads(capsys.readouterr().out)["distillation"]
    assert (part["devices"], part["fits"], part["fewest_devices"]) == (1, False, None)  # unsharded copies never fit


def test_any_configuration_can_be_sized(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_project(tmp_path, tiny)
    assert run_cli("size", str(config), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["synthesis"]["fits"]
    assert found["distillation"]["fits"]
    assert all(value > 0 for value in found["seconds"].values())


def test_an_unknown_device_is_refused_with_those_known(large: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*large, "--device", "T4") == 2
    assert "--device T4: not in the table. Known are A100-80GB, H100-80GB, MI210, L40S." in capsys.readouterr().err
