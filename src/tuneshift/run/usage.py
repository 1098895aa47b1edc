"""What a run used: seconds by stage and peak memory, added up in the ledger over all processes that worked on it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tuneshift.models import peak_cuda_memory
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
    """Return the largest resident set, and this process's largest CUDA allocation (`None` without CUDA), in bytes.

    The resident set is that of one process: of this one, or of one that trained for it.
    """
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in KiB on Linux
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "peak_memory_bytes": largest * unit,
        "peak_cuda_memory_bytes": peak_cuda_memory() if "torch" in sys.modules else None,
    }
