"""A critic of actions and of states at once, twice: what an off-policy critic needs that asks its policy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from regimen.models.q_network import ParallelLinear


class DoubleCritic(nn.Module):
    """`Q_j(s, a)` and `V_j(s)` of `critics` pairs, on features of state and action that are made once for all.

    State and action are read apart, each by a torso; both may be the same module, as where both are texts. Heads have
    two hidden layers (ReLU): Q on both features side by side, V on the state's.

    Attributes:
        state, action: torsos, `[R, ...]` to features `[R, width]`, with an attribute `width`.
    """

    def __init__(self, state: nn.Module, action: nn.Module, width: int = 64, critics: int = 2) -> None:
        """`width` is that of the hidden layers of the heads."""
        super().__init__()
        self.state, self.action = state, action
        seen, done = cast(int, state.width), cast(int, action.width)
        self.q, self.v = _head(critics, seen + done, width), _head(critics, seen, width)

    def forward(self, observations: Any, actions: Any) -> Tensor:
        """`Q [K, R]` of actions `[R, ...]` at observations `[R, ...]`."""
        return _values(self.q, torch.cat([self.state(observations), self.action(actions)], -1))

    def values(self, observations: Any) -> Tensor:
        """`V [K, R]` of observations `[R, ...]`."""
        return _values(self.v, self.state(observations))

    def both(self, observations: Any, actions: Any) -> tuple[Tensor, Tensor]:
        """`Q` and `V`, `[K, R]` each; the observations are read once."""
        seen = self.state(observations)
        return _values(self.q, torch.cat([seen, self.action(actions)], -1)), _values(self.v, seen)


def _head(critics: int, inputs: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs, width, width]):
        layers += [ParallelLinear(critics, before, after, 2**0.5), nn.ReLU()]
    return nn.Sequential(*layers, ParallelLinear(critics, width, 1, 1.0))


def _values(head: nn.Sequential, features: Tensor) -> Tensor:
    critics = cast(ParallelLinear, head[0]).weight.shape[0]
    values: Tensor = head(features.to(torch.float32).expand(critics, *features.shape))
    return values.squeeze(-1)
