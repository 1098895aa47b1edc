"""A training process that shards on the CPU, for tests: accelerate knows FSDP on accelerators only.

Its state is told, once it is made, that it is an FSDP state; all else (sharding, gathering, checkpoints) is real.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

original = AcceleratorState.__init__


def init(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **keywords: Any) -> None:
    original(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
    if fsdp_plugin is not None:
        self._shared_state["distributed_type"] = DistributedType.FSDP
        self._shared_state["fsdp_plugin"] = fsdp_plugin
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = init  # type: ignore[method-assign]

if __name__ == "__main__":
    from tuneshift.launch import main

    main()
