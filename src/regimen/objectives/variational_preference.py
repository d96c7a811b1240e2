"""Variational preference learning: a reward model that explains each user's labels by a latent of the user."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from regimen.knobs import Knob
from regimen.models.latent_reward import Pairs
from regimen.objectives.base import Batch, Objective


def preference_nll(difference: Tensor, label: Tensor, scale: float = 1.0) -> Tensor:
    """`-log p` of labels under `p(first preferred) = sigma(difference / scale)` (Bradley and Terry 1952).

    Args:
        difference: the first segment's reward minus the second's, any shape.
        label: the probability that the first is preferred, same shape.
        scale: by how much the rewards of segments differ where the odds are `e` to 1.

    Raises:
        ValueError: unequal shapes, or a scale that is not positive.
    """
    if difference.shape != label.shape or scale <= 0:
        raise ValueError(
            f"preference_nll: difference {list(difference.shape)}, label {list(label.shape)}, scale {scale}; expected "
            "equal shapes and a scale above 0"
        )
    return binary_cross_entropy_with_logits(difference / scale, label.to(difference.dtype), reduction="none")


@dataclass(frozen=True)
class VariationalPreferenceObjective(Objective):
    """The negative evidence bound of VPL (arXiv 2408.10075): `E_q[-log p(labels | z)] + kl_weight KL(q(z) || p(z))`.

    A sample is a user and a step a pair: the step columns `first`, `second [B, N, L, S]` and `label [B, N]`, see
    `Pairs`. The likelihood is summed over the pairs that are learned from, and the bound is a mean over users, so that
    a `kl_weight` means the same whatever the batch's size; 1 is the bound itself. The latent is drawn from the
    posterior given the pairs that are shown: all that exist, or those of the step column `shown` (bool `[B, N]`).

    For a reward model without a latent it is the usual likelihood of Bradley and Terry.

    Attributes:
        scale: see `preference_nll`.
        kl_weight: a number (the default of a knob of that name) or a knob.
        member: the `LatentReward` that is trained.
    """

    scale: float = 1.0
    kl_weight: Knob | float = 1.0
    member: str = "reward_model"
    name: str = "variational_preference"

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"VariationalPreferenceObjective: scale is {self.scale}, expected above 0")

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The weight of the divergence."""
        return (self._kl_weight,)

    @property
    def _kl_weight(self) -> Knob:
        return self.kl_weight if isinstance(self.kl_weight, Knob) else Knob("kl_weight", self.kl_weight, 0.0)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over users.

        Metrics: `pair_accuracy`, share of the pairs learned from whose likelier order is the label's; `kl`, in nats per
        user; `active_units`, numbers of the latent whose mean differs between users.
        """
        rollout, model = batch.rollout, batch.member(self.member)
        pairs = Pairs.of({name: rollout[name] for name in ("first", "second", "label")}, rollout.mask)
        shown: Tensor | None = rollout.get("shown")
        given = pairs if shown is None else Pairs(pairs.first, pairs.second, pairs.label, rollout.mask & shown)
        posterior = model.infer(given)
        difference, divergence = model.compare(pairs, posterior.sample(batch.rng)), posterior.kl(model.prior)
        nll = torch.where(rollout.loss_mask, preference_nll(difference, pairs.label, self.scale), 0)
        fit = (nll * batch.weights("constant", 1)).sum()
        loss = fit + batch.knobs[self._kl_weight.name] * divergence.mean() * batch.share
        right = ((difference > 0) == (pairs.label > 0.5))[rollout.loss_mask]
        return loss, {
            "pair_accuracy": right.to(nll.dtype).mean(),
            "kl": divergence.detach().mean(),
            "active_units": posterior.active_units(),
        }
