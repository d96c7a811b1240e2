"""Imitation from observation: how well a sample's frames can be moved onto those of a demonstration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from regimen.functions.transport import transport_rewards
from regimen.models.frame_costs import FrameCosts
from regimen.rewards.base import Reward, Scene
from regimen.rollout import Rollout

# What an entropy alone may cost a sample that is its demonstration.
_NOTHING = 1e-6


class OptimalTransportReward(Reward):
    """What each step pays when a whole sample is transported onto a demonstration, `[B, T]`, at most 0.

    Of several demonstrations that which costs the sample least is taken. With `scale="auto"` rewards are multiplied by
    one number for all of training, such that the first sample's add up to `-scale_target` (Haldar et al. 2022; Liu et
    al. 2024); a sample that costs nothing does not set it. See `sinkhorn` for epsilon and iterations.
    """

    def __init__(
        self,
        costs: FrameCosts,
        *,
        epsilon: float = 0.01,
        iterations: int = 100,
        scale: float | Literal["auto"] = "auto",
        scale_target: float = 10.0,
        name: str = "transport",
    ) -> None:
        """Make the reward.

        Raises:
            ValueError: a scale that is not positive.
        """
        if (scale != "auto" and scale <= 0) or scale_target <= 0:
            raise ValueError(
                f"OptimalTransportReward: scale={scale!r}, scale_target={scale_target}; expected 'auto' or above 0, "
                "and above 0"
            )
        self.costs, self.epsilon, self.iterations, self.name = costs, epsilon, iterations, name
        self.scale, self.scale_target = scale, scale_target
        self.stateful = scale == "auto"
        self._scale = None if scale == "auto" else float(scale)

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """The rewards at the steps that are learned from, 0 elsewhere.

        Raises:
            ValueError: a sample is longer or shorter than the demonstrations, or a cost is not finite.
        """
        paid = transport_rewards(self.costs.of(rollout), self.epsilon, self.iterations)
        best = paid.sum(-1).argmax(1)
        paid = paid[torch.arange(len(paid), device=paid.device), best] * self._scaled(paid, best)
        return paid.new_zeros(rollout.mask.shape).masked_scatter(rollout.loss_mask, paid)

    def _scaled(self, paid: Tensor, best: Tensor) -> float:
        """The factor; the first sample that pays anything sets it."""
        if self._scale is None:
            totals = paid.sum(-1).gather(1, best[:, None]).squeeze(1)
            costly = totals[totals < -_NOTHING]
            if not len(costly):
                return 1.0
            self._scale = self.scale_target / -float(costly[0])
        return self._scale

    def save_state(self) -> dict[str, Any]:
        """The scale, once it is set."""
        return {"scale": self._scale}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with it."""
        self._scale = state["scale"]
