"""The judge step: a reward's answer written into the rollout, with the three outcomes counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regimen.rewards.base import FAILED, NOT_APPLICABLE, SCORED, Expression, Scene, Score, all_finite
from regimen.rollout import Rollout


@dataclass(frozen=True)
class JudgeReport:
    """What happened while judging.

    Attributes:
        counts: per (task, component), how many samples were scored, not applicable, failed.
        failed: samples that leave training because a component that trains failed.
        errors: first reasons, one line each.
    """

    counts: dict[tuple[str, str], tuple[int, int, int]]
    failed: int
    errors: tuple[str, ...]


@torch.no_grad()
def judge(reward: Expression, rollout: Rollout, scene: Scene) -> tuple[Rollout, JudgeReport]:
    """The rollout with raw components, their status and the total; unscored samples leave the loss.

    `rewards` holds NaN where a component did not score; `reward` is the total that credit consumes, 0 where
    there is none, and such samples have `loss_mask` False, so that they leave their group. No gradient is kept:
    an objective that trains through a judge asks it itself.
    """
    answer = reward.judge(rollout, replace(scene, _answers={}))
    rewards = {name: _raw(score) for name, score in answer.components.items()}
    status = {name: score.status for name, score in answer.components.items()}
    errors = tuple(dict.fromkeys(error for score in answer.components.values() for error in score.errors))
    trained: dict[str, Any] = {}
    failed = 0
    if answer.total is not None:
        total = _finite(answer.total, rollout)
        scored = (total.status == SCORED)[:, None]
        trained = {"reward": torch.where(total.scored, total.value, 0), "loss_mask": rollout.loss_mask & scored}
        failed, errors = int((total.status == FAILED).sum()), (*errors, *total.errors)
    judged = rollout.replace(rewards=rewards, status=status, **trained)
    return judged, JudgeReport(_counts(rollout, status), failed, errors[:5])


def _finite(total: Score, rollout: Rollout) -> Score:
    """The total with the samples failed whose components are finite and together are not."""
    if all_finite(total.value):
        return Score(total.value, total.status)
    value = total.value if total.value.ndim == 1 else torch.where(rollout.mask, total.value, 0).sum(1)
    bad = ~value.isfinite() & (total.status == SCORED)
    if not bool(bad.any()):
        return Score(total.value, total.status)
    first = int(bad.nonzero()[0])
    why = f"the total of sample {first} is {float(value[first])}: its components are finite, together they are not"
    return Score(total.value, torch.where(bad, FAILED, total.status).to(torch.uint8), (why,))


def _raw(score: Score) -> Tensor:
    return torch.where(score.scored, score.value, torch.nan)


def _counts(rollout: Rollout, outcomes: Mapping[str, Tensor]) -> dict[tuple[str, str], tuple[int, int, int]]:
    counts, tasks = {}, len(rollout.task_names)
    for component, status in outcomes.items():
        table = torch.bincount(3 * rollout.task + status, minlength=3 * tasks).view(tasks, 3).tolist()
        for task, row in zip(rollout.task_names, table, strict=True):
            counts[task, component] = (row[SCORED], row[NOT_APPLICABLE], row[FAILED])
    return counts
