"""Temporal differences: a critic of states and actions is drawn towards the next rewards and a target's value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from regimen.functions.aggregate import mean_of
from regimen.knobs import Knob
from regimen.objectives.base import Batch, Objective
from regimen.objectives.look_ahead import LookAhead, discount_knobs, look_ahead
from regimen.objectives.soft_actor import EntropyWeight, entropy_cost, entropy_knobs

Distance = Literal["mse", "huber"]


def td_loss(values: Tensor, target: Tensor, distance: Distance = "mse", delta: float = 1.0) -> Tensor:
    """Distance of the values of `K` critics from one target, summed over critics; `[R]`.

    `"mse"` is `x^2`; `"huber"` is `x^2 / 2` up to `|x| = delta` and `delta (|x| - delta / 2)` beyond (Huber 1964).

    Args:
        values: `[K, R]`; target: `[R]`.
        distance, delta: see above.

    Raises:
        ValueError: other shapes, an unknown distance, or a delta that is not positive.
    """
    if values.ndim != 2 or values.shape[1:] != target.shape or distance not in get_args(Distance) or delta <= 0:
        raise ValueError(
            f"td_loss: values {list(values.shape)}, target {list(target.shape)}, distance '{distance}', delta={delta}; "
            f"expected [K, R] and [R], one of {', '.join(get_args(Distance))}, and delta > 0"
        )
    wide = target.expand_as(values)
    if distance == "mse":
        return (values - wide).square().sum(0)
    return huber_loss(values, wide, reduction="none", delta=delta).sum(0)


@dataclass(frozen=True)
class TDObjective(Objective):
    """Draws the critics `Q(s, a)` towards `R + D v`: the next `n` rewards and the value after them.

    `v` is the least that the target's critics give to an action that the policy proposes there (clipped double
    Q-learning, Fujimoto et al. 2018), less `entropy_weight` times the action's log-probability (Haarnoja et al. 2018,
    eq. 3); or, without a policy, the target's value of the state (as of an implicit maximiser). The loss is the mean
    over steps of the distance, summed over critics, see `td_loss`.

    Attributes:
        critic: member that is trained, `critic(observations [R, ...], actions [R, ...]) -> [K, R]`.
        target: member of the same form, usually `ReferenceRefresh("critic_target", of="critic", mode="ema",
            decay=0.995)`; without a policy, one that gives values to states, `target(rollout) -> [B, T]`.
        policy: member that proposes actions, `policy.propose(observations, rng) -> (actions, logprob)`, or `None`.
        entropy_weight: a number (the default of a knob of that name), a knob, or the member that learns it (see
            `TemperatureObjective`).
        n: rewards summed; samples must hold the steps, see `ReplayMemory(ahead=n - 1)`.
        discount: multiplied to the recorded one: a number (the default of a knob of that name) or a knob. `None` if
            the task records it and it does not move.
        distance, delta: see `td_loss`.
    """

    critic: str = "critic"
    target: str = "critic_target"
    policy: str | None = "policy"
    entropy_weight: EntropyWeight = 0.0
    n: int = 1
    discount: Knob | float | None = None
    distance: Distance = "mse"
    delta: float = 1.0
    name: str = "td"

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The discount and the weight of entropy, where they are knobs."""
        return (*discount_knobs(self.discount), *entropy_knobs(self.entropy_weight))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the distance per step; metrics `q_mean` and `td_error` (mean size)."""
        ahead = look_ahead(batch, type(self).__name__, self.n, self.discount)
        target = ahead.total + ahead.factor * self._value_after(batch, ahead)
        values: Tensor = batch.member(self.critic)(ahead.observations, ahead.actions)
        return regressed(batch, values, target, self.distance, self.delta)

    @torch.no_grad()
    def _value_after(self, batch: Batch, ahead: LookAhead) -> Tensor:
        """`[R]`."""
        after, target = ahead.next_observations, batch.member(self.target)
        if self.policy is None:
            values: Tensor = target(_Seen(after.unsqueeze(1)))
            return values.squeeze(1)
        actions, logprob = batch.member(self.policy).propose(after, batch.rng)
        least: Tensor = target(after, actions).amin(0)
        return least - entropy_cost(batch, self.entropy_weight, logprob)


def regressed(
    batch: Batch, values: Tensor, target: Tensor, distance: Distance, delta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over steps of `td_loss`, and the metrics of an objective that draws values `[K, R]` to a target."""
    found = values.detach()
    metrics = {"q_mean": mean_of(found), "td_error": mean_of((found - target).abs())}
    return batch.aggregated(td_loss(values, target, distance, delta), "token"), metrics


@dataclass(frozen=True)
class _Seen:
    """As much of a rollout as a critic of states reads: observations `[B, T, ...]`."""

    observations: Any
