"""The weight of entropy in soft actor-critic, as a weight that is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regimen.rollout import Rollout


class Temperature(nn.Module):
    """`alpha > 0`, one for all tasks or one for each."""

    def __init__(self, initial: float = 1.0, tasks: Sequence[str] = ()) -> None:
        """Make it.

        Args:
            initial: value at the start.
            tasks: names of the tasks that have one each; by default all share one.

        Raises:
            ValueError: `initial` is not above 0.
        """
        super().__init__()
        if not initial > 0:
            raise ValueError(f"Temperature: initial is {initial}, expected above 0")
        self.tasks = tuple(tasks)
        self.log = nn.Parameter(torch.full((max(len(self.tasks), 1),), math.log(initial)))

    def log_of(self, rollout: Rollout) -> Tensor:
        """`log alpha` of each sample, `[B]`; `ValueError` for a task without one."""
        if not self.tasks:
            return self.log.expand(len(rollout))
        if absent := [name for name in rollout.task_names if name not in self.tasks]:
            raise ValueError(f"Temperature has one for each of {', '.join(self.tasks)}, none for {', '.join(absent)}")
        index = torch.tensor([self.tasks.index(name) for name in rollout.task_names], device=self.log.device)
        return self.log[index[rollout.task]]

    def forward(self, rollout: Rollout) -> Tensor:
        """`alpha` of each sample, `[B]`."""
        return self.log_of(rollout).exp()
