"""What a critic that bootstraps reads: the next rewards, and what was observed after them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regimen.functions.returns import n_step_last, n_step_return, on_last_step
from regimen.knobs import Knob
from regimen.objectives.base import Batch
from regimen.rollout import Rollout, Steps


@dataclass(frozen=True)
class LookAhead:
    """The `R` steps that are learned from, and what came next.

    Attributes:
        steps: where they are.
        total: `[R]`, the discounted sum of the next rewards; factor: `[R]`, what the value after them is multiplied by.
        last: int64 `[R]`, the step of the last of these rewards; `None` if it is the step itself.
        rollout: in which they are.
    """

    steps: Steps
    total: Tensor
    factor: Tensor
    last: Tensor | None
    rollout: Rollout

    @property
    def observations(self) -> Any:
        """`[R, ...]`, what was observed in the steps."""
        return self.steps.of(self.rollout.observations)

    @property
    def actions(self) -> Tensor:
        """`[R, ...]`, what was done in them."""
        actions: Tensor = self.steps.of(self.rollout.actions)
        return actions

    @property
    def next_observations(self) -> Any:
        """`[R, ...]`, what was observed after the last of the rewards."""
        after = self.rollout["next_observations"]
        return self.steps.of(after) if self.last is None else after[self.steps.row, self.last]


def look_ahead(batch: Batch, owner: str, n: int = 1, discount: Knob | float | None = None) -> LookAhead:
    """The sums of `n` rewards after the steps that are learned from, under the discount that is in force now.

    Reads the reward (`[B]` counts at the last step), the recorded discount, and the column `cut`, if there is one: sums
    end where a sample is cut. `owner` and its `discount` are those of the objective.

    Raises:
        ValueError: there is no reward, `n` steps are asked of samples that have fewer and go on, or the discount is
            applied twice or has moved since it was recorded.
    """
    rollout = batch.rollout
    reward = batch.require("reward", owner, "give the stage a reward that trains")
    reward = on_last_step(reward, rollout.mask) if reward.ndim == 1 else reward
    knob = next(iter(discount_knobs(discount)), None)
    factor, cut = discount_in_force(rollout, batch.knobs, owner, knob), rollout.get("cut")
    steps = batch.steps
    if rollout.steps == n == 1:
        return LookAhead(steps, steps.of(reward), steps.of(factor), None, rollout)
    total, onward = n_step_return(reward, factor, n, rollout.mask, cut=cut)
    last = steps.of(n_step_last(n, rollout.mask, cut))
    if rollout.steps < n:
        over = factor[steps.row, last] == 0
        _check_over(over if cut is None else over | cut[steps.row, last], n, rollout, owner)
    return LookAhead(steps, steps.of(total), steps.of(onward), last, rollout)


@dataclass(frozen=True)
class Seen:
    """As much of a rollout as a critic of states reads: observations `[B, T, ...]`."""

    observations: Any


def value_of_states(value: Any, observations: Any) -> Tensor:
    """`[R]`: what `value(rollout) -> [B, T]` gives to observations `[R, ...]`."""
    values: Tensor = value(Seen(observations.unsqueeze(1)))
    return values.squeeze(1)


def discount_knobs(discount: Knob | float | None) -> tuple[Knob, ...]:
    """The knob that an objective's discount is: one named `discount` for a number, none for `None`."""
    if discount is None:
        return ()
    return (discount if isinstance(discount, Knob) else Knob("discount", discount, 0.0, 1.0),)


def discount_in_force(rollout: Rollout, knobs: Mapping[str, float], owner: str, discount: Knob | None) -> Tensor:
    """`[B, T]`: the recorded discount, multiplied by the knob if there is one.

    Raises:
        ValueError: with a knob, the recorded discount is no mere sign of what ended (0 or 1), so that two would be
            multiplied; without one, the knob `discount` has moved since it was recorded.
    """
    recorded: Tensor = rollout.discount
    remedy = (
        "what is replayed must not hold a discount that moves: let the task record only what ended "
        "(EnvTask(discount=None)), and give the discount to the objective"
    )
    if discount is not None:
        if bool(((recorded != 0) & (recorded != 1) & rollout.mask).any()):
            raise ValueError(
                f"{owner} multiplies by the knob '{discount.name}', and the rollout of task "
                f"{'/'.join(rollout.task_names)} already holds a discount of {_between(recorded)}; {remedy}, or leave "
                "it to the task alone (discount=None here)"
            )
        return recorded * knobs[discount.name]
    then = rollout.knob("discount")
    if then is not None and "discount" in knobs and bool((then != knobs["discount"]).any()):
        raise ValueError(
            f"{owner}: samples of task {'/'.join(rollout.task_names)} were taken under other values of the knob "
            f"'discount' than {knobs['discount']:g}, which is in force now; {remedy}"
        )
    return recorded


def _between(discount: Tensor) -> str:
    return f"{float(discount[(discount != 0) & (discount != 1)].flatten()[0]):g}"


def _check_over(over: Tensor, n: int, rollout: Rollout, owner: str) -> None:
    if not bool(over.all()):
        raise ValueError(
            f"{owner} sums {n} rewards, and the samples of task {'/'.join(rollout.task_names)} have {rollout.steps} "
            f"steps and go on; draw more with ReplayMemory(unit='transition', ahead={n - 1}), or trajectories"
        )
