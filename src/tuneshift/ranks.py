"""What a training needs when it is one of several processes; with one process each of these changes nothing.

The processes of a training are its ranks. Each calls `tuneshift.distill.distill` and sees its own part of every batch,
so that N ranks take the steps that one process takes with N times the batch: the same pairs in the same order, and the
loss divided by the labelled tokens of all ranks. Only rank 0 writes files that all share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from tuneshift.models import LoadOptions, pick_device, pick_dtype

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import Sampler

Agreed = TypeVar("Agreed")


def place_weights(options: LoadOptions) -> LoadOptions:
    """Return where this rank loads the weights: with FSDP in main memory, from where each rank takes its shard.

    The dtype stays that of the device on which the shards will be.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return options
    dtype = pick_dtype(options.dtype, pick_device(options.device))
    return replace(options, device="cpu", dtype=str(dtype).removeprefix("torch."))


def agree(choose: Callable[[], Agreed]) -> Agreed:
    """Let rank 0 choose, and return its choice on every rank."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    chosen = [choose() if PartialState().is_main_process else None]
    broadcast_object_list(chosen)
    return chosen[0]  # type: ignore[return-value]


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the adapter's weights in main memory, gathered from all ranks' shards; on other ranks than 0, nothing."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def with_blank(dataset: Dataset, token: int) -> Dataset:
    """Return a dataset with one more row, whose only token is no label, so that it adds nothing to any loss."""
    return dataset.add_item({"input_ids": [token], "labels": [-100]})


def even_order(rows: int, *, multiple: int) -> Sampler[int]:
    """Return each epoch's order of `rows` rows, as the trainer draws it, filled with the blank row to a multiple.

    `multiple` is how many pairs all ranks read at once. Without the blanks accelerate gives the last ranks pairs from
    the epoch's beginning a second time, which weighs those double.
    """
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import Sampler

    class EvenOrder(Sampler[int]):
        def __init__(self) -> None:
            self.order: Any = SeedableRandomSampler(range(rows))

        def __iter__(self) -> Iterator[int]:
            yield from self.order
            yield from [rows] * (-rows % multiple)

        def __len__(self) -> int:
            return rows + -rows % multiple

        def set_epoch(self, epoch: int) -> None:
            self.order.set_epoch(epoch)

    return EvenOrder()
