"""System calls that the standard library lacks."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

if sys.platform != "linux":
    raise ImportError("confining programs needs Linux")

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
CLONE_NEWIPC, CLONE_NEWUTS = 0x8000000, 0x4000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38

# Numbers of pivot_root, socket and io_uring_setup, and the audit architecture, by machine.
MACHINES = {"x86_64": (155, 41, 425, 0xC000003E), "aarch64": (41, 198, 425, 0xC00000B7)}
_MOUNT_SETATTR, _AT_RECURSIVE, _AT_FDCWD = 442, 0x8000, -100
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
    number = MACHINES[os.uname().machine][0]
    _checked("pivot_root", _LIBC.syscall(number, b".", b"."))
    unmount(".", MNT_DETACH)


def forbid_sockets() -> None:
    """Let every later attempt of this process and its children to make a socket fail.

    Sockets are forbidden even in an empty network namespace, because not every family of them (vsock) heeds it.
    `socketpair` remains. io_uring, which makes sockets without the system call, is forbidden too.
    """
    _, socket, io_uring, architecture = MACHINES[os.uname().machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    kill, deny, allow = 0x80000000, 0x00050000 | 1, 0x7FFF0000
    # (code, jump if true, jump if false, operand); offset 4 is the architecture, 0 the number of the call.
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        # The x32 calls of x86_64 have numbers of their own.
        (at_least, 2, 0, 0x40000000),
        (equal, 1, 0, socket),
        (equal, 0, 1, io_uring),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    mode_filter = ctypes.c_ulong(2)
    result = _LIBC.prctl(PR_SET_SECCOMP, mode_filter, header, ctypes.c_ulong(0), ctypes.c_ulong(0))
    _checked("seccomp", result)
