"""A reward in a child process that can be killed: for code that may hang, crash or eat all memory.

Parent and child speak in safetensors and JSON. The child may run code that nobody has read, so nothing that it
sends is ever unpickled.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from regimen.processes import Answer, Child, ChildLost, told
from regimen.rewards.base import Reward, Scene, Score
from regimen.rollout import Rollout
from regimen.storage import pack_tree, unpack_tree


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
        self._child: Child | None = None

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        """What the inner reward answers."""
        request = {"rollout": rollout.to("cpu").state_dict(), "knobs": dict(scene.knobs)}
        try:
            answer = self._started().ask(request, self.timeout_s)
        except ChildLost as lost:
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

    def _started(self) -> Child:
        if self._child is None:
            hint = f" (it may take {self.memory_mb} MB, memory_mb)" if self.memory_mb else ""
            self._child = Child(_ready, self._pickled, pack_tree(self._state), self.memory_mb, hint=hint)
        return self._child

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


def _ready(pickled: bytes, state: bytes, memory_mb: int | None) -> Answer:
    """In the child: the reward, and the limit on its memory."""
    reward: Reward = pickle.loads(pickled)
    reward.load_state(unpack_tree(state))
    _limit_memory(memory_mb)
    return partial(_answer, reward, memory_mb)


def _answer(reward: Reward, memory_mb: int | None, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        rollout = Rollout.from_state_dict(request["rollout"])
        with torch.no_grad():
            result = reward.score(rollout, Scene(knobs=request["knobs"]))
        score = result if isinstance(result, Score) else Score.of(torch.as_tensor(result))
        answer = {"value": score.value, "status": score.status, "errors": list(score.errors)}
        return {**answer, "state": reward.save_state()}
    except Exception as error:
        short = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        remedy = f"; it may take {memory_mb} MB, raise memory_mb or judge fewer samples" if short and memory_mb else ""
        return {"raised": told(error) + remedy}


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
