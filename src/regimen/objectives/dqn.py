"""Q-learning: a policy of action values is drawn towards the next rewards and the best value after them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.objectives.base import Batch, Objective
from regimen.objectives.look_ahead import LookAhead, discount_knobs, look_ahead
from regimen.objectives.td import Distance, regressed


@dataclass(frozen=True)
class DQNObjective(Objective):
    """Draws `Q(s, a)` of discrete actions towards `R + D max_a' Q'(s', a')` (Mnih et al. 2015).

    Attributes:
        policy: member that is trained, `policy.values(observations [R, ...]) -> [R, A]`.
        target: a copy of it, kept by `ReferenceRefresh("policy_target", of="policy", ...)`.
        double: the target's value is that of the action which the policy, not the target, thinks best (van Hasselt et
            al. 2016).
        n, discount, distance, delta: as those of `TDObjective`.
    """

    policy: str = "policy"
    target: str = "policy_target"
    double: bool = True
    n: int = 1
    discount: Knob | float | None = None
    distance: Distance = "huber"
    delta: float = 1.0
    name: str = "dqn"

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The discount, if it is one."""
        return discount_knobs(self.discount)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the distance per step; metrics `q_mean` and `td_error` (mean size)."""
        ahead = look_ahead(batch, type(self).__name__, self.n, self.discount)
        target = ahead.total + ahead.factor * self._value_after(batch, ahead)
        values = batch.member(self.policy).values(ahead.observations)
        taken = values.gather(1, ahead.actions.long()[:, None])
        return regressed(batch, taken.T, target, self.distance, self.delta)

    @torch.no_grad()
    def _value_after(self, batch: Batch, ahead: LookAhead) -> Tensor:
        """`[R]`."""
        after = ahead.next_observations
        values: Tensor = batch.member(self.target).values(after)
        judged = batch.member(self.policy).values(after) if self.double else values
        return values.gather(1, judged.argmax(1, keepdim=True)).squeeze(1)
