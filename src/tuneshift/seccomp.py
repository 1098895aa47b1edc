"""The system calls that a sandboxed program may not make, as a filter for the kernel (seccomp, classic BPF).

The namespaces of the sandbox are the wall; the filter takes away what could undermine it or leave something behind:
new processes and threads, sockets (not every family respects network namespaces), memory outside the process's own
limit, mounts and namespaces, tracing, keys. What the kernel learnt since Linux 5.1 is refused unless it is listed.
"""

from __future__ import annotations

import platform
import struct

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
REFUSED = (  # name, number on x86_64, number on aarch64 (asm/unistd.h; `None`: it has no such call)
    ("clone", 56, 220),
    ("fork", 57, None),
    ("vfork", 58, None),
    ("socket", 41, 198),
    ("shmget", 29, 194),
    ("semget", 64, 190),
    ("msgget", 68, 186),
    ("mq_open", 240, 180),
    ("memfd_create", 319, 279),
    ("ptrace", 101, 117),
    ("process_vm_readv", 310, 270),
    ("process_vm_writev", 311, 271),
    ("kcmp", 312, 272),
    ("mount", 165, 40),
    ("umount2", 166, 39),
    ("pivot_root", 155, 41),
    ("chroot", 161, 51),
    ("unshare", 272, 97),
    ("setns", 308, 268),
    ("bpf", 321, 280),
    ("perf_event_open", 298, 241),
    ("userfaultfd", 323, 282),
    ("add_key", 248, 217),
    ("request_key", 249, 218),
    ("keyctl", 250, 219),
)
FIRST_NEW = 424
"""From this number on (Linux 5.1) all architectures count alike; earlier calls of the new kind have other numbers."""
NEW_AND_ALLOWED = {"close_range": 436, "openat2": 437, "faccessat2": 439, "epoll_pwait2": 441, "futex_waitv": 449}

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38


def program(machine: str | None = None) -> bytes:
    """Return the filter for this machine, or for the named one, as bubblewrap's `--seccomp` reads it.

    Raises:
        KeyError: the machine is none of `ARCHITECTURES`.
    """
    machine = machine or platform.machine()
    rules = [
        _rule(_LOAD, _ARCHITECTURE),
        _rule(_EQUAL, ARCHITECTURES[machine], then=1),
        _rule(_RETURN, _KILL),  # another calling convention, which would count the calls otherwise
        _rule(_LOAD, _NUMBER),
    ]
    for allowed in NEW_AND_ALLOWED.values():
        rules += [_rule(_EQUAL, allowed, otherwise=1), _rule(_RETURN, _ALLOW)]
    rules += [_rule(_AT_LEAST, FIRST_NEW, otherwise=1), _rule(_RETURN, _ERRNO | _ENOSYS)]
    for _, *numbers in REFUSED:
        number = numbers[list(ARCHITECTURES).index(machine)]
        if number is not None:
            rules += [_rule(_EQUAL, number, otherwise=1), _rule(_RETURN, _ERRNO | _EPERM)]
    return b"".join([*rules, _rule(_RETURN, _ALLOW)])


def _rule(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)
