"""Regression: what a policy would most likely do is drawn to what was done."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regimen.functions.aggregate import Aggregate
from regimen.objectives.base import Batch, Objective
from regimen.objectives.distillation import Distance, check_distance, feature_distance


@dataclass(frozen=True)
class RegressionObjective(Objective):
    """Distance of a policy's likeliest action from the recorded one, for actions that are vectors of numbers.

    Unlike the likelihood of `SFTObjective` it does not ask how sure the policy is.

    Attributes:
        distance: `"mse"`, the mean square over an action's dimensions, or `"norm"`, the Euclidean distance.
        member: an `ActionPolicy` or a forecaster.
        aggregate, horizon: how steps are weighted, see `aggregate_weights`.
    """

    distance: Distance = "mse"
    member: str = "policy"
    aggregate: Aggregate = "token"
    horizon: int | None = None
    name: str = "regression"

    def __post_init__(self) -> None:
        check_distance("RegressionObjective", self.distance)

    def loss(self, batch: Batch) -> Tensor:
        """Weighted sum of the distance per step."""
        described = getattr(batch.distribution(self.member), "described", None)
        actions = batch.require("actions", "RegressionObjective", "give rows with actions")
        if described is None or not actions.is_floating_point():
            raise ValueError(
                f"RegressionObjective: member '{self.member}' ({type(batch.member(self.member)).__name__}) takes "
                f"actions of type {actions.dtype}; expected a policy whose actions are vectors of numbers. Raise the "
                "likelihood with SFTObjective"
            )
        per_step = feature_distance(described.mode(), batch.steps.of(actions), self.distance)
        return batch.aggregated(per_step, self.aggregate, self.horizon)
