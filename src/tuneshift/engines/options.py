"""What opens an engine: the settings of the configuration's `engine`, resolved."""

from __future__ import annotations

from dataclasses import dataclass, field

from tuneshift.engines.batching import BATCH_SIZE
from tuneshift.models import LoadOptions


@dataclass(frozen=True)
class Endpoint:
    """A model on a server; `api_key` is the key itself."""

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class EngineOptions:
    """What runs the models; names, meaning and defaults are those of the configuration's `engine`.

    `memory` is the share of a GPU's memory for one engine: `gpu_memory_utilization`, shared by those open at once.
    """

    kind: str = "hf"
    load: LoadOptions = field(default_factory=LoadOptions)
    batch_size: int = BATCH_SIZE
    workers: int = 1
    ray_address: str | None = None
    threads: int | None = None
    tensor_parallel_size: int = 1
    memory: float = 0.85
    max_model_len: int = 4096
    python: str | None = None
    reference_check: bool = True
    fine_tuned: Endpoint | None = None
    base: Endpoint | None = None

    @property
    def distributed(self) -> bool:
        """Whether the engine runs in workers rather than in this process."""
        return self.workers > 1 or self.ray_address is not None
