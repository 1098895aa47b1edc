"""Running code that a model wrote: it can harm nothing, and it cannot forge a result.

What each part guarantees:

* bubblewrap's namespaces: the program sees its interpreter and the system's libraries, read-only, and nothing else. No
  home folder, no project, no `/proc`, no other processes, no network; an empty environment; nowhere to write.
* The system call filter (`tuneshift.seccomp`): no further process or thread, so the memory of one process bounds all;
  no sockets of any family, no mounts, no new namespaces, no tracing.
* Resource limits, set before the program is read: memory, processor time, open files, files of zero bytes.
* This process: the wall-clock limit, for the whole and for each call, and the bound on the output. At the end it kills
  the sandbox, and waits until the last process of it is gone.
* Plain data (`tuneshift.plain`): the program gets arguments and never expected results. What it returns crosses as
  text and is compared here, with values that were never inside. So no exit code, print, patched builtin, frame walk or
  object that equals everything makes a result right; a program that writes into the channel can only claim values, and
  a claimed value that is right on every call is a right answer. A line without the run's token voids the whole run,
  which stops blind guesses of the protocol.

That a program came to its end without an error (`runs`) is its own claim: one that searches its memory for the token
can claim it falsely, and gains nothing by it but to be taken for code that runs.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import secrets
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneshift import seccomp
from tuneshift.errors import SandboxError
from tuneshift.plain import encode

INSTALL = "Install bubblewrap (Debian, Ubuntu: `apt-get install bubblewrap`; see docs/sandbox.md)"


@dataclass(frozen=True)
class Limits:
    """What a program may use; all are guesses, far above what a solution to a programming exercise takes.

    `seconds` is wall-clock time for the whole program with its calls, `processor_seconds` is of all of it.
    """

    seconds: float = 10.0
    processor_seconds: int = 10
    memory_bytes: int = 1 << 30
    output_bytes: int = 8 << 20
    open_files: int = 32

    def of_process(self) -> dict[str, int]:
        """Return the limits that the kernel keeps, by their names in the module `resource`."""
        return {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_CPU": self.processor_seconds,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_FSIZE": 0,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Call:
    """A call to make: `function` is an expression, evaluated in the program; `seconds` its wall-clock limit."""

    function: str
    arguments: Sequence[Any] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class Reply:
    """What the program claims that a call returned, as plain data, or the class of the exception it raised."""

    value: Any
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Result:
    """How a program fared; `error` tells why there are not all replies, `functions` how many it defined."""

    error: str | None
    functions: int = 0
    replies: tuple[Reply, ...] = ()


def no_sandbox() -> str | None:
    """Return why no sandbox can be had on this machine; `None` where it can."""
    try:
        Sandbox()
    except SandboxError as error:
        return str(error)
    return None


def runs(code: str) -> bool:
    """Tell whether a program compiles, defines a function, and executes without an error.

    Raises:
        SandboxError: no sandbox can be had.
    """
    result = Sandbox().run(code)
    return result.error is None and result.functions > 0


@dataclass(frozen=True)
class Sandbox:
    """Runs programs, each in a sandbox of its own; may be used from several threads.

    With `unsafe`, programs run in a bare process with resource limits: they can read and delete what you can.

    Raises:
        SandboxError: no sandbox can be had; the message says why.
    """

    unsafe: bool = False

    def __post_init__(self) -> None:
        problem = None if self.unsafe else _problem()
        if problem is not None:
            raise SandboxError(
                f"Code that a model wrote runs only in a sandbox, and there is none: {problem}. {INSTALL}."
            )

    def describe(self) -> str:
        """Return what held the programs, for the verdict."""
        return "none: a bare process with resource limits" if self.unsafe else f"{_version()}, seccomp"

    def run(self, program: str, calls: Sequence[Call] = (), limits: Limits | None = None) -> Result:
        """Execute a program, make calls in it one after the other, and return what it claims.

        Raises:
            SandboxError: the sandbox itself could not be started.
        """
        limits = limits or Limits()
        token = secrets.token_hex(16)
        job = {
            "token": token,
            "program": program,
            "limits": limits.of_process(),
            "calls": [[call.function, encode(list(call.arguments))] for call in calls],
        }
        with _start(job, unsafe=self.unsafe) as process:
            data, error = _listen(process, [call.seconds for call in calls], limits)
        return _understood(data, error, token, expected=1 + len(calls))


@contextmanager
def _start(job: dict[str, Any], *, unsafe: bool) -> Iterator[subprocess.Popen[bytes]]:
    """Start the inner program on a job, and leave nothing of it behind.

    Raises:
        SandboxError: bubblewrap or the interpreter said something, so that the program was not even read.
    """
    rules, end = os.pipe()
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryDirectory() as empty, open(rules, "rb"):
        with open(end, "wb") as writer:
            writer.write(b"" if unsafe else seccomp.program())
        stdin.write(json.dumps(job).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            _bare_command() if unsafe else [*_walls(), "--seccomp", str(rules), *_inner("/in")],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PYTHONHASHSEED": "0"},
            cwd=empty,
            pass_fds=[rules],
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # The end of the output means that nobody holds it: the kernel has ended every process of the namespace.
            while not unsafe and process.stdout.read(1 << 16):
                pass
            os.set_blocking(process.stderr.fileno(), False)
            said = process.stderr.read()
            process.stdout.close()
            process.stderr.close()
        if said:
            raise SandboxError(f"The sandbox could not be started: {said.decode(errors='replace').strip()[:500]}")


def _listen(
    process: subprocess.Popen[bytes], limits: Sequence[float | None], of_all: Limits
) -> tuple[bytes, str | None]:
    """Read reports until the last one is there, and tell why if it is not."""
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    pending = iter(limits)
    data = b""
    lines, end = 0, time.monotonic() + of_all.seconds
    until = end
    while lines <= len(limits):
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            return data, "time limit"
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        if not chunk:
            return data, None
        data += chunk
        if len(data) > of_all.output_bytes:
            return b"", "output limit"
        for _ in range(chunk.count(b"\n")):
            lines += 1
            own = next(pending, None)
            until = end if own is None else min(end, time.monotonic() + own)
    return data, None


def _understood(data: bytes, error: str | None, token: str, *, expected: int) -> Result:
    """Return the result that the reports tell; `error` is why there are not all of them, if that is known."""
    try:
        reports = [_report(line, token) for line in data.split(b"\n")[:-1]]
    except (ValueError, RecursionError):
        return Result("unreadable report")
    if not reports:
        return Result(error or "ended early")
    own = reports[0].get("error")
    if own is None and len(reports) < expected:
        own = error or "ended early"
    functions = reports[0].get("functions")
    return Result(
        own,
        functions if isinstance(functions, int) else 0,
        tuple(Reply(report.get("value"), report.get("error"), report["seconds"]) for report in reports[1:]),
    )


def _report(line: bytes, token: str) -> dict[str, Any]:
    """Return a report, of which only `value` may hold anything.

    Raises:
        ValueError: this is none. RecursionError: it is nested too deeply.
    """
    given, _, text = line.partition(b" ")
    report = json.loads(text)
    if given != token.encode() or not isinstance(report, dict) or not isinstance(report.get("seconds"), float):
        raise ValueError("a report begins with the token, and tells its seconds")
    error = report.get("error")
    if error is not None and not (isinstance(error, str) and error.isascii() and error.isidentifier()):
        raise ValueError("an error is the name of a class")
    if error is None and not {"value", "functions"} & set(report):
        raise ValueError("a report tells a value, an error or the functions")
    return report


@functools.cache
def _problem() -> str | None:
    """Return why a program cannot be run in the sandbox, having tried one."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    if platform.machine() not in seccomp.ARCHITECTURES:
        return f"the system call filter knows {' and '.join(seccomp.ARCHITECTURES)}, and this is {platform.machine()}"
    job = {"token": "token", "program": "", "limits": Limits().of_process(), "calls": []}
    try:
        with _start(job, unsafe=False) as process:
            data, error = _listen(process, (), Limits())
    except (OSError, SandboxError) as failure:
        return str(failure)
    result = _understood(data, error, "token", expected=1)
    return None if result.error is None else f"an empty program failed in it ({result.error})"


@functools.cache
def _version() -> str:
    return subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def _walls() -> tuple[str, ...]:
    """Return bubblewrap's command line up to the program."""
    own = Path(__file__).parent
    command = [
        str(shutil.which("bwrap")),
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
    ]
    command += ["--setenv", "PYTHONHASHSEED", "0"]
    command += ["--uid", "65534", "--gid", "65534", "--cap-drop", "ALL", "--hostname", "sandbox"]
    for path in _libraries():
        command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for name in ("inside.py", "plain.py"):
        command += ["--ro-bind", str(own / name), f"/in/{name}"]
    for device in ("/dev/null", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    return (*command, "--remount-ro", "/", "--chdir", "/")


def _libraries() -> list[str]:
    """Return what the interpreter needs: itself, its library, and the system's libraries; outer folders first."""
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/nix/store")
    own = (_interpreter(), os.path.join(sys.base_prefix, "lib"), sysconfig.get_path("stdlib"))
    found: list[str] = []
    for path in sorted({path for path in (*system, *own) if os.path.lexists(path)}):
        if not any(path.startswith(f"{outer}/") for outer in found):
            found.append(path)
    return found


def _interpreter() -> str:
    return os.path.realpath(sys.executable)


def _inner(folder: str) -> list[str]:
    """Return the command that does a job: no site packages, nothing from the current folder, no cached byte code."""
    return [_interpreter(), "-s", "-S", "-P", "-B", "-X", "utf8", f"{folder}/inside.py"]


def _bare_command() -> list[str]:
    return _inner(str(Path(__file__).parent))
