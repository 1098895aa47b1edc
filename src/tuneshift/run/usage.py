"""What a run used: seconds by stage and peak memory, added up in the ledger over all processes that worked on it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tuneshift.run.ledger import Ledger


@contextmanager
def timed(ledger: Ledger, stage: str) -> Iterator[None]:
    """Add the time spent inside to the stage's seconds, and note the peak memory."""
    started = time.monotonic()
    try:
        yield
    finally:
        ledger.add_seconds(stage, time.monotonic() - started)
        ledger.raise_peaks(peak_memory())


def peak_memory() -> dict[str, int | None]:
    """Return this process's largest resident set, and its largest CUDA allocation (`None` without CUDA), in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in KiB on Linux
    torch = sys.modules.get("torch")
    cuda = torch.cuda.max_memory_allocated() if torch is not None and torch.cuda.is_available() else None
    return {
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_cuda_memory_bytes": cuda,
    }
