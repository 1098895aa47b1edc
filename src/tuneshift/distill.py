"""Step 4: train a LoRA on the target with the kept pairs (paper, eq. 1: NLL of the response tokens).

The trainer is trl's `SFTTrainer` with two differences. On a CPU the loss is `tuneshift.loss.response_loss`, since trl
evaluates the language-model head on every row there; and checkpoints are written at epoch ends and carry a seal, so
that a torn one is never resumed from.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneshift.encoding import Reader, encode_prompt, encode_response
from tuneshift.errors import ConfigError, ModelError
from tuneshift.loss import response_loss
from tuneshift.models import (
    LoadOptions,
    context_length,
    enough_memory,
    file_sha256,
    free_memory,
    inspect_causal_lm,
    load_causal_lm,
    load_tokenizer,
    peak_cuda_memory,
    pick_device,
    vocabulary_size,
)
from tuneshift.ranks import adapter_state, agree, even_order, place_weights, with_blank

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer

OnStep = Callable[[int, int, Mapping[str, float]], None]
"""Is told (steps done, steps in all, the newest whole epoch's numbers: `loss` in nats per token, and trl's others)."""
SEAL = "sealed.json"
TRAINER_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "linear",  # paper, section H.1
    "warmup_steps": 0,  # the paper names none; its baseline Trans-LoRA uses none
    "weight_decay": 0.0,  # likewise
    "max_length": None,  # nothing is cut: lengths are checked before
    "gradient_checkpointing": False,
    "bf16": False,  # the frozen weights already have the wanted dtype; the adapter trains in fp32
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "ddp_find_unused_parameters": False,  # every LoRA layer takes part in every step
    "logging_strategy": "epoch",
    "report_to": "none",
    "disable_tqdm": True,
}
"""What differs from the defaults of trl's `SFTConfig`."""
DISTILL_ARGUMENTS = (
    "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
SETTINGS = {name: f"distill.{name}" for name in DISTILL_ARGUMENTS} | {"seed": "run.seed", "report_to": "run.trackers"}
OWN_ARGUMENTS = (
    "output_dir", "use_cpu", "max_steps", "max_length", "packing", "padding_free", "dataset_kwargs", "loss_type",
    "remove_unused_columns", "label_smoothing_factor", "assistant_only_loss", "completion_only_loss", "eos_token",
    "push_to_hub", "hub_token", "average_tokens_across_devices", "logging_strategy", "logging_steps",
    "logging_first_step",
)  # fmt: skip
"""Arguments that no user may set: the run's folder, what would cut or regroup the pairs or change the loss, secrets,
and when a loss is told, since the report shows one of each epoch."""
STEP_TOO_LARGE = (
    "Lower distill.per_device_train_batch_size and raise distill.gradient_accumulation_steps as much, set "
    "distill.trainer_args: {gradient_checkpointing: true}, or train on several GPUs (distill.accelerate)."
)


@dataclass(frozen=True)
class Pair:
    """A prompt and the response to learn."""

    prompt: str
    response: str


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; names and meaning are peft's and trl's, defaults the paper's (section H.1).

    `trainer_args` go to trl's `SFTConfig` as they are, and win. `accelerate` is an accelerate configuration file: its
    processes then train, see `tuneshift.launch`.
    """

    target: str
    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    target_modules: Sequence[str] | str = ("q_proj", "v_proj")
    num_train_epochs: int = 20
    learning_rate: float = 2e-5
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    trainer_args: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    load: LoadOptions = field(default_factory=LoadOptions)
    accelerate: str | None = None


@dataclass(frozen=True)
class TrainingSummary:
    """What a training run did.

    `losses` holds the mean training loss per epoch in nats per response token. `trained_tokens` counts prompt, response
    and EOS tokens over all epochs. `seconds` and `tokens_per_second` are this process's; the latter is `None` where an
    earlier process trained a part. `peak_cuda_memory_bytes` is that of the first device, `None` without CUDA.
    """

    steps: int
    losses: list[float]
    trained_tokens: int
    seconds: float
    tokens_per_second: float | None
    target_modules: list[str]
    processes: int = 1
    peak_cuda_memory_bytes: int | None = None


def distill(
    pairs: Sequence[Pair],
    settings: TrainingSettings,
    *,
    output_dir: Path,
    checkpoint_dir: Path,
    on_step: OnStep = lambda done, total, numbers: None,
) -> TrainingSummary:
    """Train a LoRA on the target in this process, or as one of its ranks, and save it under `output_dir`.

    A stopped training continues at the last epoch that `checkpoint_dir` holds. `on_step` is called after each step.

    Raises:
        ModelError: a pair does not fit into the target's context, or a target module does not exist.
        ConfigError: a training argument is wrong. MemoryLimitError: the target, or a step, does not fit into memory.
    """
    started = time.monotonic()
    tokenizer = load_tokenizer(settings.target, trust_remote_code=settings.load.trust_remote_code)
    arguments = trainer_arguments(settings, checkpoint_dir)  # meets the other ranks, before weights are placed
    model = load_causal_lm(settings.target, place_weights(settings.load))
    if int(tokenizer.pad_token_id) >= vocabulary_size(model):  # padding is embedded too, though nothing reads it
        tokenizer.pad_token = tokenizer.eos_token
    dataset = tokenize_pairs(pairs, tokenizer, max_length=context_length(model.config))
    peft_model = add_lora(model, settings)
    trainer = make_trainer(peft_model, tokenizer, dataset, arguments, on_step)
    checkpoint = agree(lambda: newest_sealed_checkpoint(checkpoint_dir))
    with enough_memory("A training step", STEP_TOO_LARGE):
        trainer.train(resume_from_checkpoint=checkpoint)
    save_adapter(peft_model, tokenizer, output_dir)
    seconds = time.monotonic() - started
    tokens = sum(len(ids) for ids in dataset["input_ids"]) * settings.num_train_epochs
    summary = TrainingSummary(
        steps=trainer.state.global_step,
        losses=[float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        trained_tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds if checkpoint is None else None,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in peft_model.targeted_module_names}),
        processes=arguments.world_size,
        peak_cuda_memory_bytes=peak_cuda_memory(),
    )
    del trainer, peft_model, model
    free_memory()  # the trainer's parts refer to each other
    return summary


def inspect_target(settings: TrainingSettings) -> Reader:
    """Prove without reading a weight that the target can be trained as asked, and return what it can read.

    Raises:
        ModelError: the target is damaged, no decoder, or lacks a target module.
        ConfigError: a training argument is wrong.
    """
    model = inspect_causal_lm(settings.target, settings.load)
    tokenizer = load_tokenizer(settings.target, trust_remote_code=settings.load.trust_remote_code)
    reader = Reader(tokenizer, context_length(model.config), vocabulary_size(model))
    add_lora(model, settings)
    trainer_arguments(settings, Path("unused"))
    return reader


def trainer_arguments(settings: TrainingSettings, checkpoint_dir: Path) -> SFTConfig:
    """Return trl's configuration of the training.

    Raises:
        ConfigError: an argument is unknown, its value is refused, or it is not the user's to set.
    """
    from trl import SFTConfig

    given = settings.trainer_args
    for name in given:
        if name in SETTINGS:
            raise ConfigError(f"distill.trainer_args: {name} has a setting of its own. Set {SETTINGS[name]}.")
        if name in OWN_ARGUMENTS:
            raise ConfigError(f"distill.trainer_args: {name} is set by the run and cannot be changed. Remove it.")
    try:
        arguments = SFTConfig(
            **{
                **TRAINER_DEFAULTS,
                "output_dir": str(checkpoint_dir),
                "num_train_epochs": settings.num_train_epochs,
                "learning_rate": settings.learning_rate,
                "per_device_train_batch_size": settings.per_device_train_batch_size,
                "gradient_accumulation_steps": settings.gradient_accumulation_steps,
                "seed": settings.seed,
                "use_cpu": pick_device(settings.load.device).type == "cpu",
                **given,
            }
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs would mean nn.DataParallel, which trl refuses
        return arguments
    except (TypeError, ValueError, ImportError) as error:
        why = str(error).removeprefix("SFTConfig.__init__() ")
        raise ConfigError(f"distill.trainer_args: {why}. See the arguments of trl's SFTConfig.") from error


def add_lora(model: PreTrainedModel, settings: TrainingSettings) -> PeftModel:
    """Return `model` with fresh LoRA layers; their A matrices are drawn from the seed.

    Raises:
        ModelError: a target module does not exist in the model.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(settings.seed)
    modules = settings.target_modules
    try:
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=modules if isinstance(modules, str) else list(modules),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")
    except ValueError as error:
        raise ModelError(f"distill.target_modules: {error}") from error


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save an adapter with its tokenizer so that after a crash `folder` holds all of it or nothing; rank 0 writes."""
    state = adapter_state(model)
    if not state:
        return
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(str(part), state_dict=state, save_embedding_layers=False)
    tokenizer.save_pretrained(part)
    for path in part.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def tokenize_pairs(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None) -> Dataset:
    """Return columns `input_ids` and `labels`: the loss covers the response and one EOS, nothing else.

    Raises:
        ModelError: a pair is longer than `max_length` tokens.
    """
    from datasets import Dataset

    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for number, pair in enumerate(pairs, start=1):
        prompt = encode_prompt(tokenizer, pair.prompt)
        response = [*encode_response(tokenizer, pair.response), int(tokenizer.eos_token_id)]
        if max_length is not None and len(prompt) + len(response) > max_length:
            raise ModelError(
                f"training pair {number} has {len(prompt) + len(response)} tokens, but the target attends to "
                f"{max_length}. Lower synthesis.max_new_tokens or choose a target with a longer context."
            )
        rows["input_ids"].append(prompt + response)
        rows["labels"].append([-100] * len(prompt) + response)
    return Dataset.from_dict(rows)


def newest_sealed_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint whose files are all as they were when it was sealed; remove torn ones.

    The trainer writes into the checkpoint's folder in place, so a kill can leave one half written.
    """
    newest = None
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        if _seal_holds(checkpoint):
            newest = str(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return newest


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    arguments: SFTConfig,
    on_step: OnStep,
) -> SFTTrainer:
    """Return trl's trainer with the head on response rows only; on CUDA devices trl's own head reads no others."""
    from torch.utils.data import RandomSampler
    from transformers import PrinterCallback
    from trl import SFTTrainer

    ranks = arguments.world_size

    class ResponseTrainer(SFTTrainer):
        """In one process on a CPU the loss is ours; several share the head's weights, and trl's loss gathers those."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if ranks > 1 or return_outputs or inputs["input_ids"].is_cuda:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
            return response_loss(model, inputs, num_items_in_batch)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            sampler = super()._get_train_sampler(train_dataset)
            if ranks == 1 or not isinstance(sampler, RandomSampler):
                return sampler
            return even_order(len(dataset), multiple=ranks * arguments.per_device_train_batch_size)

        def floating_point_ops(self, inputs: Any) -> int:
            """Return 0: the estimate walks all modules at every step, and nothing reads it."""
            return 0

    try:
        trainer = ResponseTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset if ranks == 1 else with_blank(dataset, int(tokenizer.eos_token_id)),
            processing_class=tokenizer,
            callbacks=[_epoch_callback(on_step)],
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"distill.trainer_args: trl refuses them: {error}") from error
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    return trainer


def _epoch_callback(on_step: OnStep) -> Any:
    from transformers import TrainerCallback

    class EpochCallback(TrainerCallback):
        """Reports progress, and seals each checkpoint once all of it is written."""

        def __init__(self) -> None:
            self.numbers: dict[str, float] = {}

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):  # and not the summary at the end
                self.numbers = {name: float(value) for name, value in logs.items()}

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_step(state.global_step, state.max_steps, self.numbers)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            agree(lambda: None)  # every rank has written its part
            if state.is_world_process_zero:
                _seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return EpochCallback()


def _seal(checkpoint: Path) -> None:
    files = {str(path.relative_to(checkpoint)): file_sha256(path) for path in checkpoint.rglob("*") if path.is_file()}
    (checkpoint / SEAL).write_text(json.dumps(files, indent=1), encoding="utf-8")


def _seal_holds(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        return all(file_sha256(checkpoint / name) == digest for name, digest in files.items())
    except (OSError, ValueError):
        return False
