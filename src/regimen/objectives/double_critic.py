"""Off-policy evaluation of the present policy: two critics of actions and two of states, each the other's target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.functions.aggregate import mean_of
from regimen.knobs import Knob
from regimen.objectives.base import Batch, Objective
from regimen.objectives.look_ahead import discount_knobs, look_ahead


def double_critic_loss(
    q: Tensor, v: Tensor, reward: Tensor, factor: Tensor, value_after: Tensor, value_now: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses of `K` critics of actions and `K` of states, each summed over critics (ArCHer, eq. 2 and 3).

    `L_Q = sum_j (Q_j(s, a) - r - factor * Vbar_j(s'))^2` and `L_V = sum_j (V_j(s) - Qbar_j(s, a~))^2`, with `a~` drawn
    from the policy in `s`: V is its mean under the policy, not its maximum. There is no minimum over `j`.

    Args:
        q: `[K, R]`, of the recorded actions; v: `[K, R]`, of the states.
        reward, factor: `[R]`; the factor is the discount, 0 where nothing comes after.
        value_after: `[K, R]`, `Vbar(s')` of the target.
        value_now: `[K, R]`, `Qbar(s, a~)` of the target.

    Returns:
        `L_Q` and `L_V`, `[R]` each.

    Raises:
        ValueError: shapes differ.
    """
    shapes = [list(x.shape) for x in (q, v, value_after, value_now)]
    if any(shape != [len(q), *reward.shape] for shape in shapes) or reward.shape != factor.shape or reward.ndim != 1:
        raise ValueError(
            f"double_critic_loss: q, v, value_after, value_now {shapes}, reward {list(reward.shape)}, factor "
            f"{list(factor.shape)}; expected [K, R] four times, and [R] twice"
        )
    # Not 0 times the value: a target that is not finite where nothing comes after would spread.
    target = reward + torch.where(factor == 0, 0.0, factor * value_after)
    return (q - target).square().sum(0), (v - value_now).square().sum(0)


@dataclass(frozen=True)
class DoubleCriticObjective(Objective):
    """Draws a `DoubleCritic` to the value of the present policy, from steps of any policy (ArCHer's critic).

    Q is drawn to the reward and the target's V of what came after; V to the target's Q of an action that the policy
    takes now (`Batch.resampled`), so that no importance weights are needed. The loss is the mean over steps of both.

    Attributes:
        critic: member that is trained, a `DoubleCritic`.
        target: its copy, usually `ReferenceRefresh("critic_target", of="critic", mode="ema", ...)`.
        policy: member that acts anew, see `Batch.resampled`.
        discount: as that of `TDObjective`.
    """

    critic: str = "critic"
    target: str = "critic_target"
    policy: str = "policy"
    discount: Knob | float | None = None
    name: str = "double_critic"

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The discount, if it is a knob here."""
        return discount_knobs(self.discount)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the steps that are learned from; metrics `q_loss`, `v_loss`, `q_mean` and `v_mean`."""
        critic, target = batch.member(self.critic), batch.member(self.target)
        ahead = look_ahead(batch, type(self).__name__, 1, self.discount)
        with torch.no_grad():
            after: Tensor = target.values(ahead.next_observations)
            now: Tensor = target(ahead.observations, batch.steps.of(batch.resampled(self.policy).actions))
        q, v = critic.both(ahead.observations, ahead.actions)
        q_loss, v_loss = double_critic_loss(q, v, ahead.total, ahead.factor, after, now)
        found = {"q_loss": q_loss, "v_loss": v_loss, "q_mean": q, "v_mean": v}
        metrics = {name: mean_of(value.detach()) for name, value in found.items()}
        return batch.aggregated(q_loss + v_loss, "token"), metrics
