"""How often a question is answered well: what difficulty filters and writers of questions go by."""

from __future__ import annotations

import torch
from torch import Tensor


def pass_rate(rewards: Tensor, group: Tensor) -> Tensor:
    """The mean reward of every group's answers, `[G]`, in the order of the groups' numbers.

    Args:
        rewards: `[B]`, in [0, 1] for a rate.
        group: int64 `[B]`, equal for answers to the same question.

    Raises:
        ValueError: other shapes.
    """
    if rewards.ndim != 1 or rewards.shape != group.shape:
        raise ValueError(f"pass_rate: rewards {list(rewards.shape)} and group {list(group.shape)}, expected [B] twice")
    distinct, place, count = group.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(distinct), dtype=rewards.dtype, device=rewards.device)
    return total.index_add_(0, place, rewards) / count
