"""A grid with a reward in one corner, small enough that values, occupancies and experts are exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import one_hot

from regimen.functions.tabular import optimal_values, state_values
from regimen.rollout import Rollout
from regimen.tasks.environments.tensor.mazes import MOVES
from regimen.tasks.recordings import transition_rows


class CornerGrid:
    """`size` x `size` cells, numbered row by row; each step spent in the last one pays 1, and nothing ends.

    The actions are four moves; with probability `slip` a uniform one takes the place of what was chosen; the border
    leaves one where one is.

    Attributes:
        states, actions: how many.
        transitions: `[S, A, S]`; rewards: `[S, A]`; both in double precision.
        expert: `[S, A]`, the best policy (the first of equally good actions).
    """

    def __init__(self, size: int = 8, *, slip: float = 0.1, discount: float = 0.95) -> None:
        """`ValueError` for a size below 2 or a slip outside [0, 1]."""
        if size < 2 or not 0 <= slip <= 1:
            raise ValueError(f"CornerGrid: size={size}, slip={slip}; expected at least 2, and between 0 and 1")
        self.states, self.actions, self.discount = size * size, len(MOVES), discount
        cells, moves = torch.arange(self.states), torch.tensor(MOVES)
        place = torch.stack([cells // size, cells % size], 1)[:, None] + moves
        row, column = place.clamp(0, size - 1).unbind(2)
        led = one_hot(row * size + column, self.states).double()
        self.transitions = (1 - slip) * led + slip * led.mean(1, keepdim=True)
        self.rewards = torch.zeros(self.states, self.actions, dtype=torch.float64)
        self.rewards[-1] = 1
        best = optimal_values(self.transitions, self.rewards, discount).argmax(1)
        self.expert = one_hot(best, self.actions).double()

    def walks(self, policy: Tensor, starts: Tensor, steps: int, rng: torch.Generator) -> TensorDict:
        """Every step of walks from some cells (int64 `[N]`) under a policy `[S, A]`: `transition_rows` of no reward."""
        cell, rows = starts, []
        for _ in range(steps):
            action = torch.multinomial(policy[cell], 1, generator=rng).squeeze(1)
            led = torch.multinomial(self.transitions[cell, action], 1, generator=rng).squeeze(1)
            rows.append((cell, action, led))
            cell = led
        seen, actions, after = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return transition_rows(seen, actions, torch.ones(len(seen)), after)

    def visits(self, rows: TensorDict) -> Tensor:
        """`[S, A]`, the share of rows in which each action was taken in each cell."""
        index = rows["observations"].flatten() * self.actions + rows["actions"].flatten()
        counts = torch.bincount(index, minlength=self.states * self.actions).double()
        return (counts / counts.sum()).view(self.states, self.actions)

    def worth(self, policy: Tensor) -> float:
        """The share of steps, discounted, that a policy `[S, A]` spends in the corner; mean over starts anywhere."""
        values = state_values(self.transitions, self.rewards, policy.double(), self.discount)
        return float((1 - self.discount) * values.mean())

    def measure(self, cast: Mapping[str, Any], rows: TensorDict) -> dict[str, float]:
        """Of the member `policy`: its `worth`, and that as a share of the expert's (the measure of a `DatasetTask`)."""
        worth = self.worth(self.probabilities(cast["policy"]))
        return {"worth": worth, "expert_share": worth / self.worth(self.expert)}

    @torch.no_grad()
    def probabilities(self, policy: Any) -> Tensor:
        """`[S, A]`, of a policy that sees numbers of cells and scores recorded actions."""
        cells, actions = torch.cartesian_prod(torch.arange(self.states), torch.arange(self.actions)).unbind(1)
        pairs = Rollout.create(
            task="grid",
            group=torch.arange(len(cells)),
            mask=torch.ones(len(cells), 1, dtype=torch.bool),
            observations=cells[:, None],
            actions=actions[:, None],
            knobs={"temperature": 1.0},
        )
        logprob: Tensor = policy.distribution(pairs.to(policy.device)).logprob
        return logprob.exp().cpu().double().view(self.states, self.actions)
