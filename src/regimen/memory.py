"""Memory: what stands between credit and learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from regimen.rollout import Rollout, check_joinable


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
    """A ring of the last `capacity` samples, preallocated; rewards are stored raw.

    Shorter rollouts are padded to the longest seen; the ring grows with it.
    """

    def __init__(self, capacity: int) -> None:
        """`ValueError` for a capacity below 1."""
        if capacity < 1:
            raise ValueError(f"ReplayMemory: capacity is {capacity}, expected at least 1")
        self.capacity = capacity
        self._ring: Rollout | None = None
        self._count = 0
        self._newest = NewestRollout()

    def __len__(self) -> int:
        return min(self._count, self.capacity)

    def add(self, rollout: Rollout) -> None:
        """Store a rollout's samples over the oldest ones.

        Raises:
            ValueError: it is of other tasks than those kept, or has other fields.
        """
        if len(rollout) > 0:
            ring = self._ring = self._room_for(rollout)
            kept = rollout[-self.capacity :].padded(ring.steps).data.detach()
            slots = (self._count + len(rollout) - len(kept) + torch.arange(len(kept))) % self.capacity
            ring.data[slots] = kept.to(ring.task.device)
            self._count += len(rollout)
        self._newest.add(rollout)

    def _room_for(self, rollout: Rollout) -> Rollout:
        ring = _ring_of(rollout, self.capacity) if self._ring is None else self._ring
        if rollout.task_names != ring.task_names:
            raise ValueError(
                f"ReplayMemory holds tasks {ring.task_names} and was given {rollout.task_names}; keep one per set of "
                "tasks"
            )
        ring = ring.padded(max(ring.steps, rollout.steps))
        check_joinable(ring.data, rollout[:1].padded(ring.steps).data, "the memory and a new rollout")
        return ring

    def newest(self) -> Rollout:
        """The rollout that came last."""
        return self._newest.newest()

    def sample(self, size: int, rng: torch.Generator) -> Rollout:
        """`size` samples, drawn uniformly with replacement."""
        if self._ring is None:
            raise ValueError("the memory is empty: collect before you learn")
        index = torch.randint(len(self), (size,), generator=rng, device=rng.device)
        drawn: Rollout = self._ring[index.to(self._ring.task.device)]
        return drawn.to(rng.device)

    def state_dict(self) -> dict[str, Any]:
        """The ring and how far it is filled."""
        ring = None if self._ring is None else self._ring[: len(self)].state_dict()
        return {"ring": ring, "count": self._count, "capacity": self.capacity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the ring; `ValueError` if it was of another capacity, where the oldest would be another."""
        if state["capacity"] != self.capacity:
            raise ValueError(
                f"ReplayMemory: capacity is {self.capacity} and the checkpoint's {state['capacity']}; resume with the "
                "capacity of the run that saved it"
            )
        self._count, self._ring = int(state["count"]), None
        if state["ring"] is not None:
            rollout = Rollout.from_state_dict(state["ring"])
            self._ring = _ring_of(rollout, self.capacity)
            self._ring.data[: len(rollout)] = rollout.data


def _ring_of(rollout: Rollout, capacity: int) -> Rollout:
    return Rollout(rollout.data[:1].detach().expand(capacity).clone(), rollout.task_names)
