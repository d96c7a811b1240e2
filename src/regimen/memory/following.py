"""What was observed after each step, without keeping it twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.memory.ring import Ring

Observed: TypeAlias = Tensor | TensorDict


class Following:
    """The observations after the steps in a ring's slots, kept only where the next slot does not show them.

    Of each slot it holds a number: -1 if the next slot shows what came after, else the row in a ring of the others,
    which grows as it must and has forgotten no step that is still there, because rows and steps grow old together.
    """

    def __init__(self, capacity: int) -> None:
        self._row = torch.full((capacity,), -1)
        self._others, self._first = Ring(1), 0

    def add(self, slots: Tensor, seen: Observed, after: Observed) -> None:
        """Take in what was seen in steps that now lie in some slots, side by side, and after them; `[R, ...]` each."""
        shown = torch.cat([_equal(after[:-1], seen[1:]), torch.zeros_like(slots[:1], dtype=torch.bool)])
        others = TensorDict({"observations": after[~shown]}, [int((~shown).sum())], device=slots.device)
        row = self._row.to(slots.device)
        self._first = max(self._first, int(row[slots].max()) + 1)
        needed = self._others.count - self._first + len(others)
        if needed > self._others.capacity:
            self._others.grow(2 * needed)
        row[slots] = torch.where(shown, -1, self._others.count + (~shown).cumsum(0) - 1)
        self._others.add(others)
        self._row = row

    def at(self, slots: Tensor, seen: Observed) -> Observed:
        """What came after the steps in some slots, if `seen [capacity, ...]` was observed in the steps themselves."""
        assert self._others.table is not None, "only asked where there are steps"
        row = self._row[slots]
        other = self._others.table.get("observations")[row.clamp(min=0) % self._others.capacity]
        return _where(row < 0, seen[(slots + 1) % len(self._row)], other)

    def state_dict(self, filled: int) -> dict[str, Any]:
        """The rows of the slots that are filled, and the others."""
        return {"row": self._row[:filled], "others": self._others.state_dict(), "first": self._first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._row = torch.full_like(self._row, -1)
        self._row[: len(state["row"])] = state["row"]
        self._others.load_state_dict(state["others"])
        self._first = int(state["first"])


def _equal(a: Observed, b: Observed) -> Tensor:
    """Bool `[R]`, rows that are the same in every number."""
    if isinstance(a, TensorDict):
        parts = [_equal(value, cast(TensorDict, b).get(name)) for name, value in a.items()]
        return torch.stack(parts).all(0)
    same = cast(Tensor, a == b)
    return same if same.ndim == 1 else same.flatten(1).all(1)


def _where(condition: Tensor, a: Observed, b: Observed) -> Observed:
    if isinstance(a, TensorDict):
        return a.apply(lambda x, y: _where(condition, x, y), b)
    return torch.where(condition.view(*condition.shape, *[1] * (a.ndim - condition.ndim)), a, cast(Tensor, b))
