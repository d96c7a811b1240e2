"""Selection: groups that are neither too easy nor too hard to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regimen.credit.base import Credit
from regimen.credit.group_relative import GroupRelativeAdvantage
from regimen.functions.pass_rate import pass_rate
from regimen.knobs import Knob
from regimen.rollout import Rollout


@dataclass(frozen=True)
class PassRateSelector:
    """A credit of which only the groups are kept whose pass rate lies strictly inside a window.

    The others leave the loss. If that leaves a task of the rollout with nothing to learn from (no step whose advantage
    is not 0), everything leaves it: tasks that depend on each other are learned from together or not at all, and an
    update without samples takes no step, so that no optimiser's averages decay. Source: PasoDoble (arXiv 2511.11881).

    Attributes:
        credit: what gives the advantages, before the selection.
        low, high: the window; 0 and 1 leave out what all answers, or none, have right.
        of: tasks whose groups are selected; those of other tasks are all kept. All tasks by default.
        key: the raw component whose mean over a group is its pass rate.
    """

    credit: Credit = field(default_factory=GroupRelativeAdvantage)
    low: float = 0.2
    high: float = 1.0
    of: Sequence[str] = ()
    key: str = "pass_rate"

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"PassRateSelector: low is {self.low} and high {self.high}; expected low below high")
        if isinstance(self.of, str):
            raise ValueError(f"PassRateSelector: of is the text '{self.of}'; expected a list of tasks")

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """Those of the credit."""
        return self.credit.knobs

    def __call__(self, rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
        """The credited rollout; what is left out has `loss_mask` False and advantages 0.

        Raises:
            ValueError: there is no such component.
        """
        credited = self.credit(rollout, knobs, cast)
        rate = self._rates(rollout)
        selected = (rate > self.low) & (rate < self.high) | ~self._asked(rollout)
        kept = credited.loss_mask & selected[:, None]
        teaching = ((credited.advantages != 0) & kept).any(1)
        if not all(bool(teaching[rollout.task == task].any()) for task in rollout.task.unique().tolist()):
            kept = torch.zeros_like(kept)
        return credited.replace(loss_mask=kept, advantages=credited.advantages * kept)

    def _asked(self, rollout: Rollout) -> Tensor:
        names = [place for place, name in enumerate(rollout.task_names) if not self.of or name in self.of]
        return torch.isin(rollout.task, torch.tensor(names, dtype=torch.int64, device=rollout.task.device))

    def _rates(self, rollout: Rollout) -> Tensor:
        """`[B]`, of each sample's group; NaN, which is in no window, where none of it was scored."""
        values = None if rollout.rewards is None else rollout.rewards.get(self.key, None)
        if values is None:
            there = ", ".join(rollout.rewards.keys()) if rollout.rewards is not None else "none"
            raise ValueError(
                f"PassRateSelector: the rollout has no reward component '{self.key}' (there are: {there}); give the "
                "stage a reward that has it, logged or not"
            )
        scored = values.isfinite()
        _, group = rollout.group.unique(return_inverse=True)
        rates = torch.full((len(rollout),), torch.nan, dtype=values.dtype, device=values.device)
        rates[group[scored].unique()] = pass_rate(values[scored], group[scored])
        return rates[group]
