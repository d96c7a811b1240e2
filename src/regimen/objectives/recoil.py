"""ReCOIL: a critic that imitates an expert from a few of its steps beside any other data, without rewards."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.functions.aggregate import mean_of
from regimen.knobs import Knob
from regimen.objectives.base import Batch, Objective
from regimen.objectives.look_ahead import discount_in_force, discount_knobs, value_of_states
from regimen.rollout import Rollout


def recoil_critic_loss(values: Tensor, after: Tensor, expert: Tensor, bound: float | None = None) -> Tensor:
    """`(D V(s') - Q)^2 / 4 - 1[expert] Q` of `K` critics, summed over them; `[R]`.

    ReCOIL's (Sikchi et al. 2024, section 5) with the chi-square divergence. Where an expert's share of the rows at
    `(s, a)` is `w`, the minimum is `Q = D V(s') + 2 w`: an implicit reward in [0, 2].

    Args:
        values: `[K, R]`, of the critics.
        after: `[R]`, `D V(s')`, the discounted value of what came next.
        expert: bool `[R]`, steps of the expert's.
        bound: in the place of `-Q` stands `(Q - bound)^2` (the variant of SMORe's code, which keeps Q bounded where the
            critics approximate; `2 / (1 - discount)` is the largest that Q can be).

    Raises:
        ValueError: other shapes.
    """
    if values.ndim != 2 or not values.shape[1:] == after.shape == expert.shape:
        raise ValueError(
            f"recoil_critic_loss: values {list(values.shape)}, after {list(after.shape)}, expert "
            f"{list(expert.shape)}; expected [K, R], [R] and [R]"
        )
    pull = -values if bound is None else (values - bound).square()
    return ((after - values).square() / 4 + torch.where(expert, pull, 0)).sum(0)


@dataclass(frozen=True)
class ReCOILCriticObjective(Objective):
    """Raises `Q(s, a)` on an expert's steps and keeps it consistent with the value elsewhere, with no reward.

    It takes the place of `TDObjective` beside an implicit maximiser and `AdvantageWeightedObjective`. The stage reads
    the expert's data from a task of their own and other data from any others; the mixing coefficient beta of the
    paper is the expert's share, by the knobs `mixture/<task>`. See `recoil_critic_loss`.

    Attributes:
        expert: name of the task whose rows are the expert's.
        critic: member that is trained, `critic(observations [R, ...], actions [R, ...]) -> [K, R]`.
        target: member that gives values to states, `target(rollout) -> [B, T]`, without a gradient.
        discount: as in `TDObjective`.
        bound: see `recoil_critic_loss`.
    """

    expert: str = "expert"
    critic: str = "critic"
    target: str = "value"
    discount: Knob | float | None = None
    bound: float | None = None
    name: str = "recoil_critic"

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The discount, where it is a knob."""
        return discount_knobs(self.discount)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over steps; metrics `q_expert` and `q_other`, means of the critics."""
        rollout, steps = batch.rollout, batch.steps
        expert = steps.of_rows(self._expert(rollout))
        knob = next(iter(discount_knobs(self.discount)), None)
        factor = steps.of(discount_in_force(rollout, batch.knobs, type(self).__name__, knob))
        with torch.no_grad():
            after = factor * value_of_states(batch.member(self.target), steps.of(rollout["next_observations"]))
        values: Tensor = batch.member(self.critic)(steps.of(rollout.observations), steps.of(rollout.actions))
        found = values.detach().mean(0)
        metrics = {"q_expert": mean_of(found[expert]), "q_other": mean_of(found[~expert])}
        return batch.aggregated(recoil_critic_loss(values, after, expert, self.bound), "token"), metrics

    def _expert(self, rollout: Rollout) -> Tensor:
        """Bool `[B]`."""
        if self.expert not in rollout.task_names:
            raise ValueError(
                f"ReCOILCriticObjective: no task is called '{self.expert}', of which the expert's steps would be; the "
                f"batch is of {', '.join(rollout.task_names)}. Name the task (expert=...), or raise its share, "
                f"the knob mixture/{self.expert}, above 0"
            )
        if rollout.reward is not None:
            warnings.warn(
                "ReCOILCriticObjective reads no reward, and the stage has one, which changes nothing; leave it out",
                stacklevel=2,
            )
        return rollout.task == rollout.task_names.index(self.expert)
