"""REINFORCE: the policy gradient itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.functions.aggregate import Aggregate
from regimen.objectives.base import Batch, Objective


@dataclass(frozen=True)
class ReinforceObjective(Objective):
    """`-A log pi`, whose gradient is the policy gradient's estimate (Williams 1992; Sutton et al. 2000, eq. 2).

    The advantage may be any credit: a return minus a baseline with `GAE(lam=1)`, a reward minus the group's mean. It is
    for samples of the present policy: take one gradient step with them, as it corrects for none.

    Attributes:
        aggregate, horizon: how steps are weighted, see `aggregate_weights`; `"constant"` with `horizon=1` sums over a
            sample's steps, as the gradient of the expected return of a sample does.
        member: the policy.
    """

    aggregate: Aggregate = "sequence"
    horizon: int | None = None
    member: str = "policy"
    name: str = "reinforce"

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the loss per step.

        Metrics: `ratio_deviation`, the largest `|rho - 1|` of the policy to the one that sampled, where its
        log-probabilities were recorded: 0 in the first gradient step.
        """
        mask, behaviour = batch.rollout.loss_mask, batch.rollout.logprobs
        advantage = batch.require("advantages", "ReinforceObjective", "give the stage a credit")
        logprob = batch.distribution(self.member).logprob
        weights = batch.weights(self.aggregate, self.horizon)
        loss = -torch.where(mask, advantage * logprob * weights, 0).sum()
        if behaviour is None:
            return loss, {}
        ratio = torch.where(mask, logprob.detach() - behaviour, 0).exp()
        return loss, {"ratio_deviation": (ratio - 1).abs().amax()}
