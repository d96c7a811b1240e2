"""A reward in a child process that can be killed: for code that may hang, crash or eat all memory.

Parent and child speak in safetensors and JSON. The child may run code that nobody has read, so nothing that it
sends is ever unpickled.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from regimen.rewards.base import Reward, Scene, Score
from regimen.rollout import Rollout
from regimen.storage import StorageError, pack_tree, unpack_tree

START_S = 120.0


class IsolatedReward(Reward):
    """An inner reward that is asked in a child process of its own.

    When it does not answer in time, or the child dies (crash, `os._exit`, out of memory), the whole batch has
    *failed*; the child and all that it started are killed, and the next batch gets a fresh one. An exception is
    raised here as it would be without a child. The component keeps the inner one's name, settings and state.

    The inner reward sees the rollout and the knobs. The cast stays behind: a reward that asks a member of the cast
    cannot be isolated. The child limits time and memory; files and network are as open to it as to this process.
    As with every process that Python starts afresh, a script that trains must do so under `if __name__ == "__main__":`.
    """

    def __init__(self, reward: Reward, timeout_s: float = 30.0, memory_mb: int | None = None) -> None:
        """Isolate a reward. The child starts with the first batch.

        Args:
            reward: the component; it must survive pickling (defined at a module's level, not in a function).
            timeout_s: seconds that one batch may take.
            memory_mb: memory that the child may take beyond what it needs to start; no limit if `None`.

        Raises:
            ValueError: a limit is not positive, or the reward cannot be pickled.
        """
        if timeout_s <= 0 or (memory_mb is not None and memory_mb <= 0):
            raise ValueError(f"IsolatedReward: timeout_s={timeout_s}, memory_mb={memory_mb}; expected above 0")
        try:
            self._pickled = pickle.dumps(reward)
        except Exception as error:
            raise ValueError(
                f"IsolatedReward: reward '{reward.name}' cannot be sent to a child process ({error}); define its class "
                "or function at the top level of an importable module, and open files and devices on first use"
            ) from error
        self.reward, self.timeout_s, self.memory_mb = reward, timeout_s, memory_mb
        self.name, self.reads = reward.name, reward.reads
        self.stateful, self.version = reward.stateful, reward.version
        self._state: dict[str, Any] = reward.save_state()
        self._child: _Child | None = None

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        """What the inner reward answers."""
        request = pack_tree({"rollout": rollout.to("cpu").state_dict(), "knobs": dict(scene.knobs)})
        try:
            child = self._started()
            answer = child.ask(request, self.timeout_s)
        except _ChildLost as lost:
            self.close()
            return Score.failed(len(rollout), f"reward '{self.name}' {lost}", rollout.mask.device)
        except BaseException:
            # Interrupted from outside (a stage's time limit, Ctrl-C): the child may still be at work.
            self.close()
            raise
        if "raised" in answer:
            raise RuntimeError(f"in its child process: {answer['raised']}")
        self._state = answer["state"]
        return Score(answer["value"], answer["status"], tuple(answer["errors"]))

    def save_state(self) -> dict[str, Any]:
        """The inner reward's state after the last batch that it answered."""
        return self._state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore it; the next batch gets a fresh child, unless there is nothing to forget."""
        if state or self._state:
            self.close()
        self._state = dict(state)

    def close(self) -> None:
        """Kill the child and all that it started, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    def _started(self) -> _Child:
        if self._child is None:
            self._child = _Child(self._pickled, pack_tree(self._state), self.memory_mb)
            self._child.wait_until_ready()
        return self._child

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


def _context() -> Any:
    """Fresh processes, never forks of this one, whose threads and devices would be in an unknown state.

    Where there is a fork server it imports torch once, so that a killed child is replaced in no time.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _ChildLost(Exception):
    """The child is of no more use; the message says why and what to do."""


class _Child:
    """The parent's end: one process that answers one request at a time."""

    def __init__(self, pickled: bytes, state: bytes, memory_mb: int | None) -> None:
        context = _context()
        self._memory_mb, self._leads_group = memory_mb, False
        self._connection, theirs = context.Pipe()
        # A daemon is ended with its parent; a daemonic process may start programs, though not `multiprocessing` ones.
        self._process = context.Process(target=_serve, args=(theirs, pickled, state, memory_mb), daemon=True)
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        answer = self._receive(START_S, "did not start")
        self._leads_group = True
        if "raised" in answer:
            raise _ChildLost(f"could not be loaded in a child process: {answer['raised']}; import it from a module")

    def ask(self, request: bytes, timeout_s: float) -> dict[str, Any]:
        with suppress(OSError):
            # A dead child is noticed while receiving.
            self._connection.send_bytes(request)
        return self._receive(timeout_s, "did not return")

    def _receive(self, timeout_s: float, what: str) -> dict[str, Any]:
        ready = wait([self._connection, self._process.sentinel], timeout_s)
        if not ready:
            raise _ChildLost(f"{what} within {timeout_s:g} s and was killed; raise timeout_s or mend what hangs")
        try:
            answer = unpack_tree(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise _ChildLost(f"{what}: {self._death()}") from error
        except StorageError as error:
            raise _ChildLost(f"{what} what it should: {error}; its code writes into its own connection") from error
        return dict(answer)

    def _death(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        limit = f" (it may take {self._memory_mb} MB, memory_mb)" if self._memory_mb else ""
        if code is not None and code < 0:
            return f"its process was killed by {signal.Signals(-code).name}, as by a crash or for want of memory{limit}"
        return f"its process ended with exit code {code}; look for exit calls in the code that it runs{limit}"

    def kill(self) -> None:
        """The child's whole process group, so that programs which it started go too."""
        if self._leads_group and hasattr(os, "killpg"):
            with suppress(OSError):
                os.killpg(self._process.pid or -1, signal.SIGKILL)
        self._process.kill()
        self._process.join(5)
        self._connection.close()


def _serve(connection: Connection, pickled: bytes, state: bytes, memory_mb: int | None) -> None:
    """The child's life: load the reward, then answer requests until the parent is gone."""
    _leave_the_parent_alone()
    torch.set_num_threads(1)
    try:
        reward: Reward = pickle.loads(pickled)
        reward.load_state(unpack_tree(state))
        _limit_memory(memory_mb)
    except BaseException as error:
        connection.send_bytes(pack_tree({"raised": _told(error)}))
        return
    connection.send_bytes(pack_tree({"ready": True}))
    while True:
        try:
            request = unpack_tree(connection.recv_bytes())
        except (EOFError, OSError):
            return
        connection.send_bytes(_answer(reward, request, memory_mb))


def _answer(reward: Reward, request: Mapping[str, Any], memory_mb: int | None) -> bytes:
    try:
        rollout = Rollout.from_state_dict(request["rollout"])
        with torch.no_grad():
            result = reward.score(rollout, Scene(knobs=request["knobs"]))
        score = result if isinstance(result, Score) else Score.of(torch.as_tensor(result))
        answer = {"value": score.value, "status": score.status, "errors": list(score.errors)}
        return pack_tree({**answer, "state": reward.save_state()})
    except Exception as error:
        short = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        remedy = f"; it may take {memory_mb} MB, raise memory_mb or judge fewer samples" if short and memory_mb else ""
        return pack_tree({"raised": _told(error) + remedy})


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


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


def _limit_memory(memory_mb: int | None) -> None:
    """Address space beyond what is mapped now; no limit where the system knows none."""
    if memory_mb is None:
        return
    with suppress(ImportError, OSError):
        import resource

        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        limit = mapped + memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
