"""Samples kept apart from those that are learned from, to say how well what was learned holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regimen.memory.base import NewestRollout
from regimen.memory.replay import ReplayMemory
from regimen.rollout import Rollout


class HoldOut:
    """Two memories: of every `every` samples the last goes into `apart`, and only the others are drawn.

    The newest rollout is whole, so a policy learns from all of it.
    """

    def __init__(self, memory: ReplayMemory, apart: ReplayMemory, every: int = 5) -> None:
        """`memory` is drawn from, `apart` is not; `ValueError` if `every` is below 2."""
        if every < 2:
            raise ValueError(f"HoldOut: every is {every}, expected at least 2, so that something is learned from")
        self.memory, self.apart, self.every = memory, apart, every
        self._newest, self._count = NewestRollout(), 0

    def __len__(self) -> int:
        return len(self.memory)

    def add(self, rollout: Rollout) -> None:
        """Share a rollout's samples out."""
        number = self._count + torch.arange(len(rollout), device=rollout.mask.device)
        apart = number % self.every == self.every - 1
        self.memory.add(rollout[~apart])
        self.apart.add(rollout[apart])
        self._count += len(rollout)
        self._newest.add(rollout)

    def newest(self) -> Rollout:
        """The rollout that came last, as it came."""
        return self._newest.newest()

    def sample(self, size: int, rng: torch.Generator) -> Rollout:
        """`size` samples of those that are not kept apart."""
        return self.memory.sample(size, rng)

    def last(self, size: int | None = None) -> Rollout:
        """The newest `size` of those that are not kept apart, see `ReplayMemory.last`."""
        return self.memory.last(size)

    def state_dict(self) -> dict[str, Any]:
        """Both memories, and whose turn it is."""
        return {"memory": self.memory.state_dict(), "apart": self.apart.state_dict(), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.memory.load_state_dict(state["memory"])
        self.apart.load_state_dict(state["apart"])
        self._count = int(state["count"])
