"""From features to a distribution over actions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regimen.models.torsos import orthogonal
from regimen.policies.distributions import Categorical, Gaussian, SquashedGaussian


class CategoricalHead(nn.Module):
    """Features to one of `actions`."""

    def __init__(self, width: int, actions: int, gain: float = 0.01) -> None:
        super().__init__()
        self.logits = orthogonal(nn.Linear(width, actions), gain)

    def forward(self, features: Tensor, temperature: Tensor | float = 1.0) -> Categorical:
        """Logits divided by the temperature."""
        return self.described([layer(features) for layer in self.outputs], temperature)

    @property
    def outputs(self) -> list[nn.Linear]:
        """What gives the logits."""
        return [self.logits]

    def described(self, outputs: list[Tensor], temperature: Tensor | float = 1.0) -> Categorical:
        """By the logits."""
        (logits,) = outputs
        return Categorical(logits if _is_one(temperature) else logits / temperature)


class GaussianHead(nn.Module):
    """Features to a Gaussian over `size` numbers; its deviation is a parameter, or depends on the features."""

    low: Tensor
    high: Tensor

    def __init__(
        self,
        width: int,
        size: int,
        *,
        log_std: float = 0.0,
        learned_std: bool = False,
        box: tuple[Any, Any] | None = None,
        gain: float = 0.01,
    ) -> None:
        """Make the head.

        Args:
            width: of the features.
            size: of an action.
            log_std: at the start, the logarithm of the deviation.
            learned_std: the deviation depends on the features, with its logarithm kept in [-5, 2].
            box: bounds (low, high), numbers or `[size]`, that actions are squashed into; by default they have none.
            gain: of the mean's weights.

        Raises:
            ValueError: bounds that are not finite, or not in order.
        """
        super().__init__()
        self.mean, self.squash = orthogonal(nn.Linear(width, size), gain), box is not None
        if box is not None:
            low, high = (torch.as_tensor(bound, dtype=torch.float32).expand(size).clone() for bound in box)
            if not bool((low < high).all() and (high - low).isfinite().all()):
                raise ValueError(
                    f"GaussianHead: actions are squashed into the box from {low.tolist()} to {high.tolist()}; expected "
                    "finite bounds, low below high; leave the box out, or bound the environment's actions"
                )
            self.register_buffer("low", low)
            self.register_buffer("high", high)
        self.scale = orthogonal(nn.Linear(width, size), gain) if learned_std else None
        if self.scale is None:
            self.log_std = nn.Parameter(torch.full((size,), log_std))
        else:
            nn.init.constant_(self.scale.bias, log_std)

    def forward(self, features: Tensor, temperature: Tensor | float = 1.0) -> Gaussian | SquashedGaussian:
        """The deviation is multiplied by the temperature."""
        return self.described([layer(features) for layer in self.outputs], temperature)

    @property
    def outputs(self) -> list[nn.Linear]:
        """What gives the mean, and the logarithm of the deviation where that depends on the features."""
        return [self.mean] if self.scale is None else [self.mean, self.scale]

    def described(self, outputs: list[Tensor], temperature: Tensor | float = 1.0) -> Gaussian | SquashedGaussian:
        """By these."""
        mean, *scale = outputs
        log_std = scale[0].clamp(-5, 2) if scale else self.log_std
        std = log_std.exp().expand_as(mean)
        std = std if _is_one(temperature) else std * temperature
        return SquashedGaussian(mean, std, self.low, self.high) if self.squash else Gaussian(mean, std)


def _is_one(temperature: Tensor | float) -> bool:
    """Whether there is nothing to divide by, for sure."""
    return not isinstance(temperature, Tensor) and temperature == 1
