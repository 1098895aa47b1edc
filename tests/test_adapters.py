"""Every kind of adapter that peft makes, merged and switched, against peft itself; or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import Tiny
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from tuneshift.adapters import save_merged
from tuneshift.engines.base import ScoreRequest
from tuneshift.engines.hf import HfEngine
from tuneshift.errors import ModelError
from tuneshift.models import LoadOptions

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of what is proved here
LOAD = LoadOptions(device="cpu", dtype="float32")
REQUESTS = [ScoreRequest((2, 5, 9, 10), (11, 12, 6)), ScoreRequest((5, 7), (8, 9, 10, 11))]
CLOSE = 1e-4  # nats


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj"], **options})


KINDS: dict[str, peft.PeftConfig] = {
    "all layers": lora(target_modules="all-linear"),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "biases": lora(bias="lora_only"),
    "its own output layer": lora(modules_to_save=["lm_head"]),
    "its own embeddings": lora(modules_to_save=["embed_tokens"]),
    "a LoRA of tied embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "a LoRA of a tied output layer": lora(target_modules=["q_proj", "lm_head"]),
    "single tokens": lora(trainable_token_indices=[5, 6, 7]),
    "repeated layers": lora(layer_replication=[[0, 2], [1, 2]]),
    "PiSSA": lora(init_lora_weights="pissa"),
    "IA3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "VeRA": peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(task_type="CAUSAL_LM", r=0, oft_block_size=4, target_modules=["q_proj"]),
    "layer norms": peft.LNTuningConfig(task_type="CAUSAL_LM"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with biases, as Qwen has them."""
    folder = Path(shutil.copytree(tiny.llama, tmp_path_factory.mktemp("biased") / "llama"))
    model = LlamaForCausalLM.from_pretrained(folder, attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def loaded(base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model.eval()


def trained(base: Path, config: peft.PeftConfig, folder: Path) -> Any:
    """Return a model with an adapter whose weights are random, as if it had learnt much; it is saved too."""
    torch.manual_seed(0)
    model = peft.get_peft_model(loaded(base), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return model


@torch.inference_mode()
def scores(model: Any) -> list[float]:
    found = []
    for request in REQUESTS:
        ids = torch.tensor([[*request.prompt_ids, *request.response_ids]])
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0]
        first = len(request.prompt_ids) - 1
        found += [logprobs[first + place, token].item() for place, token in enumerate(request.response_ids)]
    return found


def far(first: list[float], second: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_score_as_peft_does(base: Path, tmp_path: Path, kind: str, merge: bool) -> None:
    tuned, plain = scores(trained(base, KINDS[kind], tmp_path)), scores(loaded(base))
    assert far(tuned, plain) > 0.1
    engine = HfEngine.open(str(base), load=LOAD)
    engine.attach(str(tmp_path), merge=merge)
    for fine_tuned, expected in ((True, tuned), (False, plain)):
        own = [logprob for row in engine.score(REQUESTS, fine_tuned=fine_tuned) for logprob in row]
        assert far(own, expected) < CLOSE


@pytest.mark.parametrize("kind", ["a LoRA of tied embeddings", "a LoRA of a tied output layer"])
def test_a_checkpoint_in_which_a_tied_layer_would_change_twice_is_not_made(
    base: Path, tmp_path: Path, kind: str
) -> None:
    trained(base, KINDS[kind], tmp_path / "adapter")
    with pytest.raises(ModelError, match="cannot be merged into its base"):
        save_merged(str(base), str(tmp_path / "adapter"), tmp_path / "merged", LOAD)


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_an_adapter_that_puts_tokens_before_the_prompt_is_refused(base: Path, tmp_path: Path, config: Any) -> None:
    trained(base, config(task_type="CAUSAL_LM", num_virtual_tokens=4), tmp_path)
    engine = HfEngine.open(str(base), load=LOAD)
    with pytest.raises(ModelError, match="puts tokens of its own before each prompt"):
        engine.attach(str(tmp_path))
