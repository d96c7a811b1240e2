"""The base of environments written as batched tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regimen.functions.categorical import row_uniform
from regimen.knobs import Knob
from regimen.tasks.environments.base import Change, Observations


class TensorEnv(ABC):
    """Copies of an environment as rows of tensors. Subclass it and write `start`, `move` and `observe`.

    The state of all copies is one table of tensors `[N, ...]`; a checkpoint holds it as it is. What a copy draws, at a
    start or in a step, comes from a stream of its own (`uniform`), so that an episode is a function of its seed and its
    actions.

    Attributes:
        count, device: how many copies, and where.
        limit: steps of an episode, after which it is cut off; with `limit_terminates` it is over for good there (a
            finite horizon), and its value does not go on.
        observation_space, action_space: of one copy; a subclass sets them.
        state: the table; empty before the first reset.
        seeds: int64 `[N]`, of the present episodes; time: int64 `[N]`, steps taken in them.
    """

    observation_space: Any
    action_space: Any
    knobs: tuple[Knob, ...] = ()

    def __init__(
        self, count: int, *, limit: int, limit_terminates: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        """`ValueError` for a count or a limit below 1."""
        if count < 1 or limit < 1:
            raise ValueError(f"{type(self).__name__}: count={count}, limit={limit}; expected at least 1 of each")
        self.count, self.limit, self.limit_terminates = count, limit, limit_terminates
        self.device = torch.device(device)
        self.state: dict[str, Tensor] = {}
        self.seeds = torch.zeros(count, dtype=torch.int64, device=self.device)
        self.time = torch.zeros_like(self.seeds)

    @abstractmethod
    def start(self, seeds: Tensor, knobs: Mapping[str, float]) -> dict[str, Tensor]:
        """The state `[R, ...]` at the start of episodes with these seeds (int64 `[R]`)."""

    @abstractmethod
    def move(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """What an action in every copy does to `self.state`, which it leaves as it is.

        Returns:
            The entries of the state that change; the reward `[N]`; bool `[N]`, whether the episode terminated; and
            further columns `[N, ...]`.
        """

    @abstractmethod
    def observe(self) -> Observations:
        """What every copy sees of `self.state`."""

    def uniform(self, draw: int = 0, draws: int = 1) -> Tensor:
        """One number in [0, 1) per copy, float64 `[N]`, for the present step; draw `draw` of `draws` in a step."""
        return row_uniform(self.seeds, self.time * draws + draw)

    def reset(self, rows: Tensor, seeds: Tensor, knobs: Mapping[str, float]) -> Observations:
        """Start new episodes in some copies; observations of all."""
        # The first time all copies start, so that there is a state of each.
        rows = rows.to(self.device) if self.state else torch.ones_like(self.time, dtype=torch.bool)
        seeds = seeds.to(self.device)
        fresh = self.start(seeds[rows], knobs)
        # No tensor is changed in place, so that a state that was given out stays what it was.
        if bool(rows.all()):
            self.state = dict(fresh)
        else:
            self.state = {name: _with_rows(value, rows, fresh[name]) for name, value in self.state.items()}
        self.seeds = torch.where(rows, seeds, self.seeds)
        self.time = torch.where(rows, 0, self.time)
        return self.observe()

    def step(self, actions: Tensor) -> Change:
        """Take an action in every copy."""
        changed, reward, terminated, info = self.move(actions.to(self.device))
        self.state = {**self.state, **changed}
        self.time = self.time + 1
        late = (self.time >= self.limit) & ~terminated
        if self.limit_terminates:
            terminated, late = terminated | late, torch.zeros_like(late)
        return Change(self.observe(), reward, terminated, late, info)

    def state_dict(self) -> dict[str, Any]:
        """The table, the seeds and the times."""
        return {"state": dict(self.state), "seeds": self.seeds, "time": self.time}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put every copy back there."""
        self.state = {name: value.to(self.device) for name, value in state["state"].items()}
        self.seeds, self.time = state["seeds"].to(self.device), state["time"].to(self.device)

    def close(self) -> None:
        """Forget the table."""
        self.state = {}


def _with_rows(value: Tensor, rows: Tensor, fresh: Tensor) -> Tensor:
    changed = value.clone()
    changed[rows] = fresh
    return changed
