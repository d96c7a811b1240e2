"""Offline control without actions outside the data: an implicit maximiser, and a policy weighted by advantages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.functions.aggregate import mean_of
from regimen.objectives.base import Batch, Objective


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """`|expectile - 1[x < 0]| x^2`, any shape: least where the value is that expectile of its targets.

    Args:
        difference: target minus value.
        expectile: in (0, 1); 0.5 is half of the squared error, whose minimum is the mean, and near 1 it is the maximum.

    Raises:
        ValueError: an expectile outside (0, 1).
    """
    if not 0 < expectile < 1:
        raise ValueError(f"expectile_loss: expectile is {expectile}, expected between 0 and 1")
    return (expectile - (difference < 0).to(difference.dtype)).abs() * difference.square()


@dataclass(frozen=True)
class ImplicitValueObjective(Objective):
    """Draws `V(s)` to an upper expectile of `Q(s, a)` over the recorded actions (IQL, Kostrikov et al. 2022, eq. 5).

    That is nearly the best that the data do in a state, and asks the critic of no action that they do not hold.

    Attributes:
        expectile: see `expectile_loss`.
        value: member that is trained, `value(rollout) -> [B, T]`.
        critic: member, `critic(observations [R, ...], actions [R, ...]) -> [K, R]`, of which the least is taken.
    """

    expectile: float = 0.9
    value: str = "value"
    critic: str = "critic_target"
    name: str = "implicit_value"

    def __post_init__(self) -> None:
        if not 0 < self.expectile < 1:
            raise ValueError(f"ImplicitValueObjective: expectile is {self.expectile}, expected between 0 and 1")

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the steps that are learned from; metric `value_mean`."""
        values = batch.steps.of(batch.member(self.value)(batch.rollout))
        least = recorded_value(batch, self.critic, type(self).__name__)
        loss = batch.aggregated(expectile_loss(least - values, self.expectile), "token")
        return loss, {"value_mean": mean_of(values.detach())}


@dataclass(frozen=True)
class AdvantageWeightedObjective(Objective):
    """Likelihood of the recorded actions, weighted by `exp(inverse_temperature (Q - V))` (IQL, eq. 7).

    Attributes:
        inverse_temperature: 0 is behaviour cloning; the larger, the more the best actions count.
        max_weight: weights are cut off at it.
        policy: member that is trained.
        value, critic: members as in `ImplicitValueObjective`, without a gradient.
    """

    inverse_temperature: float = 3.0
    max_weight: float = 100.0
    policy: str = "policy"
    value: str = "value"
    critic: str = "critic_target"
    name: str = "advantage_weighted"

    def __post_init__(self) -> None:
        if self.inverse_temperature < 0 or self.max_weight <= 0:
            raise ValueError(
                f"AdvantageWeightedObjective: inverse_temperature={self.inverse_temperature}, "
                f"max_weight={self.max_weight}; expected at least 0, and above 0"
            )

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the steps that are learned from; metrics `weight_mean` and `weight_capped`, the share cut off."""
        with torch.no_grad():
            values = batch.steps.of(batch.member(self.value)(batch.rollout))
            advantage = recorded_value(batch, self.critic, type(self).__name__) - values
            free = (self.inverse_temperature * advantage).exp()
        weights = free.clamp(max=self.max_weight)
        logprob = batch.steps.of(batch.distribution(self.policy).logprob)
        capped = (free > self.max_weight).to(weights.dtype)
        metrics = {"weight_mean": mean_of(weights), "weight_capped": mean_of(capped)}
        return batch.aggregated(-weights * logprob, "token"), metrics


@torch.no_grad()
def recorded_value(batch: Batch, critic: str, owner: str) -> Tensor:
    """`[R]`: what the least of some critics gives to the recorded actions at the steps that are learned from."""
    actions = batch.require("actions", owner, "give transitions with actions")
    values: Tensor = batch.member(critic)(batch.steps.of(batch.rollout.observations), batch.steps.of(actions))
    return values.amin(0)
