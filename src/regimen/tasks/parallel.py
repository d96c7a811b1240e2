"""A task whose samples are collected by several processes at once."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.processes import Answer, Child, ChildLost
from regimen.rollout import Rollout
from regimen.storage import pack_tree, unpack_tree
from regimen.tasks.base import Evaluation, Task


class ParallelTask:
    """Several processes collect side by side, each with a task and a copy of the cast of its own, on the CPU.

    A call shares out its samples in whole groups. Weights are sent when they have changed, so that every sample is of
    the policy as it is now. What is collected depends on the random stream and on the number of workers, not on which
    of them is faster. A worker that dies is started again where it stood and asked once more; if it dies again, the run
    stops, and says how.

    As with every process that Python starts afresh, `make` and the members of the cast must survive pickling, and the
    program must be importable (`if __name__ == "__main__":`).
    """

    def __init__(self, make: Callable[[int], Task], workers: int = 2, *, timeout_s: float | None = None) -> None:
        """Make a task of several; the workers start with the first samples.

        Args:
            make: the number of a worker, 0 to `workers - 1`, to its task: with rows of its own, if rows are not to be
                drawn by several. A further task 0 in this process evaluates.
            workers: how many.
            timeout_s: seconds that a worker may take for its samples.

        Raises:
            ValueError: no workers, or a limit that is not positive.
        """
        if workers < 1 or (timeout_s is not None and timeout_s <= 0):
            raise ValueError(f"ParallelTask: workers={workers}, timeout_s={timeout_s}; expected at least 1 and above 0")
        self.make, self.timeout_s, self.inner = make, timeout_s, make(0)
        self.name, self.group_size, self.generates = self.inner.name, self.inner.group_size, self.inner.generates
        self.collects: tuple[str, ...] = getattr(self.inner, "collects", (self.name,))
        self._workers = [_Worker(self, number) for number in range(workers)]

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """Those of the task."""
        return self.inner.knobs

    @property
    def workers(self) -> int:
        """How many there are."""
        return len(self._workers)

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size` samples, in whole groups, of all workers in order.

        Raises:
            ValueError: `size` is not a multiple of `group_size`.
            RuntimeError: a worker raised, or died twice.
        """
        if size < 1 or size % self.group_size:
            raise ValueError(
                f"task '{self.name}' was asked for {size} samples, expected a multiple of its group_size "
                f"{self.group_size}"
            )
        groups, count = size // self.group_size, self.workers
        seeds = torch.randint(2**62, (count,), generator=rng, device=rng.device).tolist()
        shares = [(groups // count + (number < groups % count)) * self.group_size for number in range(count)]
        # The last ones have nothing to do where there are fewer groups than workers.
        busy = self._workers[:groups]
        try:
            for worker, share, seed in zip(busy, shares, seeds, strict=False):
                worker.send(cast, {"knobs": dict(knobs), "seed": seed, "size": share})
            return Rollout.cat([worker.receive(cast) for worker in busy]).to(rng.device)
        except BaseException:
            # Somebody's answer may still be on its way, and would be taken for that to the next request.
            self.close()
            raise

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """The task's evaluation, in this process."""
        return self.inner.evaluate(cast, knobs, rng)

    def state_dict(self) -> dict[str, Any]:
        """Where every worker's task stands."""
        return {"workers": [worker.state for worker in self._workers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; `ValueError` if it was of another number of workers."""
        if len(state["workers"]) != self.workers:
            raise ValueError(
                f"task '{self.name}': the checkpoint is of {len(state['workers'])} workers, and there are "
                f"{self.workers}; resume with as many as the run began with"
            )
        for worker, saved in zip(self._workers, state["workers"], strict=True):
            worker.close()
            worker.state = saved

    def close(self) -> None:
        """End the workers' processes; the next samples start new ones."""
        for worker in self._workers:
            worker.close()


@dataclass
class _Known:
    """Weights as a worker last got them; they are kept, so that no other tensor can take their place in memory."""

    tensors: list[Tensor]
    versions: list[int]

    def same(self, other: _Known) -> bool:
        """Whether nothing has been written since."""
        mine, theirs = ([t.data_ptr() for t in known.tensors] for known in (self, other))
        return mine == theirs and self.versions == other.versions


class _Worker:
    """This process's side of one worker."""

    def __init__(self, task: ParallelTask, number: int) -> None:
        # Only what is needed of the task, so that no circle keeps the child alive.
        self.name, self.make, self.number, self.timeout_s = task.name, task.make, number, task.timeout_s
        self.state: dict[str, Any] | None = None
        self._child: Child | None = None
        self._known: dict[str, _Known] = {}
        self._asked: dict[str, Any] = {}

    def send(self, cast: Mapping[str, Any], order: dict[str, Any]) -> None:
        """Ask for samples."""
        self._asked = order
        try:
            if self._child is None:
                self._child = Child(_ready, self.make, self.number, pack_tree(self.state))
                self._known = {}
            self._child.send({**order, **self._news(cast)})
        except ChildLost as lost:
            raise RuntimeError(f"task '{self.name}': worker {self.number} {lost}") from lost

    def receive(self, cast: Mapping[str, Any]) -> Rollout:
        """The samples that were asked for."""
        assert self._child is not None, "it was asked"
        try:
            answer = self._child.receive(self.timeout_s)
        except ChildLost as lost:
            self.close()
            warnings.warn(f"task '{self.name}': worker {self.number} {lost}; it is started again", stacklevel=2)
            answer = self._again(cast)
        if "raised" in answer:
            raise RuntimeError(f"task '{self.name}': worker {self.number} raised {answer['raised']}")
        self.state = answer["state"]
        return Rollout.from_state_dict(answer["rollout"])

    def _again(self, cast: Mapping[str, Any]) -> dict[str, Any]:
        self.send(cast, self._asked)
        assert self._child is not None, "it was asked"
        try:
            return self._child.receive(self.timeout_s)
        except ChildLost as lost:
            self.close()
            raise RuntimeError(
                f"task '{self.name}': worker {self.number} was lost twice with the same samples: it {lost}"
            ) from lost

    def _news(self, cast: Mapping[str, Any]) -> dict[str, Any]:
        """Members that the worker has not met, the states of those that have changed, and their versions."""
        fresh = {name: member for name, member in cast.items() if name not in self._known}
        states: dict[str, Any] = {}
        for name, member in cast.items():
            state = member.state_dict() if hasattr(member, "state_dict") else {}
            tensors = [value for value in state.values() if isinstance(value, Tensor)]
            now = _Known(tensors, [tensor._version for tensor in tensors])
            if name not in fresh and (len(tensors) < len(state) or not now.same(self._known[name])):
                states[name] = state
            self._known[name] = now
        versions = {name: member.version for name, member in cast.items() if hasattr(member, "version")}
        return {"fresh": _pickled(fresh) if fresh else None, "states": states, "versions": versions}

    def close(self) -> None:
        """End its process, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


def _pickled(members: Mapping[str, Any]) -> Tensor:
    """Members as bytes `[N]`; shared modules stay shared."""
    buffer = io.BytesIO()
    torch.save(dict(members), buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).clone()


def _ready(make: Callable[[int], Task], number: int, state: bytes) -> Answer:
    """In the worker: its task, where it stood."""
    task = make(number)
    if (saved := unpack_tree(state)) is not None:
        task.load_state_dict(saved)
    return partial(_answer, task, {})


def _answer(task: Task, cast: dict[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """In the worker: samples by the cast as it is now."""
    if request["fresh"] is not None:
        # Pickled by the parent of this very process.
        buffer = io.BytesIO(request["fresh"].numpy().tobytes())
        cast.update(torch.load(buffer, map_location="cpu", weights_only=False))
    for name, state in request["states"].items():
        cast[name].load_state_dict(state)
    for name, version in request["versions"].items():
        cast[name].version = version
    rng = torch.Generator().manual_seed(request["seed"])
    rollout = task.collect(cast, request["knobs"], rng, request["size"])
    return {"rollout": rollout.state_dict(), "state": task.state_dict()}
