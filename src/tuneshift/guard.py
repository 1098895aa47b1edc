"""Child processes that never outlive the run, however it ends.

`start` puts this module between the run and its child. It reads its standard input, which the run holds open and never
writes to: when that ends, because the run closed it or was killed, the child and all of the child's children are ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

GRACE = 20.0  # seconds between SIGTERM and SIGKILL: a server ends the processes of its own; a guess


def start(command: Sequence[str], *, output: IO[Any], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, its stdout and stderr into `output`; `stop` ends it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tuneshift.guard", *command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=dict(env),
        start_new_session=True,
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the command and wait until it is gone."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def main() -> None:
    """Run the command of the arguments until it ends or standard input does, and exit with its code."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, process_group=0)
    threading.Thread(target=_end_with_input, args=[child.pid], daemon=True).start()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # not reaped yet, so that its group's number stays its own
    os.killpg(child.pid, signal.SIGKILL)  # whatever it left running
    code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)  # as shells tell a signal


def _end_with_input(child: int) -> None:
    os.read(sys.stdin.fileno(), 1)  # nobody writes: it returns at the end
    os.kill(child, signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
