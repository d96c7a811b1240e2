"""Critics of actions: `Q(s, a)` of several critics at once, and the values of all discrete actions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self, cast

import gymnasium.spaces as spaces
import torch
from torch import Tensor, nn

from regimen.models.dense import large, product
from regimen.models.torsos import Observations, orthogonal, torso_for


class QNetwork(nn.Module):
    """`Q(s, a)` of `critics` fully connected networks, side by side, on what one torso makes of the observations.

    The critics share the torso's weights and nothing else. Where actions have a box they are read relative to it.
    """

    middle: Tensor
    reach: Tensor

    def __init__(
        self,
        torso: nn.Module,
        size: int,
        *,
        widths: Sequence[int] = (256, 256),
        critics: int = 2,
        box: tuple[Any, Any] | None = None,
    ) -> None:
        """Make the critics.

        Args:
            torso: observations `[R, ...]` to features `[R, D]`.
            size: numbers in an action.
            widths: of each critic's layers.
            critics: how many; two are twin critics.
            box: bounds (low, high) of the actions, numbers or `[size]`, finite.

        Raises:
            ValueError: no critics, or bounds that are not finite or not in order.
        """
        super().__init__()
        low, high = (torch.as_tensor(b, dtype=torch.float32).expand(size) for b in ((-1, 1) if box is None else box))
        if critics < 1 or not bool((low < high).all() and (high - low).isfinite().all()):
            raise ValueError(
                f"QNetwork: critics={critics}, box from {low.tolist()} to {high.tolist()}; expected at least 1 critic, "
                "and finite bounds, low below high, or none (box=None)"
            )
        self.torso, self.critics = torso, critics
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("reach", (high - low) / 2)
        layers: list[nn.Module] = []
        sizes = [cast(int, torso.width) + size, *widths]
        for before, after in pairwise(sizes):
            layers += [ParallelLinear(critics, before, after, 2**0.5), nn.ReLU()]
        self.layers = nn.Sequential(*layers, ParallelLinear(critics, sizes[-1], 1, 1.0))

    @classmethod
    def for_spaces(
        cls,
        observations: spaces.Space[Any],
        actions: spaces.Space[Any],
        *,
        reads: Sequence[str] | None = None,
        widths: Sequence[int] = (256, 256),
        critics: int = 2,
    ) -> Self:
        """The critics that fit an environment's spaces (`EnvTask.spaces`).

        Args:
            observations, actions: of one copy; actions are a `Box` of numbers `[A]`.
            reads: of a table of observations, the entries that are read; all by default.
            widths, critics: see above.

        Raises:
            ValueError: a space that no torso fits, or actions that are not numbers within bounds.
        """
        if not isinstance(actions, spaces.Box) or len(actions.shape) != 1:
            raise ValueError(
                f"QNetwork: no critic for the actions {actions}; expected a Box of numbers [A]; discrete ones have a "
                "QPolicy"
            )
        torso = torso_for(observations, (), reads)
        return cls(torso, actions.shape[0], widths=widths, critics=critics, box=(actions.low, actions.high))

    def forward(self, observations: Observations, actions: Tensor) -> Tensor:
        """Values `[K, R]` of actions `[R, A]` at observations `[R, ...]`."""
        features = self.torso(observations)
        relative = (actions - self.middle) / self.reach
        both = torch.cat([features, relative], -1)
        values: Tensor
        if any(isinstance(layer, ParallelLinear) and large(both, layer.weight[0]) for layer in self.layers):
            values = self._one_by_one(both)
        else:
            values = self.layers(both.expand(self.critics, *both.shape))
        return values.squeeze(-1)

    def _one_by_one(self, both: Tensor) -> Tensor:
        """Of large products several at once cost more than one after the other; `[K, R, 1]`."""
        layers = [layer.apart() if isinstance(layer, ParallelLinear) else layer for layer in self.layers]
        values = []
        for critic in range(self.critics):
            rows = both
            for layer in layers:
                rows = product(rows, *layer[critic]) if isinstance(layer, list) else layer(rows)
            values.append(rows)
        return torch.stack(values)


class ParallelLinear(nn.Module):
    """`K` linear layers side by side, `[K, R, inputs]` to `[K, R, outputs]`; weights orthogonal, biases 0."""

    def __init__(self, count: int, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        made = [orthogonal(nn.Linear(inputs, outputs), gain) for _ in range(count)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in made]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in made]))

    def forward(self, rows: Tensor) -> Tensor:
        """`[K, R, outputs]`."""
        return torch.baddbmm(self.bias, rows, self.weight)

    def apart(self) -> list[tuple[Tensor, Tensor]]:
        """Weights `[outputs, inputs]` and biases `[outputs]` of each layer."""
        return [(weight.t(), bias) for weight, bias in zip(self.weight, self.bias.squeeze(1), strict=True)]


class ActionValues(nn.Module):
    """Features `[R, width]` to the values of `actions` discrete actions, `[R, A]`.

    With `dueling`, a value of the state and advantages that are 0 in the mean (Wang et al. 2016, eq. 9).
    """

    def __init__(self, width: int, actions: int, *, dueling: bool = False) -> None:
        super().__init__()
        self.advantages = orthogonal(nn.Linear(width, actions), 1.0)
        self.value = orthogonal(nn.Linear(width, 1), 1.0) if dueling else None

    def forward(self, features: Tensor) -> Tensor:
        """`[R, A]`."""
        values: Tensor = self.advantages(features)
        if self.value is None:
            return values
        return self.value(features) + values - values.mean(-1, keepdim=True)


class DiscreteCritics(nn.Module):
    """`Q(s, a)` of `critics` tables of discrete actions, on what one torso makes of the observations.

    It takes the place of a `QNetwork` where actions are numbers of actions.
    """

    def __init__(self, torso: nn.Module, actions: int, *, critics: int = 2, dueling: bool = False) -> None:
        """Make the critics; they share the torso's weights and nothing else. `ValueError` for none."""
        super().__init__()
        if critics < 1:
            raise ValueError(f"DiscreteCritics: critics={critics}; expected at least 1")
        width = cast(int, torso.width)
        self.torso = torso
        self.heads = nn.ModuleList(ActionValues(width, actions, dueling=dueling) for _ in range(critics))

    def forward(self, observations: Observations, actions: Tensor) -> Tensor:
        """Values `[K, R]` of actions int64 `[R]` at observations `[R, ...]`."""
        features, taken = self.torso(observations), actions.long()[:, None]
        return torch.stack([head(features).gather(1, taken).squeeze(1) for head in self.heads])
