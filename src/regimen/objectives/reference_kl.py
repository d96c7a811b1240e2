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
        aggregate, horizon: how steps are weighted, see `aggregate_weights`.
        importance_weighted: multiply each step's estimate by the ratio of the policy to the one that sampled. The
            gradient of k1 and k3 is then that of the KL, on any policy's samples (DeepSeek-AI 2025, "DeepSeek-V3.2",
            section 3.1); that of plain k3, which is GRPO's, is another even on the policy's own.
        member, reference: names in the cast.

    Raises:
        ValueError: `importance_weighted` with an analytic form, which needs no weights.
    """

    estimator: str = "k3"
    aggregate: Aggregate = "sequence"
    horizon: int | None = None
    importance_weighted: bool = False
    member: str = "policy"
    reference: str = "reference"
    name: str = "kl"

    def __post_init__(self) -> None:
        if self.importance_weighted and self.estimator not in get_args(KLEstimator):
            raise ValueError(
                f"ReferenceKL: '{self.estimator}' is no estimate from samples, so there is nothing to weight; use "
                f"{', '.join(get_args(KLEstimator))}, or importance_weighted=False"
            )

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
        if self.importance_weighted:
            per_step = per_step * self._ratio(batch, policy.logprob)
        weights = batch.weights(self.aggregate, self.horizon)
        return torch.where(batch.rollout.loss_mask, per_step * weights, 0).sum(), {}

    def _ratio(self, batch: Batch, logprob: Tensor) -> Tensor:
        behaviour = batch.require(
            "logprobs", "ReferenceKL(importance_weighted=True)", "sample with a stochastic policy"
        )
        return (logprob - torch.where(batch.rollout.loss_mask, behaviour, 0)).exp()
