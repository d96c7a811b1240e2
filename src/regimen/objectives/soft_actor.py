"""Soft actor-critic: a policy that seeks what its critic values and keeps its entropy, and the price of entropy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from regimen.functions.aggregate import mean_of
from regimen.knobs import Knob
from regimen.objectives.base import Batch, Objective

EntropyWeight: TypeAlias = Knob | float | str
"""A number (the default of the knob `entropy_weight`), a knob, or the name of the member that learns it."""


@dataclass(frozen=True)
class SoftActorObjective(Objective):
    """`entropy_weight * log pi(a|s) - min_k Q_k(s, a)` of actions that the policy proposes (Haarnoja et al. 2018).

    The gradient goes through the proposed action into the policy; the critic is left as it is. With
    `entropy_weight=0` it is the deterministic policy gradient (Silver et al. 2014) with the policy's noise.

    Attributes:
        policy: member that is trained, `policy.propose(observations, rng) -> (actions [R, ...], logprob [R])`.
        critic: member, `critic(observations, actions) -> [K, R]`.
        entropy_weight: as that of `TDObjective`.
    """

    policy: str = "policy"
    critic: str = "critic"
    entropy_weight: EntropyWeight = 0.0
    name: str = "actor"

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The weight of entropy, if it is one."""
        return entropy_knobs(self.entropy_weight)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the steps that are learned from; metric `entropy`, minus the mean log-probability."""
        actions, logprob = batch.proposal(self.policy)
        critic = batch.member(self.critic)
        with closed(critic):
            value = critic(batch.steps.of(batch.rollout.observations), actions).amin(0)
        cost = entropy_cost(batch, self.entropy_weight, logprob)
        loss = batch.aggregated(cost - value, "token")
        return loss, {} if logprob is None else {"entropy": -mean_of(logprob.detach())}


@dataclass(frozen=True)
class TemperatureObjective(Objective):
    """Learns the weight of entropy, so that the policy's entropy is what it should be (Haarnoja et al. 2018b, eq. 18).

    `-log alpha (log pi(a|s) + target)`: above the target, entropy gets cheaper, below it dearer.

    Attributes:
        member: the `Temperature` that is trained.
        policy: member that proposes actions.
        target_entropy: in nats, of actions squashed into (-1, 1) whatever their box; minus the number of an action's
            dimensions by default.
    """

    member: str = "temperature"
    policy: str = "policy"
    target_entropy: float | None = None
    name: str = "temperature"

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the steps that are learned from; metric `entropy_weight`."""
        actions, logprob = batch.proposal(self.policy)
        if logprob is None:
            raise ValueError(
                f"TemperatureObjective: policy '{self.policy}' proposes actions without log-probabilities and so has "
                "no entropy to keep; leave the objective out"
            )
        target = -float(actions[0].numel()) if self.target_entropy is None else self.target_entropy
        log_weight = batch.steps.of_rows(batch.member(self.member).log_of(batch.rollout))
        loss = batch.aggregated(-log_weight * (logprob.detach() + target), "token")
        return loss, {"entropy_weight": mean_of(log_weight.detach().exp())}


def entropy_knobs(weight: EntropyWeight) -> tuple[Knob, ...]:
    """The knob that a weight of entropy is: none if a member learns it, or if it is 0 for good."""
    if isinstance(weight, str) or weight == 0:
        return ()
    return (weight if isinstance(weight, Knob) else Knob("entropy_weight", weight, 0.0),)


def entropy_cost(batch: Batch, weight: EntropyWeight, logprob: Tensor | None) -> Tensor | float:
    """The weight in force times the log-probability, `[R]`, of the steps that are learned from; 0 without a weight.

    No gradient flows into the weight.

    Raises:
        ValueError: there is a weight and no log-probability.
    """
    knobs = entropy_knobs(weight)
    if not knobs and not isinstance(weight, str):
        return 0.0
    if logprob is None:
        raise ValueError(
            "entropy is weighted, and the policy proposes actions without log-probabilities; use entropy_weight=0"
        )
    if isinstance(weight, str):
        return logprob * batch.steps.of_rows(batch.member(weight)(batch.rollout).detach())
    return logprob * batch.knobs[knobs[0].name]


@contextmanager
def closed(module: nn.Module) -> Iterator[None]:
    """Gradients flow through a module, and none into it."""
    open_ = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in open_:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in open_:
            parameter.requires_grad_(True)
