"""Walks over numbered cells to a goal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium.spaces as spaces
import torch
from torch import Tensor

from regimen.tasks.environments.base import Observations
from regimen.tasks.environments.tensor.base import TensorEnv
from regimen.tasks.environments.tensor.pool import TaskPool


class Walk(TensorEnv):
    """A walk over `C` cells, with `A` actions, until a goal is reached, which pays 1 and ends the episode.

    The map of every episode is drawn from a pool, whose contexts are `onward` int64 `[R, C, A]`, the cell that an
    action leads to from a cell; `start` int64 `[R]`; and `goal` bool `[R, C]`.

    The copies see the number of their cell; a subclass may show something else. Columns: `cell` and `next_cell`, where
    a step began and where it led, by which visits can be counted; `success`, 1 in the step that reaches a goal.
    """

    def __init__(self, count: int, pool: TaskPool, cells: int, actions: int, **settings: Any) -> None:
        """`settings` are those of `TensorEnv`."""
        super().__init__(count, **settings)
        self.pool = pool
        self.observation_space: Any = spaces.Discrete(cells)
        self.action_space: Any = spaces.Discrete(actions)
        self._copies = torch.arange(count, device=self.device)

    def start(self, seeds: Tensor, knobs: Mapping[str, float]) -> dict[str, Tensor]:
        """The start of a map; `last` is the number of the last action, counted from 1, and 0 where there is none."""
        drawn = self.pool.draw(seeds)
        return {
            "cell": drawn["start"],
            "last": torch.zeros_like(seeds),
            "onward": drawn["onward"],
            "goal": drawn["goal"],
        }

    def move(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """Go where the action leads."""
        cell = self.state["cell"]
        led = self.state["onward"][self._copies, cell, actions]
        found = self.state["goal"][self._copies, led]
        reward = found.float()
        return {"cell": led, "last": actions + 1}, reward, found, {"cell": cell, "next_cell": led, "success": reward}

    def observe(self) -> Observations:
        """The number of the cell."""
        return self.state["cell"]
