"""Group-relative credit: a sample is as good as it is better than its siblings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.rollout import Rollout

Spread = Literal["group", "batch", "task"]


def group_relative(
    rewards: Tensor,
    group: Tensor,
    *,
    std: Literal["group", "batch"] | None = "group",
    ddof: int = 1,
    eps: float = 1e-4,
    include: Tensor | None = None,
) -> Tensor:
    """Advantages `(R - mean of its group) / (std + eps)` (GRPO, Shao et al. 2024, section 4.1.2).

    Args:
        rewards: `[B]`.
        group: int64 `[B]`, equal for siblings.
        std: deviation of the `"group"` or of the whole `"batch"` (Flow-GRPO's global std), or `None` to leave
            the difference unscaled (Dr. GRPO).
        ddof: 1 for the sample deviation, 0 for the population's.
        eps: added to the deviation.
        include: bool `[B]`; samples left out count nowhere and get 0. All by default.

    Returns:
        `[B]`. A group of which one sample is left gets 0.

    Raises:
        ValueError: unequal shapes, an unknown setting, or every group has a single sample.
    """
    if rewards.ndim != 1 or rewards.shape != group.shape:
        raise ValueError(f"group_relative: rewards {list(rewards.shape)} and group {list(group.shape)}, expected [B]")
    _check_settings("group_relative", std, ("group", "batch"), ddof, eps)
    include = torch.ones_like(group, dtype=torch.bool) if include is None else include
    _, index = group.unique(return_inverse=True)
    groups = int(index.max()) + 1 if len(index) else 0
    if groups and groups == len(index):
        raise ValueError(
            f"group_relative: all {groups} groups have one sample, so nothing is relative to anything; "
            "ask the task for group_size >= 2, or use a credit with a learned or running baseline"
        )
    weight = include.to(rewards.dtype)
    count = _sums(weight, index, groups)
    # Taken from the group's smallest, so that equal rewards give exactly 0 and not a rounding error over eps.
    low = torch.full_like(count, torch.inf).scatter_reduce(0, index, torch.where(include, rewards, torch.inf), "amin")
    above = torch.where(include, rewards - low[index], 0)
    centred = (above - (_sums(above, index, groups) / count.clamp(min=1))[index]) * weight
    if std is None:
        return centred
    if std == "batch":
        total = weight.sum().clamp(min=1)
        around = torch.where(include, rewards - torch.where(include, rewards, 0).sum() / total, 0)
        return centred / ((around.square().sum() / (total - ddof).clamp(min=1)).sqrt() + eps)
    variance = _sums(centred.square(), index, groups) / (count - ddof).clamp(min=1)
    return centred / (variance.sqrt()[index] + eps)


def _check_settings(owner: str, std: str | None, known: tuple[str, ...], ddof: int, eps: float) -> None:
    if std not in (None, *known):
        raise ValueError(f"{owner}: std '{std}' is not one of {', '.join(known)}, None")
    if ddof not in (0, 1) or eps < 0:
        raise ValueError(f"{owner}: ddof={ddof}, eps={eps}; expected ddof 0 or 1 and eps >= 0")


def _sums(values: Tensor, index: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=values.dtype, device=values.device).index_add_(0, index, values)


@dataclass(frozen=True)
class GroupRelativeAdvantage:
    """Group-relative advantages, copied to every step of a sample; see `group_relative`.

    A reward per step is summed over the steps first. `clip` bounds the advantages on both sides.

    `std="task"` is `"batch"` for each task by itself: demonstrations that are judged in the same batch, or tasks with
    rewards of other sizes, would otherwise count in the deviation.
    """

    std: Spread | None = "group"
    ddof: int = 1
    eps: float = 1e-4
    clip: float | None = None

    def __post_init__(self) -> None:
        _check_settings("GroupRelativeAdvantage", self.std, get_args(Spread), self.ddof, self.eps)
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"GroupRelativeAdvantage: clip is {self.clip}, expected above 0")

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """It reads none."""
        return ()

    def __call__(self, rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
        """The rollout with `advantages [B, T]`; samples that left the loss count nowhere."""
        if rollout.reward is None:
            raise ValueError("GroupRelativeAdvantage: the rollout has no reward; give the stage a reward that trains")
        total = rollout.reward if rollout.reward.ndim == 1 else (rollout.reward * rollout.mask).sum(1)
        advantage = self._relative(total, rollout)
        if self.clip is not None:
            advantage = advantage.clamp(-self.clip, self.clip)
        return rollout.replace(advantages=advantage[:, None] * rollout.loss_mask)

    def _relative(self, total: Tensor, rollout: Rollout) -> Tensor:
        """`[B]`, of sums `[B]`."""
        relative = partial(group_relative, total, rollout.group, ddof=self.ddof, eps=self.eps)
        include = rollout.loss_mask.any(1)
        if self.std != "task":
            return relative(std=self.std, include=include)
        apart = [include & (rollout.task == task) for task in range(len(rollout.task_names))]
        # What is left out gets 0, so the tasks add up.
        return torch.stack([relative(std="batch", include=rows) for rows in apart]).sum(0)
