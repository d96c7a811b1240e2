"""A square in which a user is to be brought to the goal that the user has in mind."""

from __future__ import annotations

from collections.abc import Mapping

import gymnasium.spaces as spaces
import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.functions.categorical import row_uniform
from regimen.tasks.environments.base import Observations
from regimen.tasks.environments.tensor.base import TensorEnv
from regimen.tasks.worlds.user_goals import GOALS, REACH, SIDE, UserGoals, distance, moved


class UserSquare(TensorEnv):
    """Every episode has a user, who has labelled some pairs of places and wants to be near one of three goals.

    An action `[2]` is a step, up to 0.15 in each direction. The copies see a table: `state`, where they are, and
    `pairs`, a table of `first`, `second [N, 1, S]` and `label [N]`. The reward is minus the distance from the goal that
    the user has in mind. Columns: `success` and `near`, whether it is within 0.5 and within 0.3 of it.
    """

    def __init__(
        self, count: int, users: UserGoals, *, pairs: int = 8, limit: int = 30, device: torch.device | str = "cpu"
    ) -> None:
        """Make the copies.

        Args:
            count: how many.
            users: what users want and show.
            pairs: that each has labelled.
            limit, device: see `TensorEnv`.

        Raises:
            ValueError: no pairs.
        """
        if pairs < 1:
            raise ValueError(f"UserSquare: pairs={pairs}; expected at least 1")
        super().__init__(count, limit=limit, device=device)
        self.users, self.pairs = users, pairs
        side, segments = spaces.Box(-SIDE, SIDE, (users.states,)), spaces.Box(-SIDE, SIDE, (pairs, 1, users.states))
        asked = {"first": segments, "second": segments, "label": spaces.Box(0, 1, (pairs,))}
        self.observation_space = spaces.Dict({"state": side, "pairs": spaces.Dict(asked)})
        self.action_space = spaces.Box(-REACH, REACH, (2,))

    def start(self, seeds: Tensor, knobs: Mapping[str, float]) -> dict[str, Tensor]:
        """A user, a place, and the user's labels."""
        sizes = (1, self.pairs + 1, 2, 4 * self.pairs)
        steps = -2 - torch.arange(sum(sizes), device=seeds.device)
        drawn = row_uniform(seeds[:, None].expand(-1, len(steps)), steps.expand(len(seeds), -1)).float()
        kind, chance, place, asked = drawn.split(sizes, 1)
        user = (kind[:, 0] * len(GOALS)).long()
        first, second = ((2 * asked - 1) * SIDE).view(len(seeds), 2, self.pairs, 1, 2).unbind(1)
        return {
            "place": (2 * place - 1) * SIDE,
            "user": user,
            "first": self.users.shown(first, user),
            "second": self.users.shown(second, user),
            "label": self.users.label(first, second, user, chance),
        }

    def move(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """A step."""
        place = moved(self.state["place"], actions)
        away = distance(place, self.state["user"])
        told = {"success": (away < 0.5).float(), "near": (away < 0.3).float()}
        return {"place": place}, -away, torch.zeros_like(self.seeds, dtype=torch.bool), told

    def observe(self) -> Observations:
        """Where each copy is, and what its user has labelled."""
        asked = {name: self.state[name] for name in ("first", "second", "label")}
        table = {"state": self.users.shown(self.state["place"], self.state["user"]), "pairs": asked}
        return TensorDict(table, batch_size=[self.count], device=self.device)
