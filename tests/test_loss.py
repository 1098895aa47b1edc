"""The loss against the cross entropy of full logits, and what it keeps in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Tiny
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Qwen2Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from tuneshift import loss
from tuneshift.distill import TrainingSettings, add_lora
from tuneshift.loss import head, logit_bytes, response_loss

WORDS = 300
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# What each does to its logits: a soft cap, a multiplier, a divisor; a bias in q and v; other names of everything.
FAMILIES: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=3.0),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "gpt2": lambda: GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4),
}


def batch() -> dict[str, torch.Tensor]:
    """Return four rows padded on the right, with 1, 4, 9 and 0 labels."""
    ids = torch.randint(5, WORDS, (4, 16), generator=torch.Generator().manual_seed(1))
    ends, labelled = torch.tensor([16, 14, 11, 9]), torch.tensor([1, 4, 9, 0])
    place = torch.arange(16)
    given = place < ends[:, None]
    learnt = given & (place >= (ends - labelled)[:, None])
    return {"input_ids": ids, "attention_mask": given.long(), "labels": torch.where(learnt, ids, -100)}


def naive_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100)


def make(family: str) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()


@pytest.mark.parametrize("rows", [1, 3, 14, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradients_are_those_of_the_naive_cross_entropy(
    family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "HEAD_BYTES", logit_bytes(1, WORDS) * rows)
    inputs, results = batch(), []
    for loss_of in (lambda model: response_loss(model, inputs, None), lambda model: naive_loss(model, inputs)):
        model = make(family)
        value = loss_of(model)
        value.backward()
        results.append((value.item(), {name: weight.grad for name, weight in model.named_parameters()}))
    (own, own_gradients), (naive, naive_gradients) = results
    assert own == pytest.approx(naive, abs=1e-5)
    assert any(gradient is not None and gradient.abs().max() > 1e-2 for gradient in naive_gradients.values())
    for name, gradient in naive_gradients.items():
        assert torch.allclose(own_gradients[name], gradient, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("rows", [2, 1000])
def test_adapters_are_trained_through_the_pieces_also_that_of_the_head(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "HEAD_BYTES", logit_bytes(1, WORDS) * rows)
    gradients = []
    for loss_of in (response_loss, lambda model, inputs, _: naive_loss(model, inputs)):
        model = add_lora(make("qwen2"), TrainingSettings("", target_modules=("q_proj", "lm_head"), lora_dropout=0.0))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
        loss_of(model, batch(), None).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    own, naive = gradients
    assert len(naive) == 6
    for name, gradient in naive.items():
        assert gradient.abs().max() > 1e-4
        assert torch.allclose(own[name], gradient, rtol=1e-4, atol=1e-6), name


def test_the_loss_is_divided_by_the_tokens_of_the_whole_step() -> None:
    model, whole = make("qwen2"), batch()
    first, second = ({name: value[part] for name, value in whole.items()} for part in (slice(0, 2), slice(2, 4)))
    items = (whole["labels"] != -100).sum()
    with torch.no_grad():
        parts = response_loss(model, first, items) + response_loss(model, second, items)
        assert parts.item() == pytest.approx(naive_loss(model, whole).item(), abs=1e-5)
        assert response_loss(model, whole, int(items)).item() == pytest.approx(parts.item(), abs=1e-5)


def test_a_batch_without_labels_adds_nothing() -> None:
    model, inputs = make("qwen2"), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    value = response_loss(model, inputs, 14)
    value.backward()
    assert value.item() == 0
    assert not any(weight.grad.any() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("rows", [1, 3, 14])
def test_logits_of_no_more_rows_than_fit_are_held(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "HEAD_BYTES", logit_bytes(1, WORDS) * rows)
    model, held, kept = make("qwen2"), [], []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: held.append(logits.shape[:-1].numel()))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() if tensor.shape[-1:] == (WORDS,) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = response_loss(model, batch(), None)
    assert max(held) == rows  # 14 labels in all
    assert sum(held) == 14
    assert any(kept) == (rows == 14)  # pieces are made anew for the backward pass
    value.backward()
    assert max(held) == rows
    assert sum(held) == (14 if rows == 14 else 28)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_alone_is_the_models_own(family: str) -> None:
    model, ids = make(family), torch.arange(5, 12)[None]
    with torch.no_grad():
        outputs = model.base_model(input_ids=ids)
        assert torch.equal(head(model, outputs), model(input_ids=ids).logits)
    assert "forward" not in vars(model.base_model)


def test_a_backbone_that_was_replaced_before_is_put_back(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.llama, dtype=torch.float32).eval()
    own = model.base_model.forward
    model.base_model.forward = own  # as accelerate's hooks do
    head(model, BaseModelOutputWithPast(last_hidden_state=torch.zeros(1, 1, model.config.hidden_size)))
    assert vars(model.base_model)["forward"] is own
