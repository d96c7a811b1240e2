"""Steps, critics and policies that tests of off-policy objectives share: small enough to be worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regimen.knobs import Knobs
from regimen.objectives.base import Batch, Objective
from regimen.rollout import Rollout


class Line(nn.Module):
    """`K` critics: slope times the observation, plus the action, plus an offset; also values of states and actions."""

    def __init__(self, *offsets: float, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(offsets, dtype=torch.float64))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        both: Tensor = self.slope * observations[:, 0] + actions.flatten(1).sum(1) + self.offset[:, None]
        return both

    def values(self, observations: Tensor) -> Tensor:
        """Of the discrete actions, as many as offsets: their offset times the observation."""
        return self.slope * observations[:, :1] * self.offset


class Says(nn.Module):
    """Proposes the observation times a weight, with a given log-probability."""

    def __init__(self, weight: float = 2.0, logprob: float | None = -3.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.logprob = logprob

    def propose(self, observations: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        actions = self.weight * observations
        if self.logprob is None:
            return actions, None
        return actions, self.logprob + 0 * actions[:, 0] + 0.5 * self.weight


def steps(**fields: Any) -> Rollout:
    """Three samples of a step: one goes on, one terminated, one was cut off; observed are 1, 2, 3, then 10, 20, 30."""
    column = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    settings: dict[str, Any] = {
        "task": "t",
        "group": torch.arange(3),
        "mask": torch.ones(3, 1, dtype=torch.bool),
        "observations": column[..., None],
        "actions": torch.tensor([[[0.5]], [[0.25]], [[0.0]]], dtype=torch.float64),
        "reward": column / 10,
        "discount": torch.tensor([[0.5], [0.0], [0.5]], dtype=torch.float64),
        "step_columns": {
            "next_observations": 10 * column[..., None],
            "cut": torch.tensor([[False], [False], [True]]),
        },
    }
    return Rollout.create(**(settings | fields))


def batch_of(objective: Objective, rollout: Rollout, seed: int = 0, knobs: Any = None, **members: Any) -> Batch:
    board = Knobs.of(objective) if knobs is None else knobs
    return Batch(rollout, members, board, torch.Generator().manual_seed(seed))


def numerical_gradient(loss: Callable[[], Tensor], parameters: list[nn.Parameter], size: float = 1e-6) -> list[Tensor]:
    """Central differences of a loss in every number of some weights (float64)."""
    found = []
    for parameter in parameters:
        gradient = torch.zeros_like(parameter)
        flat, out = parameter.detach().view(-1), gradient.view(-1)
        for i in range(len(flat)):
            before = flat[i].item()
            ends = []
            for sign in (1, -1):
                flat[i] = before + sign * size
                ends.append(float(loss().detach()))
            flat[i] = before
            out[i] = (ends[0] - ends[1]) / (2 * size)
        found.append(gradient)
    return found
