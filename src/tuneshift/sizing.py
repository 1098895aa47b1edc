"""Memory and time of a run from the models' configurations alone: arithmetic, without weights and without a device.

Letters: N parameters, V words of the vocabulary, h hidden size, a = heads x head size, i intermediate size. Bytes are
counted for what grows with the model; a process's own libraries come on top. docs/sizing.md says which of these figures
are exact and how far the others were from measured ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuneshift.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

COMPUTE_EFFICIENCY = 0.4  # share of the peak FLOP/s that large matrix products reach; a guess
BANDWIDTH_EFFICIENCY = 0.6  # share of the peak bandwidth with which decoding reads weights and cache; a guess
TRAINED_BYTES = 16  # of an adapter's parameter: fp32 value, gradient and Adam's two moments


@dataclass(frozen=True)
class Device:
    """A device's published peaks: dense bf16 FLOP/s, bytes/s of its memory, and bytes of it."""

    flops: float
    bandwidth: float
    memory: float


DEVICES = {
    # NVIDIA A100 datasheet, June 2021, SXM 80 GB: 312 TFLOP/s, 2,039 GB/s.
    "A100-80GB": Device(312e12, 2.039e12, 80e9),
    # NVIDIA H100 datasheet, SXM: 1,979 TFLOP/s with sparsity, so half of it dense; 3.35 TB/s.
    "H100-80GB": Device(989.5e12, 3.35e12, 80e9),
    # AMD Instinct MI210 datasheet: 181.0 TFLOP/s, 1.6 TB/s, 64 GB.
    "MI210": Device(181e12, 1.6384e12, 64e9),
    # NVIDIA L40S datasheet: 733 TFLOP/s with sparsity, 362.05 dense; 864 GB/s, 48 GB.
    "L40S": Device(362.05e12, 864e9, 48e9),
}


@dataclass(frozen=True)
class ModelSize:
    """What a model's memory and time depend on.

    `body` counts the parameters of all layers, `head` those of the language-model head: V x h, also where it is tied to
    the embeddings. `windows` has for each layer the number of tokens that its key-value cache holds at most.
    """

    parameters: int
    body: int
    head: int
    vocabulary: int
    layers: int
    hidden: int
    attention: int
    key_value: int
    intermediate: int
    windows: tuple[int | None, ...]


@dataclass(frozen=True)
class AdapterSize:
    """A LoRA's parameters, and the summed input widths of the modules that it adapts."""

    parameters: int
    inputs: int


def model_size(config: PreTrainedConfig) -> ModelSize:
    """Count a decoder's parameters on torch's meta device, and read its shape.

    Raises:
        ModelError: not every token passes all parameters (mixture of experts), so the formulas here do not hold.
    """
    text = config.get_text_config()
    experts = next(
        (k for k in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(text, k, None)), None
    )
    if experts is not None:
        raise ModelError(
            f"{config.name_or_path or config.model_type}: {experts} is {getattr(text, experts)}, but sizes are "
            "computed for dense models only. Use `tuneshift plan`, which measures."
        )
    model = _on_meta(config)
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    embeddings = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    parameters = sum(parameter.numel() for parameter in model.parameters())
    window = int(getattr(text, "sliding_window", None) or 0)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return ModelSize(
        parameters=parameters,
        body=parameters - embeddings * (1 if tied else 2),
        head=embeddings,
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        attention=heads * head_size,
        key_value=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
        intermediate=text.intermediate_size,
        # The newest token attends to itself and to window - 1 others, which the cache holds.
        windows=tuple(window - 1 if kind == "sliding_attention" else None for kind in kinds),
    )


def adapter_size(config: PreTrainedConfig, *, r: int, target_modules: Any) -> AdapterSize:
    """Count what a LoRA adds to a model, with peft's own rules, on torch's meta device."""
    from tuneshift.distill import TrainingSettings, add_lora

    model = add_lora(_on_meta(config), TrainingSettings("", r=r, target_modules=target_modules))
    lora = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inputs = sum(value.shape[1] for name, value in lora.items() if ".lora_A." in name)
    return AdapterSize(sum(value.numel() for value in lora.values()), inputs)


def _on_meta(config: PreTrainedConfig) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def kv_cache_bytes(model: ModelSize, *, tokens: int, rows: int, dtype_bytes: int) -> int:
    """Return the bytes of keys and values of `rows` texts of `tokens` tokens: 2 x key-value width x tokens x layers."""
    held = sum(tokens if window is None else min(tokens, window) for window in model.windows)
    return 2 * model.key_value * held * rows * dtype_bytes


def activation_bytes(
    model: ModelSize, adapter: AdapterSize, *, tokens: int, dtype_bytes: int, checkpointed: bool = False
) -> int:
    """Return what a training step keeps of `tokens` tokens, padding included, for its backward pass.

    The weights are frozen, so a matrix product keeps no input. Assumed for a layer of Llama's kind: the inputs of two
    norms in fp32 (8h bytes); queries, repeated keys and values, and their result (4a values); the gate, what it becomes
    and what it is multiplied with (3i values); for each adapted module its input in fp32 with the dropout's mask (5
    bytes a value). With gradient checkpointing: each layer's input, and all of one layer.
    """
    layer = 8 * model.hidden + dtype_bytes * (4 * model.attention + 3 * model.intermediate)
    layers = layer * model.layers + 5 * adapter.inputs
    if checkpointed:
        layers = layers // model.layers + dtype_bytes * model.hidden * model.layers
    return tokens * layers


def decode_flops(model: ModelSize) -> int:
    """Return the FLOPs of one generated token: 2N, the embedding's table aside."""
    return 2 * (model.body + model.head)


def score_flops(model: ModelSize, *, tokens: int, scored: int) -> int:
    """Return the FLOPs of reading `tokens` tokens of which `scored` are scored: the head works for those only."""
    return 2 * (model.body * tokens + model.head * scored)


def train_flops(model: ModelSize, *, tokens: int, labels: int) -> int:
    """Return the FLOPs of training on `tokens` tokens of which `labels` are learnt.

    Forward 2N and the gradients of activations 2N; frozen weights need no gradients of their own, and the adapter's
    are small. The head works for labels only.
    """
    return 4 * (model.body * tokens + model.head * labels)


def decode_seconds(
    model: ModelSize, device: Device, *, devices: int, tokens: int, rows: int, context: int, dtype_bytes: int
) -> float:
    """Return the seconds of generating `tokens` tokens in batches of `rows` texts of `context` tokens.

    A step reads all weights and the cache once, or computes, whichever takes longer; `devices` share both.
    """
    read = (model.body + model.head) * dtype_bytes
    read += kv_cache_bytes(model, tokens=context, rows=rows, dtype_bytes=dtype_bytes)
    step = max(
        read / (device.bandwidth * BANDWIDTH_EFFICIENCY),
        decode_flops(model) * rows / (device.flops * COMPUTE_EFFICIENCY),
    )
    return step * tokens / rows / devices


def compute_seconds(flops: float, device: Device, *, devices: int) -> float:
    """Return the seconds that `devices` take for large matrix products of so many FLOPs."""
    return flops / (device.flops * COMPUTE_EFFICIENCY * devices)
