"""Generalised advantage estimation: how much better a step turned out than a critic expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regimen.credit.group_relative import group_relative
from regimen.functions.returns import gae, on_last_step
from regimen.knobs import Knob
from regimen.rollout import Rollout

Normalize = Literal["batch", "task"]


@dataclass(frozen=True)
class GAE:
    """Advantages and value targets from a critic; see `regimen.functions.gae`.

    Reads the rollout's reward (`[B]` counts at the last existing step), its `discount`, and optional columns `cut`,
    steps after which a sample was cut short, and `bootstrap`, the values after them; without a `bootstrap`, the critic
    is asked for the value of `next_observations` (as an `EnvTask` records them) there. Steps that exist but are not
    learned from are passed through.
    Monte-Carlo returns are `GAE(lam=1)`.

    Attributes:
        lam: how far to trust rewards (1) over the critic (0).
        normalize: advantages are standardised over all steps that are learned from, of the `"batch"` or of each
            `"task"`; `None` leaves them. Value targets are never changed.
        values: side column `[B, T]` of values recorded when sampled; where there is none, the critic is asked.
        critic: member of the cast, `critic(rollout) -> [B, T]`.
        reads: a policy of the cast; the critic is then given the hidden states `[B, T, D]` of its step distribution
            instead of the rollout (a `ValueHead`).
        discount: a knob that multiplies the rollout's own discount, for samples whose task records none that moves
            (texts; an `EnvTask(discount=None)`). `None` leaves the rollout's discount as it is.
    """

    lam: float = 0.95
    normalize: Normalize | None = "batch"
    values: str = "values"
    critic: str = "critic"
    reads: str | None = None
    discount: Knob | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise ValueError(f"GAE: lam is {self.lam}, expected in [0, 1]")
        if self.normalize not in (None, *get_args(Normalize)):
            raise ValueError(f"GAE: normalize '{self.normalize}' is not one of {', '.join(get_args(Normalize))}, None")

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The discount, if it is one; otherwise that in the rollout counts."""
        return () if self.discount is None else (self.discount,)

    @torch.no_grad()
    def __call__(self, rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
        """The rollout with `advantages` and the columns `values` and `value_target`, each `[B, T]`.

        Raises:
            ValueError: there is no reward, or neither recorded values nor a critic.
        """
        if rollout.reward is None:
            raise ValueError("GAE: the rollout has no reward; give the stage a reward that trains")
        reward = on_last_step(rollout.reward, rollout.mask) if rollout.reward.ndim == 1 else rollout.reward
        values = self._values(rollout, cast)
        discount = rollout.discount if self.discount is None else rollout.discount * knobs[self.discount.name]
        advantages, target = gae(
            reward, values, discount, self.lam, rollout.mask, self._bootstrap(rollout, cast),
            cut=_column(rollout, "cut"), decided=rollout.loss_mask,
        )  # fmt: skip
        if self.normalize is not None:
            advantages = self._normalized(advantages, rollout)
        return rollout.replace(advantages=advantages).with_step_columns(**{self.values: values, "value_target": target})

    def _values(self, rollout: Rollout, cast: Mapping[str, Any]) -> Tensor:
        recorded = _column(rollout, self.values)
        if recorded is not None:
            return recorded
        if self.critic not in cast:
            raise ValueError(
                f"GAE needs values: the rollout of task {'/'.join(rollout.task_names)} has no column '{self.values}' "
                f"and the cast no member '{self.critic}' (it has: {', '.join(cast)}); add a critic to the cast, or use "
                "GroupRelativeAdvantage, which needs none"
            )
        return self._asked(rollout, cast)

    def _asked(self, rollout: Rollout, cast: Mapping[str, Any]) -> Tensor:
        source = rollout if self.reads is None else cast[self.reads].distribution(rollout, rollout.mask).hidden
        values: Tensor = cast[self.critic](source)
        return values

    def _bootstrap(self, rollout: Rollout, cast: Mapping[str, Any]) -> Tensor | None:
        """Values after the steps at which a sample is cut, `[B, T]`, as recorded or as the critic sees them."""
        recorded, cut = _column(rollout, "bootstrap"), _column(rollout, "cut")
        if recorded is not None or cut is None:
            return recorded
        if _column(rollout, "next_observations") is None or self.critic not in cast:
            raise ValueError(
                f"GAE needs the values after the steps where samples of task {'/'.join(rollout.task_names)} were cut "
                f"(column 'cut'): record them as a column 'bootstrap' [B, T], or give the rollout a column "
                f"'next_observations' and the cast a member '{self.critic}' to ask"
            )
        beyond = _beyond(rollout, cut)
        values = self._asked(beyond, cast).gather(1, beyond.lengths[:, None] - 1)
        return torch.zeros_like(rollout.discount).masked_scatter(cut, values.to(rollout.discount.dtype))

    def _normalized(self, advantages: Tensor, rollout: Rollout) -> Tensor:
        """Standardising over steps is being better than the other steps of the same batch or task."""
        task = rollout.task if self.normalize == "task" else torch.zeros_like(rollout.task)
        standard = group_relative(
            advantages.flatten(),
            task[:, None].expand_as(advantages).flatten(),
            eps=1e-8,
            include=rollout.loss_mask.flatten(),
        )
        return standard.view_as(advantages)


def _beyond(rollout: Rollout, cut: Tensor) -> Rollout:
    """What was seen after each cut, as the last step of a sample of its own.

    Where a policy has memory, the steps that lead there come before it; otherwise the sample is that step alone.
    """
    if _column(rollout, "memory") is None:
        steps = rollout.unrolled(cut)
        return steps.replace(observations=steps["next_observations"])
    row, step = cut.nonzero(as_tuple=True)
    longer = rollout[row].padded(rollout.steps + 1)
    mask = torch.arange(longer.steps, device=step.device) <= step[:, None] + 1
    observations, start = longer.observations.clone(), longer["start"] & mask
    place = torch.arange(len(row), device=step.device), step + 1
    observations[place], start[place] = rollout["next_observations"][row, step], False
    return longer.replace(observations=observations, mask=mask).with_step_columns(start=start)


def _column(rollout: Rollout, name: str) -> Tensor | None:
    value: Tensor | None = rollout.get(name)
    return value
