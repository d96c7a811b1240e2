"""A condition that a policy is told: whom it is to please."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation, Task
from regimen.tasks.preferences import pairs_of

DrawCondition = Callable[[Mapping[str, Any], int, torch.Generator], Tensor]
"""The cast, a number of samples and a random stream to conditions `[B, Z]`."""


class Conditioned:
    """A data set whose every sample gets a condition, drawn anew each time: offline data, relabelled as it is read.

    Observations, and the step column `next_observations`, become tables with the entries `state`, what they were, and
    `condition [B, T, Z]`; the column `condition [B, Z]` tells judges.
    """

    def __init__(self, task: Task, draw: DrawCondition) -> None:
        """Condition a task.

        Args:
            task: it reads data, with tensors for observations.
            draw: what draws conditions, such as `StoredUsers`.

        Raises:
            ValueError: the task generates, so that its policy would have acted before it was told.
        """
        if task.generates:
            raise ValueError(
                f"Conditioned: task '{task.name}' generates its samples, before a condition could be shown; give a "
                "task that reads data, or put the condition among the contexts that the policy is given"
            )
        self.task, self.draw = task, draw
        self.name, self.group_size, self.generates = task.name, task.group_size, False

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """Those of the task."""
        return self.task.knobs

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size` samples, each with a condition.

        Raises:
            ValueError: the samples hold no observations.
        """
        rollout = self.task.collect(cast, knobs, rng, size)
        if rollout.observations is None:
            raise ValueError(f"Conditioned: samples of task '{self.name}' hold no observations to add a condition to")
        condition = self.draw(cast, size, rng)
        shown = _shown(rollout.observations, condition)
        rollout = rollout.replace(observations=shown).with_columns(condition=condition)
        after = rollout.get("next_observations")
        return rollout if after is None else rollout.with_step_columns(next_observations=_shown(after, condition))

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """That of the task."""
        return self.task.evaluate(cast, knobs, rng)

    def state_dict(self) -> dict[str, Any]:
        """That of the task."""
        return self.task.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.task.load_state_dict(state)


def _shown(observations: Tensor, condition: Tensor) -> TensorDict:
    wide = condition[:, None].expand(-1, observations.shape[1], -1)
    return TensorDict({"state": observations, "condition": wide}, batch_size=observations.shape[:2])


class StoredUsers:
    """Draws latents from the posteriors of users in store, drawn at random."""

    def __init__(self, rows: TensorDict, member: str = "reward_model") -> None:
        """`rows` are those of `preference_rows`; `member` is the `LatentReward` that knows them."""
        self.rows, self.member = rows, member

    @torch.no_grad()
    def __call__(self, cast: Mapping[str, Any], count: int, rng: torch.Generator) -> Tensor:
        """`[count, Z]`."""
        index = torch.randint(len(self.rows), (count,), generator=rng, device=rng.device).cpu()
        latents: Tensor = cast[self.member].infer(pairs_of(self.rows[index].to(rng.device))).sample(rng)
        return latents
