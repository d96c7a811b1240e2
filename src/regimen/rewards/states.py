"""The states that a rollout visits: where episodes begin, and which rows are whose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regimen.models.torsos import Observations
from regimen.rollout import Rollout


@dataclass(frozen=True)
class Visits:
    """The states that a rollout visits: at every step the state that it led to, and each episode's first one.

    Attributes:
        starts: bool `[B, T]`, existing steps that begin an episode.
        exists: bool `[B, T, 2]`, the slots of the start state and of the state after the step.
        states: `[R, ...]`, the start states, then the states after the steps, each in row order.
    """

    starts: Tensor
    exists: Tensor
    states: Observations

    @classmethod
    def of(cls, rollout: Rollout) -> Visits:
        """The visits of a rollout with `observations` and the columns `next_observations` and `start`.

        Without a column `start`, every sample is an episode of its own.

        Raises:
            KeyError: there is no column `next_observations`.
        """
        starts, mask, after = starts_of(rollout), rollout.mask, rollout["next_observations"]
        states = torch.cat([rollout.observations[starts], after[mask]])
        return cls(starts, torch.stack([starts, mask], 2), states)

    def spread(self, values: Tensor) -> Tensor:
        """What was found of each state `[R, ...]` in its slot, `[B, T, 2, ...]`; 0 in slots without one."""
        slots = values.new_zeros(*self.exists.shape, *values.shape[1:])
        begun = int(self.starts.sum())
        slots[:, :, 0][self.starts], slots[:, :, 1][self.exists[:, :, 1]] = values[:begun], values[begun:]
        return slots


def starts_of(rollout: Rollout) -> Tensor:
    """Bool `[B, T]`: existing steps that begin an episode, by the column `start`, or each sample's first."""
    start: Tensor | None = rollout.get("start")
    if start is None:
        start = rollout.mask.cumsum(1) == 1
    return start & rollout.mask


@dataclass(frozen=True)
class Stretch:
    """What copies of a task's environment went through side by side.

    Attributes:
        task: its name.
        copies: int64 `[N]`, which copies, ascending.
        rows: int64 `[N]`, the rollout's row of each.
    """

    task: str
    copies: Tensor
    rows: Tensor


def stretches(rollout: Rollout) -> Iterator[Stretch]:
    """A rollout in the order of time: task by task, and within a task stretch after stretch of its copies.

    The column `copy` (int64 `[B]`, as an `EnvTask` writes it) tells whose a row is; several rows of one copy follow
    each other. Without it, the n-th row of a task is copy n.
    """
    for index, task in enumerate(rollout.task_names):
        rows = (rollout.task == index).nonzero().flatten()
        column = rollout.get("copy")
        copy = torch.arange(len(rows), device=rows.device) if column is None else column[rows]
        turn = earlier(copy)
        for number in range(int(turn.max()) + 1 if len(rows) else 0):
            copies, order = copy[turn == number].sort()
            yield Stretch(task, copies, rows[turn == number][order])


def earlier(values: Tensor) -> Tensor:
    """How many equal values stand before each, int64 `[R]`."""
    ordered, order = values.sort(stable=True)
    rank = torch.arange(len(values), device=values.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter(0, order, rank)


@torch.no_grad()
def features_of(cast: Mapping[str, Any], member: str, states: Observations, owner: str) -> Tensor:
    """What a member of the cast makes of states `[R, ...]`: float32 `[R, D]`, without a gradient.

    Raises:
        ValueError: there is no such member, or its features have another shape, or are not finite.
    """
    if member not in cast:
        raise ValueError(
            f"{owner} needs the member '{member}', which the cast lacks (it has: {', '.join(cast)}); add it, or name "
            "another"
        )
    features: Tensor = cast[member](states)
    if features.ndim != 2 or len(features) != len(states):
        raise ValueError(
            f"{owner}: member '{member}' gave features of shape {list(features.shape)} for {len(states)} states, "
            f"expected [{len(states)}, D]"
        )
    if not bool(features.isfinite().all()):
        raise ValueError(
            f"{owner}: member '{member}' gave features that are NaN or infinite, expected finite numbers; look at its "
            "learning rate and at the observations"
        )
    return features.float()
