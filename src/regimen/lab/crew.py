"""A crew of worker processes: each has a pipe of its own, so that one that dies takes nobody with it.

A worker has one torch thread, does one task at a time, and is told of Ctrl-C by its parent only. If the parent dies,
the workers see their pipe close, stop their task as on Ctrl-C and leave. What a worker is given must be picklable, and
the program that starts a crew importable (`if __name__ == "__main__"`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Literal, Self

_STOP = "stop"
_PATIENCE_S = 10.0
_PRELOADED = "regimen.lab.jobs"


class Stopped(BaseException):
    """A task ended early because it was asked to."""


class Line:
    """A worker's end of its pipe, handed to the task it does."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stop = False

    def tell(self, content: Any) -> None:
        """Send the parent a message, kept below 4 kB."""
        self._send("event", content)

    def told_to_stop(self) -> bool:
        """Whether the parent wants the task to end early, or is gone."""
        with suppress(OSError):
            if not self._stop and self._connection.poll():
                self._receive()
        return self._stop

    def _receive(self) -> Any:
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            message = None
        self._stop = message is None or message == _STOP
        return message

    def _next(self) -> Any:
        while (message := self._receive()) == _STOP:
            pass
        return message

    def _send(self, kind: str, content: Any) -> None:
        try:
            self._connection.send((kind, content))
        except OSError:
            self._stop = True


Work = Callable[[Any, Line], Any]
"""What a worker does with a task; module-level functions and picklable tasks only."""


@dataclass(frozen=True)
class Report:
    """What the crew has to say about a task.

    Attributes:
        key: the task's, as submitted.
        kind: `"event"` (something it told), or its end: `"done"` (content: its result), `"failed"` (content: the
            exception as text), `"stopped"` (as it was asked to), `"died"` (its process did; content: how).
        content: see above.
    """

    key: Hashable
    kind: Literal["event", "done", "failed", "stopped", "died"]
    content: Any = None


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    key: Hashable | None = None


class Crew:
    """Up to `size` workers, started when there is something to do. A context manager."""

    def __init__(self, size: int, work: Work) -> None:
        if size < 1:
            raise ValueError(f"a crew of {size} workers; expected one or more")
        self._size, self._work = size, work
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kill=error is not None)

    @property
    def busy(self) -> int:
        """Workers with a task."""
        return sum(worker.key is not None for worker in self._workers)

    @property
    def free(self) -> int:
        """Tasks that may be submitted now."""
        return self._size - self.busy

    def submit(self, key: Hashable, task: Any) -> None:
        """Give a task to a worker; `key` names it in reports. There must be one that is free."""
        while True:
            worker = next((w for w in self._workers if w.key is None), None) or self._start()
            worker.key = key
            with suppress(BrokenPipeError):
                worker.connection.send(task)
                return
            self._workers.remove(worker)

    def wait(self, timeout: float) -> list[Report]:
        """What has happened; an empty list if nothing has within `timeout` seconds."""
        workers = {worker.connection: worker for worker in self._workers}
        reports = []
        for ready in wait(list(workers), timeout):
            worker = workers[ready]  # type: ignore[index]
            report = self._read(worker)
            if report is not None:
                reports.append(report)
        return reports

    def stop(self) -> None:
        """Ask every worker to end its task early; `wait` goes on until none is `busy`."""
        for worker in self._workers:
            if worker.key is not None:
                with suppress(OSError):
                    worker.connection.send(_STOP)

    def close(self, kill: bool = False) -> None:
        """Dismiss the workers; with `kill`, whatever they are doing."""
        for worker in self._workers:
            if kill or worker.key is not None:
                worker.process.kill()
            else:
                with suppress(OSError):
                    worker.connection.send(None)
        for worker in self._workers:
            worker.process.join(_PATIENCE_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _start(self) -> _Worker:
        # A fork server loads torch once, before any thread or device is in use; a worker is then there at once.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([_PRELOADED])
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._work), daemon=False)
        with _quiet_birth():
            process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _read(self, worker: _Worker) -> Report | None:
        key = worker.key
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            worker.connection.close()
            self._workers.remove(worker)
            return None if key is None else Report(key, "died", _cause(worker.process.exitcode))
        if kind != "event":
            worker.key = None
        return Report(key, kind, content)


@contextmanager
def _quiet_birth() -> Iterator[None]:
    """What is started meanwhile has one thread and never hears of Ctrl-C: signal masks and variables are inherited."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    masks = hasattr(signal, "pthread_sigmask")
    if masks:
        resource_tracker.ensure_running()  # Its start would lift the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(connection: Connection, work: Work) -> None:
    """The life of a worker."""
    import torch

    torch.set_num_threads(1)
    line = Line(connection)
    while (task := line._next()) is not None:
        kind, content = "done", None
        try:
            content = work(task, line)
        except Stopped:
            kind = "stopped"
        except Exception as error:
            kind, content = "failed", f"{type(error).__name__}: {error}"
        line._send(kind, content)


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = "; the system may be short of memory" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"exit code {exitcode}"
