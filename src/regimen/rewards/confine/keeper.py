"""The keeper: starts one program as confined as the machine allows, watches it, and reports how it ended."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from . import linux, namespaces

Order = Mapping[str, Any]
TICK_S = 0.02
NOT_A_PROGRAM = "!"


class NotAProgramError(Exception):
    """What should be run cannot be, however it is confined."""


def main() -> NoReturn:
    """Carry out the order in the last argument, and write a report to the descriptor that it names."""
    order = json.loads(sys.argv[-1])
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != order["parent"]:
        os._exit(1)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    os.set_inheritable(order["report"], False)
    report = json.dumps(keep(order)).encode()
    os.write(order["report"], report)
    os._exit(0)


def keep(order: Order) -> dict[str, Any]:
    """Try the ways to confine, best first; the program runs in the first that works and protects what it must."""
    troubles = {}
    for way, (start, protection) in WAYS.items():
        if way in order["without"]:
            troubles[way] = "switched off"
            continue
        if missing := [what for what in order["require"] if what not in protection]:
            return _refusal(missing, troubles)
        ready, ready_end = os.pipe()
        done, done_end = os.pipe()
        child = _fork(partial(start, order, ready_end, done_end), ready_end)
        os.close(ready_end)
        os.close(done_end)
        trouble = _read(ready)
        if not trouble:
            return {**_watch(child, done, order, way), "protection": protection}
        os.waitpid(child, 0)
        os.close(done)
        if trouble.startswith(NOT_A_PROGRAM):
            return _not_run(trouble.removeprefix(NOT_A_PROGRAM))
        troubles[way] = trouble
    return _not_run(_all(troubles))


def _refusal(missing: list[str], troubles: Mapping[str, str]) -> dict[str, Any]:
    return _not_run(
        f"not run, because this machine cannot protect {', '.join(missing)} ({_all(troubles)}); allow user namespaces "
        "(in a container: without its seccomp profile), or give require=() to run it all the same"
    )


def _not_run(why: str) -> dict[str, Any]:
    return {"status": None, "breach": why, "seconds": 0.0, "protection": {}}


def _all(troubles: Mapping[str, str]) -> str:
    return "; ".join(f"{way}: {trouble}" for way, trouble in troubles.items())


def _fork(body: Callable[[], None], trouble_end: int) -> int:
    """A child that runs `body`, which never returns; what it raises is written to `trouble_end`."""
    child = os.fork()
    if child:
        return child
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        body()
    except BaseException as error:
        mark = NOT_A_PROGRAM if isinstance(error, NotAProgramError) else ""
        os.write(trouble_end, f"{mark}{error or type(error).__name__}".encode()[:500])
    finally:
        os._exit(127)


def _in_namespaces(order: Order, ready: int, done: int) -> NoReturn:
    """The entrance: fresh namespaces, then wait for their process 1."""
    namespaces.enter()
    child = _fork(lambda: _as_init(order, ready, done), ready)
    os.close(ready)
    os.close(done)
    os.waitpid(child, 0)
    os._exit(0)


def _as_init(order: Order, ready: int, done: int) -> NoReturn:
    """Process 1: build the root, start the program, and end, with everything in the namespace, when it ends."""
    namespaces.build_root(order)
    os.setsid()
    limits = order["limits"]
    # Since Linux 5.14 this counts within the user namespace; the real root is exempt, and only watched.
    tasks = limits["processes"] + 2 if _kernel() >= (5, 14) else None
    child = _fork(lambda: _become(order, ready, tasks), ready)
    os.close(ready)
    for ended, status in iter(lambda: os.waitpid(-1, 0), None):
        if ended == child:
            os.write(done, str(status).encode())
            os._exit(0)
    os._exit(1)


def _directly(order: Order, ready: int, done: int) -> NoReturn:
    """Without namespaces: in the folder where the files are."""
    os.chdir(f"{order['base']}/box")
    _become(order, ready, None)


def _become(order: Order, ready: int, tasks: int | None) -> NoReturn:
    """Turn into the program: a session of its own, resource limits, no privileges to gain, no sockets."""
    # Its own session: `kill(0)` would reach the keeper's group.
    os.setsid()
    limits = order["limits"]
    megabyte = 2**20
    bounds = [
        (resource.RLIMIT_CPU, limits["cpu_s"], limits["cpu_s"] + 1),
        (resource.RLIMIT_AS, limits["memory_mb"] * megabyte, limits["memory_mb"] * megabyte),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * megabyte, limits["file_mb"] * megabyte),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, 256, 256),
    ]
    if tasks is not None:
        bounds.append((resource.RLIMIT_NPROC, tasks, tasks))
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.forbid_sockets()
    for what, soft, hard in bounds:
        resource.setrlimit(what, (soft, hard))
    try:
        os.execvpe(order["argv"][0], order["argv"], order["env"])
    except OSError as error:
        raise NotAProgramError(f"'{order['argv'][0]}' could not be run: {error.strerror}") from error


WAYS: dict[str, tuple[Callable[[Order, int, int], NoReturn], dict[str, str]]] = {
    "namespaces": (
        _in_namespaces,
        {
            "files": "mount namespace: system read-only, one scratch folder of limited size",
            "network": "network namespace, and no sockets (seccomp)",
            "processes": "pid namespace, counted",
        },
    ),
    "limits": (
        _directly,
        {
            "network": "no sockets (seccomp)",
            "processes": "counted by descent; a program that kills its keeper escapes the count",
        },
    ),
}


def _watch(child: int, done: int, order: Order, way: str) -> dict[str, Any]:
    """Wait for the end of the program, or bring it about when it breaks a limit."""
    began, breach = time.monotonic(), None
    poll = select.poll()
    poll.register(os.pidfd_open(child))
    # In namespaces the program's family descends from process 1, the only child of the entrance.
    root = next(_children(child), child) if way == "namespaces" else os.getpid()
    while not poll.poll(TICK_S * 1000):
        breach = _breach(order["limits"], time.monotonic() - began, root)
        if breach:
            break
    if breach and way == "namespaces":
        os.kill(root, signal.SIGKILL)
    elif way == "limits":
        # After a normal end too: it may have left children.
        _kill_family(root, child)
    _, status = os.waitpid(child, 0)
    relayed = _read(done)
    if way == "namespaces":
        status = int(relayed) if relayed else signal.SIGKILL
    return {"status": status, "breach": breach, "seconds": time.monotonic() - began}


def _breach(limits: Mapping[str, Any], seconds: float, root: int) -> str | None:
    """The sentence that says which limit a family of processes breaks, if it breaks one."""
    if seconds > limits["wall_s"]:
        return f"did not end within {limits['wall_s']:g} s"
    tasks = resident = 0
    for process in _family(root):
        with suppress(OSError, ValueError, IndexError):
            # The fields after the name, which may hold anything: 17 is threads, 21 is resident pages.
            fields = _content(f"/proc/{process}/stat").rpartition(")")[2].split()
            tasks += int(fields[17])
            resident += int(fields[21]) * resource.getpagesize()
    if tasks > limits["processes"]:
        return f"had {tasks} processes and threads, of {limits['processes']} allowed"
    if resident > limits["memory_mb"] * 2**20:
        return f"took {resident >> 20} MB of memory, of {limits['memory_mb']} allowed"
    return None


def _kill_family(root: int, child: int) -> None:
    """End the child, which stays to be waited for, and then all that it leaves, and all that those start meanwhile."""
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    while orphans := [process for process in _family(root) if process != child]:
        for process in orphans:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        for process in orphans:
            with suppress(OSError):
                os.waitpid(process, os.WNOHANG)


def _family(root: int) -> Iterator[int]:
    for child in _children(root):
        yield child
        yield from _family(child)


def _children(process: int) -> Iterator[int]:
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            yield from map(int, _content(f"/proc/{process}/task/{thread}/children").split())


def _content(path: str) -> str:
    with open(path) as file:
        return file.read()


def _read(end: int) -> str:
    with os.fdopen(end) as file:
        return file.read()


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
