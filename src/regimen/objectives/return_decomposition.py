"""Return decomposition: contributions of steps that add up to the final reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.objectives.base import Batch, Objective


def return_decomposition_loss(contributions: Tensor, final: Tensor, mask: Tensor) -> Tensor:
    """`(sum_i c_i - R)^2` per sample, `[B]`, in float32 or better (Arjona-Medina et al. 2019; SPA-RL, 2025, eq. 4).

    Args:
        contributions: `[B, T]`; those at steps that do not exist count nowhere.
        final: `[B]`, the reward of the whole sample.
        mask: bool `[B, T]`, steps that exist.

    Raises:
        ValueError: unequal shapes.
    """
    if contributions.shape != mask.shape or final.shape != mask.shape[:1]:
        raise ValueError(
            f"return_decomposition_loss: contributions {list(contributions.shape)}, final {list(final.shape)} and mask "
            f"{list(mask.shape)}, expected [B, T], [B], [B, T]"
        )
    wide = torch.promote_types(contributions.dtype, torch.float32)
    return (torch.where(mask, contributions, 0).sum(1, dtype=wide) - final).square()


@dataclass(frozen=True)
class ReturnDecompositionObjective(Objective):
    """Squared distance of a sample's summed contributions from its reward, mean over samples.

    Attributes:
        member: the estimator, `member(rollout) -> [B, T]`.
    """

    member: str = "estimator"
    name: str = "decomposition"

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the minibatch's samples."""
        reward = batch.require("reward", "ReturnDecompositionObjective", "give the stage that collects a reward")
        mask = batch.rollout.mask
        final = reward if reward.ndim == 1 else torch.where(mask, reward, 0).sum(1)
        each = return_decomposition_loss(batch.member(self.member)(batch.rollout), final, mask)
        return each.mean() * batch.share if len(each) else each.sum()
