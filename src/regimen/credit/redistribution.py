"""Redistribution: a reward that came at the end, given to the steps that earned it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from regimen.credit.base import Credit
from regimen.credit.gae import GAE
from regimen.functions.attribution import (
    action_ends,
    leave_one_out_contributions,
    redistribute,
    remaining_actions,
    uniform_contributions,
)
from regimen.functions.returns import on_last_step
from regimen.knobs import Knob
from regimen.rollout import Rollout

StepWeight = Literal["none", "remaining_actions"]


@dataclass(frozen=True)
class RewardRedistribution:
    """Pays each action its contribution in the place of the final reward, then credits as `inner` does (SPA-RL).

    An action is a step, or a turn where the rollout tells turns apart (`segment`); it is paid on its last step. What
    the judge said is left as it is, so that an estimator can be fitted to it again.

    Attributes:
        by: `"uniform"`, the final reward shared out equally; `"leave_one_out"`, see `leave_one_out_contributions`; or a
            member of the cast, `member(rollout) -> [B, T]`, as an estimator of progress is.
        alpha: weight of the contributions, a knob `alpha`.
        inner: from step rewards to advantages.
        final: the component that is redistributed, a term of the reward's sum with its weight `weight/<name>`; the
            others stay where they are. By default the total.
        gate: if the member tells its `misfit` (squared error over variance, held out) and it is larger, the reward is
            not redistributed, and a warning says so: a contribution that explains no reward is noise.
        fallback: the credit that is then used; `inner` by default.
        step_weight: `"remaining_actions"` multiplies what is paid for action `k` of `n` by `n - k - 1`, as the code
            published with the paper does.
    """

    by: str = "estimator"
    alpha: Knob | float = 1.0
    inner: Credit = field(default_factory=GAE)
    final: str | None = None
    gate: float = 0.5
    fallback: Credit | None = None
    step_weight: StepWeight = "none"

    def __post_init__(self) -> None:
        if not self.gate >= 0 or self.step_weight not in get_args(StepWeight):
            raise ValueError(
                f"RewardRedistribution: gate is {self.gate}, expected at least 0; step_weight is '{self.step_weight}', "
                f"expected one of {', '.join(get_args(StepWeight))}"
            )

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The weight of the contributions, and what the other credits read."""
        others = self.inner.knobs + (() if self.fallback is None else self.fallback.knobs)
        return (self._alpha, *dict.fromkeys(others))

    @torch.no_grad()
    def __call__(self, rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
        """The rollout with the advantages of `inner`, and the columns `contributions [B, T]` and `redistributed`.

        The latter is true everywhere, or nowhere if the gate is shut, and `credit/redistributed` in the log says so.

        Raises:
            ValueError: there is no reward, or no such component; the cast lacks the member.
        """
        if rollout.reward is None:
            raise ValueError("RewardRedistribution: the rollout has no reward; give the stage a reward that trains")
        if not self._trusts(cast):
            refused = (self.fallback or self.inner)(rollout, knobs, cast)
            return refused.with_step_columns(redistributed=torch.zeros_like(rollout.mask))
        total = _per_step(rollout.reward, rollout)
        replaced = total if self.final is None else self._component(self.final, rollout, knobs)
        ends = action_ends(rollout.mask, rollout.loss_mask, rollout.segment)
        contributions = self._contributions(replaced, ends, rollout, cast)
        paid = redistribute(total, replaced, contributions * knobs[self._alpha.name], rollout.mask)
        if self.step_weight == "remaining_actions":
            paid = paid * remaining_actions(ends)
        credited = self.inner(rollout.replace(reward=paid), knobs, cast)
        return credited.replace(reward=rollout.reward).with_step_columns(
            contributions=contributions, redistributed=rollout.mask
        )

    @property
    def _alpha(self) -> Knob:
        return self.alpha if isinstance(self.alpha, Knob) else Knob("alpha", self.alpha)

    def _trusts(self, cast: Mapping[str, Any]) -> bool:
        if self.by in ("uniform", "leave_one_out"):
            return True
        if self.by not in cast:
            raise ValueError(
                f"RewardRedistribution needs the member '{self.by}', which the cast lacks (it has: {', '.join(cast)}); "
                "add an estimator, or redistribute by 'uniform' or 'leave_one_out'"
            )
        misfit = float(getattr(cast[self.by], "misfit", 0.0))
        if misfit <= self.gate:
            return True
        warnings.warn(
            f"RewardRedistribution: the misfit of '{self.by}' is {misfit:.3g} (squared error over variance of held-out "
            f"final rewards; inf before MeasureMisfit), above the gate of {self.gate:g}; the reward is not "
            "redistributed. Explore more, choose another estimator, or raise the gate",
            stacklevel=2,
        )
        return False

    def _component(self, name: str, rollout: Rollout, knobs: Mapping[str, float]) -> Tensor:
        """`[B, T]`, a component as it entered the total."""
        raw = None if rollout.rewards is None else rollout.rewards.get(name, None)
        if raw is None:
            there = ", ".join(rollout.rewards.keys()) if rollout.rewards is not None else "none"
            raise ValueError(
                f"RewardRedistribution: the reward has no component '{name}' (it has: {there}); name one of them, or "
                "leave final=None to redistribute the total"
            )
        weight = knobs.get(f"weight/{name}")
        if weight is None and len(rollout.rewards.keys()) > 1:
            raise ValueError(
                f"RewardRedistribution: no knob 'weight/{name}' says how component '{name}' entered the total; make it "
                "a term of the reward's sum, without a knob of your own before it"
            )
        judged = rollout.loss_mask.any(1, keepdim=True)
        return torch.where(judged, _per_step(raw, rollout), 0) * (1.0 if weight is None else weight)

    def _contributions(self, replaced: Tensor, ends: Tensor, rollout: Rollout, cast: Mapping[str, Any]) -> Tensor:
        if self.by == "uniform":
            return uniform_contributions(replaced.sum(1), ends)
        if self.by == "leave_one_out":
            return leave_one_out_contributions(replaced.sum(1), rollout.group, ends)
        said: Tensor = cast[self.by](rollout)
        if said.shape != rollout.mask.shape:
            raise ValueError(
                f"RewardRedistribution: member '{self.by}' gave shape {list(said.shape)}, expected "
                f"{list(rollout.mask.shape)}: a contribution per step"
            )
        return torch.where(ends, said, 0)


def _per_step(reward: Tensor, rollout: Rollout) -> Tensor:
    """A reward as `[B, T]`: that of a whole sample stands on its last step."""
    return torch.where(rollout.mask, reward, 0) if reward.ndim == 2 else on_last_step(reward, rollout.mask)
