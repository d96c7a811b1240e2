"""Entropy of the policy, subtracted from a loss to keep it exploring."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regimen.functions.aggregate import Aggregate
from regimen.objectives.base import Batch, Objective


@dataclass(frozen=True)
class EntropyBonus(Objective):
    """Entropy of the policy's step distributions, in nats; `surrogate - 0.01 * EntropyBonus()` rewards it.

    Attributes:
        member: the policy.
        aggregate, horizon: how steps are weighted, see `aggregate_weights`.
    """

    member: str = "policy"
    aggregate: Aggregate = "token"
    horizon: int | None = None
    name: str = "entropy"

    def loss(self, batch: Batch) -> Tensor:
        """Weighted sum of the entropy per step."""
        entropy = batch.steps.of(batch.distribution(self.member).entropy())
        return batch.aggregated(entropy, self.aggregate, self.horizon)
