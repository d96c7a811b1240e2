"""Whole samples in a ring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.memory.ring import Ring, fitted
from regimen.rollout import Rollout


class Trajectories:
    """The last `capacity` samples, padded to the longest seen; the ring grows with it."""

    def __init__(self, capacity: int) -> None:
        self._ring = Ring(capacity)

    def __len__(self) -> int:
        return len(self._ring)

    def add(self, rollout: Rollout) -> None:
        """Store samples; `ValueError` if they have other fields than those kept."""
        rollout = rollout[-self._ring.capacity :]
        rows = rollout.data
        if self._ring.table is not None:
            kept = Rollout(self._ring.table, rollout.task_names)
            steps = max(kept.steps, rollout.steps)
            self._ring.table, rows = fitted(kept.padded(steps).data, rollout.padded(steps).data)
        self._ring.add(rows)

    def draw(self, size: int, rng: torch.Generator) -> TensorDict:
        """`size` samples, uniformly with replacement, with the column `age`."""
        return self._at(self._ring.draw(size, rng))

    def last(self, size: int | None) -> TensorDict:
        """The newest samples, the oldest of them first."""
        return self._at(self._ring.last(size))

    def _at(self, slots: Tensor) -> TensorDict:
        drawn = self._ring[slots]
        drawn.get("columns").set("age", self._ring.ages(slots))
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """The ring."""
        return self._ring.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._ring.load_state_dict(state)
