"""The keeper: starts one program as confined as the machine allows, watches it, and reports how it ended."""

from __future__ import annotations

import json
import math
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
NAMESPACES, LIMITS = "namespaces", "limits"


class NotAProgramError(Exception):
    """What should be run cannot be, however it is confined."""


def main() -> NoReturn:
    """Carry out the order in the last argument, and write a report to the descriptor that it names."""
    order = json.loads(sys.argv[-1])
    # SIGTERM stays pending until the watch sees it, and ends the family; it also comes when the parent dies.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    # Else process 1, a fork of this one, would heed an interrupt that its program sends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != order["parent"]:
        os._exit(1)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    os.set_inheritable(order["report"], False)
    report = json.dumps(keep(order)).encode()
    os.write(order["report"], report)
    os._exit(0)


def keep(order: Order) -> dict[str, Any]:
    """Try the ways to confine, best first; the program runs in the first that works and protects what it must."""
    if not os.path.exists("/proc/thread-self/children"):
        return _not_run("was not run, because this system does not tell the children of a process (/proc is needed)")
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
    return _not_run(f"was not run ({_all(troubles)})")


def _refusal(missing: list[str], troubles: Mapping[str, str]) -> dict[str, Any]:
    return _not_run(
        f"was not run, because this machine cannot protect {', '.join(missing)} ({_all(troubles)}); allow user "
        "namespaces (in a container: without its seccomp profile), or give require=() to run it all the same"
    )


def _not_run(why: str) -> dict[str, Any]:
    return {"trouble": why}


def _all(troubles: Mapping[str, str]) -> str:
    return "; ".join(f"{way}: {trouble}" for way, trouble in troubles.items())


def _fork(body: Callable[[], None], trouble_end: int) -> int:
    """A child that runs `body`, which never returns; what it raises is written to `trouble_end`."""
    child = os.fork()
    if child:
        return child
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
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
    # Left unreaped, so that its number stays its own while the keeper may signal it.
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    os._exit(0)


def _as_init(order: Order, ready: int, done: int) -> NoReturn:
    """Process 1: build the root, start the program, and end, with everything in the namespace, when it ends."""
    namespaces.build_root(order)
    os.setsid()
    child = _fork(lambda: _become(order), ready)
    os.close(ready)
    for ended, status in iter(lambda: os.waitpid(-1, 0), None):
        if ended == child:
            os.write(done, str(status).encode())
            os._exit(0)
    os._exit(1)


def _directly(order: Order, ready: int, done: int) -> NoReturn:
    """Without namespaces: in the folder where the files are."""
    os.chdir(f"{order['base']}/box")
    _become(order, shielded=(os.getppid(), order["parent"]))


def _become(order: Order, shielded: tuple[int, ...] = ()) -> NoReturn:
    """Turn into the program: a session of its own, resource limits, no privileges to gain, no sockets."""
    # Its own session: `kill(0)` would reach the keeper's group.
    os.setsid()
    # Python ignores the last two, and what is ignored stays so in the program.
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.forbid_calls(shielded)
    for what, bound in _bounds(order["limits"], in_namespace=not shielded):
        hard = resource.getrlimit(what)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(what, (bound, bound))
    try:
        os.execvpe(order["argv"][0], order["argv"], order["env"])
    except OSError as error:
        raise NotAProgramError(f"could not be run ({order['argv'][0]}: {error.strerror})") from error


def _bounds(limits: Mapping[str, Any], in_namespace: bool) -> Iterator[tuple[int, int]]:
    """The kernel's own limits. Processor time and processes leave room, so that the watch comes first and names it."""
    megabyte = 2**20
    yield resource.RLIMIT_CPU, math.ceil(limits["cpu_s"]) + 1
    yield resource.RLIMIT_AS, limits["memory_mb"] * megabyte
    yield resource.RLIMIT_FSIZE, limits["file_mb"] * megabyte
    yield resource.RLIMIT_CORE, 0
    yield resource.RLIMIT_NOFILE, 256
    # Since Linux 5.14 this counts within the user namespace, else all that the user runs. The real root is exempt.
    if in_namespace and _kernel() >= (5, 14):
        yield resource.RLIMIT_NPROC, 10 * limits["processes"] + 2


WAYS: dict[str, tuple[Callable[[Order, int, int], NoReturn], dict[str, str]]] = {
    NAMESPACES: (
        _in_namespaces,
        {
            "files": "mount namespace: system read-only, one scratch folder of limited size",
            "network": "network namespace, and no sockets (seccomp)",
            "processes": "pid namespace, counted",
        },
    ),
    LIMITS: (
        _directly,
        {
            "network": "no sockets (seccomp)",
            "processes": "counted by descent",
        },
    ),
}


def _watch(child: int, done: int, order: Order, way: str) -> dict[str, Any]:
    """Wait for the end of the program, or bring it about when it breaks a limit."""
    began = time.monotonic()
    ended = select.poll()
    ended.register(os.pidfd_open(child))
    # In namespaces the program's family descends from process 1, the only child of the entrance.
    root = next(_children(child), child) if way == NAMESPACES else os.getpid()
    reason: dict[str, str] = {}
    while not reason and not ended.poll(TICK_S * 1000):
        reason = _reason_to_end(order["limits"], time.monotonic() - began, root)
    if way == LIMITS:
        # After a normal end too: it may have left children.
        _kill_family(root, child)
    elif reason:
        os.kill(root, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    relayed = _read(done)
    if way == NAMESPACES:
        status = int(relayed) if relayed else signal.SIGKILL
    return {"status": status, "seconds": time.monotonic() - began, **reason}


def _reason_to_end(limits: Mapping[str, Any], seconds: float, root: int) -> dict[str, str]:
    """Why a program must end now, if it must: the limit that its family of processes breaks, or an order from above."""
    if signal.SIGTERM in signal.sigpending():
        return {"trouble": "was called off"}
    if seconds > limits["wall_s"]:
        return {"breach": f"did not end within {limits['wall_s']:g} s (wall_s)"}
    tasks = resident = ticks = 0
    for process in _family(root):
        with suppress(OSError, ValueError, IndexError):
            # The fields after the name, which may hold anything: processor time of itself and of the children that
            # it waited for (11 to 14), threads (17), resident pages (21).
            fields = [int(field) for field in _content(f"/proc/{process}/stat").rpartition(")")[2].split()[1:22]]
            ticks, tasks, resident = ticks + sum(fields[10:14]), tasks + fields[16], resident + fields[20]
        if tasks > limits["processes"]:
            return {"breach": f"had more than {limits['processes']} processes and threads (processes)"}
    if resident * resource.getpagesize() > limits["memory_mb"] * 2**20:
        return {"breach": f"took more than {limits['memory_mb']} MB of memory (memory_mb)"}
    if ticks > limits["cpu_s"] * os.sysconf("SC_CLK_TCK"):
        return {"breach": f"used more than {limits['cpu_s']:g} s of processor time (cpu_s)"}
    return {}


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
    """All that descends from a process."""
    waiting = [root]
    while waiting:
        for child in _children(waiting.pop()):
            waiting.append(child)
            yield child


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
