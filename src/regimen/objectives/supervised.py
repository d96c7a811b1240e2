"""Supervised likelihood: raise the probability of recorded actions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.functions.aggregate import Aggregate
from regimen.objectives.base import Batch, Objective


@dataclass(frozen=True)
class SFTObjective(Objective):
    """Negative log-likelihood of the rollout's actions at steps that are learned from, for any policy.

    Attributes:
        aggregate, horizon: how steps are weighted, see `aggregate_weights`.
        weight: a side column `[B]` of sample weights (a selection, a confidence), if any.
        member: the member that is trained.
    """

    aggregate: Aggregate = "token"
    weight: str | None = None
    horizon: int | None = None
    member: str = "policy"
    name: str = "sft"

    def loss(self, batch: Batch) -> Tensor:
        """Weighted sum of `-log p(action)` per step."""
        weights = batch.weights(self.aggregate, self.horizon)
        if self.weight is not None:
            weights = weights * batch.rollout[self.weight][:, None]
        logprob = batch.distribution(self.member).logprob
        return -torch.where(batch.rollout.loss_mask, logprob * weights, 0).sum()
