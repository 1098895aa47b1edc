"""What reference solutions give, kept in the cache folder: questions are read several times, and their truth stays."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuneshift.errors import DataError
from tuneshift.models import cache_folder
from tuneshift.sandbox import Call, Limits, Reply, Sandbox


def reference_replies(
    program: str, calls: Sequence[Call], limits: Limits, sandbox: Sandbox, *, made_from: Any
) -> list[Reply] | str:
    """Return what a reference solution's calls gave, or why they gave nothing.

    Replies are kept in the cache folder's `references/`, by the sha256 of the program, of `made_from`, which tells the
    calls as JSON, of the limits, the Python version and the sandbox. A failure is not kept: a busy machine may be why.

    Raises:
        SandboxError: the sandbox could not be started. DataError: the cache folder cannot be written.
    """
    content = [program, made_from, asdict(limits), platform.python_version(), sandbox.describe()]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "references" / f"{digest}.json"
    if (kept := _read(path)) is not None:
        return kept
    result = sandbox.run(program, calls, limits)
    failure = result.error or next((reply.error for reply in result.replies if reply.error is not None), None)
    if failure is not None:
        return failure
    _write(path, result.replies)
    return list(result.replies)


def _read(path: Path) -> list[Reply] | None:
    """Return the replies that a file holds; `None` where there is none, or it is damaged."""
    try:
        return [Reply(**row) for row in json.loads(path.read_bytes())] if path.is_file() else None
    except (ValueError, TypeError):
        return None


def _write(path: Path, replies: Sequence[Reply]) -> None:
    part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")  # another process may write the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps([asdict(reply) for reply in replies]), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: a reference solution's results cannot be written ({error.strerror}). Free space, or set "
            "TUNESHIFT_CACHE to a folder that can be written."
        ) from error
