"""A list of points, each to be answered rightly; how many were is told at the end."""

from __future__ import annotations

from collections.abc import Mapping

import gymnasium.spaces as spaces
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from regimen.functions.categorical import row_uniform
from regimen.rollout import Rollout
from regimen.tasks.environments.base import Observations
from regimen.tasks.environments.tensor.base import TensorEnv


class Checklist(TensorEnv):
    """Every step shows a point, drawn anew, to be answered by one of some actions. Half of the points count.

    A point that counts is right under one action, the same in all episodes. The reward, in the last step, is twice the
    share of the steps that were right: 1 on average for perfect play. The copies see a vector: the point as a unit
    vector, and the share of the episode that has passed. Column: `credit`, what the step earned of the final reward,
    for comparison only.

    Attributes:
        answers: int64 `[points]`, the right action of each; -1 if it does not count.
    """

    def __init__(
        self,
        count: int,
        *,
        points: int = 16,
        actions: int = 8,
        limit: int = 20,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make the copies.

        Args:
            count: how many.
            points, actions: how many there are.
            limit: steps of an episode, after which it is over for good.
            seed: which actions are right.
            device: see `TensorEnv`.

        Raises:
            ValueError: fewer than two points or actions.
        """
        if min(points, actions) < 2:
            raise ValueError(f"Checklist: points={points}, actions={actions}; expected at least 2 of each")
        super().__init__(count, limit=limit, limit_terminates=True, device=device)
        self.points = points
        drawn = torch.randint(actions, (points,), generator=torch.Generator().manual_seed(seed))
        self.answers = torch.where(torch.arange(points) < points // 2, drawn, -1).to(self.device)
        self.observation_space = spaces.Box(0.0, 1.0, (points + 1,))
        self.action_space = spaces.Discrete(actions)

    def start(self, seeds: Tensor, knobs: Mapping[str, float]) -> dict[str, Tensor]:
        """A first point."""
        return {"point": self._point(row_uniform(seeds, -1 - torch.ones_like(seeds))), "right": torch.zeros_like(seeds)}

    def _point(self, uniform: Tensor) -> Tensor:
        return (uniform * self.points).long()

    def move(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """Answer, and be shown another point."""
        correct = self.answers[self.state["point"]] == actions
        right = self.state["right"] + correct
        share = 2 / self.limit
        last = self.time + 1 >= self.limit
        reward = torch.where(last, right * share, 0.0).float()
        changed = {"point": self._point(self.uniform()), "right": right}
        return changed, reward, torch.zeros_like(last), {"credit": correct.float() * share}

    def observe(self) -> Observations:
        """The point, and the time."""
        passed = (self.time / self.limit)[:, None]
        return torch.cat([one_hot(self.state["point"], self.points), passed], 1).float()


def points_and_actions(rollout: Rollout, actions: int = 8) -> Tensor:
    """Unit vectors of (point, action), `[B, T, points * actions]`: the true credit is linear in them."""
    acted = one_hot(rollout.actions, actions)
    pairs: Tensor = rollout.observations[..., :-1, None] * acted[..., None, :]
    return pairs.flatten(2)
