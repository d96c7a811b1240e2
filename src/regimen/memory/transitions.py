"""Single steps in a ring, with the steps that came next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.fields import STEP_FIELDS
from regimen.functions.returns import on_last_step
from regimen.memory.following import Following
from regimen.memory.ring import Ring, fitted
from regimen.rollout import Rollout

_NEXT = "next_observations"
# An entry of the table: whether a step's trajectory ends with it.
_LAST = "last"


class Transitions:
    """The last `capacity` steps, those of a trajectory side by side; see `ReplayMemory`."""

    def __init__(self, capacity: int, ahead: int = 0) -> None:
        self._ring, self._ahead = Ring(capacity), ahead
        self._following: Following | None = None

    def __len__(self) -> int:
        return len(self._ring)

    def add(self, rollout: Rollout) -> None:
        """Store every step that exists; `ValueError` if they have other fields than those kept."""
        if rollout.get("memory") is not None:
            raise ValueError(
                f"ReplayMemory(unit='transition') was given samples of task {'/'.join(rollout.task_names)} with a "
                "column 'memory': a policy with memory is replayed from a sample's start; use unit='trajectory'"
            )
        rows, after = _as_steps(rollout, self._ring.capacity)
        if self._ring.table is None:
            self._following = None if after is None else Following(self._ring.capacity)
        else:
            _check_same_columns(self._following is not None, after is not None)
            self._ring.table, rows = fitted(self._ring.table, rows)
        slots = self._ring.add(rows)
        if self._following is not None:
            self._following.add(slots, rows.get("observations").squeeze(1), after)

    def draw(self, size: int, rng: torch.Generator) -> TensorDict:
        """`size` steps, uniformly with replacement, with those that came next and the column `age`."""
        return self._at(self._ring.draw(size, rng))

    def last(self, size: int | None) -> TensorDict:
        """The newest steps, the oldest of them first, with those that came next and the column `age`."""
        return self._at(self._ring.last(size))

    def _at(self, first: Tensor) -> TensorDict:
        drawn, slots = self._ring[first], first[:, None]
        if self._ahead:
            exists = self._onward(first)
            # Where a trajectory has ended its last step stands again, and not what another, or none, has left there.
            slots = (slots + exists.cumsum(1) - 1) % self._ring.capacity
            self._widen(drawn, slots, exists)
        if self._following is not None:
            after = self._following.at(slots, self._table.get("observations").squeeze(1))
            drawn.get("step_columns").set(_NEXT, after)
        drawn.get("columns").set("age", self._ring.ages(first))
        return drawn.exclude(_LAST)

    @property
    def _table(self) -> TensorDict:
        assert self._ring.table is not None, "only asked where there are steps"
        return self._ring.table

    def _onward(self, first: Tensor) -> Tensor:
        """Bool `[B, T]`, whether a step and those ahead of it are of one trajectory."""
        ahead = torch.arange(self._ahead, device=first.device)
        over = self._table.get(_LAST)[(first[:, None] + ahead) % self._ring.capacity].squeeze(2)
        return torch.cat([torch.ones_like(first, dtype=torch.bool)[:, None], over.cumsum(1) == 0], 1)

    def _widen(self, drawn: TensorDict, slots: Tensor, exists: Tensor) -> None:
        """Put the steps of the slots `[B, T]` into the place of the first of each row."""

        def wide(value: Any) -> Any:
            return value[slots].squeeze(2)

        for name in (*STEP_FIELDS, "reward"):
            if name in self._table.keys():  # noqa: SIM118
                drawn.set(name, wide(self._table.get(name)))
        if (rewards := self._table.get("rewards", None)) is not None:
            widened = {name: wide(value) if value.ndim > 1 else value[slots[:, 0]] for name, value in rewards.items()}
            drawn.set("rewards", TensorDict(widened, drawn.batch_size, device=drawn.device))
        drawn.set("mask", exists)
        drawn.get("loss_mask")[:, 1:] = False

    def state_dict(self) -> dict[str, Any]:
        """The ring, and what came after its steps."""
        following = None if self._following is None else self._following.state_dict(len(self))
        return {"ring": self._ring.state_dict(), "following": following}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._ring.load_state_dict(state["ring"])
        self._following = None if state["following"] is None else Following(self._ring.capacity)
        if self._following is not None:
            self._following.load_state_dict(state["following"])


def _as_steps(rollout: Rollout, capacity: int) -> tuple[TensorDict, Any]:
    """The last `capacity` steps that exist, `[R, 1]`, as they are kept; and what was observed after them `[R, ...]`."""
    if rollout.reward is not None and rollout.reward.ndim == 1:
        rollout = rollout.replace(reward=on_last_step(rollout.reward, rollout.mask))
    row = rollout.mask.nonzero()[:, 0]
    # A rollout of single steps is unrolled already.
    steps = rollout.data.exclude(_LAST) if rollout.mask.numel() == len(row) == len(rollout) else rollout.unrolled().data
    steps.set(_LAST, torch.cat([row[1:] != row[:-1], row.new_ones(1, dtype=torch.bool)])[:, None])
    steps = steps if len(steps) <= capacity else steps[-capacity:]
    columns = steps.get("step_columns")
    after = columns.get(_NEXT, None)
    return steps.set("step_columns", columns.exclude(_NEXT)), None if after is None else after.squeeze(1)


def _check_same_columns(kept: bool, given: bool) -> None:
    if kept != given:
        raise ValueError(
            f"the memory and a new rollout cannot be joined: only {'the first' if kept else 'the second'} has "
            f"step_columns/{_NEXT}; give both the same columns"
        )
