"""A reward by chance: the control for whatever a real one is said to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regimen.rewards.base import Reward, Scene
from regimen.rollout import Rollout


class ChanceReward(Reward):
    """1 with a fixed probability and 0 otherwise, `[B]`, whatever the sample; from a random stream of its own."""

    stateful = True

    def __init__(self, probability: float = 0.5, seed: int = 0, name: str = "chance") -> None:
        """Make it; `ValueError` for a probability outside [0, 1]."""
        if not 0 <= probability <= 1:
            raise ValueError(f"ChanceReward: probability is {probability}, expected a number in [0, 1]")
        self.probability, self.name, self._rng = probability, name, torch.Generator().manual_seed(seed)

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """One draw per sample."""
        return (torch.rand(len(rollout), generator=self._rng) < self.probability).float().to(rollout.mask.device)

    def save_state(self) -> dict[str, Any]:
        """Where its stream stands."""
        return {"rng": self._rng.get_state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._rng.set_state(state["rng"])
