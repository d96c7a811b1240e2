"""Inverse dynamics: which action led from one state to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.functions.aggregate import Aggregate, masked_mean
from regimen.objectives.base import Batch, Objective
from regimen.policies.distributions import ActionDistribution


@dataclass(frozen=True)
class InverseDynamicsObjective(Objective):
    """`-log g(a | phi(s), phi(s'))`: features from which the action can be told hold what the actor can control.

    It trains the encoder of an `EllipticalBonus` (Henaff et al. 2022, section 3.1), in an `Update` of its own with
    both members. Reads `observations`, `actions` and the column `next_observations` at steps that are learned from.

    Attributes:
        encoder: member of the cast, states `[R, ...]` to features `[R, D]`.
        head: member of the cast, both features `[R, 2 D]` to an `ActionDistribution` over the action: a
            `CategoricalHead`, or a `GaussianHead` for continuous actions, perhaps behind a torso.
        aggregate, horizon: how steps are weighted, see `aggregate_weights`; `"constant"` with `horizon=1` is the sum
            over time and the mean over samples of the paper.
    """

    encoder: str = "bonus_encoder"
    head: str = "inverse_dynamics"
    aggregate: Aggregate = "token"
    horizon: int | None = None
    name: str = "inverse_dynamics"

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the negative log-likelihood per step.

        Metrics, of discrete actions: `inverse_accuracy`, the share of steps whose action is the likeliest.
        """
        rollout, mask = batch.rollout, batch.rollout.loss_mask
        observations = batch.require("observations", "InverseDynamicsObjective", "collect with an EnvTask")
        actions = batch.require("actions", "InverseDynamicsObjective", "collect with an EnvTask")[mask]
        before, after = observations[mask], rollout["next_observations"][mask]
        # One pass over both, for encoders that look at the whole batch.
        features = batch.member(self.encoder)(torch.cat([before, after]))
        both = torch.cat([features[: len(before)], features[len(before) :]], 1)
        described: ActionDistribution = batch.member(self.head)(both)
        nll = -described.logprob(actions)
        per_step = nll.new_zeros(mask.shape).masked_scatter(mask, nll)
        loss = (per_step * batch.weights(self.aggregate, self.horizon)).sum()
        if actions.is_floating_point():
            return loss, {}
        right = torch.zeros_like(per_step).masked_scatter(mask, (described.mode() == actions).to(nll))
        return loss, {"inverse_accuracy": masked_mean(right, mask)}
