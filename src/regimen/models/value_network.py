"""Critics with a network of their own."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import Tensor, nn

from regimen.models.torsos import orthogonal


class Observed(Protocol):
    """What a critic reads of a rollout."""

    @property
    def observations(self) -> Any:
        """`[B, T, ...]`."""
        ...


class ValueNetwork(nn.Module):
    """`V(s)` of the observations of a rollout: a torso and a linear layer; the `critic` of `GAE`."""

    def __init__(self, torso: nn.Module, head: nn.Module | None = None) -> None:
        """`head`: features `[R, D]` to values `[R, 1]`, in place of the linear layer."""
        super().__init__()
        self.torso = torso
        self.out = orthogonal(nn.Linear(cast(int, torso.width), 1), 1.0) if head is None else head

    def forward(self, rollout: Observed) -> Tensor:
        """Values `[B, T]`."""
        shape = rollout.observations.shape[:2]
        values: Tensor = self.out(self.torso(rollout.observations.flatten(0, 1)))
        return values.view(shape)
