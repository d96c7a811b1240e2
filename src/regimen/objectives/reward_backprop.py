"""Reward feedback learning: the gradient of a reward, through the judge, into the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.objectives.base import Batch, Objective
from regimen.rollout import Rollout


class DifferentiableReward(Protocol):
    """What the objective asks of a reward; every reward expression has it."""

    @property
    def trains(self) -> bool:
        """Whether it has a total."""
        ...

    @property
    def undifferentiable(self) -> list[str]:
        """Components that no gradient may flow through."""
        ...

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What it reads."""
        ...

    @property
    def term_name(self) -> str:
        """A name for errors."""
        ...

    def answer(self, rollout: Rollout, cast: Mapping[str, Any], knobs: Mapping[str, float]) -> Any:
        """A `Judgement`."""
        ...


class RewardBackpropObjective(Objective):
    """`-mean reward` of samples that are a differentiable function of the weights (ReFL, Xu et al. 2023).

    The member makes the samples of the minibatch anew from what was recorded (`batch.reparameterised`): nothing with a
    graph is ever stored, and a reward per step counts as its sum. The judge's own weights get no gradient as long as
    the update trains the policy alone. Samples that the reward does not score leave the loss.
    """

    name = "reward_backprop"

    def __init__(self, reward: DifferentiableReward, member: str = "policy") -> None:
        """Make the objective.

        Args:
            reward: of differentiable components without a state.
            member: what is trained; it has `reparameterised`.

        Raises:
            TypeError: a gradient cannot flow through a component that trains.
            ValueError: the reward is only logged.
        """
        if odd := reward.undifferentiable:
            raise TypeError(
                f"RewardBackpropObjective: no gradient flows through {', '.join(odd)}; expected components that say "
                "differentiable = True and keep no state. Log these (.logged()), or use them with a credit and a "
                "policy gradient, such as ClippedSurrogateObjective"
            )
        if not reward.trains:
            raise ValueError(f"RewardBackpropObjective: '{reward.term_name}' is only logged; drop its .logged()")
        self.reward, self.member = reward, member

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What the reward reads."""
        return self.reward.knobs

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the mean over the minibatch's samples.

        Metrics: `reward/<component>`, means over the samples that it scored; `unscored`, the share without a reward.

        Raises:
            ValueError: no sample was scored, or the reward does not depend on the member's weights.
        """
        rollout = batch.reparameterised(self.member)
        answer = self.reward.answer(rollout, batch.cast, batch.knobs)
        total, counted = answer.total, answer.total.scored.flatten()
        if not bool(counted.any()):
            why = "; ".join(error for score in answer.components.values() for error in score.errors[:1])
            raise ValueError(f"RewardBackpropObjective: no sample was scored ({why or 'no component applies'})")
        if torch.is_grad_enabled() and not total.value.requires_grad:
            raise ValueError(
                f"RewardBackpropObjective: '{self.reward.term_name}' does not depend on the weights of "
                f"'{self.member}'; give a reward of what its reparameterised samples change (an image, actions)"
            )
        value = total.value if total.value.ndim == 1 else (total.value * rollout.mask).sum(1)
        loss = -torch.where(counted, value, 0).sum() / len(rollout) * batch.share
        metrics = {"unscored": 1 - counted.float().mean()}
        for name, score in answer.components.items():
            if bool((scored := score.scored.flatten()).any()):
                metrics[f"reward/{name}"] = score.value[scored].detach().mean()
        return loss, metrics
