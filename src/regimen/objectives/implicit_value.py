"""Offline control without actions outside the data: an implicit maximiser, and a policy weighted by advantages."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from regimen.functions.aggregate import mean_of
from regimen.objectives.base import Batch, Objective
from regimen.objectives.maximisers import Expectile, Maximiser


@dataclass(frozen=True)
class ImplicitValueObjective(Objective):
    """Draws `V(s)` up among the `Q(s, a)` of the recorded actions, by an implicit maximiser.

    That is nearly the best that the data do in a state, and asks the critic of no action that they do not hold. With an
    `Expectile` it is IQL's (Kostrikov et al. 2022, eq. 5), with a `Gumbel` XQL's, with `TotalVariation` or `ChiSquare`
    f-DVL's (Sikchi et al. 2024, eq. 10).

    Attributes:
        f: the maximiser.
        value: member that is trained, `value(rollout) -> [B, T]`.
        critic: member, `critic(observations [R, ...], actions [R, ...]) -> [K, R]`, of which the least is taken.
    """

    f: Maximiser = field(default_factory=Expectile)
    value: str = "value"
    critic: str = "critic_target"
    name: str = "implicit_value"

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the steps that are learned from; metrics `value_mean`, and `value_exceeded`: steps with Q > V."""
        values = batch.steps.of(batch.member(self.value)(batch.rollout))
        batch.once(_name(self.value), values.detach)
        difference = recorded_value(batch, self.critic, type(self).__name__) - values
        loss = batch.aggregated(self.f(difference), "token")
        exceeded = (difference > 0).to(values.dtype)
        return loss, {"value_mean": mean_of(values.detach()), "value_exceeded": mean_of(exceeded)}


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
        values = batch.once(_name(self.value), lambda: batch.steps.of(batch.member(self.value)(batch.rollout)))
        advantage = recorded_value(batch, self.critic, type(self).__name__) - values
        free = (self.inverse_temperature * advantage).exp()
        weights = free.clamp(max=self.max_weight)
        logprob = batch.steps.of(batch.distribution(self.policy).logprob)
        capped = (free > self.max_weight).to(weights.dtype)
        metrics = {"weight_mean": mean_of(weights), "weight_capped": mean_of(capped)}
        return batch.aggregated(-weights * logprob, "token"), metrics


def recorded_value(batch: Batch, critic: str, owner: str) -> Tensor:
    """`[R]`: what the least of some critics gives to the recorded actions at the steps that are learned from.

    Computed once for all objectives, without a gradient.
    """
    actions = batch.require("actions", owner, "give transitions with actions")

    def least() -> Tensor:
        values: Tensor = batch.member(critic)(batch.steps.of(batch.rollout.observations), batch.steps.of(actions))
        return values.amin(0)

    return batch.once(f"recorded value of {critic}", least)


def _name(value: str) -> str:
    """Of what the member gives to the observations, among what is computed once."""
    return f"values of {value}"
