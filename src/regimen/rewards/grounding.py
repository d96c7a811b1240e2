"""Whether what an agent did was possible at all."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from regimen.functions.attribution import action_ends
from regimen.rewards.base import Reward, Scene
from regimen.rollout import Rollout

Form = Literal["penalty", "bonus"]


class GroundingReward(Reward):
    """Whether each action could be executed, `[B, T]`, component `grounding`.

    `"penalty"` is `g - 1`: 0 for an action that could be executed, and -1 for one that could not. `"bonus"` is `g`, as
    in Wang et al. (2025), which pays long samples more than short ones: 20 valid actions at a weight of 0.5 earn 10,
    and success 1. Weight it: `outcome + 0.1 * GroundingReward()`.
    """

    def __init__(self, form: Form = "penalty", column: str = "valid", name: str = "grounding") -> None:
        """Make the reward.

        Args:
            form: see above.
            column: step column `[B, T]`, 1 where the action could be executed. In a dialogue it counts where a turn's
                reward stands, on its last step.
            name: of the component.

        Raises:
            ValueError: an unknown form.
        """
        if form not in get_args(Form):
            raise ValueError(f"GroundingReward: form '{form}' is not one of {', '.join(get_args(Form))}")
        self.form, self.column, self.name = form, column, name

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        """`g - 1` or `g` at the last step of every action, 0 elsewhere."""
        valid = rollout.get(self.column)
        if valid is None or valid.shape != rollout.mask.shape:
            given = "none" if valid is None else f"one of shape {list(valid.shape)}"
            raise ValueError(
                f"GroundingReward needs a column '{self.column}' {list(rollout.mask.shape)} of the rollout of task "
                f"{'/'.join(rollout.task_names)}, and there is {given}; let the environment tell which actions it "
                "could execute, or leave the reward out"
            )
        ends = action_ends(rollout.mask, rollout.loss_mask, rollout.segment)
        value = valid.to(torch.get_default_dtype())
        return torch.where(ends, value - 1 if self.form == "penalty" else value, 0)
