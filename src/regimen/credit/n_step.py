"""n-step returns: the next few rewards, for a critic that bootstraps from the state after them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regimen.functions.returns import n_step_return, n_step_target, on_last_step
from regimen.knobs import Knob
from regimen.rollout import Rollout


@dataclass(frozen=True)
class NStepReturn:
    """Sums of the next `n` rewards, as columns that a critic's objective reads; see `n_step_return`.

    Memory stores raw rewards; apply this to the samples that are drawn, so that a discount moved meanwhile holds for
    all of them.

    Attributes:
        n: steps to sum.
        discount: a knob that multiplies the rollout's own discount; the value in force now counts, not the one when
            the sample was taken. `None` leaves the rollout's discount as it is.
        bootstrap: side column `[B, T]` of values (a planner's root values); with it the column `value_target` is
            written. Without it the objective adds a value of its own.
    """

    n: int = 1
    discount: Knob | None = None
    bootstrap: str | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"NStepReturn: n is {self.n}, expected at least 1")

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The discount, if it is one."""
        return () if self.discount is None else (self.discount,)

    def __call__(self, rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
        """The rollout with columns `n_step_return` and `n_step_discount`, and `value_target` if it bootstraps.

        Each is `[B, T]`; a column `bootstrap [B]`, if there is one, is the value after a sample's last step.

        Raises:
            ValueError: there is no reward, or a sample is cut in its middle and a column should bootstrap it.
        """
        if rollout.reward is None:
            raise ValueError("NStepReturn: the rollout has no reward; give the stage a reward that trains")
        reward = on_last_step(rollout.reward, rollout.mask) if rollout.reward.ndim == 1 else rollout.reward
        discount = rollout.discount if self.discount is None else rollout.discount * knobs[self.discount.name]
        cut = rollout.get("cut")
        total, factor = n_step_return(reward, discount, self.n, rollout.mask, cut=cut)
        columns: dict[str, Tensor] = {"n_step_return": total, "n_step_discount": factor}
        if self.bootstrap is not None:
            if cut is not None and bool(cut[:, :-1].any()):
                raise ValueError(
                    "NStepReturn: a sample goes on with another episode after a cut, and has no value there; collect "
                    "whole episodes (EnvTask(episodes=True)), or leave bootstrap=None and let TDObjective add the value"
                )
            after = rollout.get("bootstrap")
            columns["value_target"] = n_step_target(
                reward, rollout[self.bootstrap], discount, self.n, rollout.mask, after
            )
        return rollout.with_step_columns(**columns)
