"""The critic's loss: squared distance from a value target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.functions.aggregate import Aggregate, mean_of
from regimen.objectives.base import Batch, Objective


def value_loss(values: Tensor, target: Tensor, old_values: Tensor | None = None, clip: float | None = None) -> Tensor:
    """`(V - target)^2` per step, or with `clip` the larger of it and that of a value near the old one.

    `max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2)`, the value loss of PPO's first implementation
    (Engstrom et al. 2020, section 3).

    Args:
        values, target: any shape, equal.
        old_values: what the critic said when the sample was taken, same shape; needed with `clip`.
        clip: how far a step may move the value, in units of the return.

    Raises:
        ValueError: unequal shapes, a clip that is not positive, or one without old values.
    """
    if values.shape != target.shape or (old_values is not None and old_values.shape != values.shape):
        old = "" if old_values is None else f" and old values {list(old_values.shape)}"
        raise ValueError(f"value_loss: values {list(values.shape)}, target {list(target.shape)}{old} differ")
    error = values - target
    if clip is None:
        return error.square()
    if clip <= 0 or old_values is None:
        raise ValueError(f"value_loss: clip={clip}; expected above 0, and with old_values")
    # The value near the old one is another only beyond the clip, where it stands still and has no gradient.
    moved, left = values.detach() - old_values, error.detach()
    near = left - (moved - moved.clamp(-clip, clip))
    return torch.where(near.abs() > left.abs(), near, error).square()


@dataclass(frozen=True)
class ValueObjective(Objective):
    """Squared error of a critic; `surrogate + 0.5 * ValueObjective()` is PPO's.

    Attributes:
        clip: see `value_loss`; needs the column `values`.
        member: the critic, `critic(rollout) -> [B, T]`.
        target: side column `[B, T]`, as `GAE` writes it.
        values: side column `[B, T]` of old values.
        reads: a policy of the cast; the critic is then given the hidden states `[B, T, D]` of its step distribution
            instead of the rollout (a `ValueHead`), at no further forward pass.
        aggregate, horizon: how steps are weighted, see `aggregate_weights`.
    """

    clip: float | None = None
    member: str = "critic"
    target: str = "value_target"
    values: str = "values"
    reads: str | None = None
    aggregate: Aggregate = "token"
    horizon: int | None = None
    name: str = "value"

    def __post_init__(self) -> None:
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"ValueObjective: clip is {self.clip}, expected above 0")

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the squared error per step.

        Metrics: `value_mean`; `explained_variance`, `1 - Var(target - V) / Var(target)` (1 is perfect, 0 is what a
        constant earns).
        """
        steps, rollout = batch.steps, batch.rollout
        values, target = steps.of(self._ask(batch)), steps.of(rollout[self.target])
        old = None if self.clip is None else steps.of(rollout[self.values])
        loss = batch.aggregated(value_loss(values, target, old, self.clip), self.aggregate, self.horizon)
        found = values.detach()
        return loss, {"value_mean": mean_of(found), "explained_variance": _explained(found, target)}

    def _ask(self, batch: Batch) -> Tensor:
        critic = batch.member(self.member)
        source = batch.rollout if self.reads is None else batch.distribution(self.reads).hidden  # type: ignore[attr-defined]
        values: Tensor = critic(source)
        expected = batch.rollout.mask.shape
        if values.shape != expected:
            raise ValueError(
                f"ValueObjective: critic '{self.member}' gave shape {list(values.shape)}, expected {list(expected)}: "
                "one value per step"
            )
        return values


def _explained(values: Tensor, target: Tensor) -> Tensor:
    if not len(target):
        return target.new_ones(())
    left, whole = torch.stack([target - values, target]).var(1, correction=0)
    return 1 - left / whole.clamp(min=1e-8)
