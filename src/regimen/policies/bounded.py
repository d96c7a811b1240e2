"""A head for actions within bounds whose noise is not squashed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regimen.models.torsos import orthogonal
from regimen.policies.distributions import Gaussian


class BoundedMeanHead(nn.Module):
    """Features to a Gaussian of fixed deviation whose mean is squashed into a box.

    Its density is finite on the border of the box, where a `SquashedGaussian`'s is not: for likelihoods of recorded
    actions that were clipped.
    """

    middle: Tensor
    reach: Tensor

    def __init__(
        self, width: int, size: int, *, box: tuple[Any, Any] = (-1.0, 1.0), std: float = 0.2, gain: float = 0.01
    ) -> None:
        """Make the head.

        Args:
            width: of the features.
            size: of an action.
            box: bounds (low, high), numbers or `[size]`.
            std: the deviation, relative to half of the box.
            gain: of the mean's weights.

        Raises:
            ValueError: bounds that are not finite or not in order, or a deviation that is not positive.
        """
        super().__init__()
        low, high = (torch.as_tensor(bound, dtype=torch.float32).expand(size) for bound in box)
        if std <= 0 or not bool((low < high).all() and (high - low).isfinite().all()):
            raise ValueError(
                f"BoundedMeanHead: box from {low.tolist()} to {high.tolist()}, std={std}; expected finite bounds, low "
                "below high, and a deviation above 0"
            )
        self.mean, self.std = orthogonal(nn.Linear(width, size), gain), std
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("reach", (high - low) / 2)

    def forward(self, features: Tensor, temperature: Tensor | float = 1.0) -> Gaussian:
        """The deviation is multiplied by the temperature."""
        mean = self.middle + self.reach * self.mean(features).tanh()
        return Gaussian(mean, (self.std * self.reach * temperature).expand_as(mean))
