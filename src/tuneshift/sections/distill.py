"""The configuration's `distill`: the target's training."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tuneshift.sections.base import PathText, Section


class DistillSection(Section):
    """LoRA and trainer settings under their Hugging Face names; defaults are the paper's (section H.1)."""

    r: int = Field(8, ge=1, description="LoRA rank.")
    lora_alpha: int = Field(16, ge=1, description="LoRA scaling numerator.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout before LoRA, a probability.")
    target_modules: tuple[str, ...] | str = Field(
        ("q_proj", "v_proj"), description="Module names that get LoRA, or `all-linear`."
    )
    num_train_epochs: int = Field(20, ge=1, description="Passes over the kept pairs.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate, then linear to zero.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Pairs in a batch, on each device.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches in an optimizer step.")
    trainer_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other argument of trl's SFTConfig (`bf16`, `lr_scheduler_type`, ...); it wins.",
    )
    accelerate: PathText | None = Field(
        None,
        description="An `accelerate` configuration file (FSDP 2, or MULTI_GPU): its processes train together, and a "
        "step learns from that many batches. Null: one device trains.",
    )
