"""A child process that answers requests one by one, can be killed, and dies with its parent.

Parent and child speak in safetensors and JSON: what a child sends is never unpickled.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from regimen.storage import StorageError, pack_tree, unpack_tree

START_S = 120.0

Answer = Callable[[Mapping[str, Any]], dict[str, Any]]
"""What a child makes of a request; both are trees that `pack_tree` takes."""


class ChildLost(Exception):
    """The child is of no more use; the message says why and what to do."""


class Child:
    """The parent's end: one process that answers one request at a time.

    As with every process that Python starts afresh, the program that makes one must be importable
    (`if __name__ == "__main__":`).
    """

    def __init__(self, make: Callable[..., Answer], *args: Any, hint: str = "") -> None:
        """Start a child.

        Args:
            make: called in the child with `args`, a module's function; gives what answers requests.
            args: pickled on their way.
            hint: added to the message when the child dies.

        Raises:
            ChildLost: it does not start, or `make` raises.
        """
        context = _context()
        self._hint, self._leads_group = hint, False
        self._connection, theirs = context.Pipe()
        # A daemon is ended with its parent; a daemonic process may start programs, though not `multiprocessing` ones.
        self.process = context.Process(target=_live, args=(theirs, make, args), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self) -> None:
        answer = self.receive(START_S, "did not start")
        self._leads_group = True
        if "raised" in answer:
            raise ChildLost(f"could not be loaded in a child process: {answer['raised']}; import it from a module")

    def ask(self, request: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """The answer to a request; `{"raised": text}` if the child raised.

        Raises:
            ChildLost: it died, did not answer in time, or sent something else.
        """
        self.send(request)
        return self.receive(timeout_s)

    def send(self, request: Mapping[str, Any]) -> None:
        """Ask without waiting."""
        with suppress(OSError):
            # A dead child is noticed while receiving.
            self._connection.send_bytes(pack_tree(request))

    def receive(self, timeout_s: float | None = None, what: str = "did not return") -> dict[str, Any]:
        """The answer to what was sent; see `ask`."""
        ready = wait([self._connection, self.process.sentinel], timeout_s)
        if not ready:
            raise ChildLost(f"{what} within {timeout_s:g} s and was killed; raise timeout_s or mend what hangs")
        try:
            answer = unpack_tree(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise ChildLost(f"{what}: {self._death()}") from error
        except StorageError as error:
            raise ChildLost(f"{what} what it should: {error}; its code writes into its own connection") from error
        return dict(answer)

    def _death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"its process was killed by {name}, as by a crash or for want of memory{self._hint}"
        return f"its process ended with exit code {code}; look for exit calls in the code that it runs{self._hint}"

    def kill(self) -> None:
        """End the child's whole process group, so that programs which it started go too."""
        if self._leads_group and hasattr(os, "killpg"):
            with suppress(OSError):
                os.killpg(self.process.pid or -1, signal.SIGKILL)
        self.process.kill()
        self.process.join(5)
        self._connection.close()


def told(error: BaseException) -> str:
    """An exception as text."""
    return f"{type(error).__name__}: {error}"


def _context() -> Any:
    """Fresh processes, never forks of this one, whose threads and devices would be in an unknown state.

    Where there is a fork server it imports once what this process has imported of the library, and with it torch, so
    that a child starts in no time.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("regimen.")])
    return context


def _live(connection: Connection, make: Callable[..., Answer], args: tuple[Any, ...]) -> None:
    """The child's life: make what answers, then answer until the parent is gone."""
    _leave_the_parent_alone()
    torch.set_num_threads(1)
    try:
        answer = make(*args)
    except BaseException as error:
        connection.send_bytes(pack_tree({"raised": told(error)}))
        return
    connection.send_bytes(pack_tree({"ready": True}))
    while True:
        try:
            request = unpack_tree(connection.recv_bytes())
        except (EOFError, OSError):
            return
        connection.send_bytes(_packed(answer, request))


def _packed(answer: Answer, request: Mapping[str, Any]) -> bytes:
    try:
        return pack_tree(answer(request))
    except Exception as error:
        return pack_tree({"raised": told(error)})


def _leave_the_parent_alone() -> None:
    """A process group of its own, no output, and an end with the parent's end."""
    if hasattr(os, "setsid"):
        os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
