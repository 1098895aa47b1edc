"""Training against the naive loss, against itself when interrupted, and against peft's own loading."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS, Tiny
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import tuneshift.distill as distill_module
from tuneshift.distill import (
    Pair,
    TrainingSettings,
    TrainingSummary,
    distill,
    newest_sealed_checkpoint,
    tokenize_pairs,
)
from tuneshift.errors import MemoryLimitError, ModelError
from tuneshift.models import LoadOptions

LOAD = LoadOptions(device="cpu", dtype="float32")
PAIRS = [Pair(f"Request: {text}\nIntent:", f" {text.split()[0]} it") for text in CORPUS[:5] * 2]
EPOCHS, STEPS_PER_EPOCH = 4, 5  # ten pairs, two a step


class Stopped(Exception):
    """Stands for a kill in the middle of a training."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, many times so beside another process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(tiny: Tiny, folder: Path, **options: Any) -> TrainingSummary:
    on_step = {"on_step": options.pop("on_step")} if "on_step" in options else {}
    settings: dict[str, Any] = {
        "target": str(tiny.gemma),
        "r": 4,
        "num_train_epochs": EPOCHS,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 2,
        "load": LOAD,
    }
    return distill(
        PAIRS,
        TrainingSettings(**{**settings, **options}),
        output_dir=folder / "adapter",
        checkpoint_dir=folder / "checkpoints",
        **on_step,
    )


def stop_at(step: int) -> Callable[[int, int, float | None], None]:
    """Return an `on_step` that kills the training once `step` steps are done."""

    def on_step(done: int, total: int, numbers: Mapping[str, float]) -> None:
        if done == step:
            raise Stopped

    return on_step


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(first: Path, second: Path) -> None:
    one, two = adapter_weights(first), adapter_weights(second)
    assert set(one) == set(two)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingSummary, Any]:
    """An uninterrupted training: its folder, its summary and the model that it trained, still in memory."""
    folder, loaded = tmp_path_factory.mktemp("whole"), []
    with pytest.MonkeyPatch.context() as patch:
        original = distill_module.load_causal_lm
        patch.setattr(distill_module, "load_causal_lm", lambda *a: loaded.append(original(*a)) or loaded[-1])
        summary = train(tiny, folder)
    (model,) = loaded
    return folder, summary, model.eval()


@pytest.fixture(scope="module")
def killed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that was killed in the middle of its third epoch."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(Stopped):
        train(tiny, folder, on_step=stop_at(2 * STEPS_PER_EPOCH + 2))
    return folder


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("checkpoint-*")}


def naive_loss(model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of the full logits over labelled tokens."""
    logits = model(input_ids=ids, attention_mask=mask).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def batch_of(rows: Any) -> dict[str, torch.Tensor]:
    """Return rows of `tokenize_pairs` padded on the right."""
    width = max(map(len, rows["input_ids"]))
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in rows["input_ids"]]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows["input_ids"]]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for labels in rows["labels"]]),
    }


def pairs_loss(model: Any, folder: Path) -> float:
    """Return the naive loss of a model on the training pairs."""
    batch = batch_of(tokenize_pairs(PAIRS, AutoTokenizer.from_pretrained(folder), max_length=None))
    with torch.no_grad():
        return naive_loss(model, batch["input_ids"], batch["attention_mask"], batch["labels"]).item()


# Tokens and labels


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_the_labels_are_exactly_the_response_and_one_eos(name: str, tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(getattr(tiny, name))
    rows = tokenize_pairs(PAIRS, tokenizer, max_length=256)
    assert len(rows) == len(PAIRS)
    for pair, ids, labels in zip(PAIRS, rows["input_ids"], rows["labels"], strict=True):
        learned = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        assert learned == [label for label in labels if label != -100]
        assert learned == [*tokenizer(pair.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        given = ids[: len(ids) - len(learned)]
        assert labels[: len(given)] == [-100] * len(given)
        assert given == tokenizer(pair.prompt)["input_ids"]
        assert (given[0] == tokenizer.bos_token_id) == (name == "gemma")
        assert ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == pair.prompt + pair.response


def test_a_pair_that_just_fits_is_not_cut(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    pair = PAIRS[0]
    (ids,) = tokenize_pairs([pair], tokenizer, max_length=None)["input_ids"]
    assert tokenize_pairs([pair], tokenizer, max_length=len(ids))["input_ids"] == [ids]
    with pytest.raises(ModelError, match=f"training pair 1 has {len(ids)} tokens.* {len(ids) - 1}"):
        tokenize_pairs([pair], tokenizer, max_length=len(ids) - 1)


def test_a_pair_longer_than_the_context_is_refused_by_its_number(tiny: Tiny, tmp_path: Path) -> None:
    long = Pair("Request: " + "play some jazz " * 30, " play")
    settings = TrainingSettings(str(tiny.gemma), load=LOAD)
    with pytest.raises(ModelError, match=r"training pair 11 .*256"):
        distill([*PAIRS, long], settings, output_dir=tmp_path / "a", checkpoint_dir=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


# Training


def test_training_changes_the_lora_weights_and_nothing_else(
    whole: tuple[Path, TrainingSummary, Any], tiny: Tiny
) -> None:
    _, _, model = whole
    fresh = AutoModelForCausalLM.from_pretrained(tiny.gemma, dtype=torch.float32).state_dict()
    trained = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    lora = {name for name in trained if ".lora_" in name}
    assert set(trained) - lora == set(fresh)
    assert [name for name in fresh if not torch.equal(trained[name], fresh[name])] == []
    assert all(trained[name].abs().max() > 0 for name in lora)
    assert len(lora) == 2 * 2 * 6  # A and B of q_proj and v_proj in six layers


def test_a_loaded_adapter_computes_what_the_trained_model_computes(
    whole: tuple[Path, TrainingSummary, Any], tiny: Tiny
) -> None:
    folder, _, trained = whole
    base = AutoModelForCausalLM.from_pretrained(tiny.gemma, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)


def test_a_loaded_adapter_predicts_the_pairs_better_than_its_base(
    whole: tuple[Path, TrainingSummary, Any], tiny: Tiny
) -> None:
    folder, _, _ = whole
    base = AutoModelForCausalLM.from_pretrained(tiny.gemma, dtype=torch.float32).eval()
    before = pairs_loss(base, tiny.gemma)
    after = pairs_loss(PeftModel.from_pretrained(base, str(folder / "adapter")).eval(), tiny.gemma)
    assert after < 0.9 * before


def test_the_summary_says_what_was_done(whole: tuple[Path, TrainingSummary, Any], tiny: Tiny) -> None:
    _, summary, _ = whole
    tokens = sum(
        map(len, tokenize_pairs(PAIRS, AutoTokenizer.from_pretrained(tiny.gemma), max_length=None)["input_ids"])
    )
    assert summary.steps == EPOCHS * STEPS_PER_EPOCH
    assert len(summary.losses) == EPOCHS
    assert summary.losses[-1] < summary.losses[0]
    assert summary.trained_tokens == EPOCHS * tokens
    assert summary.target_modules == ["q_proj", "v_proj"]
    assert summary.tokens_per_second == pytest.approx(summary.trained_tokens / summary.seconds)


def test_the_first_epoch_s_loss_is_in_nats_per_response_token(tiny: Tiny, tmp_path: Path) -> None:
    summary = train(tiny, tmp_path, num_train_epochs=1, learning_rate=1e-12)  # nothing is learned
    model = AutoModelForCausalLM.from_pretrained(tiny.gemma, dtype=torch.float32).eval()
    rows = tokenize_pairs(PAIRS, AutoTokenizer.from_pretrained(tiny.gemma), max_length=None)
    single = [batch_of(rows.select([index])) for index in range(len(rows))]
    with torch.no_grad():
        losses = [naive_loss(model, b["input_ids"], b["attention_mask"], b["labels"]).item() for b in single]
    # A step's mean weighs tokens alike and the epoch's mean weighs steps alike, so it lies between the extremes
    # and, with responses of nearly the same length, close to the mean over pairs.
    assert min(losses) < summary.losses[0] < max(losses)
    assert summary.losses[0] == pytest.approx(sum(losses) / len(losses), rel=0.05)


def test_progress_is_told_after_every_step(tiny: Tiny, tmp_path: Path) -> None:
    told: list[tuple[int, int, Mapping[str, float]]] = []
    train(tiny, tmp_path, num_train_epochs=2, on_step=lambda *step: told.append(step))
    assert [(done, total) for done, total, _ in told] == [(step, 10) for step in range(1, 11)]
    assert told[0][2] == {}
    assert told[-1][2]["loss"] > 0


def test_a_target_module_that_does_not_exist_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"distill\.target_modules"):
        train(tiny, tmp_path, target_modules=["no_such_proj"])


# Interruption


def test_a_killed_training_leaves_the_checkpoints_of_its_whole_epochs(killed: Path) -> None:
    assert checkpoints(killed) == {"checkpoint-5", "checkpoint-10"}
    # and ten comes after five, which it would not as text
    assert newest_sealed_checkpoint(killed / "checkpoints") == str(killed / "checkpoints" / "checkpoint-10")


def test_a_killed_training_ends_with_the_same_adapter(
    whole: tuple[Path, TrainingSummary, Any], killed: Path, tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(killed / "checkpoints", tmp_path / "checkpoints")
    steps: list[int] = []
    summary = train(tiny, tmp_path, on_step=lambda done, total, numbers: steps.append(done))
    assert steps == list(range(11, 21))  # the first two epochs were not trained again
    assert_same_adapter(tmp_path, whole[0])
    assert summary.losses == pytest.approx(whole[1].losses)
    assert summary.steps == whole[1].steps
    assert summary.tokens_per_second is None  # this process trained a part alone


def test_a_torn_newest_checkpoint_is_removed_and_the_one_before_is_used(
    whole: tuple[Path, TrainingSummary, Any], killed: Path, tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(killed / "checkpoints", tmp_path / "checkpoints")
    torn = tmp_path / "checkpoints" / "checkpoint-10" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    steps: list[int] = []

    def on_step(done: int, total: int, numbers: Mapping[str, float]) -> None:
        if not steps:
            assert checkpoints(tmp_path) == {"checkpoint-5"}
        steps.append(done)

    train(tiny, tmp_path, on_step=on_step)
    assert steps == list(range(6, 21))
    assert_same_adapter(tmp_path, whole[0])


@pytest.mark.parametrize("damage", ["no seal", "torn seal", "torn weights", "missing file", "empty folder"])
def test_a_damaged_checkpoint_is_not_resumed_from(damage: str, killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "checkpoint-10"
    seal, weights = newest / distill_module.SEAL, newest / "adapter_model.safetensors"
    if damage == "no seal":
        seal.unlink()
    elif damage == "torn seal":
        seal.write_text(seal.read_text()[:-20])
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing file":
        weights.unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    assert newest_sealed_checkpoint(tmp_path / "checkpoints") == str(tmp_path / "checkpoints" / "checkpoint-5")
    assert checkpoints(tmp_path) == {"checkpoint-5"}


def test_without_checkpoints_there_is_nothing_to_resume_from(tmp_path: Path) -> None:
    assert newest_sealed_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("layer", "message"),
    [("forward", "A training step does not fit .* Lower distill.per_device_train"), ("loading", "run.dtype: bfloat16")],
)
def test_a_training_for_which_memory_is_short_says_what_to_change_and_goes_on(
    layer: str, message: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*arguments: Any, **options: Any) -> torch.Tensor:
        return torch.empty(2**50)  # refused by torch's own allocator

    layers = {
        "forward": "tuneshift.distill.response_loss",
        "loading": "transformers.AutoModelForCausalLM.from_pretrained",
    }
    with monkeypatch.context() as patch:
        patch.setattr(layers[layer], allocate)
        with pytest.raises(MemoryLimitError, match=message):
            train(tiny, tmp_path)
    assert train(tiny, tmp_path).steps == EPOCHS * STEPS_PER_EPOCH


def test_a_training_killed_in_its_first_epoch_starts_over(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(tiny, tmp_path, num_train_epochs=1, on_step=stop_at(3))
    steps: list[int] = []
    train(tiny, tmp_path, num_train_epochs=1, on_step=lambda done, total, numbers: steps.append(done))
    assert steps == [1, 2, 3, 4, 5]


def test_a_training_that_was_finished_is_not_repeated(
    whole: tuple[Path, TrainingSummary, Any], tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "checkpoints")
    steps: list[int] = []
    summary = train(tiny, tmp_path, on_step=lambda done, total, numbers: steps.append(done))
    assert steps == []
    assert_same_adapter(tmp_path, whole[0])
    assert summary.steps == whole[1].steps
    assert summary.tokens_per_second is None


def test_the_seed_decides_the_adapter(tiny: Tiny, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(tiny, tmp_path / name, num_train_epochs=1, seed=seed)
    assert_same_adapter(tmp_path / "one", tmp_path / "two")
    one, three = adapter_weights(tmp_path / "one"), adapter_weights(tmp_path / "three")
    assert not any(torch.equal(one[name], three[name]) for name in one)
