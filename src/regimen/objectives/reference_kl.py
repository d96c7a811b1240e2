"""Staying near a reference policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from regimen.functions.aggregate import Aggregate
from regimen.functions.divergences import KLEstimator, kl_estimate
from regimen.objectives.base import Batch, Objective


@dataclass(frozen=True)
class ReferenceKL(Objective):
    """KL of the trained policy from a frozen one, at the rollout's steps.

    Attributes:
        estimator: `"k1"`, `"k2"`, `"k3"` estimate it from log-probabilities (any policy, see `kl_estimate`);
            every other name is an analytic form that the policy's own step distribution knows (`"exact"`; a
            flow policy also knows `"flow_grpo"`).
        member, reference: names in the cast.
    """

    estimator: str = "k3"
    aggregate: Aggregate = "sequence"
    member: str = "policy"
    reference: str = "reference"
    name: str = "kl"

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the weighted divergence per step."""
        if self.reference not in batch.cast:
            raise ValueError(
                f"ReferenceKL needs the member '{self.reference}', which the cast lacks (it has: "
                f"{', '.join(batch.cast)}); give the stage rules=[ReferenceRefresh(member='{self.reference}')]"
            )
        policy, reference = batch.distribution(self.member), batch.distribution(self.reference)
        if self.estimator in get_args(KLEstimator):
            per_step = kl_estimate(policy.logprob, reference.logprob.detach(), self.estimator)  # type: ignore[arg-type]
        else:
            per_step = policy.kl(reference, self.estimator)
        loss = torch.where(batch.rollout.loss_mask, per_step * batch.weights(self.aggregate), 0).sum()
        return loss, {}
