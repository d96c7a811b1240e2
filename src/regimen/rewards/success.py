"""Whether episodes succeeded, at whatever step."""

from __future__ import annotations

import torch
from torch import Tensor

from regimen.rewards.base import Reward, Scene
from regimen.rewards.states import starts_of
from regimen.rollout import Rollout


def success_share(flags: Tensor, starts: Tensor, mask: Tensor) -> Tensor:
    """The share of a sample's episodes that succeed at any of their steps (Meta-World, section 4.3).

    Args:
        flags: `[B, T]`, above 0 where a step succeeds.
        starts: bool `[B, T]`, steps that begin an episode; one that is under way at a sample's first step counts too.
        mask: bool `[B, T]`, steps that exist.

    Returns:
        `[B]`, 0 of a sample without steps.
    """
    episode = (starts & mask).cumsum(1) - (starts & mask)[:, :1].long()
    count = torch.where(mask, episode, 0).amax(1) + 1
    found = torch.zeros(len(flags), int(count.max()) if len(count) else 0, dtype=torch.float32, device=flags.device)
    found.scatter_reduce_(1, episode, ((flags > 0) & mask).float(), "amax")
    return found.sum(1) / count


class SuccessReward(Reward):
    """`success_share` of what the environment told, `[B]`: the success rate that a controller may read.

    To log it without learning from it, add `SuccessReward().logged()`.
    """

    def __init__(self, column: str = "success", name: str = "success") -> None:
        """`column` is where the environment's word stands, `[B, T]`; `name` that of the component."""
        self.column, self.name = column, name

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """The shares."""
        return success_share(rollout[self.column], starts_of(rollout), rollout.mask)
