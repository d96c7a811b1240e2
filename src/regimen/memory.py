"""Memory: what stands between credit and learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from tensordict import TensorDict

from regimen.rollout import Rollout


@runtime_checkable
class Memory(Protocol):
    """Keeps rollouts to learn from."""

    def add(self, rollout: Rollout) -> None:
        """Take in an iteration's rollout."""
        ...

    def newest(self) -> Rollout:
        """The rollout that came last."""
        ...

    def sample(self, size: int, rng: torch.Generator) -> Rollout:
        """`size` samples, drawn uniformly with replacement."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything kept, for an exact resume."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


class NewestRollout:
    """Keeps the newest rollout only: on-policy learning."""

    def __init__(self) -> None:
        self._newest: Rollout | None = None

    def add(self, rollout: Rollout) -> None:
        """Forget the one before."""
        self._newest = rollout

    def newest(self) -> Rollout:
        """The rollout that came last."""
        if self._newest is None:
            raise ValueError("the memory is empty: collect before you learn")
        return self._newest

    def sample(self, size: int, rng: torch.Generator) -> Rollout:
        """`size` samples of the newest rollout, with replacement."""
        newest = self.newest()
        index = torch.randint(len(newest), (size,), generator=rng, device=rng.device)
        return newest[index]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the next iteration collects anew."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class ReplayMemory:
    """A ring of the last `capacity` samples, preallocated; rewards are stored raw."""

    def __init__(self, capacity: int) -> None:
        """`ValueError` for a capacity below 1."""
        if capacity < 1:
            raise ValueError(f"ReplayMemory: capacity is {capacity}, expected at least 1")
        self.capacity = capacity
        self._ring: TensorDict | None = None
        self._names: tuple[str, ...] = ()
        self._count = 0
        self._newest = NewestRollout()

    def __len__(self) -> int:
        return min(self._count, self.capacity)

    def add(self, rollout: Rollout) -> None:
        """Store a rollout's samples over the oldest ones."""
        self._newest.add(rollout)
        data, names = rollout.data.detach(), rollout.task_names
        if self._ring is None:
            self._ring, self._names = data[:1].expand(self.capacity).clone(), names
        if names != self._names:
            raise ValueError(f"ReplayMemory holds tasks {self._names} and was given {names}; keep one per set of tasks")
        kept = data[-self.capacity :]
        slots = (self._count + len(data) - len(kept) + torch.arange(len(kept))) % self.capacity
        self._ring[slots] = kept
        self._count += len(data)

    def newest(self) -> Rollout:
        """The rollout that came last."""
        return self._newest.newest()

    def sample(self, size: int, rng: torch.Generator) -> Rollout:
        """`size` samples, drawn uniformly with replacement."""
        if self._ring is None:
            raise ValueError("the memory is empty: collect before you learn")
        index = torch.randint(len(self), (size,), generator=rng, device=rng.device)
        return Rollout(self._ring[index], self._names)

    def state_dict(self) -> dict[str, Any]:
        """The ring and how far it is filled."""
        ring = None if self._ring is None else Rollout(self._ring[: len(self)], self._names).state_dict()
        return {"ring": ring, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the ring."""
        self._count = int(state["count"])
        if state["ring"] is None:
            return
        rollout = Rollout.from_state_dict(state["ring"])
        self._names = rollout.task_names
        self._ring = rollout.data[:1].expand(self.capacity).clone()
        self._ring[: len(rollout)] = rollout.data
