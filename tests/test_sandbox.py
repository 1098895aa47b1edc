"""The sandbox against programs that mean harm: none escapes, none is graded right, and all are over in time."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tuneshift.datafiles import Item
from tuneshift.errors import SandboxError
from tuneshift.evaluate.benchmarks.mbpp import wrong
from tuneshift.plain import decode
from tuneshift.sandbox import Call, Limits, Sandbox, _problem, no_sandbox, runs

needs_sandbox = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed (`make test` installs it)"
)
pytestmark = needs_sandbox

SECRET = "sk-host-secret-" + secrets.token_hex(8)
"""Stands in this process's environment and in a file of the host; no program may come to know it."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Put a secret where programs look for one: in the environment and in a file."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "key").write_text(SECRET)
    os.environ["OPENAI_API_KEY"] = SECRET
    yield folder
    del os.environ["OPENAI_API_KEY"]


def exercise() -> Item:
    """Return an exercise whose answers cannot be guessed: nothing inside knows them."""
    asserts = [f"assert f({number}) == '{secrets.token_hex(8)}'" for number in range(3)]
    return Item("mbpp-1", "test", "", "", {"test_setup_code": "", "test_list": asserts})


def graded(program: str) -> str | None:
    return wrong(textwrap.dedent(program), exercise(), Sandbox())


# Each tries to be graded right without knowing the answer.
FORGERIES = {
    "prints passed": "print('passed'); print('ok 3 tests')\ndef f(x): return None",
    "exits early": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "SystemExit in the call": "def f(x): raise SystemExit(0)",
    "equal to everything": """
        class E:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
        def f(x): return E()
        """,
    "a str equal to everything": """
        class S(str):
            def __eq__(self, other): return True
            __hash__ = str.__hash__
        def f(x): return S('')
        """,
    "claims another class": """
        class E:
            @property
            def __class__(self): return str
            def __eq__(self, other): return True
        def f(x): return E()
        """,
    "patches builtins": """
        import builtins
        builtins.isinstance = lambda *a: True
        builtins.type = lambda *a: str
        builtins.eval = lambda *a: (lambda *b: True)
        builtins.AssertionError = Exception
        def f(x): return True
        """,
    "patches json and os": """
        import json, os, sys
        json.dumps = lambda *a, **k: '{"value": true, "seconds": 0.1}'
        os.write = lambda *a: 10**6
        sys.modules.clear()
        def f(x): return True
        """,
    "patches the encoder": """
        import sys
        for module in list(sys.modules.values()):
            for name in ('encode', 'canonical', 'decode'):
                if hasattr(module, name): setattr(module, name, lambda *a: True)
        def f(x): return True
        """,
    "guesses of the protocol on every fd": """
        import os
        for fd in range(32):
            try: os.write(fd, b'{"functions": 1, "seconds": 0.1}\\n' + b'{"value": true, "seconds": 0.1}\\n' * 9)
            except OSError: pass
        os._exit(0)
        """,
    "takes token and channel from the frames": """
        import sys, os, json
        frame, token, channel = sys._getframe(), None, None
        while frame:
            for scope in (frame.f_locals,):
                token = scope.get('token', token) or (scope.get('job') or {}).get('token', token)
                channel = scope.get('channel', channel)
            frame = frame.f_back
        assert token and channel
        for said in ({'functions': 1}, {'value': True}, {'value': 'passed'}, {'value': None}):
            os.write(channel, (token + ' ' + json.dumps({**said, 'seconds': 0.1}) + '\\n').encode())
        os._exit(0)
        """,
    "searches all memory for the expected values": """
        import gc, sys
        def f(x):
            found = [o for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]
            texts = [s for o in found for s in (o.values() if isinstance(o, dict) else o) if isinstance(s, str)]
            return next((s for s in texts if len(s) == 16 and all(c in '0123456789abcdef' for c in s)), 'none')
        """,
    "sys.exit in __del__": """
        import sys
        class D:
            def __del__(self): sys.exit(0)
        d = D(); del d
        def f(x):
            D(); return True
        """,
    "atexit": "import atexit\natexit.register(lambda: print('passed'))\ndef f(x): return True",
    "signal handlers": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, lambda *a: None)
            except (OSError, ValueError): pass
        def f(x): return True
        """,
    "trace functions": """
        import sys
        def trace(frame, event, arg):
            frame.f_locals['said'] = {'value': True}
            return trace
        sys.settrace(trace); sys.setprofile(trace)
        def f(x): return True
        """,
    "pickle bomb": """
        class P:
            def __reduce__(self): return (exec, ("import os; os.system('touch /tmp/pwned')",))
        def f(x): return P()
        """,
    "raises something odd": """
        class Odd(BaseException):
            def __str__(self): raise Odd
        def f(x): raise type('passed"}\\n', (BaseException,), {})
        """,
    "hostile numbers": "def f(x): return {hash(i * (2**61 - 1)): i * (2**61 - 1) for i in range(20000)}",
    "deep nesting": """
        def f(x):
            value = []
            for _ in range(100000): value = [value]
            return value
        """,
    "a list that contains itself": "def f(x):\n    value = []\n    value.append(value)\n    return value",
    "endless recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "a huge integer": "def f(x): return 10**(10**8)",
    "a huge repr": "class R:\n    def __repr__(self): return 'x' * 10**9\ndef f(x): return repr(R())",
    "bidirectional text": "def f(x): return '\\u202e\\u2066passed\\ud800'",
    "closes everything": "import os\nos.closerange(0, 100)\ndef f(x): return True",
    "no such function": "def g(x): return True",
    "a syntax error": "def f(x: return",
    "null bytes": "\0def f(x): return True",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_program_forges_a_right_answer(name: str, host: Path) -> None:
    started = time.monotonic()
    assert graded(FORGERIES[name]) is not None
    assert time.monotonic() - started < 15
    assert not Path("/tmp/pwned").exists()


def test_the_right_program_is_graded_right() -> None:
    item = Item(
        "1",
        "test",
        "",
        "",
        {"test_setup_code": "", "test_list": ["assert f(2) == [2, (2.0, {2})]", "assert f(1) == [1, (1, {1})]"]},
    )
    assert wrong("def f(x): return [x, (x, {x})]", item, Sandbox()) is None
    assert wrong("def f(x): return (x, (x, {x}))", item, Sandbox()) == "wrong value"


LIBC = "def libc():\n    import ctypes\n    return ctypes.CDLL(None)\n"

# Each must end in an exception: where it does not, the call returns what it got hold of.
PROBES = {
    "the host's password file": "open('/etc/passwd').read()",
    "the host's shadow file": "open('/etc/shadow').read()",
    "the secret's file": "open({key!r}).read()",
    "the project": "__import__('os').listdir({project!r})",
    "the home folder": "__import__('os').listdir({home!r})",
    "a file in the working folder": "open('out', 'w').write('x')",
    "a file in /tmp": "open('/tmp/out', 'w').write('x')",
    "a file in /dev/shm": "open('/dev/shm/out', 'w').write('x')",
    "a file among the libraries": "open(__import__('json').__file__, 'a').write('x')",
    "a link out of the sandbox": "__import__('os').symlink('/etc/passwd', '/in/link')",
    "/proc/self/environ": "open('/proc/self/environ').read()",
    "another process's environment": "open('/proc/1/environ').read()",
    "its own memory": "open('/proc/self/mem', 'r+b').read(1)",
    "a fork": "__import__('os').fork()",
    "a shell": "__import__('subprocess').run(['/bin/sh', '-c', 'id'])",
    "os.system": "__import__('os').system('true') == 0 or [][0]",
    "a thread": "__import__('threading').Thread(target=print).start()",
    "a process": "__import__('multiprocessing').Process(target=print).start()",
    "a socket to this machine": "__import__('socket').create_connection(('127.0.0.1', {port}), timeout=2)",
    "a socket to the cloud's metadata": "__import__('socket').create_connection(('169.254.169.254', 80), timeout=2)",
    "a Unix socket": "__import__('socket').socket(__import__('socket').AF_UNIX)",
    "a raw socket": "__import__('socket').socket(__import__('socket').AF_PACKET, 3)",
    "shared memory": "__import__('os').memfd_create('m')",
    "higher limits": "__import__('resource').setrlimit(9, (-1, -1))",
    "another user": "__import__('os').setuid(0)",
    "a mount": "libc().mount(b'none', b'/', b'tmpfs', 0, 0) == 0 or [][0]",
    "a namespace": "libc().unshare(0x10000000) == 0 or [][0]",
    "ptrace": "libc().ptrace(16, 1, 0, 0) == 0 or [][0]",
    "a namespace for a clone3": "libc().syscall(435, 0, 0) >= 0 or [][0]",
    "io_uring": "libc().syscall(425, 1, 0) >= 0 or [][0]",
    "a root of its own": "__import__('os').chroot('/in')",
    "the end of process 1": "__import__('os').kill(1, 9) or [][0]",
    "another process's group": "__import__('os').killpg({pid}, 9)",
    "this very process": "__import__('os').kill({pid}, 9)",
}


@pytest.mark.parametrize("name", PROBES)
def test_nothing_outside_is_reached(name: str, host: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        facts = {
            "key": str(host / "key"),
            "project": str(Path(__file__).parents[1]),
            "home": str(Path.home() / "Documents") if (Path.home() / "Documents").exists() else "/home",
            "port": server.getsockname()[1],
            "pid": os.getpid(),
        }
        expression = PROBES[name].replace("{key!r}", repr(facts["key"])).replace("{project!r}", repr(facts["project"]))
        expression = expression.replace("{home!r}", repr(facts["home"])).replace("{port}", str(facts["port"]))
        expression = expression.replace("{pid}", str(facts["pid"]))
        result = Sandbox().run(f"{LIBC}def f():\n    return str({expression})", [Call("f")], Limits(seconds=5))
    (reply,) = result.replies
    assert reply.error is not None, reply.value
    assert reply.error not in ("NameError", "SyntaxError", "AttributeError", "ImportError", "ModuleNotFoundError")


def test_the_environment_holds_nothing_of_the_host(host: Path) -> None:
    result = Sandbox().run("import os\ndef f(): return dict(os.environ)", [Call("f")])
    assert set(decode(result.replies[0].value)) <= {"PYTHONHASHSEED", "PWD", "LC_CTYPE"}


def test_no_other_process_is_seen() -> None:
    program = """
import os
def f():
    alive = []
    for pid in range(2, 100000):
        try: os.kill(pid, 0)
        except ProcessLookupError: continue
        except PermissionError: pass
        alive.append(pid)
    return alive, os.getpid()
"""
    alive, own = decode(Sandbox().run(program, [Call("f")]).replies[0].value)
    assert alive == [own]


# What may be told of each; those that end of themselves get time enough for a loaded machine.
HOGS: dict[str, tuple[str, set[str | None]]] = {
    "an endless loop": ("while True: pass", {"time limit"}),
    "a long sleep": ("import time; time.sleep(600)", {"time limit"}),
    "sleep with all signals blocked": (
        "import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(600)",
        {"time limit"},
    ),
    "an endless regular expression": ("import re; re.match('(a+)+$', 'a' * 40 + 'b')", {"time limit"}),
    "an endless power": ("x = 9**9**9", {"time limit"}),
    "10 GB": ("x = bytearray(10 * 2**30)", {"MemoryError"}),
    "10 GB in small pieces": ("x = []\nwhile True: x.append(bytearray(2**20))", {"MemoryError", "ended early"}),
    "a fork bomb": ("import os\nwhile True: os.fork()", {"PermissionError"}),
    "a flood on standard output": ("import sys\nfor _ in range(1024): sys.stdout.write('x' * 2**20)", {None}),
    "a flood on all descriptors": (
        """
import os
while True:
    for fd in range(32):
        try: os.write(fd, b'x' * 65536)
        except OSError: pass
""",
        {"output limit"},
    ),
    "a flood of open files": ("x = [open('/dev/null') for _ in range(1000)]", {"OSError"}),
}


@pytest.mark.parametrize("name", HOGS)
def test_a_program_that_takes_too_much_is_stopped(name: str) -> None:
    program, errors = HOGS[name]
    seconds = 2 if errors == {"time limit"} else 30
    started = time.monotonic()
    result = Sandbox().run(program, limits=Limits(seconds=seconds, processor_seconds=30))
    assert time.monotonic() - started < seconds + 4
    assert result.error in errors


def test_processor_time_is_bounded_by_the_kernel() -> None:
    result = Sandbox().run("while True: pass", limits=Limits(seconds=60, processor_seconds=1))
    assert result.error == "ended early"


def test_each_call_has_its_own_time_limit() -> None:
    program = "import time\ndef f(seconds): time.sleep(seconds); return seconds"
    calls = [Call("f", [0.1], seconds=5), Call("f", [30], seconds=0.5), Call("f", [0.1], seconds=5)]
    started = time.monotonic()
    result = Sandbox().run(program, calls, Limits(seconds=20))
    assert time.monotonic() - started < 10
    assert [reply.value for reply in result.replies] == [0.1]
    assert result.error == "time limit"


def test_a_killed_run_leaves_no_process_behind() -> None:
    """The sandbox dies with whoever started it, even by SIGKILL."""
    code = """
from tuneshift.sandbox import Limits, Sandbox
sandbox = Sandbox()
print("ready", flush=True)
sandbox.run("import time; time.sleep(300)", (), Limits(seconds=300))
"""
    deadline = time.monotonic() + 30
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        while (
            len(tree := descendants(run.pid)) < 3 and time.monotonic() < deadline
        ):  # bwrap, its process 1, the program
            time.sleep(0.1)
        run.kill()
    assert len(tree) == 3
    while any(Path(f"/proc/{pid}").exists() for pid in tree) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in tree if Path(f"/proc/{pid}").exists()] == []


def descendants(pid: int) -> list[int]:
    """Return the processes below one, as the host counts them."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def test_many_threads_may_run_programs() -> None:
    sandbox, before = Sandbox(), threading.active_count()

    def square(number: int) -> object:
        return sandbox.run("def f(x): return x * x", [Call("f", [number])]).replies[0].value

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(square, range(12))) == [number**2 for number in range(12)]
    assert threading.active_count() == before


def test_sets_have_the_same_order_in_every_run() -> None:
    program = "def f(): return list(set('abcdefghijklmnop'))"
    first, second = (Sandbox().run(program, [Call("f")]).replies[0].value for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(x):\n    return x", True),
        ("import math\nasync def g(): pass\nh = lambda: math.pi", True),
        ("x = 1", False),
        ("def f(x):\nreturn x", False),
        ("def f(): pass\nf(1)", False),
        ("def f(): pass\nimport os; os._exit(0)", False),
        ("def f(): pass\nraise SystemExit(0)", False),
        ("import no_such_module\ndef f(): pass", False),
        ("", False),
    ],
)
def test_code_that_runs(code: str, expected: bool) -> None:
    assert runs(code) is expected


def test_without_bubblewrap_nothing_runs_unless_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _problem.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        assert "bubblewrap is not installed" in (no_sandbox() or "")
        with pytest.raises(SandboxError, match=r"apt-get install bubblewrap"):
            Sandbox()
        with pytest.raises(SandboxError):
            runs("def f(): pass")
        bare = Sandbox(unsafe=True)
        assert bare.describe().startswith("none")
        assert bare.run("def f(x): return x", [Call("f", [(1, {2})])]).replies[0].value == {"tuple": [1, {"set": [2]}]}
        assert bare.run("while True: pass", limits=Limits(seconds=1)).error == "time limit"
        assert bare.run("x = bytearray(10 * 2**30)").error == "MemoryError"
    finally:
        _problem.cache_clear()


def test_a_sandbox_that_cannot_start_is_told_from_a_program_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    _problem.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("tuneshift.sandbox._walls", lambda: (str(broken),))
    try:
        assert "No permissions to create new namespace" in (no_sandbox() or "")
    finally:
        _problem.cache_clear()
