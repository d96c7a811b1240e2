"""System calls that the standard library lacks."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Sequence

if sys.platform != "linux":
    raise ImportError("confining programs needs Linux")

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
CLONE_NEWIPC, CLONE_NEWUTS = 0x8000000, 0x4000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38

# The audit architecture and the numbers of system calls, by machine; numbers above 400 are the same everywhere.
MACHINES = {
    "x86_64": {
        "architecture": 0xC000003E, "pivot_root": 155, "socket": 41, "unshare": 272, "clone": 56, "memfd_create": 319,
        "shmget": 29, "msgget": 68, "kill": 62, "tkill": 200, "tgkill": 234,
    },
    "aarch64": {
        "architecture": 0xC00000B7, "pivot_root": 41, "socket": 198, "unshare": 97, "clone": 220, "memfd_create": 279,
        "shmget": 194, "msgget": 186, "kill": 129, "tkill": 130, "tgkill": 131,
    },
}  # fmt: skip
_PIDFD_SEND_SIGNAL, _IO_URING_SETUP, _CLONE3, _MOUNT_SETATTR, _MEMFD_SECRET = 424, 425, 435, 442, 447
_AT_RECURSIVE, _AT_FDCWD = 0x8000, -100
_NEW_NAMESPACES = CLONE_NEWNS | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _GIVE = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ERROR, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LIBC = ctypes.CDLL(None, use_errno=True)


def _checked(what: str, result: int) -> None:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _text(value: str | None) -> bytes | None:
    return None if value is None else os.fsencode(value)


def prctl(option: int, value: int = 0) -> None:
    """Change an attribute of this process."""
    unused = (ctypes.c_ulong(0),) * 3
    _checked(f"prctl {option}", _LIBC.prctl(option, ctypes.c_ulong(value), *unused))


def unshare(flags: int) -> None:
    """Leave some of the namespaces of the parent for fresh ones."""
    _checked("unshare", _LIBC.unshare(flags))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mount a file system."""
    numbers = ctypes.c_ulong(flags)
    _checked(f"mount {target}", _LIBC.mount(_text(source), _text(target), _text(kind), numbers, _text(options)))


def unmount(target: str, flags: int) -> None:
    """Unmount a file system."""
    _checked(f"umount {target}", _LIBC.umount2(_text(target), flags))


def make_read_only(path: str) -> None:
    """Make a mount and all that is mounted below it read-only, without devices and set-uid programs (Linux 5.12)."""
    attributes = struct.pack("=QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    _checked(
        f"mount_setattr {path}",
        _LIBC.syscall(_MOUNT_SETATTR, _AT_FDCWD, _text(path), _AT_RECURSIVE, attributes, size),
    )


def pivot_root() -> None:
    """Make the working directory the root of this mount namespace, and let go of the old root."""
    number = MACHINES[os.uname().machine]["pivot_root"]
    _checked("pivot_root", _LIBC.syscall(number, b".", b"."))
    unmount(".", MNT_DETACH)


def forbid_calls(shielded: Sequence[int] = ()) -> None:
    """Let system calls by which a program could leave its limits fail from now on, for its children too.

    - Sockets, even in an empty network namespace, because not every family of them (vsock) heeds it. `socketpair`
      remains. io_uring makes sockets without the system call.
    - Namespaces of its own, in which it could mount memory as a disk without limit.
    - Memory that belongs to no process and is therefore not counted: memory files, System V segments and queues.

    Args:
        shielded: processes that get no signals from it; if there are any, no process group gets one either, and
            `kill(-1)`, which reaches everything that the user runs, fails.
    """
    machine = MACHINES[os.uname().machine]
    denied = [machine[name] for name in ("socket", "unshare", "memfd_create", "shmget", "msgget")]
    rules = [_denied(number) for number in (*denied, _IO_URING_SETUP, _MEMFD_SECRET)]
    rules.append(_denied(machine["clone"], [(_ANY_BIT, _NEW_NAMESPACES)]))
    # Its flags are out of a filter's sight; the C library then falls back on `clone`.
    rules.append(_denied(_CLONE3, error=errno.ENOSYS))
    if shielded:
        victims = [*((_EQUAL, process) for process in shielded), (_AT_LEAST, 0x80000000)]
        rules += [_denied(machine[name], victims) for name in ("kill", "tkill", "tgkill")]
        rules.append(_denied(_PIDFD_SEND_SIGNAL))
    # In the kernel's record of a call, offset 4 is the architecture, 0 the number, 16 the first argument's low half.
    program = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, machine["architecture"]),
        (_GIVE, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        # The x32 calls of x86_64 have numbers of their own.
        (_AT_LEAST, 0, 1, 0x40000000),
        (_GIVE, 0, 0, _ERROR | errno.ENOSYS),
        *(line for rule in rules for line in rule),
        (_GIVE, 0, 0, _ALLOW),
    ]
    _install(program)


_Line = tuple[int, int, int, int]


def _denied(number: int, tests: Sequence[tuple[int, int]] = (), error: int = errno.EPERM) -> list[_Line]:
    """A filter's lines that let a call fail if its first argument passes any test, or always if there is none."""
    deny = (_GIVE, 0, 0, _ERROR | error)
    if not tests:
        return [(_EQUAL, 0, 1, number), deny]
    tried = [line for test, operand in tests for line in ((test, 0, 1, operand), deny)]
    body = [(_LOAD, 0, 0, 16), *tried, (_GIVE, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, len(body), number), *body]


def _install(program: Sequence[_Line]) -> None:
    """Load a filter, lines of (code, jump if true, jump if false, operand)."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    mode_filter = ctypes.c_ulong(2)
    result = _LIBC.prctl(PR_SET_SECCOMP, mode_filter, header, ctypes.c_ulong(0), ctypes.c_ulong(0))
    _checked("seccomp", result)
