"""Distillation of features: a member learns to say what a frozen one says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from regimen.functions.aggregate import Aggregate
from regimen.objectives.base import Batch, Objective

Distance = Literal["mse", "norm"]


def feature_distance(student: Tensor, teacher: Tensor, distance: Distance = "mse") -> Tensor:
    """How far features are from others: `"mse"`, the mean square over dimensions, or `"norm"`, the Euclidean distance.

    Args:
        student, teacher: `[R, D]`.
        distance: one of the above.

    Returns:
        `[R]`; the gradient of `"norm"` where both are equal is 0.

    Raises:
        ValueError: unequal shapes, or an unknown distance.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"feature_distance: student {list(student.shape)} and teacher {list(teacher.shape)} differ")
    check_distance("feature_distance", distance)
    apart = student - teacher
    return apart.square().mean(1) if distance == "mse" else apart.norm(dim=1)


@dataclass(frozen=True)
class FeatureDistillation(Objective):
    """Distance of a member's features from those of a frozen one, on the states of a rollout.

    With a random teacher it trains the predictor of a `RandomDistillationBonus`; `distance="norm"` is then
    what Henaff et al. (2023) minimise.

    Attributes:
        teacher, student: members of the cast, states `[R, ...]` to features `[R, D]`; the teacher gets no gradient.
        projection: member of the cast from the student's features to the teacher's width, where they differ.
        distance: see `feature_distance`.
        reads: the states: `"observations"`, or a side column `[B, T, ...]`. With `"hidden"`, teacher and student are
            policies, and features are the hidden states of their step distributions: what a policy knew before each
            step, at no further forward pass of the student.
        aggregate, horizon: how steps are weighted, see `aggregate_weights`.
    """

    teacher: str = "bonus_target"
    student: str = "bonus_predictor"
    projection: str | None = None
    distance: Distance = "mse"
    reads: str = "next_observations"
    aggregate: Aggregate = "token"
    horizon: int | None = None
    name: str = "feature_distillation"

    def __post_init__(self) -> None:
        check_distance("FeatureDistillation", self.distance)

    def loss(self, batch: Batch) -> Tensor:
        """Weighted sum of the distance per step."""
        mask = batch.rollout.loss_mask
        given, wanted = self._hidden(batch) if self.reads == "hidden" else self._features(batch)
        if self.projection is not None:
            given = batch.member(self.projection)(given)
        if given.shape != wanted.shape:
            raise ValueError(
                f"FeatureDistillation: student '{self.student}' gave features {list(given.shape)} and teacher "
                f"'{self.teacher}' {list(wanted.shape)}; name a projection to the teacher's width"
            )
        apart = feature_distance(given, wanted, self.distance)
        per_step = apart.new_zeros(mask.shape).masked_scatter(mask, apart)
        return (per_step * batch.weights(self.aggregate, self.horizon)).sum()

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What student and teacher make of the states that they are shown, `[R, D]` each."""
        rollout, mask = batch.rollout, batch.rollout.loss_mask
        states = (rollout.observations if self.reads == "observations" else rollout[self.reads])[mask]
        with torch.no_grad():
            wanted = batch.member(self.teacher)(states)
        return batch.member(self.student)(states), wanted

    def _hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The hidden states of student and teacher, `[R, D]` each."""
        given, wanted = (batch.distribution(member).hidden for member in (self.student, self.teacher))  # type: ignore[attr-defined]
        return batch.steps.of(given), batch.steps.of(wanted).detach()


def check_distance(owner: str, distance: str) -> None:
    """Raise `ValueError` for a distance that there is not."""
    if distance not in get_args(Distance):
        raise ValueError(f"{owner}: distance '{distance}' is not one of {', '.join(get_args(Distance))}")
